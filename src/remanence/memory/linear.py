"""The linear maps of layers: PyTorch's, by the product that is fastest here, and without it where it is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from remanence import ops
from remanence.memory.bare import transparent


@transparent
class Linear(nn.Linear):
    """`torch.nn.Linear`, weights and all, through `product`.

    Shapes: x [..., in_features] -> [..., out_features].
    """

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b by `ops.linear`, or from the `Products` that are being gone through."""
    products = _current.get()
    return ops.linear(x, weight, bias) if products is None else products.take(x, weight, bias)


class Products:
    """The products of one reading, in order, so that the same reading need not compute them again.

    Within the first `reading()` they are computed and kept; within the second each is handed back, with the gradient of
    a linear map, and forgotten. A product that somebody has altered in place since, or that is not of plain tensors of
    one precision, is computed both times. `complete` says whether the second reading was like the first as far as its
    products tell.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, int] | None] = []
        self.at = 0
        self.known = False

    @property
    def complete(self) -> bool:
        return self.at == len(self.kept)

    @contextmanager
    def reading(self) -> Iterator[None]:
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def close(self, y: Tensor, place: Tensor) -> None:
        """The first reading is over. What it gave, y, is kept already, at this place: it needs no second one."""
        for i, entry in enumerate(self.kept):
            if entry is not None and entry[0]._version != entry[1]:
                self.kept[i] = None
            elif entry is not None and _same(entry[0], y):
                self.kept[i] = place, place._version
        self.known = True

    def take(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain = x.dtype == weight.dtype and torch._C._functorch.maybe_current_level() is None
        if not self.known:
            y = ops.linear(x, weight, bias)
            fit = plain and type(y) is Tensor and y.dtype == x.dtype and not y.is_inference()
            self.kept.append((y.detach(), y._version) if fit else None)
            return y
        self.at += 1
        entry = self.kept[self.at - 1] if self.at <= len(self.kept) else None
        if entry is None:
            return ops.linear(x, weight, bias)
        self.kept[self.at - 1] = None
        y, version = entry
        if not plain or y.shape != (*x.shape[:-1], len(weight)) or y.dtype != x.dtype or y._version != version:
            return ops.linear(x, weight, bias)
        return _Known.apply(x, weight, bias, [y.contiguous()])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


_current: ContextVar[Products | None] = ContextVar("products", default=None)


class _Known(torch.autograd.Function):
    """x Wᵀ + b, which is y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, y: list[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return y.pop()

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = d_y.flatten(0, -2)
        d_x = d_y @ weight if ctx.needs_input_grad[0] else None
        d_weight = rows.mT @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, rows.sum(0) if ctx.needs_input_grad[2] else None, None
