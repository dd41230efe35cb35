"""The gated delta rule: a memory that can replace one thing, or forget everything."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.parts import DecayGate, GatedReadout, ShortConv, l2_norm, per_head, split, wide, zeros
from remanence.state import State


@card(
    "gated-deltanet",
    kind="memory",
    says="A matrix memory that overwrites what a key held, and can forget everything at once.",
    source="arXiv:2412.06464",
    small={"dim": 8, "heads": 2},
)
class GatedDeltaNet(Memory):
    r"""Decay, then correct: $S ← e^{g} S$, then $S ← S + β k (v - S^\top k)^\top$; read as $S^\top q$.

    Queries and keys pass a short convolution, SiLU and L2 norm, values the first two; $β = σ(W_b x)$ is how much
    of the old value is replaced, $g ≤ 0$ the log decay per head (`DecayGate`).

    Args:
        dim: features of input and output; a multiple of `heads` unless `head_dim` is given.
        heads: independent memories.
        head_dim: features per key; dim/heads by default (the paper's models have 256).
        expand_v: features per value, as a multiple of `head_dim`; 2 in the paper.
        conv: tokens that the convolutions see.
        negative: let β reach 2, so that a write may reflect a key's content (arXiv:2411.12537).

    Shapes: x and y [batch, time, dim]; with K = head_dim and V = expand_v · K:
        state {"S": [batch, heads, K, V], "conv": {"tail": [batch, conv - 1, heads·(2K + V)]}}.
    Raises: `ValueError` if `heads` does not divide `dim`; `ShapeError`, `StateError` from `forward`.
    Source: Gated Delta Networks (2024), arXiv:2412.06464.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        head_dim: int | None = None,
        expand_v: int = 2,
        conv: int = 4,
        negative: bool = False,
    ):
        super().__init__()
        K = head_dim or per_head("GatedDeltaNet", dim, heads)
        self.dim, self.heads, self.widths = dim, heads, (K, K, expand_v * K)
        self.most = 2.0 if negative else 1.0
        self.qkv = nn.Linear(dim, heads * sum(self.widths), bias=False)
        self.conv = ShortConv(heads * sum(self.widths), conv)
        self.beta = nn.Linear(dim, heads, bias=False)
        self.decay = DecayGate(dim, heads)
        self.readout = GatedReadout(dim, heads, expand_v * K)

    def initial_state(self, batch: int) -> State:
        K, _, V = self.widths
        return {"S": zeros(self.qkv.weight, batch, self.heads, K, V), "conv": self.conv.initial_state(batch)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        mixed, conv = self.conv(self.qkv(x), state["conv"])
        q, k, v = (split(p, self.heads) for p in F.silu(mixed).split([self.heads * w for w in self.widths], dim=-1))
        beta = self.most * wide(self.beta(x)).sigmoid().transpose(1, 2)
        q = l2_norm(q) * q.shape[-1] ** -0.5
        y, after = ops.gated_delta_rule(q, l2_norm(k), v, beta, self.decay(x), {"S": state["S"]})
        return self.readout(y, x), {**after, "conv": conv}
