"""Normalising vectors by their length, with what usually follows: a weight and a gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.errors import expect
from remanence.ops import steps
from remanence.ops.decay import recurrent_dtype, second_order
from remanence.ops.dispatch import compiled
from remanence.ops.taps import tapped

ROWS = 256
"""Vectors that a thread takes at once."""


def normalise_reference(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    eps: float = 1e-6,
    mean: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """The definition: scale·x / √(m + eps) ⊙ weight ⊙ SiLU(gate), m the mean of squares (RMS) or their sum (L2)."""
    square = x.square()
    y = x * (scale * ((square.mean(-1, keepdim=True) if mean else square.sum(-1, keepdim=True)) + eps).rsqrt())
    y = y if weight is None else y * weight
    return y if gate is None else y * F.silu(gate)


@tapped
def normalise(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    eps: float = 1e-6,
    mean: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """scale · x / √(m + eps) ⊙ weight ⊙ SiLU(gate) over the last axis, in one pass.

    m is the mean of squares (RMS norm, Zhang & Sennrich, arXiv:1910.07467, 2019) or, without `mean`, their sum (L2).

    Shapes: `x`, `gate` and y [..., width]; `weight` [width]. Raises: `ShapeError`.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        expect("normalise", "weight", weight, "features", features=x.shape[-1])
    if not compiled(x) and steps.worth(x, weight, gate):
        return steps.normalise(x, weight, gate, eps, mean, scale)
    if x.dtype != recurrent_dtype(x) or not compiled(x):
        return normalise_reference(x, weight, gate, eps=eps, mean=mean, scale=scale)
    if x.ndim != 4:
        y = normalise(
            x.reshape(1, 1, -1, x.shape[-1]),
            weight,
            None if gate is None else gate.reshape(1, 1, -1, x.shape[-1]),
            eps=eps,
            mean=mean,
            scale=scale,
        )
        return y.view(x.shape)
    w = x.new_ones(x.shape[-1]) if weight is None else weight.to(x.dtype).contiguous()
    share = (1 / x.shape[-1] if mean else 1.0) / scale**2  # the factor goes into the root
    return _Compiled.apply(x, w, None if gate is None else gate.to(x.dtype), eps / scale**2, share)


class _Compiled(torch.autograd.Function):
    """[A, B, C, width], in any order of the first three axes in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, eps: float, share: float) -> Tensor:
        from remanence.ops import norm_kernels as kernels
        from remanence.ops.compiled import blank, flat, flat_or_none, spread

        A, B, C, _ = x.shape
        y, inverse = blank(x, 3), x.new_empty(A * B * C)
        inputs = *flat(x, 3), weight.detach().numpy(), gate is not None, *flat_or_none(gate, 3, x)
        how = B, C, share, eps
        spread(
            kernels.forward,
            -(-A * B * C // ROWS),
            x.numel(),
            ROWS,
            A * B * C,
            *how,
            *inputs,
            *flat(y, 3),
            inverse.numpy(),
        )
        ctx.save_for_backward(x, weight, gate, inverse)
        ctx.eps, ctx.share = eps, share
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import norm_kernels as kernels
        from remanence.ops.compiled import blank, flat, flat_or_none, spread

        x, weight, gate, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted

            def plain(x: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
                scale = ctx.share**-0.5
                return normalise_reference(x, weight, gate, eps=ctx.eps * scale**2, mean=False, scale=scale)

            return *second_order(ctx.needs_input_grad[:3], plain, (x, weight, gate), grads), None, None
        A, B, C, width = x.shape
        parts = -(-A * B * C // ROWS)
        d_x, d_weights = blank(x, 3), x.new_zeros(parts, width)
        d_gate = None if gate is None else blank(gate, 3)
        inputs = *flat(x, 3), weight.detach().numpy(), gate is not None, *flat_or_none(gate, 3, x), inverse.numpy()
        outputs = *flat(d_x, 3), *flat_or_none(d_gate, 3, x), d_weights.numpy()
        how = B, C, ctx.share
        spread(kernels.backward, parts, x.numel(), ROWS, A * B * C, *how, *inputs, *flat(grads[0], 3), *outputs)
        return d_x, d_weights.sum(0), d_gate, None, None
