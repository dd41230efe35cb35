"""RWKV-7: a delta rule that removes along one key, at a rate per feature, and writes along another."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.memory.bare import bare, transparent
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import HeadNorm, l2_norm, merge, split, token_shift, wide, zeros
from remanence.ops import steps
from remanence.ops.dplr import dplr
from remanence.ops.recurrence_steps import rwkv7
from remanence.state import State

LOWEST = -math.exp(-0.5)
"""The lowest log decay per token: a feature keeps at least exp(−e^−½) ≈ 0.545."""


@transparent
class LowRank(nn.Module):
    """W₂ f(W₁ x) + b on [..., dim], with W₁ = 0 at the start, so that all begin with their bias."""

    def __init__(self, dim: int, rank: int, bias: Tensor | None, inner: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.down, self.up = Linear(dim, rank, bias=False), Linear(rank, dim, bias=bias is not None)
        self.inner = inner
        nn.init.zeros_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=0.1)
        if bias is not None:
            self.up.bias.data.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.up(x if self.inner is None else self.inner(x))

    def maps(self) -> tuple[Tensor, Tensor, Tensor]:
        """W₁, W₂ and b."""
        return self.down.weight, self.up.weight, self.up.bias


@card(
    "rwkv7",
    kind="memory",
    says="A delta rule that removes along one key, at a rate per feature, and writes along another.",
    source="arXiv:2503.14456",
    small={"dim": 8, "head_dim": 4, "rank": 3},
    parents=("rwkv6", "deltanet"),
    change="a removal key, a replacement key and a learning rate per feature",
)
class RWKV7(Memory):
    r"""$S_t = \mathrm{Diag}(e^{g}) S - (\hat κ ⊙ η)(\hat κ^\top S)^\top + \tilde k v^\top$, read as $S_t^\top r$.

    From mixtures of each token with the one before it: receptance r, log decay $g ∈ (-e^{-½}, 0)$, key k, value v,
    rate $η = σ(·)$ and gate. $\hat κ = k ⊙ k_k$ at unit length is what is removed (from the state before its decay),
    $\tilde k = k ⊙ (1 + (η - 1) ⊙ k_a)$ what is written. What is read is normalised per head, the token's own value
    is added $(\sum r ⊙ \tilde k ⊙ r_k)$ times, then comes the gate.

    Args:
        dim: features of input and output; a multiple of `head_dim`.
        head_dim: features per key and value.
        layer, layers: place in the stack; what is learnt starts from it. Layers after the first draw their values
            towards those of the first, when these are given.
        rank: of the projections of decay, rate, value mixture and gate; about 2.5√dim, 2.5√dim, 1.7√dim and 5√dim,
            in multiples of 32, by default.

    Shapes: x and y [batch, time, dim]; state {"S": [batch, dim/head_dim, head_dim, head_dim], "shift": [batch, dim]}.
    Raises: `ValueError` for a width, layer or rank out of range; `ShapeError`, `StateError` from `forward`.
    Source: RWKV-7 "Goose" (2025), arXiv:2503.14456.
    """

    def __init__(self, dim: int, *, head_dim: int = 64, layer: int = 0, layers: int = 1, rank: int | None = None):
        super().__init__()
        if head_dim < 1 or dim < 1 or dim % head_dim:
            raise ValueError(f"RWKV7: dim must be a positive multiple of head_dim, got {dim} and {head_dim}.")
        if not 0 <= layer < layers:
            raise ValueError(f"RWKV7: layer must be from 0 to layers - 1, got layer={layer} and layers={layers}.")
        self.dim, self.head_dim, self.layer, heads = dim, head_dim, layer, dim // head_dim
        depth, rest = layer / max(layers - 1, 1), 1 - layer / layers
        place = torch.arange(dim) / max(dim - 1, 1)
        centred = place - 0.5
        zigzag = 2 * (torch.arange(dim) % head_dim) / max(head_dim - 1, 1) - 1
        zigzag = zigzag * zigzag.abs()

        def ranks(times: float) -> int:
            return rank or max(32, 32 * round(times * dim**0.5 / 32))

        powers = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])[:, None] * rest  # of r, w, k, v, a, g
        self.mix = nn.Parameter(1 - (torch.arange(dim) / dim) ** powers)
        self.r, self.k, self.v, self.out = (Linear(dim, dim, bias=False) for _ in range(4))
        self.decay = LowRank(dim, ranks(2.5), 6 * place ** (1 + depth**0.3) - 5.5 + 2.5 * zigzag, torch.tanh)
        self.rate = LowRank(dim, ranks(2.5), 0.3 * zigzag + 0.4 * centred - 0.19)
        self.value_mix = LowRank(dim, ranks(1.7), 0.73 - 0.4 * centred) if layer else None
        self.gate = LowRank(dim, ranks(5), None, torch.sigmoid)
        self.removal = nn.Parameter(0.71 - 0.1 * centred)
        self.replacement = nn.Parameter(torch.full((dim,), 1.02))
        self.bonus = nn.Parameter(torch.full((heads, head_dim), -0.04))
        self.norm = HeadNorm(heads, dim, eps=1e-5 * head_dim)
        for linear, bound in ((self.r, 0.5), (self.k, 0.05), (self.v, 0.5)):
            nn.init.uniform_(linear.weight, -bound * dim**-0.5, bound * dim**-0.5)
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.norm.weight, ((layer + 1) / layers) ** 0.7)

    def initial_state(self, batch: int) -> State:
        heads, K = self.bonus.shape
        return {"S": zeros(self.k.weight, batch, heads, K, K), "shift": zeros(self.k.weight, batch, self.dim)}

    def _plain(self) -> bool:
        low = self.decay, self.rate, self.gate
        return bare(*(part for m in low for part in (m, m.down, m.up)))

    def forward(
        self, x: Tensor, state: State | None = None, context: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """`context` is what the layers of one stack tell each other about these tokens: the first leaves its values
        there (under "rwkv7 values"), the later ones take them. Without it, each keeps to its own."""
        state = self.begin(x, state)
        (x_r, x_w, x_k, x_v, x_a, x_g), last = token_shift(x, state["shift"], self.mix)
        v = self.v(x_v)
        if self.layer == 0 and context is not None:
            context["rwkv7 values"] = v
        elif self.value_mix is not None and context is not None and "rwkv7 values" in context:
            v = v.lerp(context["rwkv7 values"], self.value_mix(x_v).sigmoid())
        rkv = self.r(x_r), self.k(x_k), v
        if x.shape[1] == 1 and steps.worth(state["S"], x, v) and self._plain():
            learnt, norm = (self.removal, self.replacement, self.bonus), (self.norm.weight, self.norm.bias)
            maps = self.decay.maps(), self.rate.maps(), self.gate.maps()[:2]
            y, S = rwkv7((x_w, x_a, x_g), rkv, *maps, learnt, norm, LOWEST, self.norm.eps, state["S"])
            return self.out(y), {"S": S, "shift": last}
        r, k, values, g, eta = (split(p, len(self.bonus)) for p in (*rkv, self.decay(x_w), self.rate(x_a)))
        g, eta = LOWEST * g.sigmoid(), eta.sigmoid()
        removal, replacement = (split(p[None, None], len(self.bonus)) for p in (self.removal, self.replacement))
        removed = l2_norm(k * removal, eps=1e-12)
        written = k * (1 + (eta - 1) * replacement)
        y, after = dplr(r, written, values, -removed, removed * eta, g, {"S": state["S"]})
        own = (r * written * wide(self.bonus)[:, None]).sum(-1, keepdim=True) * values
        y = self.norm(merge(y).to(x.dtype)) + merge(own).to(x.dtype)
        return self.out(y * self.gate(x_g)), {**after, "shift": last}
