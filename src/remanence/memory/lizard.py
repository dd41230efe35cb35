"""A softmax layer's weights, read as learnt gated linear attention and a short window under one normaliser."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.linear import Linear
from remanence.memory.parts import merge, project, rotate, wide, zeros
from remanence.memory.softmax import SoftmaxWeights
from remanence.ops import layer_steps, steps
from remanence.ops.expgate import exponential_sums
from remanence.state import State


@card(
    "lizard",
    kind="memory",
    says="Softmax attention's weights as gated linear attention with learnt features, and a window with meta tokens.",
    source="arXiv:2507.09025",
    small={"dim": 8, "heads": 2, "kv_heads": 1, "window": 5, "features": 6, "meta": 2},
    parents=("softmax", "sliding-window", "linear-attention"),
    change="learnt exponential features and gates imitate what a taught softmax layer attends to",
)
class Lizard(SoftmaxWeights):
    r"""One average over the window, a few learnt meta tokens, and all the past, seen through learnt features.

    Token j counts in the window with $e^{q · k_j / \sqrt K}$ (rotated), as does a meta token, and in the past with
    $φ(q) · φ(k_j) \prod_{i=j+1}^{t} γ_i$, where $φ(x) = [e^{W x}, e^{-W x}]$ (not rotated) and $γ = σ(w · x + b)$ per
    head; all share one normaliser. Exponents are taken out per token, so that no exponential overflows.

    Args:
        dim, heads, kv_heads, base: those of `SoftmaxAttention`, whose parameters it has, by the same names.
        window: tokens that the softmax branch sees.
        features: of φ, an even number; 128 in the paper.
        meta: learnt keys and values that every token sees.

    Shapes: x and y [batch, time, dim], K = dim/heads; state {"C": [batch, heads, features, K], "n": [batch, heads,
        features], "m": float64 [batch, heads], "window": {"k", "v": [batch, kv_heads, window − 1, K], "seen": int64
        [batch]}}.
    Raises: `ValueError` as `SoftmaxAttention`, or if `window` < 1, `meta` < 0 or `features` is no even number above 0;
        `ShapeError`, `StateError` from `forward`.
    Source: Lizard (2025), arXiv:2507.09025, which has no official code; how the parts share a normaliser is
        reconstructed.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        base: float = 10000.0,
        window: int = 128,
        features: int = 128,
        meta: int = 4,
    ):
        super().__init__(dim, heads=heads, kv_heads=kv_heads, base=base)
        if window < 1 or meta < 0 or features < 2 or features % 2:
            raise ValueError(
                "Lizard: window must be at least 1, meta at least 0 and features an even number above 0, "
                f"got window={window}, meta={meta}, features={features}."
            )
        self.window, self.features = window, features
        scale = self.head_dim**-0.25  # so that φ(q)·φ(k) starts near the size of e^{q·k/√K}
        self.query_map, self.key_map = (
            nn.Parameter(scale * torch.randn(heads, self.head_dim, features // 2) * self.head_dim**-0.5)
            for _ in range(2)
        )
        self.forget = Linear(dim, heads)
        nn.init.constant_(self.forget.bias, 4.0)  # forgets 2% per token, until taught otherwise
        self.meta = nn.Parameter(torch.randn(2, 1, heads, meta, self.head_dim) * self.head_dim**-0.5)

    def initial_state(self, batch: int) -> State:
        C = zeros(self.out.weight, batch, self.heads, self.features, self.head_dim)
        k = zeros(self.out.weight, batch, self.kv_heads, self.window - 1, self.head_dim)
        near = {"k": k, "v": k.clone(), "seen": k.new_zeros(batch, dtype=torch.int64)}
        m = C.new_zeros(batch, self.heads, dtype=torch.float64)
        return {"C": C, "n": C[..., 0].clone(), "m": m, "window": near}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if x.shape[1] == 1 and steps.worth(state["C"], x, state["n"], state["window"]["k"], state["window"]["v"]):
            return self._token(x, state)
        q, k, v = self.project(x)
        k, v = self.per_query(k), self.per_query(v)
        near, past = state["window"], {name: state[name] for name in ("C", "n", "m")}
        query, query_size = exponential_features(q @ wide(self.query_map))
        key, key_size = exponential_features(k @ wide(self.key_map))
        forget = F.logsigmoid(wide(self.forget(x))).transpose(1, 2)
        sums, mass, m, past = exponential_sums(query, key, v, forget, key_size, past)
        mass = mass.clamp(min=torch.finfo(mass.dtype).tiny)
        log_mass = mass.log() + (m + query_size).to(mass.dtype)
        q, k = (rotate(part, near["seen"], self.frequencies) for part in (q, k))
        window = {**near, "k": self.per_query(near["k"]), "v": self.per_query(near["v"])}
        meta = wide(self.meta)
        win, log_win, near = ops.window_attention(q, k, v, window=self.window, state=window, prefix=(meta[0], meta[1]))
        y = torch.lerp(win, sums / mass[..., None], (log_mass - log_win).sigmoid()[..., None])
        group = self.heads // self.kv_heads
        near = {"k": near["k"][:, ::group], "v": near["v"][:, ::group], "seen": near["seen"]}
        return self.out(merge(y).to(x.dtype)), {**past, "window": near}

    def _token(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        qkv, near, log_near = self.projected(x), state["window"], x.new_empty(len(x), self.heads)
        win = layer_steps.attention_token(
            qkv, near["k"], near["v"], near["seen"], self.frequencies, prefix=(self.meta[0, 0], self.meta[1, 0]),
            logsumexp=log_near,
        )  # fmt: skip
        maps = self.query_map, self.key_map
        y, past = layer_steps.featured_token(qkv, maps, project(self.forget, x), state, win.y, log_near)
        return project(self.out, y), {**past, "window": {"k": win.keys, "v": win.values, "seen": win.position}}


def exponential_features(x: Tensor) -> tuple[Tensor, Tensor]:
    """[e^x, e^{−x}] over its largest entry [..., 2F], and the logarithm of that [...]."""
    both = torch.cat([x, -x], -1)
    most = both.amax(-1).detach()
    return (both - most[..., None]).exp(), most
