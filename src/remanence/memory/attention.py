"""Softmax attention over a sliding window, behind the same interface as the recurrent memories."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import merge, per_head, project, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.ops.rotary import turned_heads
from remanence.state import State


@card(
    "sliding-window",
    kind="memory",
    says="Softmax attention to the last tokens of a window, with rotary positions: exact, but short.",
    source="arXiv:1706.03762",
    small={"dim": 8, "heads": 2, "window": 5},
)
class WindowAttention(Memory):
    r"""Causal softmax attention: token t sees the tokens in (t - window, t], itself included.

    Keys are kept as they were turned by their absolute position (rotary, arXiv:2104.09864), in a window of fixed size.

    Args:
        dim: features of input and output.
        heads: independent attentions.
        window: tokens that each token sees, at least 1.
        base: the slowest rotary phase turns once in about 2π·base tokens.
        kv_heads: heads of keys and values, each shared by heads/kv_heads of queries (arXiv:2305.13245); `heads` by
            default. Only these are kept.
        head_dim: features per head; dim/heads by default, which must then be whole.
        rotary: share of each head's features that is turned, the first ones.
        bias, out_bias: whether queries, keys and values, and the output, have biases.

    Shapes: x and y [batch, time, dim];
        state {"k", "v": [batch, kv_heads, window - 1, head_dim], "seen": int64 [batch]}.
    Raises: `ValueError` on arguments out of range; `ShapeError`, `StateError` from `forward`.
    Source: Attention Is All You Need (2017), arXiv:1706.03762.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        window: int = 128,
        base: float = 10000.0,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: float = 1.0,
        bias: bool = False,
        out_bias: bool = False,
    ):
        super().__init__()
        self.dim, self.heads, self.window, self.kv_heads = dim, heads, window, kv_heads or heads
        self.head_dim = head_dim or per_head("WindowAttention", dim, heads, multiple=2)
        self.turned = int(rotary * self.head_dim)
        if window < 1:
            raise ValueError(f"WindowAttention: window must be at least 1, got {window}.")
        if heads % self.kv_heads:
            raise ValueError(f"WindowAttention: kv_heads must divide heads = {heads}, got {kv_heads}.")
        if not 0 <= rotary <= 1 or self.turned % 2:
            given = f"rotary={rotary}, head_dim={self.head_dim}"
            raise ValueError(f"WindowAttention: rotary must be a share in [0, 1] of an even number, got {given}.")
        self.qkv = Linear(dim, (heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.out = Linear(heads * self.head_dim, dim, bias=out_bias)
        pairs = torch.arange(0, self.turned, 2, dtype=torch.float64) / max(self.turned, 1)
        self.frequencies = base**-pairs  # not a buffer: `.float()` would round it

    def initial_state(self, batch: int) -> State:
        k = zeros(self.out.weight, batch, self.kv_heads, self.window - 1, self.head_dim)
        return {"k": k, "v": k.clone(), "seen": k.new_zeros(batch, dtype=torch.int64)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        qkv = project(self.qkv, x)
        if x.shape[1] == 1 and steps.worth(state["k"], x, state["v"]):
            seen = layer_steps.attention_token(qkv, state["k"], state["v"], state["seen"], self.frequencies)
            return project(self.out, seen.y), {"k": seen.keys, "v": seen.values, "seen": seen.position}
        groups = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = turned_heads(wide(qkv), groups, state["seen"], self.frequencies)
        y, _, after = ops.window_attention(q, k, v, window=self.window, state=state)
        return self.out(merge(y).to(x.dtype)), after
