"""The gated delta rule. Axes: B batch, H heads, T time, K key features, V value features."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.errors import expect
from remanence.ops.decay import chunks, cumulative, floored, lower_decay, recurrent_dtype
from remanence.state import State


def gated_delta_rule_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """The definition: S ← exp(g_t) S;  S ← S + β_t k_t (v_t − Sᵀk_t)ᵀ;  y_t = Sᵀ q_t."""
    dtype = recurrent_dtype(value)
    query, key, v, beta = (x.to(dtype) for x in (query, key, value, beta))
    S = v.new_zeros(*key.shape[:2], key.shape[3], v.shape[3]) if state is None else state["S"]
    y = []
    for t in range(key.shape[2]):
        if log_decay is not None:
            S = floored(log_decay[:, :, t].to(dtype)).exp()[..., None, None] * S
        k = key[:, :, t]
        error = v[:, :, t] - torch.einsum("bhk,bhkv->bhv", k, S)
        S = S + (beta[:, :, t, None] * k)[..., None] * error[..., None, :]
        y.append(torch.einsum("bhk,bhkv->bhv", query[:, :, t], S))
    return (torch.stack(y, 2).to(value.dtype) if y else value), {"S": S}


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, State]:
    """S ← exp(g_t) S;  S ← S + β_t k_t (v_t − Sᵀk_t)ᵀ;  y_t = Sᵀ q_t, `chunk_size` tokens at a time.

    `chunk_size` changes speed, never the result. Keys are used as given: the rule is stable while
    0 ≤ β‖k‖² ≤ 2. The query is not scaled.

    Shapes: `query`, `key` [B, H, T, K], `value` and y [B, H, T, V], `beta` [B, H, T], `log_decay` (≤ 0,
    clamped at −60) None or [B, H, T], any T ≥ 0; state {"S": [B, H, K, V]}, float32 or wider.
    Raises: `ShapeError`.
    Source: Yang et al., Gated Delta Networks, arXiv:2412.06464 (2024); chunked by the WY form of
    arXiv:2406.06484 (2024).
    """
    _check(query, key, value, beta, log_decay)
    dtype = recurrent_dtype(value)
    B, H, T, K = key.shape
    S = value.new_zeros(B, H, K, value.shape[3], dtype=dtype) if state is None else state["S"]
    if T == 0:
        return value, {"S": S}
    size = min(chunk_size, T)
    q, k, v, b = (chunks(x.to(dtype), size) for x in (query, key, value, beta))
    g = torch.zeros_like(b) if log_decay is None else chunks(floored(log_decay.to(dtype)), size)
    G = cumulative(g, 3)
    decay = lower_decay(G, dtype)
    since = G.exp().to(dtype)[..., None]
    # Row i of `writes` is what token i adds along its key, were the chunk to begin at S = 0; `reads` is
    # what of S the chunk's own writes replace: the true additions are writes − reads S.
    system = (b[..., None] * (k @ k.mT) * decay).tril(-1)
    right = torch.cat([b[..., None] * v, b[..., None] * since * k], -1)
    writes, reads = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        [v.shape[-1], K], -1
    )
    k_out = (k * (G[..., -1:] - G).exp().to(dtype)[..., None]).mT
    total = G[..., -1].exp().to(dtype)[..., None, None]
    befores, adds = [], []
    for c in range(q.shape[2]):
        befores.append(S)
        adds.append(writes[:, :, c] - reads[:, :, c] @ S)
        S = total[:, :, c] * S + k_out[:, :, c] @ adds[-1]
    y = (q * since) @ torch.stack(befores, 2) + ((q @ k.mT) * decay) @ torch.stack(adds, 2)
    return y.flatten(2, 3)[:, :, :T].to(value.dtype), {"S": S}


def gated_delta_rule_carry(
    key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, chunk_size: int = 64
) -> tuple[Tensor, Tensor]:
    """(M [B, H, K, K], N [B, H, K, V]) with S_end = M @ S_start + N for every state S_start.

    The rule acts on each column of S by itself, so columns of the identity that write nothing become M.
    """
    B, H, T, K = key.shape
    V = value.shape[3]
    one = torch.eye(K, dtype=recurrent_dtype(value), device=value.device).expand(B, H, K, K)
    start = torch.cat([one.new_zeros(B, H, K, V), one], -1)
    wide = torch.cat([value, value.new_zeros(B, H, T, K)], -1)
    S = gated_delta_rule(key, key, wide, beta, log_decay, {"S": start}, chunk_size=chunk_size)[1]["S"]
    N, M = S.split([V, K], -1)
    return M, N


def _check(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor | None) -> None:
    where = "gated_delta_rule"
    expect(where, "key", key, "batch heads time features")
    B, H, T, K = key.shape
    expect(where, "query", query, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect(where, "value", value, "batch heads time features", batch=B, heads=H, time=T)
    expect(where, "beta", beta, "batch heads time", batch=B, heads=H, time=T)
    if log_decay is not None:
        expect(where, "log_decay", log_decay, "batch heads time", batch=B, heads=H, time=T)
