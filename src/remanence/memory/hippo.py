"""HiPPO-RNN: a gated cell that writes one signal into an online polynomial projection of its whole past."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import wide, zeros
from remanence.ops import steps
from remanence.ops.hippo import hippo_matrices, legs_transitions, projected_cell, projected_token
from remanence.state import State

TABLE = 64
"""Tokens whose transitions are tabulated together."""


@card(
    "hippo",
    kind="memory",
    says="A gated cell with the optimal polynomial projection of all that it ever wrote, whatever the time scale.",
    source="arXiv:2008.07669",
    small={"dim": 4, "order": 5, "channels": 2},
)
class HiPPO(Memory):
    r"""A cell reads $[h, c, x]$ and writes $f = W_f h$; $c_t$ are the Legendre coefficients of $f_1..f_t$.

    $h_t = (1 - g) ⊙ h_{t-1} + g ⊙ \tanh(W [h_{t-1}, c_{t-1}, x_t] + b)$, with the gate $g$ a sigmoid of another such
    map. `legs` weighs all of the past alike, at any length; `legt` the last `window` tokens. Both steps are exact for
    f held constant within a token (the paper's models use the bilinear step, which is poor while t < order).
    The cell feeds on what it wrote, so training is a compiled loop over tokens; `ops.hippo.legs` is the projection
    alone, parallel over time.

    Args:
        dim: features of input and output.
        hidden: features of the cell; `dim` by default.
        order: coefficients per channel.
        channels: signals that are written.
        measure: `legs` or `legt`.
        window: tokens that `legt` remembers; `legs` has no time scale.

    Shapes: x and y [batch, time, dim];
        state {"h": [batch, hidden], "c": [batch, channels, order], "position": int64 [batch]}.
    Raises: `ValueError` for an unknown measure, an order or window below 1; `ShapeError`, `StateError` from `forward`.
    Source: HiPPO (2020), arXiv:2008.07669.
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        order: int = 64,
        channels: int = 1,
        measure: str = "legs",
        window: int = 256,
    ):
        super().__init__()
        if window < 1:
            raise ValueError(f"HiPPO: window must be at least 1, got {window}.")
        self.dim, self.hidden, self.order, self.channels, self.measure = dim, hidden or dim, order, channels, measure
        A, B = hippo_matrices(measure, order)
        joint = torch.linalg.matrix_exp(torch.cat([torch.cat([A, B[:, None]], 1) / window, A.new_zeros(1, order + 1)]))
        # of `legt`; constants, not buffers: `.float()` would round them
        self.fixed = joint[:-1, :-1].contiguous(), joint[:-1, -1].contiguous()
        self.read = Linear(self.hidden + channels * order, 2 * self.hidden, bias=False)
        self.input = Linear(dim, 2 * self.hidden)
        self.write = Linear(self.hidden, channels)
        self.out = Linear(self.hidden, dim)

    def initial_state(self, batch: int) -> State:
        h = zeros(self.write.weight, batch, self.hidden)
        c = h.new_zeros(batch, self.channels, self.order)
        return {"h": h, "c": c, "position": h.new_zeros(batch, dtype=torch.int64)}

    def transitions(self, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The steps of the `count` tokens after `position`: [batch, count, order, order] and [batch, count, order]."""
        if self.measure == "legs":
            return legs_transitions(position, count, self.order)
        A, b = (part.to(position.device) for part in self.fixed)
        return A.expand(len(position), count, -1, -1), b.expand(len(position), count, -1)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        h, position = state["h"], state["position"]
        c = state["c"].to(h)
        read, write, bias = (wide(p).to(h) for p in (self.read.weight, self.write.weight, self.write.bias))
        if x.shape[1] == 1 and steps.worth(h, c, x):
            fixed = None if self.measure == "legs" else self.fixed
            h, c = projected_token(self.input(x), read, write, bias, fixed, position, h, c)
            return self.out(h[:, None]), {"h": h, "c": c, "position": position + 1}
        out = [h.new_zeros(len(h), 0, self.hidden)]
        for piece in wide(self.input(x)).split(TABLE, 1):
            A, b = (table.to(h) for table in self.transitions(position, piece.shape[1]))
            if not piece.shape[1]:
                continue
            y, c = projected_cell(piece.to(h), read, write, bias, A, b, h, c)
            h = y[:, -1]
            out.append(y)
            position = position + piece.shape[1]
        return self.out(torch.cat(out, 1).to(x.dtype)), {"h": h, "c": c, "position": position}
