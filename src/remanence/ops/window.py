"""Softmax attention over a window. Axes: B batch, H heads, T time, K key features, V value features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remanence.errors import ShapeError, expect
from remanence.ops.decay import recurrent_dtype, second_order
from remanence.ops.dispatch import compiled
from remanence.ops.taps import tapped
from remanence.state import State

Prefix = tuple[Tensor, Tensor]

BLOCK = 128
"""Queries that are handled together."""


def window_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    state: State | None = None,
    prefix: Prefix | None = None,
) -> tuple[Tensor, Tensor, State]:
    """The definition: y_t = Σ_j softmax_j(q_t·k_j / √K) v_j over the prefix and the j in (t − window, t]."""
    state = _begin(key, value, window or 1) if state is None else state
    k, v, seen = state["k"], state["v"], state["seen"]
    share, y, logsumexp = query.shape[1] // key.shape[1], [], []
    for t in range(key.shape[2]):
        k, v = torch.cat([k, key[:, :, t : t + 1]], 2), torch.cat([v, value[:, :, t : t + 1]], 2)
        seen = seen + 1
        reach = k.shape[2]
        keys, values = (x.repeat_interleave(share, 1) for x in _with_prefix(k, v, prefix))
        scores = (query[:, :, t, None].to(keys.dtype) * keys).sum(-1) / key.shape[3] ** 0.5
        empty = torch.arange(reach, device=key.device) < (reach - seen)[:, None, None]
        empty = torch.cat([empty.new_zeros(*empty.shape[:2], keys.shape[2] - reach), empty], -1)
        scores = scores.masked_fill(empty, -torch.inf)
        y.append((scores.softmax(-1)[..., None] * values).sum(2))
        logsumexp.append(scores.logsumexp(-1))
        if window is not None:
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
    window: int | None,
    state: State | None = None,
    prefix: Prefix | None = None,
) -> tuple[Tensor, Tensor, State]:
    """Causal softmax attention: token t sees the prefix and the j in (t − window, t], scaled by K^{−1/2}.

    Returns (y, logsumexp, state). With the logsumexp, results over disjoint sets of keys merge exactly. Without a
    window (None) all that was read is seen, and the state grows by T.

    Shapes: `query` [B, H, T, K], `key` [B, G, T, K] and `value` [B, G, T, V], where G divides H: each head of keys and
    values is read by H/G neighbours; y [B, H, T, V], logsumexp [B, H, T], any T ≥ 0; `window` None or ≥ 1; `prefix`
    None or (keys [B or 1, G, P, K], values [B or 1, G, P, V]), visible to every token;
    state {"k": [B, G, window − 1, K], "v": [B, G, window − 1, V], "seen": int64 [B]}: the last keys (rotated, if they
    are rotated) and values, latest last, and how many tokens each row has read, which tells empty slots from full
    ones and is the absolute position of the next token.
    Raises: `ShapeError`; `ValueError` when `window` < 1.
    Source: blocks and their logsumexp are those of FlashAttention-2, arXiv:2307.08691 (2023).
    """
    if window is not None and window < 1:
        raise ValueError(f"window_attention: window must be at least 1, got {window}.")
    expect("window_attention", "key", key, "batch heads time features")
    B, G, T, K = key.shape
    expect("window_attention", "query", query, "batch heads time features", batch=B, time=T, features=K)
    expect("window_attention", "value", value, "batch heads time features", batch=B, heads=G, time=T)
    H = query.shape[1]
    if not G or H % G:
        raise ShapeError(f"window_attention: query must have a multiple of the {G} heads of key, got {H}.")
    state = _begin(key, value, window or 1) if state is None else state
    all_k, all_v, seen = _joined(state["k"], key), _joined(state["v"], value), state["seen"]
    left = 0 if window is None else T
    after = {"k": all_k[:, :, left:], "v": all_v[:, :, left:], "seen": seen + T}
    if not T:
        return value.new_empty(B, H, 0, value.shape[3]), query.new_zeros(B, H, 0, dtype=recurrent_dtype(value)), after
    y, logsumexp = attend(query.to(all_k.dtype), all_k, all_v, seen, window, prefix)
    return y.to(value.dtype), logsumexp, after


def attend(
    q: Tensor, all_k: Tensor, all_v: Tensor, seen: Tensor, window: int | None = None, prefix: Prefix | None = None
) -> tuple[Tensor, Tensor]:
    """(y, logsumexp) of `window_attention` for keys and values joined with those before, all of one dtype, T ≥ 1."""
    window = window or all_k.shape[2]
    if q.shape[2] == 1 or not compiled(q):
        return _by_blocks(q, all_k, all_v, prefix, seen, window)
    p_k, p_v = (all_k[:, :, :0], all_v[:, :, :0]) if prefix is None else _wide_prefix(prefix, all_k)
    return _Compiled.apply(q, all_k, all_v, p_k, p_v, seen, window)


def _by_blocks(
    q: Tensor, all_k: Tensor, all_v: Tensor, prefix: Prefix | None, seen: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """A block of queries at a time, in differentiable operations on any device."""
    T, K = q.shape[2:]
    past, share = all_k.shape[2] - T, q.shape[1] // all_k.shape[1]
    # Joined again from split pieces: the gradient of a slice is as long as all keys, that of a piece is not.
    split_k, split_v = all_k.split(BLOCK, 2), all_v.split(BLOCK, 2)
    y, logsumexp = [], []
    for start in range(0, T, BLOCK):
        n = min(BLOCK, T - start)
        stop = past + start + n
        low = max(past + start - window + 1, 0) // BLOCK
        k, v = (torch.cat(x[low : -(-stop // BLOCK)], 2)[:, :, : stop - low * BLOCK] for x in (split_k, split_v))
        row = torch.arange(past + start, stop, device=q.device)[:, None]
        column = torch.arange(low * BLOCK, stop, device=q.device)
        hidden = (column > row) | (column <= row - window) | (column < (past - seen)[:, None, None, None])
        k, v = (x.repeat_interleave(share, 1) if share > 1 else x for x in _with_prefix(k, v, prefix))
        scores = (q[:, :, start : start + n] / K**0.5) @ k.mT
        far, near = scores.split([k.shape[2] - len(column), len(column)], -1)
        scores = torch.cat([far, near.masked_fill(hidden, -torch.inf)], -1)
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
        from remanence.ops.compiled import flat, rows, spread_products

        B, H, T, K = q.shape
        y = q.new_empty(B, T, H, v.shape[3]).transpose(1, 2)  # whose heads lie side by side, as they are read next
        logsumexp = q.new_empty(B, H, T)
        share, past = H // k.shape[1], k.shape[2] - T
        stripes = _stripes(B * H)
        ctx.how = H, share, T, past, window, K**-0.5
        inputs = *flat(q, 3), *flat(k, 3), *flat(v, 3), rows(p_k), rows(p_v), seen.numpy()
        outputs = *flat(y, 3), rows(logsumexp)
        spread_products(kernels.forward, B * H * stripes, q.numel(), stripes, *ctx.how, *inputs, *outputs)
        ctx.save_for_backward(q, k, v, p_k, p_v, seen, y, logsumexp)
        return y, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import window_kernels as kernels
        from remanence.ops.compiled import flat, rows, spread_products

        q, k, v, p_k, p_v, seen, y, logsumexp = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted

            def plain(q: Tensor, k: Tensor, v: Tensor, p_k: Tensor, p_v: Tensor) -> tuple[Tensor, Tensor]:
                return _by_blocks(q, k, v, (p_k, p_v), seen, ctx.how[4])

            return *second_order(ctx.needs_input_grad[:5], plain, (q, k, v, p_k, p_v), grads), None, None
        B, heads = k.shape[:2]
        stripes = _stripes(B * heads)
        d_q = q.new_zeros(stripes, *q.shape)
        found = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v, p_k, p_v)]
        inputs = *flat(q, 3), *flat(k, 3), *flat(v, 3), rows(p_k), rows(p_v), seen.numpy()
        given = *flat(y, 3), rows(logsumexp), *flat(grads[0], 3), rows(grads[1])
        outputs = d_q.flatten(1, 2).numpy(), *(rows(x) for x in found)
        spread_products(kernels.backward, B * heads * stripes, q.numel(), stripes, *ctx.how, *inputs, *given, *outputs)
        return d_q[0] if stripes == 1 else d_q.sum(0), *found, None, None


def _stripes(heads: int) -> int:
    """Parts of each head's blocks: one where there are heads enough for all threads."""
    threads = torch.get_num_threads()
    return 1 if heads % threads == 0 or heads > 4 * threads else threads


def _begin(key: Tensor, value: Tensor, window: int) -> State:
    B, H, _, K = key.shape
    dtype = recurrent_dtype(value)
    return {
        "k": key.new_zeros(B, H, window - 1, K, dtype=dtype),
        "v": value.new_zeros(B, H, window - 1, value.shape[3], dtype=dtype),
        "seen": torch.zeros(B, dtype=torch.int64, device=key.device),
    }


def _joined(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat([old, new], 2) if old.shape[2] else new.to(old.dtype)


def _with_prefix(k: Tensor, v: Tensor, prefix: Prefix | None) -> Prefix:
    if prefix is None:
        return k, v
    p_k, p_v = _wide_prefix(prefix, k)
    return torch.cat([p_k, k], 2), torch.cat([p_v, v], 2)


def _wide_prefix(prefix: Prefix, k: Tensor) -> Prefix:
    """The prefix in the precision of the keys, and as wide as the batch."""
    p_k, p_v = (x.to(k.dtype).expand(k.shape[0], -1, -1, -1) for x in prefix)
    return p_k, p_v
