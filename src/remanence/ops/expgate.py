"""Exponential gating of a matrix memory. Axes: B batch, H heads, T time, K key features, V value features."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from remanence.errors import expect
from remanence.ops import dispatch
from remanence.ops.decay import floored, recurrent_dtype, second_order
from remanence.ops.linear_attention import linear_attention
from remanence.ops.scan import scan
from remanence.ops.taps import tapped
from remanence.state import State

EMPTY = -1e30
"""The stabiliser of a memory that holds nothing: lower than any gate, and its differences are still numbers."""


def expgate_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    log_input: Tensor,
    state: State | None = None,
    *,
    eps: float = 0.0,
) -> tuple[Tensor, State]:
    """The definition: m' = max(f + m, i), C' = e^{f+m−m'} C + e^{i−m'} k vᵀ, n' alike without v.

    y = C'ᵀq / (max(|n'·q|, e^{−m'}) + eps).
    """
    C, n, m = _begin(key, value, state)
    n, dtype = n.double(), C.dtype
    q, k, v = query.double(), key.double(), value.to(dtype)
    f, i = floored(log_forget.double()), log_input.double()
    y = []
    for t in range(key.shape[2]):
        before, m = m, torch.maximum(f[:, :, t] + m, i[:, :, t]).detach()
        keep, write = (f[:, :, t] + before - m).exp(), (i[:, :, t] - m).exp()
        added = write[..., None] * k[:, :, t]
        n = torch.addcmul(added, keep[..., None], n)
        C = torch.addcmul(keep[..., None, None].to(dtype) * C, added[..., None].to(dtype), v[:, :, t, None])
        size = torch.maximum((n * q[:, :, t]).sum(-1).abs(), (-m).exp()) + eps
        y.append((q[:, :, t, None].to(dtype) @ C)[:, :, 0] / size[..., None].to(dtype))
    return (torch.stack(y, 2).to(value.dtype) if y else value), {"C": C, "n": n, "m": m}


@tapped
def expgate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    log_input: Tensor,
    state: State | None = None,
    *,
    scale: float = 1.0,
    eps: float = 0.0,
    chunk_size: int = 64,
) -> tuple[Tensor, State]:
    r"""Linear attention with writes of weight $e^{i_t}$, averaged: $y_t = C_t^\top q_t / \max(|n_t · q_t|, 1)$.

    $C_t = e^{f_t} C_{t-1} + e^{i_t} k_t v_t^\top$ and $n_t = e^{f_t} n_{t-1} + e^{i_t} k_t$. The state holds
    $e^{-m} C$ and $e^{-m} n$, where m is the greatest exponent so far, so that gates of any size stay finite; m cancels
    in y and has no gradient of its own: what depends on C and n is differentiated exactly.

    With m known beforehand (a running maximum) this is linear attention with decay f_t + m_{t−1} − m_t ≤ 0, over a
    scan of keys.

    n and n · q are float64 whatever the rest is: that costs little, as n has one number per key feature, and where the
    terms of n · q cancel, their rounding would be that of y, many times over. C' is not: its sums give their values
    weights that are off by some δ_j, which is Σ δ_j (v_j − y°) for any y° once y° Σ δ_j is known, and that is the
    difference of n · q in both precisions. With y° near y, and no greater than values are, little is left of it.

    Args:
        log_forget: f ≤ 0, clamped at −60.
        log_input: i, any number; −∞ writes nothing.
        scale: of the queries.
        eps: added to the denominator of the stabilised quotient, as published models do (1e-6).
        chunk_size: changes speed, never the result.

    Shapes: `query`, `key` [B, H, T, K], `value` and y [B, H, T, V], gates [B, H, T], any T ≥ 0;
        state {"C": [B, H, K, V], "n": float64 [B, H, K], "m": float64 [B, H]}. Raises: `ShapeError`.
    Source: Beck et al., xLSTM, arXiv:2405.04517 (2024).
    """
    expect("expgate", "key", key, "batch heads time features")
    B, H, T, K = key.shape
    expect("expgate", "query", query, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect("expgate", "value", value, "batch heads time features", batch=B, heads=H, time=T)
    for name, gate in (("log_forget", log_forget), ("log_input", log_input)):
        expect("expgate", name, gate, "batch heads time", batch=B, heads=H, time=T)
    if T <= 1:
        return expgate_reference(scale * query, key, value, log_forget, log_input, state, eps=eps)
    C, n, start = _begin(key, value, state)
    keep, write, m = _stabilised(log_forget, log_input, start)
    run = _Compiled.apply if dispatch.compiled(key) and not dispatch.triton(value) else _by_sums
    q, k, v = query.to(C.dtype), key.to(C.dtype), value.to(C.dtype)
    y, C, n = run(q, k, v, keep, write, C, n.double(), m, scale, eps, min(chunk_size, T))
    return y.to(value.dtype), {"C": C, "n": n, "m": m[:, :, -1]}


def exponential_sums(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    log_input: Tensor,
    state: State | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor, Tensor, State]:
    """What `expgate` divides: (C'ᵀq [B, H, T, V], n'·q [B, H, T], m float64 [B, H, T], state), for positive features.

    Nothing cancels in n'·q then, and n is as wide as C. The true values are e^m times both. With them, averages over
    disjoint sets of tokens, or of two kinds, can share one normaliser.
    """
    C, n, start = _begin(key, value, state)
    n = n.to(C.dtype)
    if key.shape[2] == 0:
        none = log_input.double()
        return value.to(C.dtype), none.to(C.dtype), none, {"C": C, "n": n, "m": start}
    keep, write, m = _stabilised(log_forget, log_input, start)
    num, den, C, n = _sums(query, key, value, keep, write, C, n, chunk_size)
    return num, den, m, {"C": C, "n": n, "m": m[:, :, -1]}


def expgate_carry(key: Tensor, value: Tensor, log_forget: Tensor, log_input: Tensor) -> tuple[Tensor, State]:
    """(log decay over the piece [B, H], the state that the piece alone leaves): `merge` adds any state before it."""
    B, H, _, K = key.shape
    empty = key.new_zeros(B, H, K, value.shape[3] + 1, dtype=recurrent_dtype(value))
    nothing = {
        "C": empty[..., 1:],
        "n": empty[..., 0].double(),
        "m": torch.full_like(empty[:, :, 0, 0], EMPTY).double(),
    }
    _, state = expgate(key, key, value, log_forget, log_input, nothing)
    return floored(log_forget.double()).sum(2), state


def merge(before: State, log_decay: Tensor, after: State) -> State:
    """The state of two pieces in a row, from the first's and from the second's (log decay, state on its own).

    Works on every stabilised state: each tensor stands for e^m times itself, m having the leading axes and, as
    everywhere, no gradient of its own.
    """
    past, present = before["m"].detach() + log_decay, after["m"].detach()
    m = torch.maximum(past, present).detach()
    keep, add = (past - m).exp(), (present - m).exp()

    def join(x: Tensor, y: Tensor) -> Tensor:
        keeps, adds = (w.to(y.dtype).view(*m.shape, *[1] * (y.ndim - m.ndim)) for w in (keep, add))
        return keeps * x + adds * y

    return {"m": m, **{name: join(before[name], y) for name, y in after.items() if name != "m"}}


def _stabilised(log_forget: Tensor, log_input: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(Log decays and log weights under the running maximum, both ≤ 0; that maximum m), all float64 [B, H, T]."""
    f, i = floored(log_forget.double()), log_input.double()
    with torch.no_grad():
        total = f.cumsum(2)
        m = total + torch.cat([start[..., None], i - total], 2).cummax(2).values[:, :, 1:]
        before = torch.cat([start[..., None], m[:, :, :-1]], 2)
    return f + before - m, i - m, m


def _sums(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor, write: Tensor, C: Tensor, n: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(C'ᵀq, n'·q, C', n') at once: a value of 1 beside the others counts the weights that they are given."""
    written = key.to(C.dtype) * write.exp().to(C.dtype)[..., None]
    counted = torch.cat([value.to(C.dtype), torch.ones_like(written[..., :1])], 3)
    S = {"S": torch.cat([C, n[..., None]], 3)}
    sums, after = linear_attention(query, written, counted, keep.to(C.dtype), S, chunk_size=chunk_size)
    C, n = after["S"][..., :-1].contiguous(), after["S"][..., -1].contiguous()
    return sums[..., :-1], sums[..., -1], C, n


def _by_sums(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, write: Tensor, C: Tensor, n: Tensor, m: Tensor, scale: float,
    eps: float, size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, C', n') in differentiable operations, on any device."""
    q, dtype = scale * q, C.dtype
    num, rounded, C, _ = _sums(q, k, v, keep, write, C, n.to(dtype), size)
    counted = (k.double() * write.exp()[..., None]).transpose(1, 2).flatten(2)
    ns, _ = scan(keep.transpose(1, 2).repeat_interleave(k.shape[3], 2), counted, {"h": n.flatten(1)})
    ns = ns.unflatten(2, n.shape[1:])
    den = (ns * q.transpose(1, 2)).sum(-1).transpose(1, 2)
    with torch.no_grad():
        most = v.abs().amax(2, keepdim=True)
        typical = (num / rounded[..., None]).nan_to_num().clamp(-most, most)
    num = num + typical * (den - rounded).to(dtype)[..., None]
    whole = (torch.maximum(den.abs(), (-m).exp()) + eps).to(dtype)
    return num / whole[..., None], C, ns[:, -1]


class _Compiled(torch.autograd.Function):
    """The same compiled for the CPU, with gradients by hand: a head at a time, a stretch of it in the cache."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, write: Tensor, C: Tensor, n: Tensor, m: Tensor,
        scale: float, eps: float, size: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        from remanence.ops import expgate_kernels as kernels
        from remanence.ops.chunk_kernels import EVERY
        from remanence.ops.compiled import blank, flat, rows, spread_products

        (B, H, T, K), V = k.shape, v.shape[3]
        stretches = -(-T // (size * EVERY))
        y, den, most = blank(v, 3), m.new_empty(B, H, T), v.new_empty(B, H, V)
        befores, n_befores = v.new_empty(B * H * (stretches + 1), 1, K, V + 1), n.new_empty(B * H, stretches, K)
        C_end, n_end = C.new_empty(C.shape), n.new_empty(n.shape)
        ctx.how = H, T, size, EVERY, scale, eps
        inputs = *flat(q, 3), *flat(k, 3), *flat(v, 3), *map(rows, (keep, write, m))
        kept = rows(den), rows(most), befores.numpy(), n_befores.numpy()
        outputs = *flat(y, 3), *kept, rows(C_end), rows(n_end)
        spread_products(kernels.forward, B * H, k.numel(), *ctx.how, *inputs, rows(C), rows(n), *outputs)
        ctx.save_for_backward(q, k, v, keep, write, C, n, m, y, den, most, befores, n_befores)
        return y, C_end, n_end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import expgate_kernels as kernels
        from remanence.ops.compiled import blank, flat, rows, spread_products

        *given, y, den, most, befores, n_befores = ctx.saved_tensors
        q, k, v, keep, write, *_, m = given
        (_, _, size, _, scale, eps), nothing = ctx.how, (None,) * 3
        if torch.is_grad_enabled():  # a second derivative is wanted
            plain = partial(_by_sums, scale=scale, eps=eps, size=size)
            return *second_order(ctx.needs_input_grad[:8], plain, given, grads), *nothing
        d_q, d_k, d_v = (blank(x, 3) for x in (q, k, v))
        d_keep, d_write = torch.empty_like(den), torch.empty_like(den)
        d_C, d_n = (d.clone(memory_format=torch.contiguous_format) for d in grads[1:])
        inputs = *flat(q, 3), *flat(k, 3), *flat(v, 3), *map(rows, (keep, write, m))
        kept = *flat(y, 3), rows(den), rows(most), befores.numpy(), n_befores.numpy(), *flat(grads[0], 3)
        outputs = *flat(d_q, 3), *flat(d_k, 3), *flat(d_v, 3), *map(rows, (d_keep, d_write, d_C, d_n))
        spread_products(kernels.backward, k.shape[0] * k.shape[1], k.numel(), *ctx.how, *inputs, *kept, *outputs)
        return d_q, d_k, d_v, d_keep, d_write, d_C, d_n, None, *nothing


def _begin(key: Tensor, value: Tensor, state: State | None) -> tuple[Tensor, Tensor, Tensor]:
    """(C, n, m); a fresh m is 0, so that the first denominators are those of the published models to the last digit."""
    if state is not None:
        return state["C"], state["n"], state["m"].double().detach()
    B, H, _, K = key.shape
    C = key.new_zeros(B, H, K, value.shape[3], dtype=recurrent_dtype(value))
    return C, C[..., 0].double(), torch.zeros(B, H, dtype=torch.float64, device=key.device)
