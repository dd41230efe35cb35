"""MesaNet: the best linear map from keys to values, found anew at every token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import GatedReadout, ShortConv, l2_norm, per_head, project, split, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.ops.least_squares import least_squares
from remanence.state import State


@card(
    "mesa",
    kind="memory",
    says="A matrix memory that answers with the best linear map over all it was told, older pairs counting less.",
    source="arXiv:2506.05233",
    small={"dim": 8, "heads": 2},
)
class Mesa(Memory):
    r"""$H ← γH + βkk^\top$, $G ← γG + βkv^\top$, $y = G^\top (H + \mathrm{diag} λ)^{-1} q$.

    Queries and keys pass a short convolution, SiLU and L2 norm; values are projected only. $γ = σ(W_a x + b_a)$ and
    $β = σ(W_b x + b_b)$ are per head; the ridge $λ = λ_{\min} + \mathrm{softplus}(p)$ per key feature is 1 at first.

    Args:
        dim: features of input and output; a multiple of `heads` unless `head_dim` is given.
        heads: independent memories.
        head_dim: features per key and value; dim/heads by default (128 in the paper's models).
        conv: tokens that the convolutions see.
        ridge: λ_min > 0, the least that λ can become.
        steps: of conjugate gradients, at most; None factorises instead, and is exact for any head width.
        gate: whether what was read is gated by SiLU(W_g x).
        eps: of the norm of what was read.

    Shapes: x and y [batch, time, dim]; state {"H": [batch, heads, K, K], "G": [batch, heads, K, K],
        "conv": {"tail": [batch, conv - 1, 2·heads·K]}} with K = head_dim.
    Raises: `ValueError` on arguments out of range; `ShapeError`, `StateError` from `forward`.
    Source: MesaNet: Sequence Modeling by Locally Optimal Test-Time Training (2025), arXiv:2506.05233.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
        conv: int = 4,
        ridge: float = 0.25,
        steps: int | None = 30,
        gate: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        K = head_dim or per_head("Mesa", dim, heads)
        if not ridge > 0 or (steps is not None and steps < 1):
            raise ValueError(f"Mesa: ridge must be > 0 and steps at least 1 or None, got {ridge} and {steps}.")
        self.dim, self.heads, self.head_dim, self.least, self.steps = dim, heads, K, ridge, steps
        self.qk = Linear(dim, 2 * heads * K, bias=False)
        self.v = Linear(dim, heads * K, bias=False)
        self.conv = ShortConv(2 * heads * K, conv)
        self.gates = Linear(dim, 2 * heads)
        above = max(1 - ridge, 0.01)
        self.ridge = nn.Parameter(torch.full((heads, K), math.log(math.expm1(above))))
        self.readout = GatedReadout(dim, heads, K, eps=eps, activation=F.silu if gate else None)

    def initial_state(self, batch: int) -> State:
        H = zeros(self.v.weight, batch, self.heads, self.head_dim, self.head_dim)
        return {"H": H, "G": H.clone(), "conv": self.conv.initial_state(batch)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if x.shape[1] == 1 and self.steps is not None and steps.worth(state["H"], x, state["G"], state["conv"]["tail"]):
            y, after = layer_steps.least_squares_token(
                project(self.qk, x), project(self.v, x), project(self.gates, x), self.conv.weight, self.ridge,
                self.least, state, self.readout.plan(x), self.steps,
            )  # fmt: skip
            return project(self.readout.out, y), after
        mixed, conv = self.conv(self.qk(x), state["conv"], silu=True)
        q, k = (l2_norm(split(part, self.heads)) for part in mixed.chunk(2, -1))
        decay, beta = wide(self.gates(x)).transpose(1, 2).chunk(2, dim=1)
        ridge = self.least + F.softplus(wide(self.ridge))
        v, log_decay = split(self.v(x), self.heads), F.logsigmoid(decay)
        y, after = least_squares(q, k, v, beta.sigmoid(), ridge, log_decay, state, steps=self.steps)
        return self.readout(y, x), {**after, "conv": conv}
