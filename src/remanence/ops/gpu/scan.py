"""The diagonal recurrence for the GPU: chunks of time in parallel.

Three passes: what each chunk does to the state that it is given (h ← M ⊙ h + N); the states between chunks, one after
another; then each chunk from its true start. Gradients run through the same passes backwards. A product of decays is
built factor by factor and never divided.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from remanence.ops.decay import FLOOR as LOWEST
from remanence.ops.decay import second_order

FLOOR = tl.constexpr(LOWEST)
CHUNK, BAND, CARRIED = 64, 128, 64


@triton.jit
def _effects(g, x, M, N, T, D, REVERSE: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    """M, N [B, chunks, D] of every chunk; backwards it is the gradient x that is carried, out of token t by e^{g_t}."""
    c, chunks, b = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * W + tl.arange(0, W)
    first, n = c * C, tl.minimum(C, T - c * C)
    over, new = tl.full([W], 1, M.dtype.element_ty), tl.zeros([W], M.dtype.element_ty)
    for i in range(n):
        at = (b * T + first + (n - 1 - i if REVERSE else i)) * D + d
        a = tl.exp(tl.maximum(tl.load(g + at, mask=d < D, other=0), FLOOR))
        added = tl.load(x + at, mask=d < D, other=0)
        new = a * (new + added) if REVERSE else a * new + added
        over *= a
    to = (b * chunks + c) * D + d
    tl.store(M + to, over, mask=d < D)
    tl.store(N + to, new, mask=d < D)


@triton.jit
def _borders(M, N, start, end, chunks, D, REVERSE: tl.constexpr, W: tl.constexpr):
    """Replace N by the state that each chunk is given; `end` is what comes after them all."""
    b = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * W + tl.arange(0, W)
    h = tl.load(start + b * D + d, mask=d < D, other=0)
    for i in range(chunks):
        at = (b * chunks + (chunks - 1 - i if REVERSE else i)) * D + d
        over, new = tl.load(M + at, mask=d < D, other=0), tl.load(N + at, mask=d < D, other=0)
        tl.store(N + at, h, mask=d < D)
        h = over * h + new
    tl.store(end + b * D + d, h, mask=d < D)


@triton.jit
def _forward(g, x, given, h, T, D, C: tl.constexpr, W: tl.constexpr):
    c, chunks, b = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * W + tl.arange(0, W)
    now = tl.load(given + (b * chunks + c) * D + d, mask=d < D, other=0)
    for t in range(c * C, tl.minimum(T, c * C + C)):
        at = (b * T + t) * D + d
        a = tl.exp(tl.maximum(tl.load(g + at, mask=d < D, other=0), FLOOR))
        now = a * now + tl.load(x + at, mask=d < D, other=0)
        tl.store(h + at, now, mask=d < D)


@triton.jit
def _backward(g, start, h, d_h, given, d_g, d_x, T, D, C: tl.constexpr, W: tl.constexpr):
    c, chunks, b = tl.program_id(0), tl.num_programs(0), tl.program_id(2).to(tl.int64)
    d = tl.program_id(1) * W + tl.arange(0, W)
    carried = tl.load(given + (b * chunks + c) * D + d, mask=d < D, other=0)
    first, n = c * C, tl.minimum(C, T - c * C)
    for i in range(n):
        t = first + n - 1 - i
        at = (b * T + t) * D + d
        log_decay = tl.load(g + at, mask=d < D, other=0)
        total = carried + tl.load(d_h + at, mask=d < D, other=0)
        tl.store(d_x + at, total, mask=d < D)
        carried = tl.exp(tl.maximum(log_decay, FLOOR)) * total
        before = tl.load(start + b * D + d, mask=d < tl.where(t == 0, D, 0), other=0)
        before += tl.load(h + at - D, mask=d < tl.where(t > 0, D, 0), other=0)
        tl.store(d_g + at, tl.where(log_decay >= FLOOR, carried * before, 0), mask=d < D)


def _given(g: Tensor, x: Tensor, start: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The state (backwards: the gradient) that each chunk is given [B, chunks, D], and the last one [B, D]."""
    B, T, D = x.shape
    chunks = triton.cdiv(T, CHUNK)
    M, N = x.new_empty(B, chunks, D), x.new_empty(B, chunks, D)
    end = torch.empty_like(start)
    _effects[chunks, triton.cdiv(D, BAND), B](g, x, M, N, T, D, reverse, CHUNK, BAND)
    _borders[triton.cdiv(D, CARRIED), B](M, N, start, end, chunks, D, reverse, CARRIED)
    return N, end


class Scan(torch.autograd.Function):
    """h [B, T, D] from contiguous log decays and inputs [B, T, D] and a start [B, D], in float32 or float64."""

    @staticmethod
    def forward(ctx: Any, log_decay: Tensor, b: Tensor, start: Tensor) -> Tensor:
        B, T, D = b.shape
        h = torch.empty_like(b)
        with torch.cuda.device_of(b):
            given, _ = _given(log_decay, b, start, False)
            _forward[triton.cdiv(T, CHUNK), triton.cdiv(D, BAND), B](log_decay, b, given, h, T, D, CHUNK, BAND)
        ctx.save_for_backward(log_decay, b, start, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_decay, b, start, h = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            from remanence.ops.scan import _scan_by_doubling

            return second_order(ctx.needs_input_grad, _scan_by_doubling, (log_decay, b, start), grads)
        B, T, D = h.shape
        d_h, d_g, d_b = grads[0].contiguous(), torch.empty_like(h), torch.empty_like(h)
        with torch.cuda.device_of(h):
            given, d_start = _given(log_decay, d_h, torch.zeros_like(start), True)
            _backward[triton.cdiv(T, CHUNK), triton.cdiv(D, BAND), B](
                log_decay, start, h, d_h, given, d_g, d_b, T, D, CHUNK, BAND
            )
        return d_g, d_b, d_start
