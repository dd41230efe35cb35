"""Retrieval beside a recurrence: what the state has lost is looked up in the text itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import catalogue
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import per_head, wide, zeros
from remanence.state import State


@card(
    "resona",
    kind="memory",
    says="Any memory with a side branch that looks up passages of its own context and attends to them.",
    source="arXiv:2503.22913",
    small={"dim": 8, "memory": "gla", "arguments": {"heads": 2, "rank": 3}, "chunk": 3, "top": 1, "budget": 4},
)
class Resona(Memory):
    r"""$o = h + σ(W_g h) ⊙ \mathrm{Attention}(x, \text{what was found})$, where $h$ is the output of any memory.

    The context is cut into chunks, each known by the mean of its tokens. When a chunk ends, those earlier ones that it
    resembles most (cosine) are found, and the tokens of the next chunk attend to them and to the chunks that
    followed them. So nothing of an open chunk is ever looked up, and one search serves a whole chunk.

    Args:
        dim: features of input and output.
        memory: the name of a memory, or one of width `dim`.
        arguments: of the named memory.
        chunk: tokens of a passage.
        top: passages that are found, each with the one that followed it.
        budget: chunks that are kept, the oldest dropped first; what is kept costs budget·chunk·dim numbers.
        heads: of the attention.

    Shapes: x and y [batch, time, dim]; state {"memory": that of the memory, "kept": [batch, budget, chunk, dim], latest
        last, "means": [batch, budget, dim], of what is kept, "open": [batch, chunk, dim], "seen": int64 [batch]}.
    Raises: `UnknownName` for a memory that there is not; `ValueError` if `heads` does not divide `dim`, a memory has
        another width, or chunk, top < 1, budget < 2; `ShapeError`, `StateError` from `forward`.
    Source: Resona (2025), arXiv:2503.22913, whose code is not published: sizes, what resembles what, and the gate are
        this library's choice. The gate starts near 0.02, which leaves a trained memory almost as it was.
    """

    def __init__(
        self,
        dim: int,
        *,
        memory: str | Memory = "gated-deltanet",
        arguments: Mapping[str, Any] | None = None,
        chunk: int = 64,
        top: int = 2,
        budget: int = 64,
        heads: int = 4,
    ):
        super().__init__()
        if chunk < 1 or top < 1 or budget < 2:
            raise ValueError(
                f"Resona: chunk and top must be at least 1, budget at least 2, got {chunk}, {top}, {budget}."
            )
        self.memory = (
            catalogue.find(memory, "memory").make(dim, **(arguments or {})) if isinstance(memory, str) else memory
        )
        if self.memory.dim != dim:
            raise ValueError(f"Resona: the memory must have width {dim}, got {self.memory.dim}.")
        self.dim, self.chunk, self.top, self.budget, self.heads = dim, chunk, top, budget, heads
        per_head("Resona", dim, heads)
        self.query, self.key, self.value, self.out = (Linear(dim, dim, bias=False) for _ in range(4))
        self.gate = Linear(dim, dim)
        nn.init.constant_(self.gate.bias, -4.0)

    def initial_state(self, batch: int) -> State:
        kept = zeros(self.out.weight, batch, self.budget, self.chunk, self.dim)
        return {
            "memory": self.memory.initial_state(batch),
            "kept": kept,
            "means": kept[:, :, 0].clone(),
            "open": kept[:, 0].clone(),
            "seen": torch.zeros(batch, dtype=torch.int64, device=kept.device),
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        h, inner = self.memory(x, state["memory"])
        (B, T, _), C = x.shape, self.chunk
        seen, kept = state["seen"], state["kept"]
        phase = seen % C
        ended = (phase + T) // C  # chunks of this call, by row
        count = 1 + max(ended.tolist(), default=0)
        grid = self._grid(wide(x), state["open"], phase, count)
        means = torch.cat([state["means"], grid.detach().mean(2)], 1)
        if T:
            found, there = self._find(kept, grid, means, (seen // C).clamp(max=self.budget))
            h = h + self.gate(h).sigmoid() * self._attend(x, found, there, phase)
        rows = torch.arange(B, device=x.device)
        if count > 1:
            last = ended[:, None] + torch.arange(self.budget, device=x.device)
            kept = torch.cat([kept, grid], 1)[rows[:, None], last]
            means = means[rows[:, None], last]
        else:
            means = state["means"]
        return h, {"memory": inner, "kept": kept, "means": means, "open": grid[rows, ended], "seen": seen + T}

    def _grid(self, x: Tensor, begun: Tensor, phase: Tensor, count: int) -> Tensor:
        """The open chunk and what follows it, in chunks [batch, count, chunk, dim], zero where nothing is read yet."""
        (B, T, D), C = x.shape, self.chunk
        slot, phase = torch.arange(count * C, device=x.device), phase[:, None]
        source = torch.where(slot < phase, slot, C + slot - phase)
        there = slot < phase + T
        text = torch.cat([begun, x], 1)
        grid = text.gather(1, source.clamp(max=C + T - 1)[..., None].expand(-1, -1, D))
        return torch.where(there[..., None], grid, 0).view(B, count, C, D)

    def _find(self, kept: Tensor, grid: Tensor, means: Tensor, stored: Tensor) -> tuple[Tensor, Tensor]:
        """What each new chunk may look at: tokens [batch, new, 2·top, chunk, dim], and which passages there are."""
        B, N = means.shape[:2]
        new = torch.arange(self.budget, N, device=means.device)
        known = F.normalize(means, dim=-1)
        likeness = known[:, new - 1] @ known.mT
        passage = torch.arange(N, device=means.device)
        first = torch.maximum(new[:, None] - self.budget, (self.budget - stored)[:, None, None])
        hidden = (passage < first) | (passage > new[:, None] - 2)
        best = likeness.masked_fill(hidden, -torch.inf).topk(min(self.top, N), dim=-1)
        place = torch.stack([best.indices, (best.indices + 1).clamp(max=N - 1)], -1).flatten(2)
        row = torch.arange(B, device=means.device)[:, None, None]
        if len(new) > 2:
            found = torch.cat([kept, grid], 1)[row, place]
        else:  # a few tokens: what is kept is not copied for them
            old, late = kept[row, place.clamp(max=self.budget - 1)], grid[row, (place - self.budget).clamp(min=0)]
            found = torch.where((place < self.budget)[..., None, None], old, late)
        return found, best.values.isfinite().repeat_interleave(2, -1)

    def _attend(self, x: Tensor, found: Tensor, there: Tensor, phase: Tensor) -> Tensor:
        """Attention of each token to what its chunk found. Keys and values are never made: their maps are moved over
        to the queries and to the mean of the tokens, which are fewer."""
        (B, T, D), C, H, P = x.shape, self.chunk, self.heads, found.shape[1]
        place = phase[:, None] + torch.arange(T, device=x.device)
        if T < C:  # every token against every chunk's finds: there are at most two
            token = torch.arange(T, device=x.device).expand(B, P, T)
            answer = place // C * T + torch.arange(T, device=x.device)
        else:
            token = torch.arange(P * C, device=x.device).view(P, C) - phase[:, None, None]
            token, answer = token.clamp(0, T - 1), place
        W_k, W_v = (wide(W.weight).unflatten(0, (H, -1)) for W in (self.key, self.value))
        q = wide(self.query(x)).unflatten(-1, (H, -1)) * (D // H) ** -0.5
        q = torch.einsum("bthk,hkd->bthd", q, W_k)[torch.arange(B, device=x.device)[:, None, None], token]
        text = found.flatten(2, 3)
        scores = torch.einsum("bpwhd,bpjd->bpwhj", q, text)
        visible = there.repeat_interleave(C, -1)[:, :, None, None]
        weight = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible
        read = torch.einsum("bpwhj,bpjd->bpwhd", weight, text).flatten(1, 2)
        read = read.gather(1, answer[..., None, None].expand(-1, -1, H, D))
        return self.out(torch.einsum("bthd,hkd->bthk", read, W_v).flatten(2).to(x.dtype))
