"""A softmax layer's own weights, read as a gated recurrence beside a short window."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.errors import unknown
from remanence.memory.parts import merge, project, rotate, zeros
from remanence.memory.softmax import SoftmaxWeights
from remanence.ops import layer_steps, steps
from remanence.ops.slots import slots as attend_to_slots
from remanence.state import State, tree_map


@card(
    "liger",
    kind="memory",
    says="Softmax attention's weights as a gated recurrence beside a short window, without a new parameter.",
    source="arXiv:2503.01496",
    small={"dim": 8, "heads": 4, "kv_heads": 2, "window": 5},
    parents=("softmax", "gla", "sliding-window"),
    change="the decay is pooled from the keys, so that a taught softmax layer needs no new weights",
)
class Liger(SoftmaxWeights):
    r"""$y = W_o(a\, y^{lin} + b\, y^{win})$: linear attention with a decay made of the keys, and windowed attention.

    Both read the same q, k and v. In the linear branch q and k pass a softmax over their features, without rotation,
    and $g = \log σ(k)/16$ decays each key feature. `gate` names the recurrence: "gla" is this one, "hgrn2" writes with
    $1 - e^g$ for the key, "gsa" pools g to as many slots (the pool runs over features, never over time).

    Args:
        dim, heads, kv_heads, base: those of `SoftmaxAttention`, whose parameters it has, by the same names.
        window: tokens that the softmax branch sees.
        mix: (a, b).
        gate: "gla", "hgrn2" or "gsa".
        slots: of "gsa"; dim/heads by default.

    Shapes: x and y [batch, time, dim], K = dim/heads; state {"S": [batch, kv_heads, K, K]}, or for "gsa" {"K", "V":
        [batch, kv_heads, slots, K]}, and "window": {"k", "v": [batch, kv_heads, window − 1, K], "seen": int64 [batch]}.
    Raises: `ValueError` as `SoftmaxAttention`, or if `window` or `slots` < 1; `UnknownName` for the gate;
        `ShapeError`, `StateError` from `forward`.
    Source: Liger (2025), arXiv:2503.01496.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        kv_heads: int | None = None,
        base: float = 10000.0,
        window: int = 64,
        mix: tuple[float, float] = (0.5, 0.5),
        gate: str = "gla",
        slots: int | None = None,
    ):
        super().__init__(dim, heads=heads, kv_heads=kv_heads, base=base)
        if gate not in ("gla", "hgrn2", "gsa"):
            raise unknown("gate", gate, ("gla", "hgrn2", "gsa"))
        if window < 1 or (slots is not None and slots < 1):
            raise ValueError(f"Liger: window and slots must be at least 1, got window={window}, slots={slots}.")
        self.window, self.mix, self.gate, self.slots = window, mix, gate, slots or self.head_dim

    def initial_state(self, batch: int) -> State:
        K, like = self.head_dim, self.out.weight
        k = zeros(like, batch, self.kv_heads, self.window - 1, K)
        near = {"k": k, "v": k.clone(), "seen": k.new_zeros(batch, dtype=torch.int64)}
        if self.gate != "gsa":
            return {"S": zeros(like, batch, self.kv_heads, K, K), "window": near}
        slots = zeros(like, batch, self.kv_heads, self.slots, K)
        return {"K": slots, "V": slots.clone(), "window": near}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        plain, near = self.gate == "gla" and self.heads == self.kv_heads, state["window"]
        if x.shape[1] == 1 and plain and steps.worth(state["S"], x, near["k"], near["v"]):
            return self._token(self.projected(x), **state)
        # heads of a group have equal memories: one copy is kept
        state = tree_map(lambda t: self.per_query(t) if t.ndim > 1 else t, state)
        q, k, v = self.project(x)
        k, v = self.per_query(k), self.per_query(v)
        near, far = state["window"], {name: state[name] for name in state if name != "window"}
        lin, far = self.recur(q, k, v, far)
        q, k = (rotate(part, near["seen"], self.frequencies) for part in (q, k))
        win, _, near = ops.window_attention(q, k, v, window=self.window, state=near)
        a, b = self.mix
        kept = tree_map(lambda t: t[:, :: self.heads // self.kv_heads] if t.ndim > 1 else t, {**far, "window": near})
        return self.out(merge(a * lin + b * win).to(x.dtype)), kept

    def _token(self, qkv: Tensor, S: Tensor, window: State) -> tuple[Tensor, State]:
        lin, S, _ = layer_steps.outer_token(qkv, S, features=steps.SOFTMAX, scale=self.mix[0], temper=16.0)
        win = layer_steps.attention_token(qkv, window["k"], window["v"], window["seen"], self.frequencies)
        near = {"k": win.keys, "v": win.values, "seen": win.position}
        return project(self.out, torch.add(lin, win.y, alpha=self.mix[1])), {"S": S, "window": near}

    def recur(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """The linear branch: all [B, heads, T, K]."""
        pool = F.adaptive_avg_pool1d(torch.eye(self.head_dim).to(k), self.slots) if self.gate == "gsa" else None
        log_decay = F.logsigmoid(k if pool is None else k @ pool) / 16
        query, key, taken = q.softmax(-1), k.softmax(-1), -torch.expm1(log_decay)
        if self.gate == "gsa":
            return attend_to_slots(query, key, v, taken, log_decay, state)
        return ops.linear_attention(query, taken if self.gate == "hgrn2" else key, v, log_decay, state)
