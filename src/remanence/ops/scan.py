"""The diagonal linear recurrence. Axes: B batch, T time, D features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remanence.errors import expect
from remanence.ops import dispatch, steps
from remanence.ops.decay import floored, recurrent_dtype, second_order
from remanence.ops.taps import tapped
from remanence.state import State


def scan_reference(log_decay: Tensor, b: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """The definition: h_t = exp(g_t) ⊙ h_{t−1} + b_t."""
    dtype = recurrent_dtype(b)
    decay = floored(log_decay.to(dtype)).exp()
    h = b.new_zeros(b.shape[0], b.shape[2], dtype=dtype) if state is None else state["h"]
    out = []
    for t in range(b.shape[1]):
        h = decay[:, t] * h + b[:, t]
        out.append(h)
    return (torch.stack(out, 1) if out else b.to(dtype)), {"h": h}


@tapped
def scan(log_decay: Tensor, b: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """h_t = exp(g_t) ⊙ h_{t−1} + b_t for every feature by itself.

    Shapes: `log_decay` (≤ 0, clamped at −60), `b` and h [B, T, D], any T ≥ 0; state {"h": [B, D]}.
    h has float32 or wider. Raises: `ShapeError`.
    Source: Martin & Cundy, Parallelizing Linear Recurrent Neural Nets over Sequence Length,
    arXiv:1709.04057 (2017).
    """
    expect("scan", "b", b, "batch time features")
    B, T, D = b.shape
    expect("scan", "log_decay", log_decay, "batch time features", batch=B, time=T, features=D)
    dtype = recurrent_dtype(b)
    if T == 1 and state is not None and steps.worth(b, log_decay, state["h"]):
        h = steps.scan(log_decay, b, state["h"])
        return h[:, None], {"h": h}
    if T <= 1:
        return scan_reference(log_decay, b, state)
    log_decay, b = log_decay.to(dtype).contiguous(), b.to(dtype).contiguous()
    start = b.new_zeros(B, D) if state is None else state["h"].to(dtype).contiguous()
    if dispatch.triton(b):
        from remanence.ops.gpu.scan import Scan

        h = Scan.apply(log_decay, b, start)
    else:
        h = (_Scan.apply if b.device.type == "cpu" else _scan_by_doubling)(log_decay, b, start)
    return h, {"h": h[:, -1]}


def scan_carry(log_decay: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(M, N), both [B, D], with h_end = M ⊙ h_start + N for every state h_start."""
    decay = floored(log_decay.to(recurrent_dtype(b))).sum(1).exp()
    return decay, scan(log_decay, b)[1]["h"]


def _scan_by_doubling(log_decay: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """The same with tensor operations only, on any device: after step s, h_t has read s tokens back."""
    a = floored(log_decay).exp()
    h = torch.cat([b[:, :1] + a[:, :1] * start[:, None], b[:, 1:]], 1)
    step = 1
    while step < h.shape[1]:
        h = torch.cat([h[:, :step], h[:, step:] + a[:, step:] * h[:, :-step]], 1)
        a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], 1)
        step *= 2
    return h


class _Scan(torch.autograd.Function):
    """Compiled loops over time, forwards for h and backwards for the gradients."""

    @staticmethod
    def forward(ctx: Any, log_decay: Tensor, b: Tensor, start: Tensor) -> Tensor:
        from remanence.ops import scan_kernels as kernels
        from remanence.ops.compiled import spread_bands

        h = torch.empty_like(b)
        spread_bands(kernels.forward, b.shape[2], b.numel(), log_decay, b, start, h)
        ctx.save_for_backward(log_decay, b, start, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import scan_kernels as kernels
        from remanence.ops.compiled import spread_bands

        log_decay, b, start, h = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return second_order(ctx.needs_input_grad, _scan_by_doubling, (log_decay, b, start), grads)
        d_log_decay, d_b, d_start = torch.empty_like(h), torch.empty_like(h), torch.empty_like(start)
        inputs = log_decay, start, h, grads[0].contiguous()
        spread_bands(kernels.backward, h.shape[2], h.numel(), *inputs, d_log_decay, d_b, d_start)
        return d_log_decay, d_b, d_start
