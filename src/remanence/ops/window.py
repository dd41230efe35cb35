"""Softmax attention over a window. Axes: B batch, H heads, T time, K key features, V value features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remanence.errors import expect
from remanence.ops.decay import recurrent_dtype, second_order
from remanence.ops.dispatch import compiled
from remanence.ops.taps import tapped
from remanence.state import State

Prefix = tuple[Tensor, Tensor]

BLOCK = 128
"""Queries that are handled together; each block reads window − 1 keys before its own."""


def window_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    state: State | None = None,
    prefix: Prefix | None = None,
) -> tuple[Tensor, Tensor, State]:
    """The definition: y_t = Σ_j softmax_j(q_t·k_j / √K) v_j over the prefix and the j in (t − window, t]."""
    state = _begin(key, value, window) if state is None else state
    k, v, seen = state["k"], state["v"], state["seen"]
    y, logsumexp = [], []
    for t in range(key.shape[2]):
        k, v = torch.cat([k, key[:, :, t : t + 1]], 2), torch.cat([v, value[:, :, t : t + 1]], 2)
        seen = seen + 1
        keys, values = _with_prefix(k, v, prefix)
        scores = (query[:, :, t, None].to(keys.dtype) * keys).sum(-1) / key.shape[3] ** 0.5
        slot = torch.arange(window, device=key.device)
        empty = slot < (window - seen)[:, None, None]
        empty = torch.cat([empty.new_zeros(*empty.shape[:2], keys.shape[2] - window), empty], -1)
        scores = scores.masked_fill(empty, -torch.inf)
        y.append((scores.softmax(-1)[..., None] * values).sum(2))
        logsumexp.append(scores.logsumexp(-1))
        k, v = k[:, :, 1:], v[:, :, 1:]
    after = {"k": k, "v": v, "seen": seen}
    if not y:
        return value, value.new_zeros(value.shape[:3], dtype=recurrent_dtype(value)), after
    return torch.stack(y, 2).to(value.dtype), torch.stack(logsumexp, 2), after


@tapped
def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    state: State | None = None,
    prefix: Prefix | None = None,
) -> tuple[Tensor, Tensor, State]:
    """Causal softmax attention: token t sees the prefix and the j in (t − window, t], scaled by K^{−1/2}.

    Returns (y, logsumexp, state). With the logsumexp, results over disjoint sets of keys merge exactly.

    Shapes: `query`, `key` [B, H, T, K], `value` and y [B, H, T, V], logsumexp [B, H, T], any T ≥ 0;
    `window` ≥ 1; `prefix` None or (keys [B or 1, H, P, K], values [B or 1, H, P, V]), visible to every
    token; state {"k": [B, H, window − 1, K], "v": [B, H, window − 1, V], "seen": int64 [B]}: the last keys
    (rotated, if they are rotated) and values, latest last, and how many tokens each row has read, which
    tells empty slots from full ones and is the absolute position of the next token.
    Raises: `ShapeError`; `ValueError` when `window` < 1.
    """
    if window < 1:
        raise ValueError(f"window_attention: window must be at least 1, got {window}.")
    expect("window_attention", "key", key, "batch heads time features")
    B, H, T, K = key.shape
    expect("window_attention", "query", query, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect("window_attention", "value", value, "batch heads time features", batch=B, heads=H, time=T)
    state = _begin(key, value, window) if state is None else state
    old_k, old_v, seen = state["k"], state["v"], state["seen"]
    all_k, all_v = torch.cat([old_k, key], 2), torch.cat([old_v, value], 2)
    after = {"k": all_k[:, :, T:], "v": all_v[:, :, T:], "seen": seen + T}
    if not T:
        return value, value.new_zeros(value.shape[:3], dtype=recurrent_dtype(value)), after
    q = query.to(all_k.dtype)
    if T > 1 and compiled(q):
        p_k, p_v = (all_k[:, :, :0], all_v[:, :, :0]) if prefix is None else _wide_prefix(prefix, all_k)
        y, logsumexp = _Compiled.apply(q, all_k, all_v, p_k, p_v, seen, window)
    else:
        y, logsumexp = _by_blocks(q, all_k, all_v, prefix, seen, window)
    return y.to(value.dtype), logsumexp, after


def _by_blocks(
    q: Tensor, all_k: Tensor, all_v: Tensor, prefix: Prefix | None, seen: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """A block of queries at a time, in differentiable operations on any device."""
    T, K = q.shape[2:]
    # Joined again from split pieces: the gradient of a slice is as long as all keys, that of a piece is not.
    split_k, split_v = all_k.split(BLOCK, 2), all_v.split(BLOCK, 2)
    y, logsumexp = [], []
    for block, start in enumerate(range(0, T, BLOCK)):
        n = min(BLOCK, T - start)
        stop = start + n + window - 1
        needed = slice(block, -(-stop // BLOCK))
        k, v = (torch.cat(x[needed], 2)[:, :, : stop - start] for x in (split_k, split_v))
        k, v = _with_prefix(k, v, prefix)
        scores = (q[:, :, start : start + n] / K**0.5) @ k.mT
        row = torch.arange(n, device=q.device)[:, None]
        column = torch.arange(stop - start, device=q.device)
        hidden = (column < row) | (column >= row + window)
        hidden = hidden | (column + start < (window - 1 - seen)[:, None, None, None])
        visible = scores[..., k.shape[2] - (stop - start) :].masked_fill(hidden, -torch.inf)
        scores = torch.cat([scores[..., : k.shape[2] - (stop - start)], visible], -1)
        total = scores.logsumexp(-1)
        y.append((scores - total[..., None]).exp() @ v)
        logsumexp.append(total)
    return torch.cat(y, 2), torch.cat(logsumexp, 2)


class _Compiled(torch.autograd.Function):
    """The same compiled for the CPU, with gradients by hand: weights are made again from the logsumexp."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor, seen: Tensor, window: int
    ) -> tuple[Tensor, Tensor]:
        from remanence.ops import window_kernels as kernels
        from remanence.ops.compiled import blank, flat, rows, spread_products

        B, H, T, K = q.shape
        y = blank(v[:, :, :T], 3)
        logsumexp = q.new_empty(B, H, T)
        how = H, T, min(max(window, 16), 64), window, K**-0.5
        inputs = *flat(q, 3), rows(k), rows(v), rows(p_k), rows(p_v), seen.numpy()
        spread_products(kernels.forward, B * H, q.numel(), *how, *inputs, *flat(y, 3), rows(logsumexp))
        ctx.save_for_backward(q, k, v, p_k, p_v, seen, y, logsumexp)
        ctx.how = how
        return y, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import window_kernels as kernels
        from remanence.ops.compiled import blank, flat, rows, spread_products

        q, k, v, p_k, p_v, seen, y, logsumexp = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted

            def plain(q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor) -> tuple[Tensor, Tensor]:
                return _by_blocks(q, k, v, (p_k, p_v), seen, ctx.how[3])

            return *second_order(ctx.needs_input_grad[:5], plain, (q, k, v, p_k, p_v), grads), None, None
        B, H = q.shape[:2]
        d_q = blank(q, 3)
        found = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v, p_k, p_v)]
        inputs = *flat(q, 3), rows(k), rows(v), rows(p_k), rows(p_v), seen.numpy(), *flat(y, 3), rows(logsumexp)
        given = *flat(grads[0], 3), rows(grads[1])
        spread_products(
            kernels.backward, B * H, q.numel(), *ctx.how, *inputs, *given, *flat(d_q, 3), *(rows(x) for x in found)
        )
        return d_q, *found, None, None


def _begin(key: Tensor, value: Tensor, window: int) -> State:
    B, H, _, K = key.shape
    dtype = recurrent_dtype(value)
    return {
        "k": key.new_zeros(B, H, window - 1, K, dtype=dtype),
        "v": value.new_zeros(B, H, window - 1, value.shape[3], dtype=dtype),
        "seen": torch.zeros(B, dtype=torch.int64, device=key.device),
    }


def _with_prefix(k: Tensor, v: Tensor, prefix: Prefix | None) -> Prefix:
    if prefix is None:
        return k, v
    p_k, p_v = _wide_prefix(prefix, k)
    return torch.cat([p_k, k], 2), torch.cat([p_v, v], 2)


def _wide_prefix(prefix: Prefix, k: Tensor) -> Prefix:
    """The prefix in the precision of the keys, and as wide as the batch."""
    p_k, p_v = (x.to(k.dtype).expand(k.shape[0], -1, -1, -1) for x in prefix)
    return p_k, p_v
