r"""The network inside a fast-weight memory: what it reads, and the gradient of every token, written out.

A perceptron without biases, $f(W, x) = [x +]\; [\mathrm{LN}]\, W_L\,\sigma(\cdots \sigma(W_1 x))$, or gated,
$W_3(\sigma(W_1 x) ∘ W_2 x)$, with $\sigma$ = GELU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.ops.objectives import Objective, Squared

Weights = list[Tensor]
Affine = tuple[Tensor, Tensor]


class _GeluSlope(torch.autograd.Function):
    """GELU's derivative, whose own derivative is φ(x)(2 − x²)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gelu_slope(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.square() * -0.5).exp() * (2 - x.square()) / math.sqrt(2 * math.pi)


def _gelu_slope(x: Tensor) -> Tensor:
    return torch.special.ndtr(x) + x * (x.square() * -0.5).exp() / math.sqrt(2 * math.pi)


def network(
    query: Tensor,
    linear: Callable[[int, Tensor], Tensor],
    layers: int,
    residual: bool,
    gated: bool,
    norm: Affine | None,
) -> Tensor:
    """f, given what each layer does to its input."""
    if gated:
        z = linear(2, F.gelu(linear(0, query)) * linear(1, query))
    else:
        z = query
        for i in range(layers):
            z = linear(i, F.gelu(z) if i else z)
    if norm is not None:
        z = standardised(z)[0] * norm[0][:, None] + norm[1][:, None]
    return query + z if residual else z


def standardised(z: Tensor) -> tuple[Tensor, Tensor]:
    """z with mean 0 and variance 1, and one over its deviation."""
    z = z - z.mean(-1, keepdim=True)
    scale = (z.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return z * scale, scale


def fast_weight_read(
    query: Tensor,
    weights: Sequence[Tensor],
    *,
    residual: bool = False,
    gated: bool = False,
    norm: Affine | None = None,
) -> Tensor:
    """f(W, q) with the same weights for every query. query [B, H, T, K], weights [B, H, out, in] by layer."""
    return network(query, lambda i, z: z @ weights[i].mT, len(weights), residual, gated, norm)


def inner_gradient(
    key: Tensor,
    value: Tensor,
    anchor: Weights,
    residual: bool,
    *,
    gated: bool = False,
    norm: Affine | None = None,
    objective: Objective = Squared(),
    threshold: Tensor | None = None,
) -> tuple[Weights, Weights]:
    """The gradient δ_i x_iᵀ of every token in every layer, as the layers' inputs x and output gradients δ."""
    return inner_gradient_along(key, value, anchor, residual, gated, norm, objective, threshold)[:2]


def inner_gradient_along(
    key: Tensor,
    value: Tensor,
    anchor: Weights,
    residual: bool,
    gated: bool,
    norm: Affine | None,
    objective: Objective,
    threshold: Tensor | None,
) -> tuple[Weights, Weights, Tensor]:
    """`inner_gradient`, and how far each error points along its slope, ⟨e, ∂ℓ/∂f⟩."""
    x, inputs, slopes = key, [key], []
    if gated:
        h, up = key @ anchor[0].mT, key @ anchor[1].mT
        gate, slope = F.gelu(h), _GeluSlope.apply(h)
        x = gate * up
        inputs += [key, x]
    else:
        for W in anchor[:-1]:
            h = x @ W.mT
            x = F.gelu(h)
            inputs.append(x)
            slopes.append(_GeluSlope.apply(h))
    z = x @ anchor[-1].mT
    target = value - key if residual else value
    if norm is None:
        delta = objective.slope(z, target, threshold)
        along = (delta * (z - target)).sum(-1)
    else:
        standard, scale = standardised(z)
        gamma = norm[0][:, None]
        y = standard * gamma + norm[1][:, None]
        delta = objective.slope(y, target, threshold)
        along = (delta * (y - target)).sum(-1)
        delta = delta * gamma
        delta = delta - delta.mean(-1, keepdim=True) - standard * (standard * delta).mean(-1, keepdim=True)
        delta = delta * scale
    deltas = [delta]
    if gated:
        back = delta @ anchor[2]
        return inputs, [back * up * slope, back * gate, delta], along
    for W, slope in zip(reversed(anchor[1:]), reversed(slopes), strict=True):
        deltas.append(deltas[-1] @ W * slope)
    return inputs, deltas[::-1], along
