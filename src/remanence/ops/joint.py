"""Parts of what one projection gave, and their gradients in one memory, so that nothing has to be joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def parts(x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    """`x.split(widths, -1)`, for which gradients that `blanks` has laid side by side are the gradient of x as they are.

    Shapes: x [B, T, features]; one view [B, T, width] for each width, of which the sum is all features.
    """
    if torch._C._are_functorch_transforms_active() or not x.requires_grad or not torch.is_grad_enabled():
        return x.split(list(widths), -1)
    return _Parts.apply(x, widths)


def blanks(*xs: Tensor) -> list[Tensor]:
    """Empty tensors for the gradients of these, [B, H, T, K] each: side by side as `parts` of one, where the xs are."""
    from remanence.ops.compiled import blank

    B, _, T, _ = xs[0].shape
    step, at = xs[0].stride(2), xs[0].data_ptr()
    for x in xs:
        heads, width = x.shape[1], x.shape[3]
        strides = (T * step, width, step, 1)
        if x.dtype != xs[0].dtype or x.data_ptr() != at or x.shape[::2] != (B, T):
            break
        if any(n > 1 and s != wanted for n, s, wanted in zip(x.shape, x.stride(), strides, strict=True)):
            break
        at += heads * width * x.itemsize
    else:
        if at - xs[0].data_ptr() == step * xs[0].itemsize:
            joint = xs[0].new_empty(B, T, step).split([x.shape[1] * x.shape[3] for x in xs], -1)
            return [part.view(B, T, *x.shape[1::2]).transpose(1, 2) for part, x in zip(joint, xs, strict=True)]
    return [blank(x, 3) for x in xs]


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.widths = x.shape, widths
        ctx.set_materialize_grads(False)
        return x.detach().split(list(widths), -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        some = next(g for g in grads if g is not None)
        found = [some.new_zeros(*ctx.shape[:-1], n) if g is None else g for g, n in zip(grads, ctx.widths, strict=True)]
        whole = None if torch.is_grad_enabled() else _whole(found, ctx.shape)
        return torch.cat(found, -1) if whole is None else whole, None


def _whole(parts: Sequence[Tensor], shape: torch.Size) -> Tensor | None:
    """The contiguous tensor that these are the parts of."""
    first, at = parts[0], parts[0].data_ptr()
    strides = (shape[1] * shape[2], shape[2], 1)
    for part in parts:
        if part.data_ptr() != at or part.stride() != strides or part.dtype != first.dtype:
            return None
        at += part.shape[-1] * part.itemsize
    # neighbours by chance are no parts of one
    if any(part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for part in parts):
        return None
    return first.as_strided(shape, strides)
