"""A linear recurrence between two multiplicative gates, which contains linear attention exactly."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from remanence import ops
from remanence.catalogue import card
from remanence.errors import ShapeError
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import project, wide, zeros
from remanence.state import State


@card(
    "gated-rnn-attention",
    kind="memory",
    says="A diagonal linear recurrence with multiplicative input and output gates: linear attention is one setting.",
    source="arXiv:2309.01775",
    small={"dim": 6},
    parents=("lru", "linear-attention"),
    change="two linear maps multiplied at the input and at the output, and nothing else that is not linear",
)
class GatedRNN(Memory):
    r"""Gate, accumulate, gate: $h_t = λ ⊙ h_{t-1} + (W_1 x_t) ⊙ (W_2 x_t)$, $y_t = W_o((W_3 x_t) ⊙ h_t)$.

    $λ = e^{-r^2}$ per unit, so that a root r of 0 keeps everything exactly.

    Args:
        dim: features of input and output.
        width: units of the recurrence; `dim` by default.

    Shapes: x and y [batch, time, dim]; state {"h": [batch, width]}.
    Raises: `ValueError` for a width below 1; `ShapeError`, `StateError` from `forward`.
    Source: Gated recurrent neural networks discover attention (2023), arXiv:2309.01775, whose λ is complex, as in the
        LRU, where that helps learning; the construction needs 1 only.
    """

    def __init__(self, dim: int, *, width: int | None = None):
        super().__init__()
        self.dim, self.width = dim, dim if width is None else width
        if self.width < 1:
            raise ValueError(f"GatedRNN: width must be at least 1, got {width}.")
        self.inward = Linear(dim, 2 * self.width, bias=False)
        self.gate = Linear(dim, self.width, bias=False)
        self.out = Linear(self.width, dim, bias=False)
        reach = torch.empty(self.width).uniform_(math.log(2), math.log(1000)).exp()
        self.root = nn.Parameter(reach.rsqrt())

    def initial_state(self, batch: int) -> State:
        return {"h": zeros(self.root, batch, self.width)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        a, b = wide(project(self.inward, x)).chunk(2, dim=-1)
        h, after = ops.scan(-wide(self.root).square().expand_as(a), a * b, {"h": state["h"]})
        return project(self.out, (wide(project(self.gate, x)) * h).to(x.dtype)), after


def as_gated_rnn(query: Tensor, key: Tensor, value: Tensor, out: Tensor | None = None) -> GatedRNN:
    """The gated recurrence that equals linear attention with these projections: y = W_o Σ_{j≤t} (q_t·k_j) v_j.

    Unit (i, j) adds up k_i v_j and is read times q_i. Several heads are several such attentions, added.

    Shapes: `query`, `key` [K, dim], `value` [V, dim], `out` [dim, V] (the identity where it is None and V = dim).
    Raises: `ShapeError` for projections that do not fit.
    """
    (K, dim), V = key.shape, value.shape[0]
    out = torch.eye(V, dtype=value.dtype, device=value.device) if out is None else out
    if query.shape != (K, dim) or value.shape != (V, dim) or out.shape != (dim, V):
        shapes = ", ".join(str(list(w.shape)) for w in (query, key, value, out))
        raise ShapeError(
            f"as_gated_rnn: query and key must be [K, dim], value [V, dim] and out [dim, V], got {shapes}."
        )
    rnn = GatedRNN(dim, width=K * V).to(value)
    with torch.no_grad():
        rnn.inward.weight.copy_(torch.cat([key.repeat_interleave(V, 0), value.repeat(K, 1)]))
        rnn.gate.weight.copy_(query.repeat_interleave(V, 0))
        rnn.out.weight.copy_(out.repeat(1, K))
        rnn.root.zero_()
    return rnn
