"""minGRU and minLSTM: gated cells whose gates see only the input, so that they train by scan."""

from __future__ import annotations

from torch import Tensor

from remanence import ops
from remanence.catalogue import card
from remanence.errors import unknown
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import project, wide, zeros
from remanence.ops import dispatch, layer_steps, min_cell, steps, taps
from remanence.ops.min_cell import positive
from remanence.state import State


class MinGRU(Memory):
    r"""$h_t = (1 - z_t) ⊙ h_{t-1} + z_t ⊙ g(W_h x_t)$ with $z_t = σ(W_z x_t)$ and $g$ = `positive`.

    Args:
        dim: features of input and output.
        expand: the state has `expand * dim` features; the papers use 1 to 3.
        start: what an empty state holds in every feature. ½ is g(0), the papers' choice; 0 reads as nothing.

    Shapes: x and y [batch, time, dim]; state {"h": [batch, expand·dim]}.
    Raises: `ValueError` on an empty or negative expansion; `ShapeError`, `StateError` from `forward`.
    Source: Were RNNs All We Needed? (2024), arXiv:2410.01201.
    """

    gates = 1

    def __init__(self, dim: int, *, expand: float = 1, start: float = 0.5):
        super().__init__()
        if int(expand * dim) < 1:
            raise ValueError(f"{type(self).__name__}: expand·dim must be at least 1, got {expand}·{dim}.")
        self.dim, self.width, self.start = dim, int(expand * dim), start
        self.inward = Linear(dim, (self.gates + 1) * self.width)
        self.out = Linear(self.width, dim, bias=False)

    def initial_state(self, batch: int) -> State:
        return {"h": zeros(self.out.weight, batch, self.width) + self.start}

    def shares(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithms of what is kept and of what is written; their exponentials sum to 1."""
        return min_cell.shares(gate, self.gates)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        z = wide(project(self.inward, x))
        if x.shape[1] == 1 and steps.worth(z, x, state["h"]):
            h = layer_steps.min_gru(z, self.gates, state["h"])
            return project(self.out, h.unsqueeze(1)), {"h": h}
        if x.shape[1] > 1 and dispatch.compiled(z) and not taps.watched():
            h = min_cell.min_cell(z, self.gates, state["h"].to(z.dtype))
            return self.out(h.to(x.dtype)), {"h": h[:, -1]}
        gate, candidate = z.split([self.gates * self.width, self.width], dim=-1)
        keep, write = self.shares(gate)
        h, state = ops.scan(keep, write.exp() * positive(candidate), state)
        return self.out(h.to(x.dtype)), state


@card(
    "min-lstm",
    kind="memory",
    says="An LSTM whose gates see only the input, normalised to sum to one.",
    source="arXiv:2410.01201",
    small={"dim": 6, "expand": 1.5},
    covers="min-lstm-gru",
)
class MinLSTM(MinGRU):
    r"""$h_t = f'_t ⊙ h_{t-1} + i'_t ⊙ g(W_h x_t)$ with $f' = f/(f + i)$, $i' = i/(f + i)$, gates σ of the input.

    Arguments, shapes, errors and source are those of `MinGRU`.
    """

    gates = 2


@card(
    "min-lstm-gru",
    kind="memory",
    says="A GRU (or LSTM) whose gates see only the input, so that it trains by scan.",
    source="arXiv:2410.01201",
    small={"dim": 6, "expand": 1.5},
)
def min_lstm_gru(dim: int, *, cell: str = "gru", expand: float = 1, start: float = 0.5) -> MinGRU:
    """`MinGRU` or `MinLSTM`, by `cell`: "gru" or "lstm". Raises `UnknownName` on another."""
    cells = {"gru": MinGRU, "lstm": MinLSTM}
    if cell not in cells:
        raise unknown("cell of min-lstm-gru", cell, cells)
    return cells[cell](dim, expand=expand, start=start)
