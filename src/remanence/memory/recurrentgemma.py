"""RecurrentGemma: Griffin's pattern of two recurrent blocks and one of local attention, as it was released."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.errors import unknown
from remanence.memory.attention import WindowAttention
from remanence.memory.base import Memory
from remanence.memory.griffin import Griffin
from remanence.memory.linear import Linear
from remanence.memory.parts import RMSNorm
from remanence.state import State

PATTERN = ("recurrent", "recurrent", "attention")
HEAD = 256
"""Features of a head in the released models."""


def _fewest(dim: int) -> int:
    """Of heads no wider than the released models', whose rotated half comes in pairs."""
    if dim < 1 or dim % 4:
        raise ValueError(f"RecurrentGemma: dim must be a positive multiple of 4 unless heads are given, got dim={dim}.")
    return next(n for n in range(-(-dim // HEAD), dim // 4 + 1) if dim % (4 * n) == 0)


class GatedMLP(nn.Module):
    """W_o(GeLU(W_g x) ⊙ W_i x) with biases. [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.inward = Linear(dim, 2 * hidden)
        self.out = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.inward(x).chunk(2, dim=-1)
        return self.out(F.gelu(gate, approximate="tanh") * value)


class ResidualBlock(nn.Module):
    """x + memory(norm x), then x + MLP(norm x)."""

    def __init__(self, memory: Memory, hidden: int, eps: float):
        super().__init__()
        self.memory_norm, self.mixer_norm = (RMSNorm(memory.dim, eps=eps) for _ in range(2))
        self.memory, self.mixer = memory, GatedMLP(memory.dim, hidden)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.memory(self.memory_norm(x), state)
        x = x + y
        return x + self.mixer(self.mixer_norm(x)), state


@card(
    "recurrentgemma",
    kind="memory",
    says="The released Griffin models between embedding and logits: two recurrent blocks, one of local attention.",
    source="arXiv:2404.07839",
    small={"dim": 8, "layers": 3, "heads": 2, "window": 5},
    parents=("griffin", "sliding-window"),
    change="a fixed configuration, trained and released",
)
class RecurrentGemma(Memory):
    r"""The trunk of a RecurrentGemma model: residual blocks of `Griffin` or `WindowAttention`, each with a GeGLU.

    A language model of it reads embeddings times √dim, and its logits are 30·tanh(E·y/30) with the same embeddings E.
    The defaults are the 2B model at `dim=2560`; the 9B model has `dim=4096, layers=38`.

    Args:
        dim: features of the stream.
        layers: residual blocks, whose kinds repeat `pattern`.
        heads: of attention, and blocks of the recurrent gates' maps; by default as few as leave a head at most the 256
            features of the released models.
        kv_heads: heads of keys and values.
        width: features of the recurrence; `dim` by default.
        hidden: of the GeGLU; 3·dim by default.
        window: tokens that attention sees, itself included (see docs/outer-products.md on the published codes).
        conv: tokens that the convolutions see.
        pattern: kinds of blocks, "recurrent" or "attention".
        eps: of the norms, whose weights are 1 at the start (checkpoints store them less 1).

    Shapes: x and y [batch, time, dim]; state {"0": ..., "1": ...}, one per block.
    Raises: `ValueError` on arguments that `Griffin` or `WindowAttention` refuse; `UnknownName` on a pattern of other
        kinds; `ShapeError`, `StateError` from `forward`.
    Source: RecurrentGemma (2024), arXiv:2404.07839.
    """

    def __init__(
        self,
        dim: int,
        *,
        layers: int = 26,
        heads: int | None = None,
        kv_heads: int = 1,
        width: int | None = None,
        hidden: int | None = None,
        window: int = 2048,
        conv: int = 4,
        pattern: Sequence[str] = PATTERN,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.dim = dim
        many = heads or _fewest(dim)

        def block(kind: str) -> Memory:
            if kind == "recurrent":
                return Griffin(dim, width=width, heads=many, conv=conv)
            if kind == "attention":
                return WindowAttention(dim, heads=many, kv_heads=kv_heads, window=window, rotary=0.5, out_bias=True)
            raise unknown("kind of block", kind, PATTERN)

        kinds = [pattern[i % len(pattern)] for i in range(layers)]
        self.blocks = nn.ModuleList(ResidualBlock(block(kind), hidden or 3 * dim, eps) for kind in kinds)
        self.norm = RMSNorm(dim, eps=eps)

    @property
    def memories(self) -> list[Memory]:
        """The memories of the blocks, first to last."""
        return [block.memory for block in self.blocks if isinstance(block, ResidualBlock)]

    def initial_state(self, batch: int) -> State:
        return {str(i): memory.initial_state(batch) for i, memory in enumerate(self.memories)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        after: State = {}
        for i, block in enumerate(self.blocks):
            x, after[str(i)] = block(x, state[str(i)])
        return self.norm(x), after
