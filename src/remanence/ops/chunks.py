"""Cutting sequences into chunks, and what decay does within one: shared by the matrix memories.

Axes: B batch, H heads, T time; R rows (batch and heads together), n chunks of C tokens, K key features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.ops.decay import cumulative

CACHED_CHUNKS = 32
"""How many chunks are handled together on a CPU: enough for full matrix speed, few enough for its cache."""


@dataclass(frozen=True)
class Piece:
    """Tokens `first` to `last`, as chunks of `size`; the last chunk of all is filled up with zeros."""

    first: int
    last: int
    size: int

    def cut(self, x: Tensor) -> Tensor:
        """[B, H, T, ...] to [R, n, C, ...]."""
        x = x[:, :, self.first : self.last]
        if missing := -x.shape[2] % self.size:
            x = F.pad(x, (0, 0) * (x.ndim - 3) + (0, missing))
        return x.reshape(x.shape[0] * x.shape[1], -1, self.size, *x.shape[3:])

    def put(self, x: Tensor, chunks: Tensor) -> None:
        """The inverse of `cut`: write chunks to their place in x."""
        tokens = chunks.view(*x.shape[:2], -1, *x.shape[3:])
        x[:, :, self.first : self.last] = tokens[:, :, : self.last - self.first]


def pieces(x: Tensor, size: int) -> Iterator[Piece]:
    """The pieces of [B, H, T, ...] whose intermediate results fit a CPU's cache; elsewhere the whole."""
    B, H, T = x.shape[:3]
    together = max(1, CACHED_CHUNKS // max(1, B * H)) if x.device.type == "cpu" else -(-T // size)
    for first in range(0, T, together * size):
        yield Piece(first, min(first + together * size, T), size)


class ChunkDecay:
    """What a log decay g does within chunks: None, per head [R, n, C], or per key feature [R, n, C, K]."""

    def __init__(self, g: Tensor | None, like: Tensor):
        self.per_key = g is not None and g.ndim == 4
        self.sums: Tensor | None = None
        if g is None:
            return
        self.sums = G = cumulative(g, 2)
        wide = G if self.per_key else G[..., None]
        self._from_start = wide.exp().to(like.dtype)
        self._to_end = (wide[:, :, -1:] - wide).exp().to(like.dtype)
        self._over = self._from_start[:, :, -1, :, None]
        if not self.per_key:
            # clamped instead of masked before exp: above the diagonal the exponent is positive
            difference = (G[..., :, None] - G[..., None, :]).to(like.dtype)
            self._between = difference.clamp_(max=0).exp_().tril_()

    def from_start(self, x: Tensor) -> Tensor:
        """x_i ⊙ e^{G_i}: as seen from the chunk's start."""
        return x if self.sums is None else x * self._from_start

    def to_end(self, x: Tensor) -> Tensor:
        """x_i ⊙ e^{G_C − G_i}: as seen from the chunk's end."""
        return x if self.sums is None else x * self._to_end

    def over(self, c: int, S: Tensor, new: Tensor) -> Tensor:
        """Diag(e^{G_C}) S + new over chunk c."""
        return S + new if self.sums is None else torch.addcmul(new, self._over[:, c], S)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """P_ij = Σ_d q_id k_jd e^{G_id − G_jd} for j ≤ i, else 0."""
        if self.per_key:
            return self._scores_per_key(q, k)
        P = q @ k.mT
        return P.tril_() if self.sums is None else P.mul_(self._between)

    def scores_backward(self, d_P: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients for q and k from that of P."""
        if self.per_key:
            return self._scores_per_key_backward(d_P, q, k)
        d_P = d_P.tril_() if self.sums is None else d_P.mul_(self._between)
        return d_P @ k, d_P.mT @ q

    def gradient(self, read_minus_written: Tensor, carried: Tensor) -> Tensor:
        """The gradient of g, from q ⊙ ∂q − k ⊙ ∂k [R, n, C, K] and S' ⊙ ∂S' [R, n, K, V].

        G_i enters only as q_i e^{G_i} and k_i e^{−G_i}, and the last one also as the decay of S'. A token's g is
        in its own G and in all later ones.
        """
        if self.per_key:
            d_G, d_end = read_minus_written, carried.sum(-1)
        else:
            d_G, d_end = read_minus_written.sum(-1), carried.sum((-2, -1))
        later = d_G.flip(2).cumsum(2).flip(2)
        return later.add_(d_end[:, :, None])

    def _borders(self, q: Tensor, k: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """For s = 1, 2, 4, …: late queries and early keys of blocks of 2s tokens, seen from the blocks' middle.

        Seen from there neither factor exceeds 1, and every pair j < i has exactly one such block.
        """
        assert self.sums is not None
        C = q.shape[2]
        s = 1
        while s < C:
            G, q_s, k_s = (x.unflatten(2, (C // (2 * s), 2, s)) for x in (self.sums, q, k))
            middle = G[:, :, :, 0, -1:]
            late = (G[:, :, :, 1] - middle).exp().to(q.dtype)
            early = (middle - G[:, :, :, 0]).exp().to(q.dtype)
            yield s, q_s[:, :, :, 1] * late, k_s[:, :, :, 0] * early, late, early
            s *= 2

    @staticmethod
    def _blocks(P: Tensor, s: int) -> Tensor:
        """The blocks of P [R, n, C, C] between late queries and early keys, as a view [R, n, blocks, s, s]."""
        blocks = P.shape[-1] // (2 * s)
        inner = P.unflatten(3, (blocks, 2, s)).unflatten(2, (blocks, 2, s))
        return inner[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)

    def _scores_per_key(self, q: Tensor, k: Tensor) -> Tensor:
        P = torch.diag_embed((q * k).sum(-1))
        for s, late, early, _, _ in self._borders(q, k):
            self._blocks(P, s).copy_(late @ early.mT)
        return P

    def _scores_per_key_backward(self, d_P: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        diagonal = d_P.diagonal(dim1=2, dim2=3)[..., None]
        d_q, d_k = diagonal * k, diagonal * q
        for s, late, early, late_decay, early_decay in self._borders(q, k):
            d_block = self._blocks(d_P, s).contiguous()
            halves = (q.shape[2] // (2 * s), 2, s)
            d_q.unflatten(2, halves)[:, :, :, 1] += (d_block @ early) * late_decay
            d_k.unflatten(2, halves)[:, :, :, 0] += (d_block.mT @ late) * early_decay
        return d_q, d_k
