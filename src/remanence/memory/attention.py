"""Softmax attention over a sliding window, behind the same interface as the recurrent memories."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.parts import merge, per_head, rotate, split, zeros
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
        dim: features of input and output; a multiple of 2·heads.
        heads: independent attentions.
        window: tokens that each token sees, at least 1.
        base: the slowest rotary phase turns once in about 2π·base tokens.

    Shapes: x and y [batch, time, dim]; state {"k", "v": [batch, heads, window - 1, dim/heads], "seen": int64 [batch]}.
    Raises: `ValueError` if 2·heads does not divide `dim` or `window` < 1; `ShapeError`, `StateError` from `forward`.
    Source: Attention Is All You Need (2017), arXiv:1706.03762.
    """

    def __init__(self, dim: int, *, heads: int = 4, window: int = 128, base: float = 10000.0):
        super().__init__()
        if window < 1:
            raise ValueError(f"WindowAttention: window must be at least 1, got {window}.")
        self.dim, self.heads, self.window = dim, heads, window
        self.head_dim = per_head("WindowAttention", dim, heads, multiple=2)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        self.frequencies = base**-pairs  # not a buffer: `.float()` would round it

    def initial_state(self, batch: int) -> State:
        k = zeros(self.out.weight, batch, self.heads, self.window - 1, self.head_dim)
        return {"k": k, "v": k.clone(), "seen": k.new_zeros(batch, dtype=torch.int64)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        q, k, v = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = (rotate(part, state["seen"], self.frequencies) for part in (q, k))
        y, _, state = ops.window_attention(q, k, v, window=self.window, state=state)
        return self.out(merge(y).to(x.dtype)), state
