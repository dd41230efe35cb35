"""The gated delta rule. Axes: B batch, H heads, T time, K key features, V value features."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from remanence.errors import expect
from remanence.ops import dispatch, steps
from remanence.ops.decay import cumulative, floored, lower_decay, recurrent_dtype, second_order
from remanence.ops.norm import normalise
from remanence.ops.taps import tapped
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


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    query, key = _readers(given["query"], given["key"], given["unit"], given["scale"])
    return given | {"query": query, "key": key, "unit": False, "scale": 1.0}


@partial(tapped, plain=_plain)
def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    *,
    unit: bool = False,
    scale: float = 1.0,
    chunk_size: int = 64,
) -> tuple[Tensor, State]:
    """S ← exp(g_t) S;  S ← S + β_t k_t (v_t − Sᵀk_t)ᵀ;  y_t = Sᵀ q_t, `chunk_size` tokens at a time.

    `chunk_size` changes speed, never the result. Keys are used as given: the rule is stable while 0 ≤ β‖k‖² ≤ 2. With
    `unit`, queries and keys are first brought to unit length, x / √(‖x‖² + 10⁻⁶), which needs no memory of its own.
    Queries are multiplied by `scale`.

    Shapes: `query`, `key` [B, H, T, K], `value` and y [B, H, T, V], `beta` [B, H, T], `log_decay` (≤ 0,
    clamped at −60) None or [B, H, T], any T ≥ 0; state {"S": [B, H, K, V]}, float32 or wider.
    Raises: `ShapeError`.
    Source: Yang et al., Gated Delta Networks, arXiv:2412.06464 (2024); chunked by the WY form of
    arXiv:2406.06484 (2024).
    """
    _check(query, key, value, beta, log_decay)
    inside = key.shape[2] > 1 and dispatch.compiled(key) and not dispatch.triton(value)
    if not (inside and unit):
        query, key = _readers(query, key, unit, scale)
    if key.shape[2] == 1 and state is not None and steps.worth(state["S"], query, key, value, beta, log_decay):
        y, S = steps.gated_delta_rule(query, key, value, beta, log_decay, state["S"])
        return y, {"S": S}
    if not key.shape[2]:
        return gated_delta_rule_reference(query, key, value, beta, log_decay, state)
    dtype, (B, H, T, K) = recurrent_dtype(value), key.shape
    start = value.new_zeros(B, H, K, value.shape[3], dtype=dtype) if state is None else state["S"].to(dtype)
    if T > 1 and K <= 256 and dispatch.triton(value):  # whose programs hold whole columns of the state
        from remanence.ops.gpu.delta import GatedDeltaRule

        y, S = GatedDeltaRule.apply(query, key, value, beta, log_decay, start, min(chunk_size, T))
        return y, {"S": S}
    q, k, v, b = (x.to(dtype) for x in (query, key, value, beta))
    g = None if log_decay is None else log_decay.to(dtype)
    if T == 1:
        y, S = _step(q, k, v, b, g, start)
        return y.to(value.dtype), {"S": S}
    if inside:
        y, S = _Compiled.apply(q, k, v, b, g, start, min(chunk_size, T), unit, scale if unit else 1.0)
    else:
        y, S = _by_chunks(q, k, v, b, g, start, min(chunk_size, T))
    return y.to(value.dtype), {"S": S}


def _readers(q: Tensor, k: Tensor, unit: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Queries and keys as the recurrence takes them."""
    if unit:
        return normalise(q, mean=False, scale=scale), normalise(k, mean=False)
    return q if scale == 1 else scale * q, k


def _step(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token, in few operations."""
    if g is not None:
        S = floored(g).exp()[..., None] * S
    S = S + k.mT @ (b[..., None] * (v - k @ S))
    return q @ S, S


def _by_chunks(
    q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, start: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """The chunked form in differentiable operations, on any device.

    What token i writes is w_i = β_i k_i times its error f_i = v_i − (prediction). With the sums G of the log
    decays since the chunk began, A_ij = (k_i·w_j) e^{G_i − G_j} for j < i and P_ij = (q_i·w_j) e^{G_i − G_j} for
    j ≤ i: (I + A) F = V − (K ⊙ e^G) S,  Y = P F + (Q ⊙ e^G) S,  S' = e^{G_C} S + (W ⊙ e^{G_C − G})ᵀ F.
    """
    S, out = start, []
    for t in range(0, k.shape[2], size):
        qs, ks, vs, bs = (x[:, :, t : t + size] for x in (q, k, v, b))
        ws = ks * bs[..., None]
        G = bs.new_zeros(bs.shape) if g is None else floored(g[:, :, t : t + size])
        G = cumulative(G, 2)
        between = lower_decay(G, q.dtype)
        from_start, to_end = G.exp().to(q.dtype)[..., None], (G[..., -1:] - G).exp().to(q.dtype)[..., None]
        A = ((ks @ ws.mT) * between).tril(-1)
        F = torch.linalg.solve_triangular(A, vs - (ks * from_start) @ S, upper=False, unitriangular=True)
        out.append(((qs @ ws.mT) * between) @ F + (qs * from_start) @ S)
        S = from_start[:, :, -1:] * S + (ws * to_end).mT @ F
    return torch.cat(out, 2), S


class _Compiled(torch.autograd.Function):
    """The same compiled for the CPU, with gradients by hand: a head at a time, its chunks in the cache."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        b: Tensor,
        g: Tensor | None,
        start: Tensor,
        size: int,
        unit: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        from remanence.ops import delta_kernels as kernels
        from remanence.ops.chunk_kernels import EVERY
        from remanence.ops.compiled import blank, flat, flat_or_none, rows, spread_products

        B, H, T, K = k.shape
        V = v.shape[3]
        y, end = blank(v, 3), v.new_empty(B, H, K, V)
        errors, befores = v.new_empty(B * H, T, V), v.new_empty(B * H, -(-T // (size * EVERY)), K, V)
        inputs = *flat(q, 3), *flat(k, 3), *flat(v, 3), *flat(b, 3), *flat_or_none(g, 3, q), rows(start)
        outputs = *flat(y, 3), errors.numpy(), befores.numpy(), rows(end)
        ctx.how = H, T, size, int(g is not None), unit, scale
        spread_products(kernels.forward, B * H, k.numel(), *ctx.how, *inputs, *outputs)
        ctx.save_for_backward(q, k, v, b, g, start, end, errors, befores)
        return y, end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import delta_kernels as kernels
        from remanence.ops.compiled import blank, flat, flat_or_none, rows, spread_products

        q, k, v, b, g, start, end, errors, befores = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted

            def plain(
                q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, start: Tensor
            ) -> tuple[Tensor, Tensor]:
                q, k = _readers(q, k, *ctx.how[4:])
                return _by_chunks(q, k, v, b, g, start, ctx.how[2])

            return *second_order(ctx.needs_input_grad[:6], plain, (q, k, v, b, g, start), grads), *[None] * 3
        B, H = k.shape[:2]
        d_q, d_k, d_v, d_b = (blank(x, 3) for x in (q, k, v, b))
        d_g = None if g is None else blank(g, 3)
        d_start = grads[1].clone(memory_format=torch.contiguous_format)
        inputs = *flat(q, 3), *flat(k, 3), *flat(b, 3), *flat_or_none(g, 3, q)
        kept = errors.numpy(), befores.numpy(), rows(end), *flat(grads[0], 3)
        outputs = *flat(d_q, 3), *flat(d_k, 3), *flat(d_v, 3), *flat(d_b, 3), *flat_or_none(d_g, 3, q), rows(d_start)
        spread_products(kernels.backward, B * H, k.numel(), *ctx.how, *inputs, *kept, *outputs)
        return d_q, d_k, d_v, d_b, d_g, d_start, *[None] * 3


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
