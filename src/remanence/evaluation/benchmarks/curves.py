"""How far back a memory reaches, and how far beyond its training what it learned still holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from remanence.catalogue import card
from remanence.evaluation.benchmarks.tasks import Batch, Parity, Recall, Task


@dataclass(frozen=True)
class Lags(Task):
    """A string of letters, then questions in random order: which letter stood n places before its end?

    Letters are tokens below `symbols`, the question for `LAGS[i]` is token `symbols + i`. `only` asks for one lag; the
    others are still put, so that the questions stand in the same place.

    Source: the memory curve of Jaeger 2002, "Short term memory in echo state networks", GMD Report 152, as accuracy at
        each lag of one trained model.
    """

    length: int = 32
    symbols: int = 8
    only: int | None = None

    @property
    def lags(self) -> list[int]:
        """1, 2, 4, ... up to the length."""
        return [2**i for i in range(self.length.bit_length()) if 2**i <= self.length]

    @property
    def vocabulary(self) -> int:
        return self.symbols + len(self.lags)

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        letters = torch.randint(self.symbols, (batch, self.length), generator=generator)
        order = torch.rand(batch, len(self.lags), generator=generator).argsort(1)
        lag = torch.tensor(self.lags)[order]
        inputs = torch.cat([letters, self.symbols + order], 1)
        targets, mask = torch.zeros_like(inputs), torch.zeros(inputs.shape, dtype=torch.bool)
        targets[:, self.length :] = letters.gather(1, self.length - lag)
        mask[:, self.length :] = torch.ones_like(lag, dtype=torch.bool) if self.only is None else lag == self.only
        return Batch(inputs, targets, mask)

    def longer(self) -> Lags:
        return replace(self, length=2 * self.length)

    @property
    def exams(self) -> Mapping[str, Task]:
        return {f"lag {n}": replace(self, only=n) for n in self.lags}


@dataclass(frozen=True)
class Stretched(Task):
    """Another task, examined at its own length, twice that, four times, and so on."""

    task: Task
    doublings: int = 3

    @property
    def vocabulary(self) -> int:
        return self.task.vocabulary

    @property
    def chance(self) -> float:
        return self.task.chance

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        drawn = self.task.draw(batch, generator)
        assert isinstance(drawn, Batch)
        return drawn

    def longer(self) -> Stretched:
        return Stretched(self.task.longer(), self.doublings)

    @property
    def exams(self) -> Mapping[str, Task]:
        exams, task = {"×1": self.task}, self.task
        for i in range(self.doublings):
            task = task.longer()
            exams[f"×{2 ** (i + 1)}"] = task
        return exams


@card(
    "memory-curve",
    kind="benchmark",
    says="Which letter stood n places back: accuracy at each lag.",
    source="Jaeger, Short term memory in echo state networks, GMD Report 152 (2002)",
    covers="copying",
)
def memory_curve(length: int = 16, symbols: int = 4) -> dict[str, Task]:
    return {"memory-curve": Lags(length, symbols)}


@card(
    "length-extrapolation",
    kind="benchmark",
    says="Parity and recall, learned at one length and asked at twice, four and eight times that.",
    source="arXiv:2404.08819",
    covers="state-tracking",
)
def length_extrapolation(length: int = 16, pairs: int = 4, symbols: int = 8, doublings: int = 3) -> dict[str, Task]:
    return {
        "parity": Stretched(Parity(length), doublings),
        "mqar": Stretched(Recall(pairs, length, symbols), doublings),
    }
