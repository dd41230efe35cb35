"""A short causal convolution, each feature by itself. Axes: B batch, T time, D features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.errors import expect
from remanence.ops import steps
from remanence.ops.decay import recurrent_dtype, second_order
from remanence.ops.taps import tapped
from remanence.state import State


def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: State | None = None, *, silu: bool = False
) -> tuple[Tensor, State]:
    """The definition: y_t = bias + Σ_j w_j ⊙ x_{t−width+1+j}: the last column of `weight` meets the present."""
    tail = _tail(x, weight, state)
    y = []
    for t in range(x.shape[1]):
        seen = torch.cat([tail, x[:, t : t + 1]], 1)
        now = (seen * weight.mT).sum(1)
        now = now if bias is None else now + bias
        y.append(F.silu(now) if silu else now)
        tail = seen[:, 1:]
    return (torch.stack(y, 1).to(x.dtype) if y else x), {"tail": tail}


@tapped
def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: State | None = None,
    *,
    silu: bool = False,
    widths: Sequence[int] | None = None,
) -> tuple[Any, State]:
    """y_t = bias + Σ_{j < width} w_j ⊙ x_{t−width+1+j}, or SiLU of it.

    With `widths`, y comes in parts of so many features, [B, T, w] each, whose gradients need not be joined.

    Shapes: `x` and y [B, T, D], any T ≥ 0; `weight` [D, width], its last column meeting the present token;
    `bias` None or [D]; state {"tail": [B, width − 1, D]}, the last raw inputs, float32 or wider.
    Raises: `ShapeError`.
    """
    expect("causal_conv", "x", x, "batch time features", features=weight.shape[0])
    expect("causal_conv", "weight", weight, "features width")
    T = x.shape[1]
    tail, parts = _tail(x, weight, state), [x.shape[2]] if widths is None else list(widths)

    def given(*ys: Tensor) -> Tensor | tuple[Tensor, ...]:
        return ys[0].to(x.dtype) if widths is None else tuple(y.to(x.dtype) for y in ys)

    if T == 1 and steps.worth(x, weight, bias, tail):
        y, tail = steps.causal_conv(x, weight, bias, tail, silu)
        return given(*y.split(parts, -1)), {"tail": tail}
    dtype = torch.promote_types(tail.dtype, x.dtype)
    if T == 1:
        seen = torch.cat([tail, x], 1)
        now = torch.einsum("btd,dt->bd", seen, weight.to(seen.dtype))[:, None]
        now = now if bias is None else now + bias
        return given(*(F.silu(now) if silu else now).split(parts, -1)), {"tail": seen[:, 1:]}
    b = x.new_zeros(weight.shape[0], dtype=dtype) if bias is None else bias.to(dtype).contiguous()
    taps = weight.to(dtype).mT.contiguous()
    tail, seen, width = tail.to(dtype), x.to(dtype), weight.shape[1]
    after = seen[:, T - width + 1 :].clone() if width <= T + 1 else torch.cat([tail[:, T:], seen], 1)
    if x.device.type == "cpu" and T:
        ys = _Compiled.apply(tail, seen, taps, b, silu, parts)
    else:
        ys = _shifted(tail, seen, taps, b, silu).split(parts, -1)
    return given(*ys), {"tail": after}


def _shifted(tail: Tensor, x: Tensor, taps: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """Sums of shifted products, in differentiable operations on any device."""
    seen = torch.cat([tail, x], 1)
    y = bias + sum(seen[:, j : j + x.shape[1]] * tap for j, tap in enumerate(taps))
    return F.silu(y) if silu else y


class _Compiled(torch.autograd.Function):
    """The same in one pass over the inputs, which may be features of a wider tensor."""

    @staticmethod
    def forward(
        ctx: Any, tail: Tensor, x: Tensor, taps: Tensor, bias: Tensor, silu: bool, parts: Sequence[int]
    ) -> tuple[Tensor, ...]:
        from remanence.ops import conv_kernels as kernels
        from remanence.ops.compiled import flat, spread_bands

        tail, y = tail.contiguous(), x.new_empty(x.shape)
        spread_bands(kernels.forward, x.shape[2], x.numel(), tail, *flat(x, 2), taps, bias, silu, y)
        ctx.save_for_backward(tail, x, taps, bias)
        ctx.silu, ctx.parts = silu, parts
        return (y,) if len(parts) == 1 else y.split(parts, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import conv_kernels as kernels
        from remanence.ops.compiled import flat, spread_bands

        tail, x, taps, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted

            def plain(tail: Tensor, x: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
                return _shifted(tail, x, taps, bias, ctx.silu).split(ctx.parts, -1)

            return *second_order(ctx.needs_input_grad[:4], plain, (tail, x, taps, bias), grads), None, None
        found = torch.zeros_like(tail), x.new_empty(x.shape), torch.zeros_like(taps), torch.zeros_like(bias)
        inputs, outputs = (tail, *flat(x, 2), taps, bias, ctx.silu), (found[0], *flat(found[1], 2), *found[2:])
        before = 0
        for width, d_y in zip(ctx.parts, grads, strict=True):
            given = before, x.shape[1], *inputs, *flat(d_y, 2), *outputs
            spread_bands(kernels.backward, width, d_y.numel(), *given)
            before += width
        return *found, None, None


def _tail(x: Tensor, weight: Tensor, state: State | None) -> Tensor:
    if state is not None:
        return state["tail"]
    return x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2], dtype=recurrent_dtype(x))
