"""Retention: linear attention with one fixed decay per head and rotary phases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import GatedReadout, per_head, project, rotate, split, zeros
from remanence.ops import layer_steps, steps
from remanence.state import State


@card(
    "retnet",
    kind="memory",
    says="Linear attention with a fixed decay per head and rotary phases (retention).",
    source="arXiv:2307.08621",
    small={"dim": 8, "heads": 2},
)
class RetNet(Memory):
    r"""Multi-scale retention: $S_t = γ_h S_{t-1} + k_t v_t^\top$, $y_t = S_t^\top q_t$, with $γ_h = 1 - 2^{-5-h}$.

    Queries and keys turn with the absolute position, which is part of the state; keys are scaled by K^{-1/2}. The
    score rescalings of the published code are left out: they cancel in the norm up to its eps, and break resumption.

    Args:
        dim: features of input and output; a multiple of 2·heads.
        heads: head h = 0, 1, ... forgets with a half-life of about 22·2^h tokens.

    Shapes: x and y [batch, time, dim]; state {"S": [batch, heads, K, 2K], "position": int64 [batch]}, K = dim/heads.
    Raises: `ValueError` if 2·heads does not divide `dim`; `ShapeError`, `StateError` from `forward`.
    Source: Retentive Network (2023), arXiv:2307.08621.
    """

    def __init__(self, dim: int, *, heads: int = 4):
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, per_head("RetNet", dim, heads, multiple=2)
        self.qk = Linear(dim, 2 * dim, bias=False)
        self.v = Linear(dim, 2 * dim, bias=False)
        self.readout = GatedReadout(dim, heads, 2 * self.head_dim, affine=False)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.xavier_uniform_(weight, gain=0.5 if weight is self.readout.out.weight else 2**-2.5)
        # constants, not buffers: `.float()` would round them
        self.log_decay = torch.log1p(-(2.0 ** -(5 + torch.arange(heads, dtype=torch.float64))))
        self.frequencies = 10000 ** -torch.linspace(0, 1, self.head_dim // 2, dtype=torch.float64)

    def initial_state(self, batch: int) -> State:
        S = zeros(self.v.weight, batch, self.heads, self.head_dim, 2 * self.head_dim)
        return {"S": S, "position": S.new_zeros(batch, dtype=torch.int64)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        qk, v, scale, start = project(self.qk, x), project(self.v, x), self.head_dim**-0.5, state["position"]
        after = {"position": start + x.shape[1]}
        if x.shape[1] == 1 and steps.worth(state["S"], x):
            y, S, _ = layer_steps.outer_token(
                qk, state["S"], v, key_scale=scale, fixed=self.log_decay, positions=(start, self.frequencies),
                readout=self.readout.plan(x),
            )  # fmt: skip
            return project(self.readout.out, y), {"S": S, **after}
        q, k = rotate(split(qk, 2 * self.heads), start, self.frequencies).chunk(2, dim=1)
        v = split(v, self.heads)
        decay = self.log_decay.to(k)[:, None].expand(k.shape[:3])
        y, written = ops.linear_attention(q, scale * k, v, decay, {"S": state["S"]})
        return self.readout(y, x), {**written, **after}
