"""Hope: a memory that learns while it reads, followed by mixers that learn at many paces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from remanence.catalogue import card
from remanence.memory.attention import WindowAttention
from remanence.memory.base import Memory
from remanence.memory.continuum import ContinuumMemory
from remanence.memory.self_modifying import SOURCE, SelfModifyingTitans
from remanence.state import State


@card(
    "hope",
    covers="nested-learning",
    kind="memory",
    says="Self-modifying Titans, then a continuum memory: learning at every token, and at every pace above.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "expand": 2, "chunk_size": 3, "maker_chunk_size": 4, "periods": (1, 2)},
)
class Hope(Memory):
    r"""$y = \mathrm{CMS}(x + \mathrm{reader}(x))$: within the sequence the reader learns, across it the levels do.

    Give the model's parameters to `remanence.optim.clocked`, which finds the levels' periods.

    Args:
        dim: features of input and output; a multiple of `heads`.
        periods: of the levels, in optimiser steps.
        nested: whether each level's update restarts the quicker one before it.
        reader: further arguments of `SelfModifyingTitans`.

    Shapes: x and y [batch, time, dim]; the state is the reader's.
    Raises: as `SelfModifyingTitans` and `ContinuumMemory` do.
    Source: Nested Learning (2025), arXiv:2512.24695.
    """

    def __init__(self, dim: int, *, periods: Sequence[int] = (1, 4, 16), nested: bool = False, **reader: Any):
        super().__init__()
        self.dim = dim
        self.reader = self.make_reader(dim, **reader)
        self.continuum = ContinuumMemory(dim, periods, nested=nested)

    def make_reader(self, dim: int, **arguments: Any) -> Memory:
        """The memory that reads the sequence."""
        return SelfModifyingTitans(dim, **arguments)

    def initial_state(self, batch: int) -> State:
        return self.reader.initial_state(batch)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, state = self.reader(x, self.begin(x, state))
        return self.continuum(x + y), state


@card(
    "hope-attention",
    covers="nested-learning",
    kind="memory",
    says="Windowed attention, then a continuum memory.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "window": 5, "periods": (1, 2)},
)
class HopeAttention(Hope):
    """Hope whose reader is softmax attention, here over a window, so that its state stays constant.

    Args: as `Hope`, with further arguments of `WindowAttention`.
    Shapes, errors, source: as `Hope`.
    """

    def make_reader(self, dim: int, **arguments: Any) -> Memory:
        return WindowAttention(dim, **arguments)
