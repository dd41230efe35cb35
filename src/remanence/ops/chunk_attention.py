"""Softmax attention inside chunks of the stream. Axes: B batch, T time, K key features, V value features, C chunk."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.errors import expect
from remanence.ops.decay import recurrent_dtype
from remanence.ops.taps import tapped
from remanence.state import State


def chunk_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """The definition: y_t = Σ_j softmax_j(q_t·k_j / √K + bias_{t−j}) v_j over the j ≤ t of the chunk that t is in."""
    C = len(bias)
    state = _begin(key, value, C) if state is None else state
    k, v, position = state["k"], state["v"], state["position"]
    y = []
    for t in range(key.shape[1]):
        slot = position % C
        here = torch.arange(C, device=key.device) == slot[:, None]
        k = torch.where(here[..., None], key[:, t, None].to(k.dtype), k)
        v = torch.where(here[..., None], value[:, t, None].to(v.dtype), v)
        lag = slot[:, None] - torch.arange(C, device=key.device)
        scores = torch.einsum("bk,bck->bc", query[:, t].to(k.dtype), k) / key.shape[2] ** 0.5
        scores = (scores + bias.to(k.dtype)[lag.clamp(min=0)]).masked_fill(lag < 0, -torch.inf)
        y.append(torch.einsum("bc,bcv->bv", scores.softmax(-1), v))
        position = position + 1
        closed = (position % C == 0)[:, None, None]
        k, v = torch.where(closed, 0.0, k), torch.where(closed, 0.0, v)
    return (torch.stack(y, 1).to(value.dtype) if y else value), {"k": k, "v": v, "position": position}


@tapped
def chunk_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """Causal attention, scaled by K^{−1/2}, that sees nothing before the chunk that a token is in.

    Chunks of C = len(bias) tokens are counted from the beginning of the stream, so cuts elsewhere change nothing.

    Shapes: `query`, `key` [B, T, K], `value` and y [B, T, V], any T ≥ 0; `bias` [C], by distance, nearest first; state
    {"k": [B, C, K], "v": [B, C, V], "position": int64 [B]}: the open chunk, zero beyond what was read of it.
    Raises: `ShapeError`. Source: the chunks of Mega, arXiv:2209.10655 (2022).
    """
    expect("chunk_attention", "key", key, "batch time features")
    B, T, K = key.shape
    expect("chunk_attention", "query", query, "batch time features", batch=B, time=T, features=K)
    expect("chunk_attention", "value", value, "batch time features", batch=B, time=T)
    expect("chunk_attention", "bias", bias, "chunk")
    C = len(bias)
    state = _begin(key, value, C) if state is None else state
    position = state["position"]
    slot = position % C
    rows = torch.arange(B, device=key.device)[:, None]
    at = slot[:, None] + torch.arange(T, device=key.device)  # slots of the new tokens, in chunks laid end to end
    chunks = -(-(C + T) // C)
    k, v = (_laid(state[n], new, rows, at, chunks * C) for n, new in (("k", key), ("v", value)))
    index = torch.arange(C, device=key.device)
    bias, query = bias.to(k.dtype), query.to(k.dtype) * K**-0.5
    if T < C:  # few queries, which may straddle two chunks
        lag = at[..., None] - torch.arange(chunks * C, device=key.device)
        blocked = (lag < 0) | (lag > at[..., None] % C)
        scores = query @ k.mT + bias[lag.clamp(0, C - 1)]
        y = scores.masked_fill(blocked, -torch.inf).softmax(-1) @ v
    else:
        lag = index[:, None] - index
        q = _laid(query.new_zeros(B, C, K), query, rows, at, chunks * C).unflatten(1, (chunks, C))
        scores = q @ k.unflatten(1, (chunks, C)).mT + bias[lag.clamp(min=0)]
        y = (scores.masked_fill(lag < 0, -torch.inf).softmax(-1) @ v.unflatten(1, (chunks, C))).flatten(1, 2)[rows, at]
    open_at = (slot + T) // C * C
    kept = open_at[:, None] + index
    k, v = k[rows, kept], v[rows, kept]
    return y.to(value.dtype), {"k": k, "v": v, "position": position + T}


def _laid(held: Tensor, new: Tensor, rows: Tensor, at: Tensor, length: int) -> Tensor:
    """The open chunk followed by empty slots, with the new tokens written at their places: [B, length, ...]."""
    room = held.new_zeros(held.shape[0], length - held.shape[1], held.shape[2])
    return torch.cat([held, room], 1).index_put((rows, at), new.to(held.dtype))


def _begin(key: Tensor, value: Tensor, C: int) -> State:
    k = key.new_zeros(key.shape[0], C, key.shape[2], dtype=recurrent_dtype(key))
    v = value.new_zeros(value.shape[0], C, value.shape[2], dtype=recurrent_dtype(value))
    return {"k": k, "v": v, "position": k.new_zeros(key.shape[0], dtype=torch.int64)}
