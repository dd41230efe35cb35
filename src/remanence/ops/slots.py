"""Slot memories. Axes: B batch, H heads, T time, M slots, K key features, V value features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.errors import expect
from remanence.ops.decay import cumulative, floored, recurrent_dtype
from remanence.ops.linear_attention import linear_attention
from remanence.ops.taps import tapped
from remanence.state import State


def slots_reference(
    query: Tensor, key: Tensor, value: Tensor, write: Tensor, log_decay: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """The definition: K' = Diag(e^g) K + w kᵀ and V' = Diag(e^g) V + w vᵀ; y = V'ᵀ softmax(K' q)."""
    keys, values = _begin(key, value, write, state)
    q, k, v, w = (x.to(keys.dtype) for x in (query, key, value, write))
    decay = floored(log_decay.to(keys.dtype)).exp()
    y = []
    for t in range(key.shape[2]):
        keys = decay[:, :, t, :, None] * keys + w[:, :, t, :, None] * k[:, :, t, None]
        values = decay[:, :, t, :, None] * values + w[:, :, t, :, None] * v[:, :, t, None]
        share = torch.einsum("bhmk,bhk->bhm", keys, q[:, :, t]).softmax(-1)
        y.append(torch.einsum("bhm,bhmv->bhv", share, values))
    return (torch.stack(y, 2).to(value.dtype) if y else value), {"K": keys, "V": values}


@tapped
def slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write: Tensor,
    log_decay: Tensor,
    state: State | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, State]:
    r"""M slots of keys and values that all forget at their own rates, read by softmax attention to the slots.

    $K_t = \mathrm{Diag}(e^{g_t}) K_{t-1} + w_t k_t^\top$ and $V_t$ alike; $y_t = V_t^\top \mathrm{softmax}(K_t q_t)$.
    Two passes of linear attention: one with queries and keys that decays on its values w and gives the logits, one
    that reads v with the softmax of these. `chunk_size` changes speed, never the result. The query is not scaled.

    Shapes: `query`, `key` [B, H, T, K], `value` and y [B, H, T, V], `write` and `log_decay` (≤ 0, clamped at −60)
        [B, H, T, M], any T ≥ 0; state {"K": [B, H, M, K], "V": [B, H, M, V]}, float32 or wider. Raises: `ShapeError`.
    Source: Zhang et al., Gated Slot Attention, arXiv:2409.07146 (2024); Peng et al., ABC, arXiv:2110.02488 (2021).
    """
    expect("slots", "key", key, "batch heads time features")
    B, H, T, K = key.shape
    expect("slots", "query", query, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect("slots", "value", value, "batch heads time features", batch=B, heads=H, time=T)
    expect("slots", "write", write, "batch heads time slots", batch=B, heads=H, time=T)
    expect("slots", "log_decay", log_decay, "batch heads time slots", batch=B, heads=H, time=T, slots=write.shape[3])
    if T <= 1:
        return slots_reference(query, key, value, write, log_decay, state)
    keys, values = _begin(key, value, write, state)
    logits, S = value_decayed(query, key, write, log_decay, {"S": keys.mT}, chunk_size=chunk_size)
    share = logits.softmax(-1)
    y, after = linear_attention(share, write, value, log_decay, {"S": values}, chunk_size=chunk_size)
    return y, {"K": S["S"].mT.contiguous(), "V": after["S"]}


def slots_carry(key: Tensor, value: Tensor, write: Tensor, log_decay: Tensor) -> tuple[Tensor, State]:
    """(M [B, H, slots, 1], N) with state_end = M ⊙ state_start + N for both "K" and "V"."""
    _, N = slots(key, key, value, write, log_decay)
    return floored(log_decay.to(N["K"].dtype)).sum(2)[..., None].exp(), N


def value_decayed(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, state: State | None = None, *, chunk_size: int = 64
) -> tuple[Tensor, State]:
    r"""Linear attention whose value features forget: $S_t = S_{t-1} \mathrm{Diag}(e^{g_t}) + k_t v_t^\top$.

    It is read by $y_t = S_t^\top q_t$.

    Within a chunk $y_i = e^{G_i} ⊙ S^\top q_i + Σ_{j ≤ i} (q_i · k_j) e^{G_i - G_j} ⊙ v_j$. The sum is taken over
    blocks of late queries and early keys, both seen from the blocks' middle, where no factor exceeds 1.

    Shapes: `query`, `key` [B, H, T, K], `value`, `log_decay` (≤ 0, clamped at −60) and y [B, H, T, V], any T ≥ 0;
        state {"S": [B, H, K, V]}, float32 or wider.
    Source: the transposed gate of Yang et al., arXiv:2312.06635 (2023), in its chunked form.
    """
    B, H, T, K = key.shape
    dtype = recurrent_dtype(value)
    S = key.new_zeros(B, H, K, value.shape[3], dtype=dtype) if state is None else state["S"]
    size = 1 << (min(chunk_size, max(T, 1)) - 1).bit_length()
    q, k, v, g = (_chunks(x.to(dtype), size) for x in (query, key, value, floored(log_decay.to(dtype))))
    G = cumulative(g, 3)
    inner = _within(q @ k.mT, v, G)
    written = k.mT @ (v * (G[:, :, :, -1:] - G).exp().to(dtype))
    from_start = G.exp().to(dtype)
    y = []
    for c in range(q.shape[2]):
        y.append(inner[:, :, c] + from_start[:, :, c] * (q[:, :, c] @ S))
        S = from_start[:, :, c, -1:] * S + written[:, :, c]
    out = torch.cat(y, 2)[:, :, :T] if y else value.to(dtype)
    return out.to(value.dtype), {"S": S}


def _chunks(x: Tensor, size: int) -> Tensor:
    """[B, H, T, ...] to [B, H, n, size, ...], the last chunk filled up with zeros, which write and forget nothing."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size))


def _within(scores: Tensor, v: Tensor, G: Tensor) -> Tensor:
    """Σ_{j ≤ i} P_ij e^{G_i − G_j} ⊙ v_j by halving: P [B, H, n, C, C], v and G [B, H, n, C, V], C a power of 2."""
    out = scores.diagonal(dim1=-2, dim2=-1)[..., None] * v
    C, half = v.shape[3], 1
    while half < C:
        blocks = C // (2 * half)
        G_b, v_b = (x.unflatten(3, (blocks, 2, half)) for x in (G, v))
        middle = G_b[..., 0, -1:, :]
        late = (G_b[..., 1, :, :] - middle).exp().to(v.dtype)
        early = (middle - G_b[..., 0, :, :]).exp().to(v.dtype)
        pairs = scores.unflatten(4, (blocks, 2, half)).unflatten(3, (blocks, 2, half))[:, :, :, :, 1, :, :, 0]
        pairs = pairs.diagonal(dim1=3, dim2=5).movedim(-1, 3)
        seen = late * (pairs @ (early * v_b[..., 0, :, :]))
        out = out + torch.stack([torch.zeros_like(seen), seen], 4).flatten(3, 5)
        half *= 2
    return out


def _begin(key: Tensor, value: Tensor, write: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
    if state is not None:
        return state["K"], state["V"]
    B, H, _, K = key.shape
    dtype, M = recurrent_dtype(value), write.shape[3]
    return key.new_zeros(B, H, M, K, dtype=dtype), key.new_zeros(B, H, M, value.shape[3], dtype=dtype)
