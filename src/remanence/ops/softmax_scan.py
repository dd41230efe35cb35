"""Softmax over all that was read, in constant memory. Axes: B batch, T time, D features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remanence.errors import expect
from remanence.ops import steps
from remanence.ops.decay import floored, recurrent_dtype, second_order
from remanence.ops.expgate import EMPTY
from remanence.ops.taps import tapped
from remanence.state import State


def softmax_scan_reference(
    score: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """The definition, with the past as w/u = Σ e^{s−m} v / Σ e^{s−m}: m, u and w are decayed, then written to."""
    s, v, g, bonus, w, u, m = _prepare(score, value, log_decay, bonus, state)
    dtype = w.dtype
    y = []
    for t in range(s.shape[1]):
        present = s[:, t].double() + bonus
        top = torch.maximum(m, present).detach()
        past, now = (m - top).exp().to(dtype), (present - top).exp().to(dtype)
        y.append((past * w + now * v[:, t]) / (past * u + now))
        top = torch.maximum(m + g, s[:, t].double()).detach()
        past, now = (m + g - top).exp().to(dtype), (s[:, t].double() - top).exp().to(dtype)
        w, u, m = past * w + now * v[:, t], past * u + now, top
    return (torch.stack(y, 1).to(value.dtype) if y else value), {"w": w, "u": u, "m": m}


@tapped
def softmax_scan(
    score: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State]:
    r"""A running softmax average per feature: $y_t = \frac{\sum_{j<t} e^{(t-1-j)g + s_j} v_j + e^{u + s_t} v_t}{…}$.

    The denominator is the same sum without v. Without decay g and bonus u this is causal softmax attention with one
    query for all times (Aaren); with them it is RWKV-4's WKV, in which the present is counted before any decay.

    The state holds e^{-m} times the sums, m being the greatest exponent so far; m cancels in y and has no gradient of
    its own. `remanence.ops.expgate.merge` joins the states of two pieces.

    Shapes: `score`, `value` and y [B, T, D], any T ≥ 0; `log_decay` (≤ 0, clamped at −60) and `bonus` None or [D];
        state {"w", "u": [B, D], "m": float64 [B, D]}, float32 or wider. Raises: `ShapeError`.
    Source: Peng et al., RWKV, arXiv:2305.13048 (2023); Feng et al., Attention as an RNN, arXiv:2405.13956 (2024).
    """
    expect("softmax_scan", "score", score, "batch time features")
    B, T, D = score.shape
    expect("softmax_scan", "value", value, "batch time features", batch=B, time=T, features=D)
    for name, x in (("log_decay", log_decay), ("bonus", bonus)):
        if x is not None:
            expect("softmax_scan", name, x, "features", features=D)
    if T == 1 and state is not None and steps.worth(score, value, state["w"], state["u"]):
        return steps.softmax_scan(score, value, log_decay, bonus, state)
    if T == 0:
        return softmax_scan_reference(score, value, log_decay, bonus, state)
    inputs = _prepare(score, value, log_decay, bonus, state)
    run = _SoftmaxScan.apply if score.device.type == "cpu" else _by_doubling
    y, w, u, m = run(*inputs)
    return y.to(value.dtype), {"w": w, "u": u, "m": m}


def softmax_scan_carry(score: Tensor, value: Tensor, log_decay: Tensor | None = None) -> tuple[Tensor, State]:
    """(log decay over the piece [D], the state that the piece alone leaves); `expgate.merge` adds any state before."""
    total = score.new_zeros(score.shape[2]) if log_decay is None else floored(log_decay.double())
    return total * score.shape[1], softmax_scan(score, value, log_decay)[1]


def _prepare(
    score: Tensor, value: Tensor, log_decay: Tensor | None, bonus: Tensor | None, state: State | None
) -> tuple[Tensor, ...]:
    """(s, v, g, u, and the state's w, u, m): sums in `recurrent_dtype`, exponents per feature in float64."""
    B, _, D = score.shape
    dtype = recurrent_dtype(value)
    none = torch.zeros(D, dtype=torch.float64, device=score.device)
    g = none if log_decay is None else floored(log_decay.double())
    bonus = none if bonus is None else bonus.double()
    if state is None:
        w = value.new_zeros(B, D, dtype=dtype)
        return score.to(dtype), value.to(dtype), g, bonus, w, w.clone(), torch.full_like(w, EMPTY, dtype=none.dtype)
    return score.to(dtype), value.to(dtype), g, bonus, state["w"], state["u"], state["m"].double().detach()


def _by_doubling(
    s: Tensor, v: Tensor, g: Tensor, bonus: Tensor, w: Tensor, u: Tensor, m: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with tensor operations only, on any device: after step n, sums reach n tokens back."""
    tops = torch.cat([m[:, None], s.double()], 1).detach()
    one = (s - s.detach()).exp()  # whose gradient is that of e^{s−m}
    sums = torch.stack([torch.cat([w[:, None], one * v], 1), torch.cat([u[:, None], one], 1)])
    n = 1
    while n <= s.shape[1]:
        reach = tops[:, :-n] + n * g
        top = torch.maximum(tops[:, n:], reach).detach()
        near, far = (tops[:, n:] - top).exp().to(w.dtype), (reach - top).exp().to(w.dtype)
        sums = torch.cat([sums[:, :, :n], near * sums[:, :, n:] + far * sums[:, :, :-n]], 2)
        tops = torch.cat([tops[:, :n], top], 1)
        n *= 2
    present = s.double() + bonus
    top = torch.maximum(tops[:, :-1], present).detach()
    past, now = (tops[:, :-1] - top).exp().to(w.dtype), (present - top).exp().to(w.dtype)
    y = (past * sums[0, :, :-1] + now * v) / (past * sums[1, :, :-1] + now)
    return y, sums[0, :, -1], sums[1, :, -1], tops[:, -1]


class _SoftmaxScan(torch.autograd.Function):
    """Compiled loops over time; the backward one replays a chunk at a time from the states kept in between."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from remanence.ops.softmax_scan_kernels import BAND, CHUNK, forward

        s, v, g, bonus, *state = (x.contiguous() for x in inputs)
        B, T, D = s.shape
        end = [x.clone() for x in state]
        kept = [x.new_empty(B, -(-T // CHUNK), D) for x in state]
        y = torch.empty_like(v)
        _spread(forward, BAND, s, v, g, bonus, *end, y, *kept)
        ctx.save_for_backward(s, v, g, bonus, *state, *kept)
        ctx.mark_non_differentiable(end[2])
        return y, end[0], end[1], end[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops.softmax_scan_kernels import BAND, backward

        s, v, g, bonus, w, u, m, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            inputs = (s, v, g, bonus, w, u, m)

            def plain(*inputs: Tensor) -> tuple[Tensor, ...]:
                return _by_doubling(*inputs)[:3]

            return second_order(ctx.needs_input_grad, plain, inputs, grads[:3])
        d_w, d_u = (x.to(v.dtype).clone(memory_format=torch.contiguous_format) for x in grads[1:3])
        d_s, d_v = torch.empty_like(s), torch.empty_like(v)
        d_g, d_bonus = (g.new_zeros(s.shape[0], s.shape[2]) for _ in range(2))
        _spread(backward, BAND, s, v, g, bonus, *kept, grads[0].contiguous(), d_w, d_u, d_s, d_v, d_g, d_bonus)
        return d_s, d_v, d_g.sum(0), d_bonus.sum(0), d_w, d_u, None


def _spread(kernel: Any, band: int, *tensors: Tensor) -> None:
    from remanence.ops.compiled import spread

    parts, arrays = -(-tensors[0].shape[2] // band), [x.detach().numpy() for x in tensors]
    if tensors[0].shape[1] == 1:  # a token is done before threads are asked
        kernel(0, parts, *arrays)
    else:
        spread(kernel, parts, tensors[0].numel(), *arrays)
