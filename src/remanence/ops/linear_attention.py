"""Linear attention with any decay. Axes: B batch, H heads, T time, K key features, V value features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remanence.errors import ShapeError, expect
from remanence.ops.chunks import ChunkDecay, pieces
from remanence.ops.decay import floored, recurrent_dtype, second_order
from remanence.state import State


def linear_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None = None, state: State | None = None
) -> tuple[Tensor, State]:
    """The definition: S_t = Diag(exp g_t) S_{t−1} + k_t v_tᵀ,  y_t = S_tᵀ q_t."""
    dtype = recurrent_dtype(value)
    query, key, v = query.to(dtype), key.to(dtype), value.to(dtype)
    S = v.new_zeros(*key.shape[:2], key.shape[3], v.shape[3]) if state is None else state["S"]
    if log_decay is not None:
        decay = floored(log_decay.to(dtype)).exp()
        decay = decay[..., None] if decay.ndim == 3 else decay
    y = []
    for t in range(key.shape[2]):
        if log_decay is not None:
            S = decay[:, :, t, :, None] * S
        S = S + key[:, :, t, :, None] * v[:, :, t, None, :]
        y.append(torch.einsum("bhk,bhkv->bhv", query[:, :, t], S))
    return (torch.stack(y, 2).to(value.dtype) if y else value), {"S": S}


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, State]:
    """S_t = Diag(exp g_t) S_{t−1} + k_t v_tᵀ,  y_t = S_tᵀ q_t, `chunk_size` tokens at a time.

    `chunk_size` changes speed, never the result. The query is not scaled.

    Shapes: `query`, `key` [B, H, T, K], `value` and y [B, H, T, V], any T ≥ 0; `log_decay` (≤ 0, clamped
    at −60) is None, [B, H, T] (per head) or [B, H, T, K] (per key feature); state {"S": [B, H, K, V]},
    float32 or wider. Raises: `ShapeError`.
    Source: Katharopoulos et al., arXiv:2006.16236 (2020); decays: Yang et al., arXiv:2312.06635 (2023).
    """
    _check("linear_attention", query, key, value, log_decay)
    if key.shape[2] <= 1:
        return linear_attention_reference(query, key, value, log_decay, state)
    dtype = recurrent_dtype(value)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    start = v.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state["S"].to(dtype)
    g = None if log_decay is None else floored(log_decay.to(dtype))
    y, S = _Chunked.apply(q, k, v, g, start, min(chunk_size, k.shape[2]))
    return y.to(value.dtype), {"S": S}


class _Chunked(torch.autograd.Function):
    """The chunked form with its gradients by hand, a few chunks at a time so that they stay in the cache.

    Within a chunk, with G the sum of the log decays since it began and P_ij = Σ_d q_id k_jd exp(G_id − G_jd):
    Y = P V + (Q ⊙ e^G) S  and  S' = Diag(e^{G_C}) S + (K ⊙ e^{G_C − G})ᵀ V.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        if g is not None and g.ndim == 4:
            size = 1 << (size - 1).bit_length()  # the halving wants powers of two
        y = torch.empty_like(v)
        S = start.flatten(0, 1)
        befores = []
        for piece in pieces(k, size):
            qs, ks, vs = piece.cut(q), piece.cut(k), piece.cut(v)
            decay = ChunkDecay(None if g is None else piece.cut(g), qs)
            new = decay.to_end(ks).mT @ vs
            before = torch.empty_like(new)
            for c in range(new.shape[1]):
                before[:, c] = S
                S = decay.over(c, S, new[:, c])
            out = decay.scores(qs, ks) @ vs
            piece.put(y, out.add_(decay.from_start(qs) @ before))
            befores.append(before)
        S = S.view_as(start).clone()
        ctx.save_for_backward(q, k, v, g, start, S, *befores)
        ctx.size = size
        return y, S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, start, end, *befores = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted

            def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor) -> tuple[Tensor, Tensor]:
                y, state = linear_attention_reference(q, k, v, g, {"S": start})
                return y, state["S"]

            return *second_order(ctx.needs_input_grad[:5], loop, (q, k, v, g, start), grads), None
        d_y, d_end = grads
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        d_g = None if g is None else torch.empty_like(g)
        d_S, after_all = d_end.flatten(0, 1), end.flatten(0, 1)
        for piece, before in zip(reversed(list(pieces(k, ctx.size))), reversed(befores), strict=True):
            qs, ks, vs, d_ys = piece.cut(q), piece.cut(k), piece.cut(v), piece.cut(d_y)
            decay = ChunkDecay(None if g is None else piece.cut(g), qs)
            new = decay.from_start(qs).mT @ d_ys
            d_after = torch.empty_like(new)
            for c in reversed(range(new.shape[1])):
                d_after[:, c] = d_S
                d_S = decay.over(c, d_S, new[:, c])
            d_vs = decay.scores(qs, ks).mT @ d_ys
            piece.put(d_v, d_vs.add_(decay.to_end(ks) @ d_after))
            d_qs, d_ks = decay.scores_backward(d_ys @ vs.mT, qs, ks)
            d_qs.add_(decay.from_start(d_ys @ before.mT))
            d_ks.add_(decay.to_end(vs @ d_after.mT))
            piece.put(d_q, d_qs)
            piece.put(d_k, d_ks)
            if d_g is not None and g is not None:
                after = torch.cat([before[:, 1:], after_all[:, None]], 1)
                piece.put(d_g, decay.gradient((qs * d_qs).sub_(ks * d_ks), after * d_after))
            after_all = before[:, 0]
        return d_q, d_k, d_v, d_g, d_S.view_as(start), None


def linear_attention_carry(
    key: Tensor, value: Tensor, log_decay: Tensor | None = None, *, chunk_size: int = 64
) -> tuple[Tensor, Tensor]:
    """(M [B, H, K, 1], N [B, H, K, V]) with S_end = M ⊙ S_start + N for every state S_start."""
    N = linear_attention(key, key, value, log_decay, chunk_size=chunk_size)[1]["S"]
    if log_decay is None:
        return torch.ones_like(N[..., :1]), N
    g = floored(log_decay.to(N.dtype)).sum(2)
    return (g[..., None] if g.ndim == 2 else g)[..., None].exp().expand(*N.shape[:3], 1), N


def _check(where: str, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None) -> None:
    expect(where, "key", key, "batch heads time features")
    B, H, T, K = key.shape
    expect(where, "query", query, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect(where, "value", value, "batch heads time features", batch=B, heads=H, time=T)
    if log_decay is not None and log_decay.shape not in ((B, H, T), (B, H, T, K)):
        raise ShapeError(
            f"{where}: log_decay must be {[B, H, T]} (per head) or {[B, H, T, K]} (per key feature), "
            f"got {list(log_decay.shape)}."
        )
