"""Attention to the nearest tokens before, near or spread out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import merge, per_head, project, rotate, split, zeros
from remanence.ops import layer_steps, steps
from remanence.state import State


@card(
    "neighborhood-attention",
    kind="memory",
    says="Softmax attention to the nearest tokens before, which a dilation spreads over a longer past.",
    source="arXiv:2403.04690",
    small={"dim": 8, "heads": 2, "window": 3, "dilation": 2},
    parents=("sliding-window",),
    change="a dilation between the neighbours, and any number of axes",
)
class NeighborhoodAttention(Memory):
    r"""Causal softmax attention to t, t − δ, t − 2δ, … : `window` tokens, δ = `dilation` apart, with rotary positions.

    This is the one axis that can be read as a stream. `remanence.ops.neighborhood.neighborhood_attention` has two and
    three axes, and those that look ahead, for inputs that are whole.

    Args:
        dim: features of input and output; a multiple of 2·heads.
        heads: independent attentions.
        window: tokens that each token sees, itself included.
        dilation: distance between them; 1 is `WindowAttention`.
        base: the slowest rotary phase turns once in about 2π·base tokens.

    Shapes: x and y [batch, time, dim];
        state {"k", "v": [batch, heads, (window − 1)·dilation, dim/heads], "position": int64 [batch]}.
    Raises: `ValueError` if 2·heads does not divide `dim`, or `window` or `dilation` < 1; `ShapeError`, `StateError`
        from `forward`.
    Source: Faster Neighborhood Attention (2024), arXiv:2403.04690.
    """

    def __init__(self, dim: int, *, heads: int = 4, window: int = 64, dilation: int = 1, base: float = 10000.0):
        super().__init__()
        if window < 1 or dilation < 1:
            raise ValueError(
                f"NeighborhoodAttention: window and dilation must be at least 1, got {window} and {dilation}."
            )
        self.dim, self.heads, self.window, self.dilation = dim, heads, window, dilation
        self.head_dim = per_head("NeighborhoodAttention", dim, heads, multiple=2)
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.out = Linear(dim, dim, bias=False)
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        self.frequencies = base**-pairs  # not a buffer: `.float()` would round it

    def initial_state(self, batch: int) -> State:
        k = zeros(self.out.weight, batch, self.heads, (self.window - 1) * self.dilation, self.head_dim)
        return {"k": k, "v": k.clone(), "position": k.new_zeros(batch, dtype=torch.int64)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        qkv = project(self.qkv, x)
        if x.shape[1] == 1 and steps.worth(state["k"], x, state["v"]):
            seen = layer_steps.attention_token(
                qkv, state["k"], state["v"], state["position"], self.frequencies, reach=self.window - 1,
                stride=self.dilation,
            )  # fmt: skip
            return project(self.out, seen.y), {"k": seen.keys, "v": seen.values, "position": seen.position}
        q, k, v = (split(part, self.heads) for part in qkv.chunk(3, dim=-1))
        q, k = (rotate(part, state["position"], self.frequencies) for part in (q, k))
        keep, T = state["k"].shape[2], x.shape[1]
        after = {name: torch.cat([state[name], part], 2)[:, :, T : T + keep] for name, part in (("k", k), ("v", v))}
        # tokens of one residue see only each other: as many rows as residues, with an ordinary window each
        residue = torch.arange(self.dilation, device=x.device)
        seen = ((state["position"] + residue[:, None]) // self.dilation).flatten()
        past = {"k": self._by_residue(state["k"]), "v": self._by_residue(state["v"]), "seen": seen}
        inputs = (self._by_residue(part) for part in (q, k, v))
        y, _, _ = ops.window_attention(*inputs, window=self.window, state=past)
        y = y.unflatten(0, (self.dilation, -1)).permute(1, 2, 3, 0, 4).flatten(2, 3)[:, :, :T]
        return self.out(merge(y).to(x.dtype)), {**after, "position": state["position"] + T}

    def _by_residue(self, x: Tensor) -> Tensor:
        """[B, H, T, K] to [δ·B, H, ⌈T/δ⌉, K]; zeros at the end, which no token before them sees, fill up T."""
        whole = F.pad(x, (0, 0, 0, -x.shape[2] % self.dilation))
        return whole.unflatten(2, (-1, self.dilation)).permute(3, 0, 1, 2, 4).flatten(0, 1)
