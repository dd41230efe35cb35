"""The product of every projection: x Wᵀ + b."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.ops.decay import second_order
from remanence.ops.dispatch import compiled

ROWS, HIGH, WIDE = 256, 512, 256
"""Of a part: tokens of a product; outputs and inputs of the weight's gradient."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, with gradients: by kernels of our own where these are faster, else PyTorch's.

    Ours share out parts of the product to threads that wait without spinning, so that a busy neighbour costs its share
    of a core; and on AMD's processors with AVX-512 they need less time than the BLAS that PyTorch comes with.

    Shapes: x [..., in], weight [out, in], bias [out] -> [..., out]. Raises: `RuntimeError`, as PyTorch's.
    """
    if not (compiled(x) and _fits(x, weight)):
        return F.linear(x, weight, bias)
    y = _Compiled.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


def _fits(x: Tensor, weight: Tensor) -> bool:
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float64) or weight.ndim != 2:
        return False
    if x.shape[-1] != weight.shape[1] or not weight.is_contiguous() or torch.is_autocast_enabled("cpu"):
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    panel = _panel(x.dtype)
    return panel > 0 and not (weight.shape[0] % panel or weight.shape[1] % panel)


@cache
def _panel(dtype: torch.dtype) -> int:
    """Of how many columns the kernels take a multiple, or 0 where they are not faster."""
    from remanence.ops.product_kernels import BYTES, FASTER

    return 2 * BYTES // dtype.itemsize if FASTER else 0


class _Compiled(torch.autograd.Function):
    """[tokens, in] -> [tokens, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import linear_kernels as kernels
        from remanence.ops.compiled import spread

        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return second_order(ctx.needs_input_grad, F.linear, (x, weight), grads)
        d_y, d_weight = _contiguous_rows(grads[0]), None
        if ctx.needs_input_grad[1]:
            d_weight = torch.empty_like(weight)
            high, wide = HIGH, WIDE if d_weight.numel() > 2 * HIGH * WIDE else WIDE // 2
            parts = -(-weight.shape[0] // high) * -(-weight.shape[1] // wide)
            spread(
                kernels.slopes, parts, x.numel(), high, wide, d_y.numpy(), _contiguous_rows(x).numpy(), d_weight.numpy()
            )
        return _product(d_y, weight, False) if ctx.needs_input_grad[0] else None, d_weight


def _product(x: Tensor, weight: Tensor, turned: bool) -> Tensor:
    """x Wᵀ where it is turned, else x W."""
    from remanence.ops import linear_kernels as kernels
    from remanence.ops.compiled import spread

    x, out = _contiguous_rows(x), x.new_empty(len(x), weight.shape[0 if turned else 1])
    rows = ROWS if len(x) >= 4 * ROWS else max(32, -(-len(x) // 4))
    spread(
        kernels.multiply, -(-len(x) // rows), x.numel(), rows, x.numpy(), weight.detach().numpy(), turned, out.numpy()
    )
    return out


def _contiguous_rows(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
