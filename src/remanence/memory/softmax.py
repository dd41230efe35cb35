"""Causal softmax attention to everything that was read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.errors import StateError, expect
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import merge, per_head, project, split, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.ops.dispatch import compiled
from remanence.ops.rotary import turned_heads
from remanence.ops.window import attend
from remanence.state import State, check_state, fits

BLOCK = 64
"""Tokens by which the state grows, so that rows of different lengths can lie side by side."""


class SoftmaxWeights(Memory):
    """What softmax attention and its linearisations share: the parameters, and how queries share keys and values."""

    def __init__(self, dim: int, *, heads: int = 4, kv_heads: int | None = None, base: float = 10000.0):
        super().__init__()
        name = type(self).__name__
        self.dim, self.heads, self.kv_heads = dim, heads, heads if kv_heads is None else kv_heads
        self.head_dim = per_head(name, dim, heads, multiple=2)
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ValueError(f"{name}: kv_heads must divide heads, got kv_heads={kv_heads}, heads={heads}.")
        self.qkv = Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = Linear(dim, dim, bias=False)
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        self.frequencies = base**-pairs  # not a buffer: `.float()` would round it

    def projected(self, x: Tensor) -> Tensor:
        """Queries, keys and values side by side [B, T, (heads + 2 kv_heads) K], before any rotation."""
        return project(self.qkv, x)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, heads, T, K], keys and values [B, kv_heads, T, K], before any rotation."""
        widths = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = self.projected(x).split(widths, dim=-1)
        return split(q, self.heads), split(k, self.kv_heads), split(v, self.kv_heads)

    def per_query(self, x: Tensor) -> Tensor:
        """Keys or values of each group of heads, for each of its heads: [B, kv_heads, ...] to [B, heads, ...]."""
        return x.repeat_interleave(self.heads // self.kv_heads, 1)


@card(
    "softmax",
    kind="memory",
    says="Full causal softmax attention with rotary positions: forgets nothing, and keeps everything.",
    source="arXiv:1706.03762",
    small={"dim": 8, "heads": 2},
    exempt={"constant state": "full attention keeps a key and a value for every token that it has read"},
)
class SoftmaxAttention(SoftmaxWeights):
    r"""$y_t = W_o \sum_{j ≤ t} \mathrm{softmax}_j(q_t · k_j / \sqrt K) v_j$.

    Keys are kept as they were turned by their absolute position (rotary, arXiv:2104.09864). The state grows by blocks
    of 64 tokens, and each row's tokens lie at its end.

    Args:
        dim: features of input and output.
        heads: independent attentions, each of an even number of features.
        kv_heads: how many heads have keys and values of their own; divides `heads` (grouped queries,
            arXiv:2305.13245), and all of them by default.
        base: the slowest rotary phase turns once in about 2π·base tokens.

    Shapes: x and y [batch, time, dim]; state {"keys", "values": [batch, kv_heads, room, dim/heads], "position": int64
        [batch]}, where `room` is the longest row's tokens, rounded up to a multiple of 64.
    Raises: `ValueError` if 2·heads does not divide `dim`, or kv_heads not heads; `ShapeError`, `StateError` from
        `forward`.
    Source: Attention Is All You Need (2017), arXiv:1706.03762.
    """

    def initial_state(self, batch: int) -> State:
        k = zeros(self.out.weight, batch, self.kv_heads, 0, self.head_dim)
        return {"keys": k, "values": k.clone(), "position": k.new_zeros(batch, dtype=torch.int64)}

    def begin(self, x: Tensor, state: State | None) -> State:
        keys = None if state is None else state.get("keys")
        room = keys.shape[2] if isinstance(keys, Tensor) and keys.ndim == 4 else 0
        held = (self.kv_heads, room, self.head_dim), "floating"
        form = {"keys": held, "values": held, "position": ((), "integer")}
        if state is not None and x.ndim == 3 and x.shape[2] == self.dim and fits(state, form, x.shape[0]):
            return state
        name = type(self).__name__
        expect(name, "x", x, "batch time dim", dim=self.dim, hint="One token per row? Pass x[:, None].")
        fresh = self.initial_state(x.shape[0])
        if state is None:
            return fresh
        grown = {n: t.new_zeros(*t.shape[:2], room, t.shape[3]) for n, t in fresh.items() if t.ndim == 4}
        check_state(name, state, {**fresh, **grown})
        return state

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if (T := x.shape[1]) == 0:
            return x, state
        position, room = state["position"], state["keys"].shape[2]
        if (most := int(position.max())) > room:
            raise StateError(f"{type(self).__name__}: a state of {room} tokens cannot be at position {most}.")
        qkv, room_after = self.projected(x), max(room, -(-(most + T) // BLOCK) * BLOCK)
        if T == 1 and steps.worth(state["keys"], x, state["values"]):
            held = state["keys"], state["values"], position
            seen = layer_steps.attention_token(qkv, *held, self.frequencies, room=room_after)
            after = {"keys": seen.keys, "values": seen.values, "position": seen.position}
            return self.readout(seen.y, x), after
        groups = self.heads, self.kv_heads, self.kv_heads
        q, k, v = turned_heads(wide(qkv), groups, position, self.frequencies)
        keys, values = (torch.cat([state[n], new], 2) if room else new for n, new in (("keys", k), ("values", v)))
        after = {"keys": _last(keys, room_after), "values": _last(values, room_after), "position": position + T}
        y = attend(q, keys, values, position)[0] if T > 1 and compiled(q) else self._fused(q, keys, values, position)
        return self.readout(merge(y).to(x.dtype), x), after

    def _fused(self, q: Tensor, keys: Tensor, values: Tensor, position: Tensor) -> Tensor:
        """PyTorch's own attention, on any device."""
        T, room = q.shape[2], keys.shape[2] - q.shape[2]
        seen, fresh = None, not bool(position.any())
        if not fresh:
            slot, row = torch.arange(room + T, device=q.device), torch.arange(T, device=q.device)[:, None]
            seen = (slot <= room + row) & (slot >= (room - position)[:, None, None])
            seen = seen[:, None]
        k, v = (self.per_query(part[:, :, room:] if fresh else part) for part in (keys, values))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=fresh)

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        """What attention found, projected to `dim`. Shapes: [batch, time, heads·head_dim], x as in `forward`."""
        return project(self.out, y)

    def level(self, states: Sequence[State]) -> Sequence[State]:
        most = max(s["keys"].shape[2] for s in states)
        return [with_room(s, most) for s in states]


def with_room(state: State, room: int) -> State:
    """The same state with room for at least so many tokens, as `concat` needs of rows that are to lie side by side."""
    room = max(room, state["keys"].shape[2])
    return {**state, **{name: _last(state[name], room) for name in ("keys", "values")}}


def _last(x: Tensor, room: int) -> Tensor:
    """The last `room` tokens of [B, H, T, K], with zeros before them where there are fewer."""
    return x[:, :, x.shape[2] - room :].contiguous() if x.shape[2] >= room else F.pad(x, (0, 0, room - x.shape[2], 0))
