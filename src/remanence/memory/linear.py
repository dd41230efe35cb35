"""The linear maps of layers: PyTorch's, by the product that is fastest here, and without it where it is known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from remanence import ops
from remanence.memory.bare import transparent
from remanence.ops.dispatch import compiled
from remanence.ops.linear import _Compiled, _fits


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


Kept = tuple[Tensor, int] | None
"""A product and its version when it was new."""


class Products:
    """The products of one piece of a sequence, in their order, for a second reading of the same.

    Within `first()` they are computed and kept. Within `second()` each is handed back and forgotten, with the gradient
    of a linear map; what is not known, since it was never kept or somebody has altered it in place, is computed.
    `complete` says whether the second reading was like the first, as far as its products tell.
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
        if self.at is None:
            y = ops.linear(x, weight, bias)
            assert self.kept is not None
            self.kept.append((y.detach(), y._version) if plain and y.dtype == x.dtype else None)
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


class Sum:
    """The gradient of a weight over all pieces, added up in place where nobody else can hold the tensor."""

    def __init__(self, weight: Tensor):
        self.weight = weight
        self.total: Tensor | None = None
        self.own = False

    def add(self, new: Tensor | None, own: bool = False) -> None:
        if new is None:
            return
        if self.total is None:
            self.total, self.own = new, own
        else:
            self.total, self.own = self.total.add_(new) if self.own else self.total + new, True


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
        return ops.linear(x, weight, bias) if known is None else known.pop()

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = d_y.flatten(0, -2)
        d_x, d_weight = _slopes(x.flatten(0, -2), weight, rows, ctx.needs_input_grad)
        if ctx.total is not None:
            ctx.total.add(d_weight, own=True)
            d_weight = None
        d_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return None if d_x is None else d_x.view_as(x), d_weight, d_bias, None, None


def _slopes(x: Tensor, weight: Tensor, d_y: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    """What `ops.linear` sends back to x [tokens, in] and to the weight, by the same products."""
    if compiled(x) and _fits(x, weight):
        d_x, d_weight = _Compiled.backward(SimpleNamespace(saved_tensors=(x, weight), needs_input_grad=needs[:2]), d_y)
        return d_x, d_weight
    return d_y @ weight if needs[0] else None, d_y.mT @ x if needs[1] else None
