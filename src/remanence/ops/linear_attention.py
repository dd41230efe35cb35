"""Linear attention with any decay. Axes: B batch, H heads, T time, K key features, V value features."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.errors import ShapeError, expect
from remanence.ops import dispatch, steps
from remanence.ops.decay import cumulative, floored, lower_decay, recurrent_dtype, second_order
from remanence.ops.joint import blanks
from remanence.ops.taps import tapped
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


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    changed = {name: F.silu(given[name]) for name in ("query", "key", "value")} if given["silu"] else {}
    return given | changed | {"silu": False}


@partial(tapped, plain=_plain)
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    *,
    silu: bool = False,
    chunk_size: int = 64,
) -> tuple[Tensor, State]:
    """S_t = Diag(exp g_t) S_{t−1} + k_t v_tᵀ,  y_t = S_tᵀ q_t, `chunk_size` tokens at a time.

    `chunk_size` changes speed, never the result. The query is not scaled. With `silu`, queries, keys and values are
    SiLU of what is given, which then needs no memory of its own.

    Shapes: `query`, `key` [B, H, T, K], `value` and y [B, H, T, V], any T ≥ 0; `log_decay` (≤ 0, clamped
    at −60) is None, [B, H, T] (per head) or [B, H, T, K] (per key feature); state {"S": [B, H, K, V]},
    float32 or wider. Raises: `ShapeError`.
    Source: Katharopoulos et al., arXiv:2006.16236 (2020); decays: Yang et al., arXiv:2312.06635 (2023).
    """
    _check("linear_attention", query, key, value, log_decay)
    inside = key.shape[2] > 1 and dispatch.compiled(key) and not dispatch.triton(value)
    if silu and not inside:
        query, key, value = F.silu(query), F.silu(key), F.silu(value)
    if key.shape[2] == 1 and state is not None and steps.worth(state["S"], query, key, value, log_decay):
        y, S = steps.linear_attention(query, key, value, log_decay, state["S"])
        return y, {"S": S}
    if not key.shape[2]:
        return linear_attention_reference(query, key, value, log_decay, state)
    dtype, (B, H, T, K) = recurrent_dtype(value), key.shape
    start = value.new_zeros(B, H, K, value.shape[3], dtype=dtype) if state is None else state["S"].to(dtype)
    if T > 1 and dispatch.triton(value):
        from remanence.ops.gpu.linear_attention import LinearAttention

        y, S = LinearAttention.apply(query, key, value, log_decay, start, min(chunk_size, T))
        return y, {"S": S}
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    g = None if log_decay is None else log_decay.to(dtype)
    if T == 1:
        y, S = _step(q, k, v, g, start)
        return y.to(value.dtype), {"S": S}
    if inside:
        y, S = _Compiled.apply(q, k, v, g, start, min(chunk_size, T), silu)
    else:
        y, S = _by_chunks(q, k, v, g, start, min(chunk_size, T))
    return y.to(value.dtype), {"S": S}


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token, in few operations."""
    if g is not None:
        a = floored(g).exp()
        S = (a[..., None] if a.ndim == 3 else a.mT) * S
    S = S + k.mT * v
    return q @ S, S


def _by_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The chunked form in differentiable operations, on any device.

    Within a chunk, with G the sum of the log decays since it began and P_ij = Σ_d q_id k_jd exp(G_id − G_jd):
    Y = P V + (Q ⊙ e^G) S  and  S' = Diag(e^{G_C}) S + (K ⊙ e^{G_C − G})ᵀ V.
    """
    S, out = start, []
    if g is not None and g.ndim == 4:
        size = min(size, 16)  # its exponents are [C, C, K]
    for t in range(0, k.shape[2], size):
        qs, ks, vs = (x[:, :, t : t + size] for x in (q, k, v))
        if g is None:
            out.append((qs @ ks.mT).tril() @ vs + qs @ S)
            S = S + ks.mT @ vs
            continue
        G = cumulative(floored(g[:, :, t : t + size]), 2)
        if g.ndim == 3:
            P = (qs @ ks.mT) * lower_decay(G, q.dtype)
            G = G[..., None]
        else:
            P = torch.einsum("bhik,bhjk,bhkij->bhij", qs, ks, lower_decay(G.mT, q.dtype))
        from_start, to_end = G.exp().to(q.dtype), (G[:, :, -1:] - G).exp().to(q.dtype)
        out.append(P @ vs + (qs * from_start) @ S)
        S = from_start[:, :, -1, :, None] * S + (ks * to_end).mT @ vs
    return torch.cat(out, 2), S


class _Compiled(torch.autograd.Function):
    """The same compiled for the CPU, with gradients by hand: a head at a time, its chunks in the cache."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor, size: int, silu: bool
    ) -> tuple[Tensor, Tensor]:
        from remanence.ops import linear_attention_kernels as kernels
        from remanence.ops.chunk_kernels import EVERY, PER_KEY
        from remanence.ops.compiled import blank, flat, flat_or_none, rows, spread_products

        B, H, T, K = k.shape
        y, end = blank(v, 3), v.new_empty(B, H, K, v.shape[3])
        kind = 0 if g is None else g.ndim - 2
        every = 1 if kind == PER_KEY else EVERY  # whose decays take longer to make again
        befores = v.new_empty(B * H, -(-T // (size * every)), K, v.shape[3])
        how = H, T, size, every, kind, silu
        inputs = *flat(q, 3), *flat(k, 3), *flat(v, 3), *flat_or_none(g, 3, q), rows(start)
        outputs = *flat(y, 3), befores.numpy(), rows(end)
        spread_products(kernels.forward, B * H, k.numel(), *how, *inputs, *outputs)
        ctx.save_for_backward(q, k, v, g, start, end, befores)
        ctx.how = how
        return y, end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import linear_attention_kernels as kernels
        from remanence.ops.compiled import blank, flat, flat_or_none, rows, spread_products

        q, k, v, g, start, end, befores = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted

            def plain(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor) -> tuple[Tensor, Tensor]:
                q, k, v = (F.silu(x) if ctx.how[-1] else x for x in (q, k, v))
                return _by_chunks(q, k, v, g, start, ctx.how[2])

            return *second_order(ctx.needs_input_grad[:5], plain, (q, k, v, g, start), grads), None, None
        B, H = k.shape[:2]
        d_q, d_k, d_v = blanks(q, k, v)
        d_g = None if g is None else blank(g, 3)
        d_start = grads[1].clone(memory_format=torch.contiguous_format)
        inputs = *flat(q, 3), *flat(k, 3), *flat(v, 3), *flat_or_none(g, 3, q)
        kept = befores.numpy(), rows(end), *flat(grads[0], 3)
        outputs = *flat(d_q, 3), *flat(d_k, 3), *flat(d_v, 3), *flat_or_none(d_g, 3, q), rows(d_start)
        spread_products(kernels.backward, B * H, k.numel(), *ctx.how, *inputs, *kept, *outputs)
        return d_q, d_k, d_v, d_g, d_start, None, None


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
