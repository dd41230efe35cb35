"""LightNet: linear attention whose keys are a softmax over all tokens read so far."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import RMSNorm, merge, per_head, project, split, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.state import State

NOTHING = -1e30
"""The logarithm of an empty sum, as a number: differences of −∞ are not."""


@card(
    "lightnet",
    kind="memory",
    says="Linear attention whose keys are a running softmax over time: order-free, so images need one pass only.",
    source="arXiv:2405.21022",
    small={"dim": 8, "heads": 2, "gate_rank": 3},
    parents=("linear-attention", "gla"),
    change="the decay is what the normaliser of an additive recurrence leaves",
)
class LightNet(Memory):
    r"""$y_t = q_t^\top \sum_{j ≤ t} \mathrm{softmax}_{j ≤ t}(κ_j) v_j^\top$, a softmax over time per key feature.

    With $z_t = \log \sum_{j ≤ t} e^{κ_j}$ that is linear attention with keys $e^{κ_t - z_t}$ and log decays
    $z_{t-1} - z_t$: what was read weighs less only as more is read. q = SiLU(W_q x); the output is normalised over all
    heads and gated by SiLU of a low-rank map. Positions are not part of it: see docs/outer-products.md.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent memories (the paper's models have 128 features per head).
        gate_rank: rank of the output gate's map.

    Shapes: x and y [batch, time, dim]; state {"S": [batch, heads, K, K], "z": [batch, dim]}, K = dim/heads.
    Raises: `ValueError` if `heads` does not divide `dim`; `ShapeError`, `StateError` from `forward`.
    Source: You Only Scan Once (2024), arXiv:2405.21022.
    """

    def __init__(self, dim: int, *, heads: int = 4, gate_rank: int = 128):
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, per_head("LightNet", dim, heads)
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.gate = nn.Sequential(Linear(dim, gate_rank, bias=False), Linear(gate_rank, dim, bias=False))
        self.norm = RMSNorm(dim, eps=1e-5)
        self.out = Linear(dim, dim, bias=False)

    def initial_state(self, batch: int) -> State:
        S = zeros(self.out.weight, batch, self.heads, self.head_dim, self.head_dim)
        return {"S": S, "z": S.new_full((batch, self.dim), NOTHING)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        qkv = project(self.qkv, x)
        if x.shape[1] == 1 and steps.worth(state["S"], x, state["z"]):
            how = {"scale": self.head_dim**-0.5, "top": state["z"], "readout": self.norm.plan(project(self.gate, x))}
            y, S, z = layer_steps.outer_token(qkv, state["S"], features=steps.SILU, **how)
            return project(self.out, y), {"S": S, "z": z}
        q, k, v = qkv.chunk(3, dim=-1)
        z = torch.cat([state["z"][:, None], running_logsumexp(wide(k), state["z"])], 1)
        key, decay = (split(part, self.heads) for part in ((wide(k) - z[:, 1:]).exp(), z[:, :-1] - z[:, 1:]))
        q, v = split(F.silu(q), self.heads) * self.head_dim**-0.5, split(v, self.heads)
        y, after = ops.linear_attention(q, key, v, decay, {"S": state["S"]})
        return self._read(merge(y), x), {**after, "z": z[:, -1]}

    def whole(self, x: Tensor) -> Tensor:
        """Every token reads all of them, in any order: one sum for images and other sets. [batch, ..., dim]."""
        tokens = x.flatten(1, -2)
        q, k, v = (split(part, self.heads) for part in self.qkv(tokens).chunk(3, dim=-1))
        y = F.silu(q) * self.head_dim**-0.5 @ (k.softmax(dim=2).mT @ v)
        return self._read(merge(y), tokens).view_as(x)

    def _read(self, y: Tensor, x: Tensor) -> Tensor:
        return self.out(self.norm(y.to(x.dtype)) * F.silu(self.gate(x)))


def running_logsumexp(x: Tensor, start: Tensor) -> Tensor:
    """z_t = log(exp(start) + Σ_{j ≤ t} exp x_j), by a scan that runs several times faster than `torch.logcumsumexp`.

    Shapes: x and z [B, T, D], start [B, D].
    """
    if x.shape[1] == 1:
        return torch.logaddexp(start[:, None], x)
    # Any reference gives the same z, so the largest so far may be a constant; the scan carries the gradient.
    most = torch.cat([start[:, None], x], 1).detach().cummax(1).values
    total, _ = ops.scan(most[:, :-1] - most[:, 1:], (x - most[:, 1:]).exp(), {"h": (start - most[:, 0]).exp()})
    return most[:, 1:] + total.log()
