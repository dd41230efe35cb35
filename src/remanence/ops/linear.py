"""The product of every projection: x Wᵀ + b."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.ops import dispatch
from remanence.ops.decay import second_order

ROWS, HIGH, WIDE = 256, 128, 512
"""Of a part: tokens of a product; outputs and inputs of the weight's gradient."""
PANELS = 8
"""From how many on it is worth while to multiply columns that make no whole panel apart."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, with gradients: by kernels of our own where these are faster, else PyTorch's.

    Ours share out parts of the product to threads that wait without spinning, so that a busy neighbour costs its share
    of a core; and on AMD's processors with AVX-512 they need less time than the BLAS that PyTorch comes with.

    Shapes: x [..., in], weight [out, in], bias [out] -> [..., out]. Raises: `RuntimeError`, as PyTorch's.
    """
    if not (_worth(x, len(weight)) and _fits(x, weight)):
        return F.linear(x, weight, bias)
    y = _Compiled.apply(x.reshape(-1, x.shape[-1]), weight)
    y = y if bias is None else y.add_(bias)
    return y.view(*x.shape[:-1], len(weight))


def _worth(x: Tensor, other: int) -> bool:
    """Whether the rows of x, or as many of `other` numbers, are worth what the compiled form loads."""
    wider = max(x.numel(), x.numel() // max(x.shape[-1], 1) * other)
    return x.device.type == "cpu" and wider >= dispatch.COMPILED_FROM


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels take x Wᵀ."""
    if x.shape[-1] != weight.shape[1] or not weight.is_contiguous() or torch.is_autocast_enabled("cpu"):
        return False
    return not torch._C._are_functorch_transforms_active() and _suits(x, weight, len(weight))


def _suits(x: Tensor, y: Tensor, width: int) -> bool:
    """Whether the kernels take such numbers, and are worth it for a product of so many columns."""
    if x.dtype != y.dtype or x.dtype not in (torch.float32, torch.float64):
        return False
    panel = _panel(x.dtype)
    return panel > 0 and (width % panel == 0 or width >= PANELS * panel)


@cache
def _panel(dtype: torch.dtype) -> int:
    """Of how many columns the kernels take a multiple, PyTorch's product the rest; or 0 where they are not faster."""
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
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return second_order(ctx.needs_input_grad, F.linear, (x, weight), grads)
        d_y, (of_x, of_weight) = _contiguous_rows(grads[0]), ctx.needs_input_grad
        d_weight = weight_gradient(d_y, x) if of_weight else None
        return input_gradient(d_y, weight) if of_x else None, d_weight


def input_gradient(d_y: Tensor, weight: Tensor) -> Tensor:
    """d_y W: of y = x Wᵀ, from its gradient to that of x. Shapes: [tokens, out], [out, in] -> [tokens, in]."""
    ours = _worth(d_y, weight.shape[1]) and _suits(d_y, weight, weight.shape[1])
    return _product(d_y, weight, False) if ours else d_y @ weight


def weight_gradient(d_y: Tensor, x: Tensor) -> Tensor:
    """d_yᵀ x, the gradient of W. Shapes: [tokens, out], [tokens, in] -> [out, in]."""
    if not (_worth(x, d_y.shape[1]) and len(x) and _suits(d_y, x, x.shape[1])):
        return d_y.mT @ x
    from remanence.ops import linear_kernels as kernels
    from remanence.ops.compiled import spread

    d_y, x, out = _contiguous_rows(d_y), _contiguous_rows(x), x.new_empty(d_y.shape[1], x.shape[1])
    whole, rest = _cut(out)
    parts = -(-whole.shape[0] // HIGH) * -(-whole.shape[1] // WIDE)
    spread(kernels.slopes, parts, x.numel(), HIGH, WIDE, d_y.numpy(), x.numpy(), whole.numpy())
    if rest.numel():
        rest.copy_(d_y.mT @ x[:, whole.shape[1] :])
    return out


def _product(x: Tensor, weight: Tensor, turned: bool) -> Tensor:
    """x Wᵀ where it is turned, else x W."""
    from remanence.ops import linear_kernels as kernels
    from remanence.ops.compiled import spread

    x, out = _contiguous_rows(x), x.new_empty(len(x), weight.shape[0 if turned else 1])
    whole, rest = _cut(out)
    rows = ROWS if len(x) >= 4 * ROWS else max(32, -(-len(x) // 4))
    factors = x.numpy(), _contiguous_rows(weight).numpy()
    spread(kernels.multiply, -(-len(x) // rows), x.numel(), rows, *factors, turned, whole.numpy())
    if rest.numel():
        at = whole.shape[1]
        rest.copy_(x @ (weight[at:].mT if turned else weight[:, at:]))
    return out


def _cut(out: Tensor) -> tuple[Tensor, Tensor]:
    """The columns that make whole panels, and the rest."""
    rest = out.shape[1] % _panel(out.dtype)
    return out[:, : out.shape[1] - rest], out[:, out.shape[1] - rest :]


def _contiguous_rows(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.stride(1) == 1 and (x.stride(0) >= x.shape[1] or len(x) < 2) else x.contiguous()
