"""The interface of strategies against forgetting.

A strategy says only what it changes, through a few optional methods whose defaults do nothing; an
ordered list of strategies is a strategy. What each method may change is one term of the common view

    L(θ) = data loss over collected rows + Σ loss terms;   g ← transform_grad(∇L);   θ ← after_step(optimizer(θ, g))

with `consolidate` at boundaries and `predict` in the place of the model's own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """What a learner observes at once.

    Shapes: `inputs` [rows, ...] (for sequence models [rows, time]), `targets` likewise.
    `fresh` counts the rows of the stream itself, which come first; the rest were added by `collect`.
    `task` is the label of the domain or task, where it is known.
    """

    inputs: Tensor
    targets: Tensor
    fresh: int
    task: str | int | None = None

    def extended(self, inputs: Tensor, targets: Tensor) -> Batch:
        """The same batch with further rows behind its own."""
        return replace(self, inputs=torch.cat([self.inputs, inputs]), targets=torch.cat([self.targets, targets]))


@dataclass(frozen=True)
class Context:
    """What a loss term may look at: the model, the batch, and what the model said to it."""

    model: nn.Module
    batch: Batch
    outputs: Tensor
    loss: Tensor


class Strategy:
    """What one method changes of a learning step; every hook is optional.

    `needs` declares what the method cannot work without, from: `task_id_train`, `task_id_test`,
    `boundaries`, `pretrained`, `features`. A learner refuses a strategy whose needs its stream cannot meet.
    """

    needs: frozenset[str] = frozenset()

    def attach(self, model: nn.Module) -> None:
        """Called once, before the first batch: the place to add or wrap parameters."""

    def on_boundary(self, task: str | int | None) -> None:
        """A task, session or domain called `task` has ended."""

    def collect(self, batch: Batch) -> Batch:
        """Mix stored samples into the batch, and store from it."""
        return batch

    def loss(self, context: Context) -> Tensor | None:
        """A scalar to add to the data loss, in its units; None for nothing."""
        return None

    def transform_grad(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Alter `.grad` in place, before the optimiser sees it."""

    def after_step(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Alter parameters in place, after the optimiser: masks and projections of the final update."""

    def consolidate(self, batches: Iterable[Batch]) -> None:
        """Digest what was learned, given batches of it."""

    def predict(self, forward: Callable[[Tensor], Tensor], x: Tensor, task: str | int | None = None) -> Tensor:
        """Outputs for `x`, where the method routes, retrieves or corrects; the model's own by default."""
        return forward(x)

    def state_dict(self) -> dict[str, Any]:
        """All that resumption needs: tensors (by name) and plain numbers or strings."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""

    def state_bytes(self) -> int:
        """Bytes kept of the past: exemplars, references, statistics."""
        return sum(v.numel() * v.element_size() for v in self.state_dict().values() if isinstance(v, Tensor))


class Strategies(Strategy):
    """Several strategies in order; each hook runs through all of them."""

    def __init__(self, members: Iterable[Strategy] = ()):
        self.members = list(members)
        self.needs = frozenset().union(*(s.needs for s in self.members))

    def attach(self, model: nn.Module) -> None:
        for s in self.members:
            s.attach(model)

    def on_boundary(self, task: str | int | None) -> None:
        for s in self.members:
            s.on_boundary(task)

    def collect(self, batch: Batch) -> Batch:
        for s in self.members:
            batch = s.collect(batch)
        return batch

    def loss(self, context: Context) -> Tensor | None:
        terms = [term for s in self.members if (term := s.loss(context)) is not None]
        return torch.stack(terms).sum() if terms else None

    def transform_grad(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for s in self.members:
            s.transform_grad(parameters)

    def after_step(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for s in self.members:
            s.after_step(parameters)

    def consolidate(self, batches: Iterable[Batch]) -> None:
        batches = list(batches)
        for s in self.members:
            s.consolidate(batches)

    def predict(self, forward: Callable[[Tensor], Tensor], x: Tensor, task: str | int | None = None) -> Tensor:
        for s in self.members:
            forward = _routed(s, forward, task)
        return forward(x)

    def state_dict(self) -> dict[str, Any]:
        return {f"{i}.{name}": value for i, s in enumerate(self.members) for name, value in s.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for i, s in enumerate(self.members):
            prefix = f"{i}."
            s.load_state_dict({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})

    def state_bytes(self) -> int:
        return sum(s.state_bytes() for s in self.members)


def _routed(
    strategy: Strategy, forward: Callable[[Tensor], Tensor], task: str | int | None
) -> Callable[[Tensor], Tensor]:
    return lambda x: strategy.predict(forward, x, task)
