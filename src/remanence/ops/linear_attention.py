"""Linear attention with any decay. Axes: B batch, H heads, T time, K key features, V value features."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.errors import ShapeError, expect
from remanence.ops.decay import chunks, cumulative, floored, lower_decay, recurrent_dtype
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
    dtype = recurrent_dtype(value)
    B, H, T, K = key.shape
    S = value.new_zeros(B, H, K, value.shape[3], dtype=dtype) if state is None else state["S"]
    if T == 0:
        return value, {"S": S}
    size = min(chunk_size, T)
    q, k, v = (chunks(x.to(dtype), size) for x in (query, key, value))
    if log_decay is None:
        scores, q_in, k_out, total = (q @ k.mT).tril(), q, k, None
    else:
        g = floored(log_decay.to(dtype))
        per_head = g.ndim == 3
        G = cumulative(chunks(g, size), 3)
        if per_head:
            scores = (q @ k.mT) * lower_decay(G, dtype)
            G = G[..., None]
        else:
            scores = _scores(q, k, G)
        q_in = q * G.exp().to(dtype)
        k_out = k * (G[:, :, :, -1:] - G).exp().to(dtype)
        total = G[:, :, :, -1].exp().to(dtype)[..., None]
    new = k_out.mT @ v
    before = []
    for c in range(q.shape[2]):
        before.append(S)
        S = (S if total is None else total[:, :, c] * S) + new[:, :, c]
    y = scores @ v + q_in @ torch.stack(before, 2)
    return y.flatten(2, 3)[:, :, :T].to(value.dtype), {"S": S}


def _scores(q: Tensor, k: Tensor, G: Tensor) -> Tensor:
    """P_ij = Σ_d q_id k_jd exp(G_id − G_jd) for j ≤ i, by halving: [..., C, K] to [..., C, C].

    Between the two halves of a block both factors are measured from their border, so neither exceeds 1;
    within a half the same holds again, down to single tokens, whose decay is exp 0.
    """
    C = q.shape[-2]
    if C == 1:
        return (q * k).sum(-1, keepdim=True)
    m = C // 2
    border = G[..., m - 1 : m, :]
    late = q[..., m:, :] * (G[..., m:, :] - border).exp().to(q.dtype)
    early = k[..., :m, :] * (border - G[..., :m, :]).exp().to(q.dtype)
    top = _scores(q[..., :m, :], k[..., :m, :], G[..., :m, :])
    bottom = _scores(q[..., m:, :], k[..., m:, :], G[..., m:, :])
    top = torch.nn.functional.pad(top, (0, C - m))
    return torch.cat([top, torch.cat([late @ early.mT, bottom], -1)], -2)


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
