"""Griffin's gated recurrence of bounded variance. Axes: B batch, T time, D features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remanence.ops.decay import second_order
from remanence.ops.scan import scan
from remanence.state import State


class BoundedSqrt(torch.autograd.Function):
    """√x with its slope held to 1000, so that a decay of almost 1 cannot blow up the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (4 * x).clamp(min=1e-6).rsqrt()


def by_scan(u: Tensor, slow: Tensor, into: Tensor, rate: Tensor, empty: Tensor, start: Tensor) -> tuple[Tensor, State]:
    r"""The definition: $h_t = a_t ⊙ h_{t-1} + \sqrt{1 - a_t^2} σ(i_t) ⊙ u_t$ with $\log a_t = -8 σ(s_t) ρ$.

    A row's first token is written with factor 1 where the row is empty.

    Shapes: u, `slow` s and `into` i [B, T, D]; `rate` ρ ≥ 0 [D]; `empty` bool [B]; start [B, D] -> h [B, T, D], {"h"}.
    """
    log_a = -8 * slow.sigmoid() * rate
    first = empty[:, None] & (torch.arange(u.shape[1], device=u.device) == 0)
    scale = torch.where(first[..., None], 1.0, BoundedSqrt.apply(-torch.expm1(2 * log_a)))
    return scan(log_a, scale * into.sigmoid() * u, {"h": start})


def rg_lru(u: Tensor, slow: Tensor, into: Tensor, rate: Tensor, empty: Tensor, start: Tensor) -> tuple[Tensor, State]:
    """`by_scan` compiled for the CPU, for T ≥ 1, in one pass, which keeps its inputs alone."""
    inputs = (x.contiguous() for x in (u, slow, into, rate, empty, start))
    h = _Compiled.apply(*inputs)
    return h, {"h": h[:, -1]}


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        from remanence.ops import rg_lru_kernels as kernels
        from remanence.ops.compiled import spread_bands

        h = torch.empty_like(inputs[0])
        spread_bands(kernels.forward, h.shape[2], 4 * h.numel(), *inputs, h)
        ctx.save_for_backward(*inputs, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import rg_lru_kernels as kernels
        from remanence.ops.compiled import spread_bands

        *inputs, h = ctx.saved_tensors
        u, slow, into, rate, _, start = inputs
        if torch.is_grad_enabled():  # a second derivative is wanted
            return second_order(ctx.needs_input_grad, lambda *given: by_scan(*given)[0], inputs, grads)
        found = *(torch.empty_like(x) for x in (u, slow, into)), torch.zeros_like(rate), torch.empty_like(start)
        spread_bands(kernels.backward, h.shape[2], 4 * h.numel(), *inputs, h, grads[0].contiguous(), *found)
        return *found[:4], None, found[4]
