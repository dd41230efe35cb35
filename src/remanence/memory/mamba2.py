"""Mamba-2: a selective state space with one decay per head, which makes it gated linear attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import ShortConv, merge, split, wide, zeros
from remanence.ops import steps
from remanence.ops.norm import normalise
from remanence.ops.recurrence_steps import mamba2
from remanence.state import State


@card(
    "mamba2",
    kind="memory",
    says="A selective state space with one input-chosen decay per head: linear attention with a large state.",
    source="arXiv:2405.21060",
    small={"dim": 8, "state_size": 3, "head_dim": 4, "groups": 2, "bias": True},
    parents=("mamba",),
    change="one decay per head instead of one per channel and state, so that chunks are matrix products",
)
class Mamba2(Memory):
    r"""State space duality: $S_t = e^{-A Δ_t} S_{t-1} + Δ_t B_t x_t^\top$, $y_t = S_t^\top C_t + D x_t$, per head.

    $[z, x, B, C, δ] = W_i u$; x, B and C pass the convolution and SiLU; $Δ = \mathrm{softplus}(δ + b)$, clamped to
    `step_limit`; the heads of a group share B and C. Read as $W_o \mathrm{RMSNorm}(y ⊙ \mathrm{SiLU}(z))$: the
    gate comes before the norm.

    Args:
        dim: features of input and output.
        expand: inner features, as a multiple of `dim`.
        state_size: features of B and C (the keys and queries).
        head_dim: inner features per head; 64 by default, or the largest divisor of both.
        groups: sets of heads that share one B and C.
        conv: tokens that the convolution sees.
        conv_bias, bias: whether the convolution and the two projections have biases.
        step_limit: least and greatest Δ.
        norm_groups: parts in which the norm runs; `groups` by default, as in the authors' code (one part in
            `transformers` before it followed).
        eps: of the norm.

    Give `rate`, `step_bias` and `skip` no weight decay.

    Shapes: x and y [batch, time, dim]; with I = expand·dim, H = I/head_dim, N = state_size:
        state {"S": [batch, H, N, head_dim], "conv": {"tail": [batch, conv - 1, I + 2·groups·N]}}.
    Raises: `ValueError` if heads, groups or norm_groups do not divide; `ShapeError`, `StateError` from `forward`.
    Source: Transformers are SSMs (2024), arXiv:2405.21060.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        state_size: int = 128,
        head_dim: int | None = None,
        groups: int = 1,
        conv: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        step_limit: tuple[float, float] = (0.0, math.inf),
        norm_groups: int | None = None,
        eps: float = 1e-5,
    ):
        super().__init__()
        inner = expand * dim
        head_dim = head_dim or math.gcd(inner, 64)
        heads, norm_groups = inner // head_dim, norm_groups or groups
        if inner % head_dim or heads % groups or inner % norm_groups:
            given = f"head_dim={head_dim}, groups={groups}, norm_groups={norm_groups}"
            raise ValueError(
                f"Mamba2: head_dim and norm_groups must divide expand·dim = {inner}, groups the heads, got {given}."
            )
        self.dim, self.heads, self.groups, self.step_limit = dim, heads, groups, step_limit
        self.widths = (inner, groups * state_size, groups * state_size)
        self.inward = Linear(dim, inner + sum(self.widths) + heads, bias=bias)
        self.conv = ShortConv(sum(self.widths), conv, bias=conv_bias)
        self.rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm_groups, self.eps = norm_groups, eps
        self.scale = nn.Parameter(torch.ones(inner))
        self.out = Linear(inner, dim, bias=bias)

    def initial_state(self, batch: int) -> State:
        inner, keys, _ = self.widths
        S = zeros(self.out.weight, batch, self.heads, keys // self.groups, inner // self.heads)
        return {"S": S, "conv": self.conv.initial_state(batch)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        inner = self.widths[0]
        projected = self.inward(x)
        if x.shape[1] == 1 and steps.worth(state["S"], projected, tail := state["conv"]["tail"]):
            held = tail, self.conv.weight, self.conv.bias
            learnt, how = (self.step_bias, self.rate, self.skip, self.scale), (self.norm_groups, self.eps)
            y, S, tail = mamba2(projected, held, learnt, state["S"], self.groups, self.step_limit, *how)
            return self.out(y), {"S": S, "conv": {"tail": tail}}
        z, mixed, step = projected.split([inner, sum(self.widths), self.heads], dim=-1)
        (u, B, C), conv = self.conv(mixed, state["conv"], silu=True, widths=self.widths)
        u = split(u, self.heads)
        k, q = (self._share(split(part, self.groups)) for part in (B, C))
        step = F.softplus(wide(step) + wide(self.step_bias)).clamp(*self.step_limit).transpose(1, 2)
        decay = -wide(self.rate).exp()[:, None] * step
        y, after = ops.linear_attention(q, k, step[..., None] * u, decay, {"S": state["S"]})
        y = merge(torch.addcmul(y, wide(self.skip)[:, None, None], u)) * F.silu(wide(z))
        return self._read(y, x), {**after, "conv": conv}

    def _read(self, y: Tensor, x: Tensor) -> Tensor:
        if self.norm_groups == 1:
            y = normalise(y, self.scale.to(y.dtype), eps=self.eps)
        else:
            y = normalise(y.unflatten(-1, (self.norm_groups, -1)), eps=self.eps).flatten(-2) * self.scale
        return self.out(y.to(x.dtype))

    def _share(self, x: Tensor) -> Tensor:
        """[batch, groups, time, N] -> [batch, heads, time, N], without a copy where there is one group."""
        return x[:, :, None].expand(-1, -1, self.heads // self.groups, -1, -1).flatten(1, 2)
