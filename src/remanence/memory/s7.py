"""S7: S5 made selective, with a transition that stays bounded whatever the input says."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import wide, zeros
from remanence.ops import steps
from remanence.ops.complex_scan import chosen_token, complex_scan
from remanence.state import State


def bounded(Lambda: Tensor) -> Tensor:
    """1 − 1/(Λ² + ½): in [−1, 1) for every real Λ."""
    return 1 - 1 / (Lambda.square() + 0.5)


@card(
    "s7",
    kind="memory",
    says="One small state for all features, whose transition, input and output maps the token chooses, stably.",
    source="arXiv:2410.03464",
    small={"dim": 8, "rank": 2},
)
class S7(Memory):
    r"""$h_t = a_t ⊙ h_{t-1} + B_t x_t + β_t$, $y_t = C_t h_t + D_t ⊙ x_t$, out $= σ(W_g \mathrm{GELU}(y)) ⊙ y$.

    $a_t = 1 - 1/(Λ_t^2 + ½)$ with $Λ_t = Λ_0 + W_Λ x_t$; $B_t, C_t, D_t, β_t$ are linear in $x_t$. The maps from x to B
    and C would have dim²·states weights; here they have rank `rank`: $B_t = \sum_r (w_r · x_t) B_r$. Λ_0 starts at
    −4, −5, …: at 0 the transition would be −1, and the state change sign with every token. The published block's
    residual is left to the model.

    Args:
        dim: features of input and output.
        states: numbers that all features share (N); dim/4 by default, rounded up.
        rank: of the maps to B and C, up to `dim`, where they are general.

    Shapes: x and y [batch, time, dim]; state {"h": [batch, states]}.
    Raises: `ValueError` for sizes below 1; `ShapeError`, `StateError` from `forward`.
    Source: Soydan et al., S7: Selective and Simplified State Space Layers for Sequence Modeling (2024),
    arXiv:2410.03464; the start and the low rank are ours.
    """

    def __init__(self, dim: int, *, states: int | None = None, rank: int = 8):
        super().__init__()
        states = -(-dim // 4) if states is None else states
        if min(dim, states, rank) < 1:
            raise ValueError(f"S7: dim, states and rank must be at least 1, got {dim}, {states}, {rank}.")
        self.dim, self.states, self.rank = dim, states, rank
        self.Lambda = nn.Parameter(-4.0 - torch.arange(states))
        self.steer = Linear(dim, 2 * states + dim, bias=False)
        self.codes = Linear(dim, 2 * rank, bias=False)
        self.B = Linear(dim, rank * states, bias=False)
        self.C = Linear(rank * states, dim, bias=False)
        self.gate = Linear(dim, dim, bias=False)
        nn.init.normal_(self.steer.weight, std=0.02)
        nn.init.normal_(self.codes.weight, std=dim**-0.5)
        for low in (self.B, self.C):  # so that B_t and C_t start as if their maps were full, with deviation 0.02
            nn.init.normal_(low.weight, std=0.02 * math.sqrt(dim / rank))

    def initial_state(self, batch: int) -> State:
        return {"h": zeros(self.Lambda, batch, self.states)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if x.shape[1] == 1 and steps.worth(x, state["h"]):
            steered = self.steer(x)
            seen, h = chosen_token(steered, self.codes(x), self.B(x), self.Lambda, state["h"])
            y = torch.addcmul(self.C(seen), steered[..., 2 * self.states :], x)
            return self.gate(F.gelu(y)).sigmoid() * y, {"h": h}
        moved, beta, D = wide(self.steer(x)).split([self.states, self.states, self.dim], dim=-1)
        write, read = wide(self.codes(x)).chunk(2, dim=-1)
        written = torch.einsum("btr,btrn->btn", write, wide(self.B(x)).unflatten(-1, (self.rank, -1)))
        h, state = complex_scan(bounded(wide(self.Lambda) + moved), written + beta, state)
        seen = (read[..., None] * h[..., None, :]).flatten(-2)
        y = (ops.linear(seen, wide(self.C.weight)) + D * wide(x)).to(x.dtype)
        return self.gate(F.gelu(y)).sigmoid() * y, state
