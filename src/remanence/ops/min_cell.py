"""Gated cells whose gates see only the input. Axes: B batch, T time, D features."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.ops.decay import second_order
from remanence.ops.scan import scan


def shares(gates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The logarithms of what is kept and of what is written, whose exponentials sum to 1, of one gate or of two."""
    if count == 2:
        forget, write = gates.chunk(2, dim=-1)
        gates = F.logsigmoid(write) - F.logsigmoid(forget)
    return F.logsigmoid(-gates), F.logsigmoid(gates)  # not -softplus, which drops all terms below e⁻²⁰


def positive(x: Tensor) -> Tensor:
    """x + ½ where x ≥ 0, else σ(x): a candidate that keeps the state above zero."""
    return torch.where(x >= 0, x + 0.5, x.sigmoid())


def by_scan(z: Tensor, gates: int, start: Tensor) -> Tensor:
    """The definition, as a linear recurrence: h_t = k_t ⊙ h_{t−1} + (1 − k_t) ⊙ g(x_t), [B, T, D].

    k is what a gate σ(−a) keeps, or f/(f + i) of two, f = σ(a) and i = σ(b); g is `positive`.

    Shapes: z [B, T, (gates + 1)·D], the logits of the gates and x, side by side; start [B, D].
    """
    width = z.shape[-1] // (gates + 1)
    gate, candidate = z.split([gates * width, width], dim=-1)
    keep, write = shares(gate, gates)
    return scan(keep, write.exp() * positive(candidate), {"h": start})[0]


def min_cell(z: Tensor, gates: int, start: Tensor) -> Tensor:
    """`by_scan` compiled for the CPU, in one pass over z, of which alone it makes gates and candidates again."""
    return _Compiled.apply(z.contiguous(), gates, start.contiguous())


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, gates: int, start: Tensor) -> Tensor:
        from remanence.ops import min_cell_kernels as kernels
        from remanence.ops.compiled import spread_bands

        h = z.new_empty(*z.shape[:2], start.shape[1])
        spread_bands(kernels.forward, h.shape[2], z.numel(), gates, z, start, h)
        ctx.save_for_backward(z, start, h)
        ctx.gates = gates
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import min_cell_kernels as kernels
        from remanence.ops.compiled import spread_bands

        z, start, h = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted

            def plain(z: Tensor, start: Tensor) -> Tensor:
                return by_scan(z, ctx.gates, start)

            d_z, d_start = second_order((ctx.needs_input_grad[0], ctx.needs_input_grad[2]), plain, (z, start), grads)
            return d_z, None, d_start
        d_z, d_start = torch.empty_like(z), torch.empty_like(start)
        spread_bands(
            kernels.backward, h.shape[2], z.numel(), ctx.gates, z, start, h, grads[0].contiguous(), d_z, d_start
        )
        return d_z, None, d_start
