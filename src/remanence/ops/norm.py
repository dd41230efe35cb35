"""Normalising vectors by their length, with what usually follows: a weight, a bias and a gate."""

from __future__ import annotations

from collections.abc import Callable
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
ACTIVATIONS: dict[Callable[[Tensor], Tensor], int] = {F.silu: steps.SILU, torch.sigmoid: steps.SIGMOID}
"""What the compiled forms can put a gate through."""


def normalise_reference(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    mean: bool = True,
    scale: float = 1.0,
    centred: bool = False,
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """The definition: (scale·x / √(m + eps) ⊙ weight + bias) ⊙ activation(gate), where m is the mean of the squares or
    their sum, and x are the deviations from its mean where `centred`."""
    x = x - x.mean(-1, keepdim=True) if centred else x
    square = x.square()
    y = x * (scale * ((square.mean(-1, keepdim=True) if mean else square.sum(-1, keepdim=True)) + eps).rsqrt())
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y if gate is None else y * activation(gate)


@tapped
def normalise(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    mean: bool = True,
    scale: float = 1.0,
    centred: bool = False,
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """(scale · x / √(m + eps) ⊙ weight + bias) ⊙ activation(gate) over the last axis, in one pass.

    m is the mean of squares (RMS norm, Zhang & Sennrich, arXiv:1910.07467, 2019) or, without `mean`, their sum (L2);
    with `centred` x are the deviations from its mean (layer norm, Ba et al., arXiv:1607.06450, 2016).

    Shapes: `x`, `gate` and y [..., width] or [..., heads, width]; `weight`, `bias` [width] or [heads, width].
    Raises: `ShapeError`.
    """
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.shape != x.shape[-given.ndim :]:
            own = {"features": x.shape[-1]} if given.ndim == 1 else {"heads": x.shape[-2], "features": x.shape[-1]}
            expect("normalise", name, given, " ".join(own), **own)  # type: ignore[arg-type]
    simple = bias is None and not centred and activation is F.silu and (weight is None or weight.ndim == 1)
    if simple and not compiled(x) and steps.worth(x, weight, gate):
        return steps.normalise(x, weight, gate, eps, mean, scale)
    if x.dtype != recurrent_dtype(x) or not compiled(x) or activation not in ACTIVATIONS:
        how: dict[str, Any] = {"eps": eps, "mean": mean, "scale": scale, "centred": centred, "activation": activation}
        return normalise_reference(x, weight, gate, bias=bias, **how)
    heads = max([given.shape[0] for given in (weight, bias) if given is not None and given.ndim == 2], default=1)
    rows = (lambda t: t) if x.ndim == 4 else (lambda t: t.reshape(1, -1, heads, t.shape[-1]))
    w = x.new_ones(1, x.shape[-1]) if weight is None else weight.to(x.dtype).reshape(-1, x.shape[-1])
    b = None if bias is None else bias.to(x.dtype).reshape(-1, x.shape[-1]).expand_as(w)
    g = None if gate is None else rows(gate.to(x.dtype))
    share = (1 / x.shape[-1] if mean else 1.0) / scale**2  # the factor goes into the root
    y = _Compiled.apply(rows(x), w.contiguous(), b, g, eps / scale**2, share, centred, ACTIVATIONS[activation])
    return y.view(x.shape)


class _Compiled(torch.autograd.Function):
    """[A, B, C, width], in any order of the first three axes in memory; weight and bias [C or 1, width]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        eps: float,
        share: float,
        centred: bool,
        kind: int,
    ) -> Tensor:
        from remanence.ops import norm_kernels as kernels
        from remanence.ops.compiled import blank, flat, spread

        y = blank(x, 3)
        ctx.save_for_backward(x, weight, bias, gate)
        ctx.how = eps, share, centred, kind
        sizes, inputs = _arguments(ctx.how, x, weight, bias, gate)
        spread(kernels.forward, -(-sizes[1] // ROWS), x.numel(), *sizes, *inputs, *flat(y, 3))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import norm_kernels as kernels
        from remanence.ops.compiled import blank, flat, flat_or_none, spread

        x, weight, bias, gate = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return *second_order(ctx.needs_input_grad[:4], _plain(*ctx.how), (x, weight, bias, gate), grads), *[
                None
            ] * 4
        sizes, inputs = _arguments(ctx.how, x, weight, bias, gate)
        parts = -(-sizes[1] // ROWS)
        d_x, d_weights = blank(x, 3), x.new_zeros(parts, *weight.shape)
        d_biases = x.new_zeros(parts, *(weight.shape if bias is not None else (0, 0)))
        d_gate = None if gate is None else blank(gate, 3)
        outputs = *flat(d_x, 3), *flat_or_none(d_gate, 3, x), d_weights.numpy(), d_biases.numpy()
        spread(kernels.backward, parts, x.numel(), *sizes, *inputs, *flat(grads[0], 3), *outputs)
        return d_x, d_weights.sum(0), None if bias is None else d_biases.sum(0), d_gate, *[None] * 4


def _plain(eps: float, share: float, centred: bool, kind: int) -> Callable[..., Tensor]:
    """The same in differentiable operations."""
    scale = share**-0.5
    activation = next(f for f, code in ACTIVATIONS.items() if code == kind)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None) -> Tensor:
        how: dict[str, Any] = {"eps": eps * scale**2, "mean": False, "scale": scale, "centred": centred}
        return normalise_reference(x, weight, gate, bias=bias, activation=activation, **how)

    return plain


def _arguments(
    how: tuple[float, float, bool, int], x: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor | None
) -> tuple[tuple[int, ...], list[Any]]:
    """The kernels' arguments: sizes, then how and from what."""
    from remanence.ops.compiled import flat, flat_or_none

    (A, B, C, _), (eps, share, centred, kind) = x.shape, how
    shift = x.new_empty(0, 0) if bias is None else bias.detach().contiguous()
    gates = steps.PLAIN if gate is None else kind, *flat_or_none(gate, 3, x)
    inputs = share, eps, centred, *flat(x, 3), weight.detach().numpy(), shift.numpy(), *gates
    return (ROWS, A * B * C, B, C), [*inputs]
