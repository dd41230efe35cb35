"""Learning-rate schedules for streams without an end: pure functions of the step.

Each maps a step (0, 1, 2, ...) to a multiplier of the optimiser's rate in (0, 1]. A schedule is its arguments
and nothing else: `dataclasses.asdict` saves it whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from remanence.catalogue import card


@dataclass(frozen=True)
class EndlessSchedule:
    """Linear warm-up, then decay like one over the square root of the step, to a floor above zero.

    Args:
        warmup: steps in which the rate rises to 1; 0 for none.
        scale: steps after the warm-up in which the rate falls to 1/√2.
        floor: the lowest multiplier, in (0, 1]; what is left to learn new domains with.

    Raises: `ValueError` for arguments out of range.
    """

    warmup: int = 100
    scale: int = 1000
    floor: float = 0.1

    def __post_init__(self) -> None:
        _at_least("warmup", self.warmup, 0)
        _at_least("scale", self.scale, 1)
        _share("floor", self.floor)

    def __call__(self, step: int) -> float:
        """The multiplier at `step` ≥ 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return max(self.floor, 1 / math.sqrt(1 + (step - self.warmup) / self.scale))


@card(
    "infinite-lr",
    kind="optimizer",
    says="Warms up once, cools down to a constant rate kept for ever, and anneals only on demand.",
    source="arXiv:2503.02844",
    small={"warmup": 3, "cooldown": 5},
)
@dataclass(frozen=True)
class InfiniteSchedule:
    """The infinite learning-rate schedule (Singh et al. 2025), as multipliers of the largest rate.

    Warm-up: linear to 1. Cool-down, with u from 0 to 1: `"cosine"`, c + (1 − c)(1 + cos πu)/2, or
    `"inverse-sqrt"`, 1 + (c − 1) f(u)/f(1) with f(u) = 1/√(1 + 10u) − 1. Then the constant c: later domains
    are learned at c, without warming up again. To ship a model, take a checkpoint of the constant phase and
    train a copy under `annealed(step, steps)`, which falls exponentially to `minimum`; go on from the
    checkpoint, not from the annealed copy.

    Args:
        warmup, cooldown: the lengths of the two phases, in steps (the paper: 5% and 10% of the first domain;
            its code reads the cool-down as an end point, here it is a length).
        constant: c, in (0, 1]. Too high a value is warming up again.
        shape: of the cool-down.
        minimum: where annealing ends, in (0, constant].
        anneal_at, anneal_steps: set by `annealed`.

    Raises: `ValueError` for arguments out of range, also for annealing before the constant phase.
    """

    warmup: int = 100
    cooldown: int = 200
    constant: float = 0.3
    shape: Literal["cosine", "inverse-sqrt"] = "cosine"
    minimum: float = 0.01
    anneal_at: int | None = None
    anneal_steps: int = 0

    def __post_init__(self) -> None:
        _at_least("warmup", self.warmup, 0)
        _at_least("cooldown", self.cooldown, 0)
        _share("constant", self.constant)
        if self.shape not in ("cosine", "inverse-sqrt"):
            raise ValueError(f"shape must be 'cosine' or 'inverse-sqrt', got {self.shape!r}.")
        if not 0 < self.minimum <= self.constant:
            raise ValueError(f"minimum must be above 0 and at most constant={self.constant}, got {self.minimum}.")
        if self.anneal_at is not None:
            _at_least("anneal_at", self.anneal_at, self.warmup + self.cooldown)
            _at_least("anneal_steps", self.anneal_steps, 1)

    def annealed(self, step: int, steps: int) -> InfiniteSchedule:
        """This schedule until `step`, then an exponential fall to `minimum` within `steps`."""
        return replace(self, anneal_at=step, anneal_steps=steps)

    def __call__(self, step: int) -> float:
        """The multiplier at `step` ≥ 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if step < self.warmup + self.cooldown:
            return self._cooling((step - self.warmup) / self.cooldown)
        if self.anneal_at is None or step < self.anneal_at:
            return self.constant
        v = min(1.0, (step - self.anneal_at) / self.anneal_steps)
        return self.constant * (self.minimum / self.constant) ** v

    def _cooling(self, u: float) -> float:
        if self.shape == "cosine":
            return self.constant + (1 - self.constant) * (1 + math.cos(math.pi * u)) / 2
        return 1 + (self.constant - 1) * _inverse_sqrt(u) / _inverse_sqrt(1.0)


def _inverse_sqrt(u: float) -> float:
    return 1 / math.sqrt(1 + 10 * u) - 1


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least} steps, got {value}.")


def _share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}.")
