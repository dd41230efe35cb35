"""With what state a training sequence begins: an empty one is not what long streams will meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from remanence.catalogue import card
from remanence.continual.base import Batch
from remanence.errors import CheckpointError, unknown
from remanence.learning.learner import Learner, Outcome
from remanence.state import State, detach, flatten, select, tree_map, unflatten

POLICIES = ("zero", "noise", "fitted-noise", "state-passing", "tbptt")


@card(
    "length-generalization",
    kind="tool",
    says="Begins training sequences with states that long texts lead to, so that models read on where they failed.",
    source="arXiv:2507.02782",
)
class InitialStates:
    """Draws the states that the next batch of sequences begins with.

    `zero`: empty. `noise`: normal numbers. `fitted-noise`: normal numbers with the mean and deviation that final states
    have had, per layer and head. `state-passing`: final states of the last batch, dealt to other rows, so that they
    come from other sequences. `tbptt`: each row's own final state, for batches that continue their rows. None passes a
    gradient. Positions, flags and other entries that are not floating-point numbers begin as in an empty state, and are
    passed on with the rest where states are.

    A few hundred steps of this, at the end of training, are enough in the paper (2k -> 128k tokens).

    Args:
        policy: one of those.
        std: deviation of `noise`, ≥ 0.
        zero_share: rows that begin empty nevertheless, so that beginnings stay known; in [0, 1] (not for `tbptt`).
        momentum: weight of each batch in the running moments of `fitted-noise`, in (0, 1].
        seed: of all draws.

    Raises: `UnknownName` for another policy; `ValueError` for numbers out of range.
    Source: Understanding and Improving Length Generalization in Recurrent Models (2025), arXiv:2507.02782; the share
        of empty beginnings is not given there.

    >>> starts = InitialStates("state-passing")
    >>> # for batch in batches: starts.observe(learner, batch)
    """

    def __init__(
        self,
        policy: str = "state-passing",
        *,
        std: float = 1.0,
        zero_share: float = 0.1,
        momentum: float = 0.1,
        seed: int = 0,
    ):
        if policy not in POLICIES:
            raise unknown("policy for initial states", policy, POLICIES)
        if not std >= 0 or not 0 <= zero_share <= 1 or not 0 < momentum <= 1:
            given = f"std={std}, zero_share={zero_share}, momentum={momentum}"
            raise ValueError(f"InitialStates: std ≥ 0, zero_share in [0, 1], momentum in (0, 1], got {given}.")
        self.policy, self.std, self.zero_share, self.momentum = policy, std, zero_share, momentum
        self.generator = torch.Generator().manual_seed(seed)
        self.moments: State = {}

    def draw(self, empty: State, final: State | None) -> State:
        """The states to begin with.

        Args:
            empty: `model.initial_state(rows)`.
            final: those that the last batch left, of as many rows or others; None before the first.
        """
        rows = next(iter(flatten(empty).values())).shape[0]
        if final is not None:
            final = detach(final)
        if self.policy == "fitted-noise" and final is not None:
            self._fit(final)
        if self.policy == "noise":
            begin = tree_map(lambda t: self._normal(t) * self.std if t.is_floating_point() else t, empty)
        elif self.policy == "fitted-noise" and self.moments:
            begin = tree_map(self._like, empty, self.moments["mean"], self.moments["square"])
        elif self.policy == "state-passing" and final is not None:
            begin = select(final, self._deal(next(iter(flatten(final).values())).shape[0], rows))
        elif self.policy == "tbptt" and final is not None:
            return final
        else:
            return empty
        blank = torch.rand(rows, generator=self.generator) < self.zero_share
        return tree_map(lambda t, e: torch.where(blank.to(t.device).view(-1, *[1] * (t.ndim - 1)), e, t), begin, empty)

    def observe(self, learner: Learner, batch: Tensor | Batch) -> Outcome:
        """`learner.observe(batch)` for a batch of fresh sequences, from states that are drawn.

        With `tbptt` the batch's rows go on where the last ended, as the learner does by itself.
        """
        inputs = batch if isinstance(batch, Tensor) else batch.inputs
        rows = inputs.shape[0] if isinstance(batch, Tensor) else batch.fresh
        empty = learner.model.initial_state(rows)  # type: ignore[operator]
        learner.state = self.draw(empty, learner.state)
        if self.policy != "tbptt":
            learner.last = None
        return learner.observe(batch)

    def state_dict(self) -> dict[str, Any]:
        """All that resumption needs: the draws to come, and the running moments."""
        return {
            "policy": self.policy,
            "generator": self.generator.get_state(),
            "moments": {name: t.clone() for name, t in flatten(self.moments).items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises: `CheckpointError` for another policy's."""
        if state["policy"] != self.policy:
            raise CheckpointError(f"These are the initial states of {state['policy']!r}, not of {self.policy!r}.")
        self.generator.set_state(state["generator"])
        self.moments = unflatten(dict(state["moments"]))

    def _normal(self, t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=self.generator, dtype=t.dtype).to(t.device)

    def _like(self, empty: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        if not empty.is_floating_point():
            return empty
        return mean[:1] + self._normal(empty) * (square - mean.square()).clamp(min=0).sqrt()[:1]

    def _fit(self, final: State) -> None:
        """Running moments over rows and all but the second axis, which is heads, or the features of a vector."""
        now = {
            "mean": tree_map(lambda t: _per_head(t, 1), final),
            "square": tree_map(lambda t: _per_head(t, 2), final),
        }
        known = self.moments or now
        self.moments = tree_map(lambda old, new: old + self.momentum * (new - old), known, now)

    def _deal(self, have: int, want: int) -> list[int]:
        """Rows for rows: no row goes to itself, if there are two or more."""
        order = torch.randperm(have, generator=self.generator).tolist()
        to = {row: order[(i + 1) % have] for i, row in enumerate(order)}
        return [to[row % have] for row in range(want)]


def _per_head(t: Tensor, power: int) -> Tensor:
    if not t.is_floating_point():
        return t.new_zeros(1, dtype=torch.float32)
    axes = [0, *range(2, t.ndim)]
    return t.pow(power).mean(axes, keepdim=True) if t.numel() else t.new_zeros(1, *[1] * (t.ndim - 1))
