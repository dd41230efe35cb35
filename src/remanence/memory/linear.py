"""The linear maps of layers: PyTorch's, by the product that is fastest here, and without it where it is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from remanence import ops
from remanence.memory.bare import transparent
from remanence.ops.linear import input_gradient, weight_gradient


@transparent
class Linear(nn.Linear):
    """`torch.nn.Linear`, weights and all, through `product`.

    Shapes: x [..., in_features] -> [..., out_features].
    """

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b by `ops.linear`, or as the reading that is going on has it."""
    reading = _current.get()
    return ops.linear(x, weight, bias) if reading is None else reading.take(x, weight, bias)


FEW = 128
"""Inputs up to which a product takes no longer to make again than other operations do: it is not kept."""
Kept = tuple[Tensor, int] | None
"""A product and its version when it was new."""


class Products:
    """The products of one piece of a sequence, in their order, for a second reading of the same.

    Within `first()` they are computed and kept, but for those of `FEW` inputs. Within `second()` each is handed back
    and forgotten, with the gradient of a linear map; what is not known, since it was never kept or somebody has altered
    it in place, is computed. `complete` says whether the second reading was like the first, as far as products tell.
    """

    def __init__(self) -> None:
        self.kept: list[Kept] | None = None
        self.at: int | None = None  # in the second reading
        self.sums: dict[int, Sum] = {}

    @property
    def complete(self) -> bool:
        return self.kept is None or self.at == len(self.kept)

    @contextmanager
    def first(self) -> Iterator[None]:
        self.kept = []
        with self._reading():
            yield

    @contextmanager
    def second(self, sums: Iterable[Sum]) -> Iterator[None]:
        """Gradients of the weights that have a sum are added to it, and not passed on."""
        self.at, self.sums = 0, {id(s.weight): s for s in sums}
        with self._reading():
            yield

    @contextmanager
    def _reading(self) -> Iterator[None]:
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def close(self, y: Tensor, place: Tensor) -> None:
        """The first reading is over. What it gave, y, is kept already, at this place: it needs no second one."""
        self.kept = self.kept and [self._closed(entry, y, place) for entry in self.kept]

    @staticmethod
    def _closed(entry: Kept, y: Tensor, place: Tensor) -> Kept:
        if entry is None or entry[0]._version != entry[1]:
            return None
        return (place, place._version) if _same(entry[0], y) else entry

    def take(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain = x.dtype == weight.dtype and not torch._C._are_functorch_transforms_active()
        # whoever packs saved tensors, as checkpoints do, makes sure that the same are saved again
        plain = plain and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        if self.at is None:
            y = ops.linear(x, weight, bias)
            assert self.kept is not None
            keeps = plain and y.dtype == x.dtype and x.shape[-1] > FEW
            self.kept.append((y.detach(), y._version) if keeps else None)
            return y
        self.at += 1
        known = self._known(self.at - 1, (*x.shape[:-1], len(weight)), x.dtype)
        if known is None and (not plain or torch.is_autocast_enabled(x.device.type)):
            return ops.linear(x, weight, bias)
        return _Known.apply(x, weight, bias, known, self.sums.get(id(weight)))

    def _known(self, i: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor] | None:
        """The product, in a list of its own, since what an autograd function is given it must not give back."""
        entry = self.kept[i] if self.kept and i < len(self.kept) else None
        if not self.kept or entry is None:
            return None
        self.kept[i] = None
        y, version = entry
        return [y.contiguous()] if y.shape == shape and y.dtype == dtype and y._version == version else None


ROWS = 512
"""Of a weight, whose gradient is made before it is added: so many need little room."""


class Sum:
    """The gradient of a weight over all pieces, added up in place where nobody else can hold the tensor."""

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.total: Tensor | None = None
        self.own = False

    def add(self, new: Tensor | None) -> None:
        if self.total is None:
            self.total = new
        elif new is not None:
            self.total, self.own = self.total.add_(new) if self.own else self.total + new, True

    def add_product(self, d_y: Tensor, x: Tensor) -> None:
        """d_yᵀ x, of [tokens, out] and [tokens, in]."""
        if self.total is None:
            self.total, self.own = weight_gradient(d_y, x), True
        elif not self.own:
            self.add(weight_gradient(d_y, x))
        else:
            for part, d_part in zip(self.total.split(ROWS), d_y.split(ROWS, 1), strict=True):
                part.add_(weight_gradient(d_part, x))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


_current: ContextVar[Products | None] = ContextVar("products", default=None)


class _Known(torch.autograd.Function):
    """x Wᵀ + b, which is what `known` holds, if it is given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, known: list[Tensor] | None, total: Sum | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total = total
        # without its past as a view, so that whoever asked may alter it in place, as that of any product
        return ops.linear(x, weight, bias).data if known is None else known.pop()

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (of_x, of_weight, of_bias, *_) = ctx.saved_tensors, ctx.needs_input_grad
        rows, d_weight = d_y.flatten(0, -2), None
        if of_weight and ctx.total is not None:
            ctx.total.add_product(rows, x.flatten(0, -2))
        elif of_weight:
            d_weight = weight_gradient(rows, x.flatten(0, -2))
        d_x = input_gradient(rows, weight).view_as(x) if of_x else None
        return d_x, d_weight, rows.sum(0) if of_bias else None, None, None
