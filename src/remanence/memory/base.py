"""The interface that every memory obeys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from remanence.errors import expect
from remanence.state import Form, State, check_state, concat, fits, form, select


class Memory(nn.Module):
    """A layer that carries a state along a sequence.

    Shapes: `x` and `y` are [batch, time, dim], any time ≥ 0. The state is a nested dictionary of tensors
    whose first axis is the batch; None stands for `initial_state(batch)`.

    A subclass sets `self.dim` and writes `initial_state` and `forward`. It obeys the law of resumption
    (any cut gives the same outputs, final state and gradients), never alters the state that it was
    given, and keeps its state's size constant unless its card exempts it, with a reason.
    """

    dim: int
    _form: Form | None = None  # of the initial state: decoding need not build one for each token

    def initial_state(self, batch: int) -> State:
        """The state before anything was read: `batch` independent rows."""
        raise TypeError(f"{type(self).__name__} must define initial_state.")

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        raise TypeError(f"{type(self).__name__} must define forward.")

    def begin(self, x: Tensor, state: State | None) -> State:
        """Check `x` and the given state, and supply the initial one where none was given."""
        like, shape = self._form, x.shape
        fit = like is not None and len(shape) == 3 and shape[2] == self.dim
        if fit and state is not None and fits(state, like, shape[0]):  # type: ignore[arg-type]
            return state
        name = type(self).__name__
        expect(name, "x", x, "batch time dim", dim=self.dim, hint="One token per row? Pass x[:, None].")
        fresh = self.initial_state(x.shape[0])
        self._form = form(fresh)
        if state is None:
            return fresh
        check_state(name, state, fresh)
        return state

    def level(self, states: Sequence[State]) -> Sequence[State]:
        """Several states in one form, as `concat` needs them: a memory that grows fills up the shorter ones."""
        return states


def ragged(memory: Memory, x: Tensor, lengths: list[int], state: State | None = None) -> tuple[Tensor, State]:
    """Run a memory over right-padded rows: padding leaves the state as it was, and reads as zeros.

    Rows of equal length run together. Shapes: x [batch, time, dim]; `lengths` one count of real tokens per row.
    """
    if len(lengths) != x.shape[0] or any(not 0 <= n <= x.shape[1] for n in lengths):
        raise ValueError(f"ragged: lengths must be {x.shape[0]} counts from 0 to {x.shape[1]}, got {lengths}.")
    state = memory.begin(x, state)
    y = x.new_zeros(x.shape)
    pieces: list[State] = []
    order: list[int] = []
    for n in sorted(set(lengths)):
        rows = [i for i, length in enumerate(lengths) if length == n]
        out, after = memory(x[rows, :n], select(state, rows))
        y = y.index_put((torch.tensor(rows)[:, None], torch.arange(n)[None]), out)
        pieces.append(after)
        order += rows
    return y, select(concat(memory.level(pieces)), torch.tensor(order).argsort())
