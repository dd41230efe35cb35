"""Decays in log space, shared by every recurrence that forgets.

The rules: exponentiate only differences that are ≤ 0, mask before `exp`, restart sums at each chunk, and
clamp at `FLOOR` rather than carry −∞, whose differences are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FLOOR = -60.0
"""The lowest log decay: e⁻⁶⁰ is zero for every purpose, and its differences are still numbers."""


def floored(log_decay: Tensor) -> Tensor:
    return log_decay.clamp(min=FLOOR)


def recurrent_dtype(x: Tensor) -> torch.dtype:
    """What recurrent tensors are kept in: float32, or float64 for float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def cumulative(log_decay: Tensor, dim: int) -> Tensor:
    """Inclusive sums, in float64: a difference of float32 sums loses digits after a hard forget."""
    return log_decay.double().cumsum(dim)


def lower_decay(total: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(G_i − G_j) for j ≤ i and 0 above, from inclusive sums G [..., C]: [..., C, C]."""
    future = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device).triu(1)
    difference = (total[..., :, None] - total[..., None, :]).to(dtype)
    # masked before exp: above the diagonal the exponent is positive, and inf · 0 would be NaN in the gradient
    return difference.masked_fill(future, -torch.inf).exp()


def second_order(
    needed: Sequence[bool], plain: Callable[..., Any], inputs: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, through the same function in differentiable operations."""
    # views, since what one input owes to another (a key to the value made of it) is not this function's to tell
    views = [None if x is None else x.view_as(x) for x in inputs]
    wanted = [x for x, need in zip(views, needed, strict=True) if need and x is not None]
    outputs = plain(*views)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    reached = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
    ys, gs = [y for y, _ in reached], [g for _, g in reached]
    found = iter(torch.autograd.grad(ys, wanted, gs, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needed)
