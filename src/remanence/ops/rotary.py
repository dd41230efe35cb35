"""Rotary positions. Axes: B batch, H heads, T time, K features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from remanence.ops.dispatch import compiled


def turned_heads(x: Tensor, heads: Sequence[int], start: Tensor, frequencies: Tensor) -> tuple[Tensor, ...]:
    """Heads that lie side by side, apart, and all but the last group of them turned by their position.

    Feature pairs (j, j + P) of the first 2P features turn by `frequencies[j]` radians per position; the others stay.
    Angles are computed in float64, so that a position of many millions still has an exact phase. Nothing of this is
    kept for the gradient, which is turned back.

    Shapes: x [B, T, Σ heads · K] -> for each h of `heads` [B, h, T, K]; `start` int64 [B], the position of the first
    token; `frequencies` float64 [P], 2P ≤ K. Source: rotary positions, arXiv:2104.09864 (2021).
    """
    if len(start) > 1 and bool((start == start[:1]).all()):
        start = start[:1]
    angle = (start[:, None] + torch.arange(x.shape[1], device=x.device))[..., None] * frequencies.to(x.device)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    if compiled(x) and x.dtype in (torch.float32, torch.float64):
        return _Turned.apply(x, tuple(heads), cos, sin)
    parts = x.unflatten(-1, (sum(heads), -1)).transpose(1, 2).split(list(heads), 1)
    return *(_turn(part, cos[:, None], sin[:, None]) for part in parts[:-1]), parts[-1]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    P = cos.shape[-1]
    a, b, rest = x.split([P, P, x.shape[-1] - 2 * P], -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


class _Turned(torch.autograd.Function):
    """Compiled for the CPU: one copy, which every layer needs that is to have a head's tokens side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: tuple[int, ...], cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        from remanence.ops import rotary_kernels as kernels
        from remanence.ops.compiled import flat, spread

        (B, T, width), offset, parts = x.shape, 0, []
        K = width // sum(heads)
        for i, h in enumerate(heads):
            part, pairs = x.new_empty(B, h, T, K), cos.shape[-1] if i + 1 < len(heads) else 0
            angles = cos[..., :pairs].numpy(), sin[..., :pairs].numpy()
            spread(kernels.out, B * h, part.numel(), *flat(x, 2), offset, *angles, part.numpy())
            parts.append(part)
            offset += h * K
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _TurnedBack.apply(ctx.heads, *ctx.saved_tensors, *grads), None, None, None


class _TurnedBack(torch.autograd.Function):
    """The inverse, which is also the gradient."""

    @staticmethod
    def forward(ctx: Any, heads: tuple[int, ...], cos: Tensor, sin: Tensor, *parts: Tensor) -> Tensor:
        from remanence.ops import rotary_kernels as kernels
        from remanence.ops.compiled import flat, spread

        B, _, T, K = parts[0].shape
        x, offset = parts[0].new_empty(B, T, sum(heads) * K), 0
        for i, (h, part) in enumerate(zip(heads, parts, strict=True)):
            pairs = cos.shape[-1] if i + 1 < len(heads) else 0
            angles = cos[..., :pairs].numpy(), sin[..., :pairs].numpy()
            spread(kernels.back, B * h, part.numel(), *flat(part, 3), h, K, *angles, x.numpy(), offset)
            offset += h * K
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_Turned.apply(grads[0], ctx.heads, *ctx.saved_tensors)
