"""Long inputs in little memory: a piece at a time, and for the gradient each piece once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from remanence.memory.linear import Products, Sum
from remanence.ops.decay import second_order
from remanence.state import State, flatten, tree_map

KEEP = "states", "projections"


def in_pieces(
    module: nn.Module, x: Tensor, state: State | None = None, *, piece: int = 512, keep: str = "states"
) -> tuple[Tensor, State]:
    """What `module(x, state)` gives, keeping for the gradient no more than is named, and one piece's work.

    The gradient is exact and reaches back over all of x: backward goes from the last piece to the first and reads each
    but the last again. Random numbers, as of dropout, are the same in both readings.

    Args:
        module: a memory, a block or a whole model: whatever takes (x, state) and obeys the law of resumption.
        piece: tokens at a time, at least 1.
        keep: "states": of each piece only the state before it, so that what a pass needs besides input, output and
            their gradients does not grow with time but for one state per piece. It takes longer: by a forward pass,
            and by what smaller products lose. "projections": also what every `remanence.memory.linear.Linear` gave,
            so that only the rest (convolutions, gates, norms, the recurrence) is computed twice. That is quicker, and
            grows with time by the projections' outputs, a part of what reading at once keeps.

    Shapes: x [batch, time, ...], features or tokens; y [batch, time, ...].
    Raises: `ValueError` for a piece below 1 or another `keep`.
    Source: gradient checkpointing (Chen et al. 2016, arXiv:1604.06174), at the states that a recurrence has anyway
    (Gruslys et al. 2016, arXiv:1606.03401).
    """
    if piece < 1:
        raise ValueError(f"in_pieces: piece must be at least 1 token, got {piece}.")
    if keep not in KEEP:
        raise ValueError(f"in_pieces: keep must be 'states' or 'projections', got {keep!r}.")
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    before = {} if state is None else flatten(state)
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *before.values(), *weights.values()))
    if x.shape[1] <= piece or not learns:
        return _one_by_one(module, x, state, piece)
    reading = _Reading(module, piece, state, [*weights], keep == "projections")
    y, *after = _Pieces.apply(reading, x, *before.values(), *weights.values())
    return y, _filled(reading.after, after)


def _one_by_one(
    module: Callable[..., tuple[Tensor, State]], x: Tensor, state: State | None, piece: int
) -> tuple[Tensor, State]:
    """The same in plain operations. The output is made whole at once: joined in the end, it would be there twice."""
    if x.shape[1] <= piece:
        return module(x, state)
    y = None
    for here in _slices(x.shape[1], piece):
        part, state = module(x[:, here], state)
        y = part.new_empty(*x.shape[:2], *part.shape[2:]) if y is None else y
        y[:, here] = part
    assert y is not None
    assert state is not None
    return y, state


def _slices(time: int, piece: int) -> list[slice]:
    return [slice(start, start + piece) for start in range(0, time, piece)]


Piece = tuple[Tensor, State, list[Tensor]]


class _Reading:
    """A module, its pieces, its weights by name, and states for their form: before (None: none is given) and after."""

    def __init__(self, module: nn.Module, piece: int, before: State | None, weights: list[str], keeps: bool):
        self.module, self.piece, self.weights, self.keeps = module, piece, weights, keeps
        self.call: Callable[..., tuple[Tensor, State]] = module
        self.tensors = _tensors(module)
        self.before = None if before is None else tree_map(Tensor.detach, before)
        self.after: State = {}

    def given(self, tensors: Sequence[Tensor]) -> tuple[State | None, Sequence[Tensor]]:
        """The state before and the weights, of all that is given beside x."""
        count = len(tensors) - len(self.weights)
        return None if self.before is None else _filled(self.before, tensors[:count]), tensors[count:]

    def renew(self) -> None:
        """See to it that the module is read with the tensors of the first reading, which were perhaps lent to it."""
        now = _tensors(self.module)
        lent = {name: t for name, t in self.tensors.items() if now.get(name) is not t}
        self.call = (lambda *given: functional_call(self.module, lent, given)) if lent else self.module

    def graph(self, x: Tensor, state: State | None) -> Piece:
        """What one piece gives, and the leaves that stand for its input and the state before it."""
        x, before = _leaf(x), None if state is None else tree_map(_leaf, state)
        with torch.enable_grad():
            y, after = self.call(x, before)
        return y, after, [x, *flatten(before or {}).values()]

    def first(self, x: Tensor, state: State | None, products: Products) -> tuple[Tensor, State]:
        """What one piece gives, without a graph; where products are kept, by the code that makes one."""
        if self.keeps:
            with products.first():
                y, after, _ = self.graph(x, state)
        else:
            y, after = self.module(x, state)
        return y.detach(), tree_map(_own, after)

    def second(self, x: Tensor, state: State | None, products: Products, sums: Sequence[Sum]) -> Piece:
        """The piece with its graph, from the products of the first reading unless this one calls for others."""
        random = torch.get_rng_state()
        with products.second(sums):
            found = self.graph(x, state)
        if products.complete:
            return found
        torch.set_rng_state(random)
        return self.graph(x, state)

    def plain(self, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The whole of it, as a function of all that it depends on."""
        state, weights = self.given(tensors)
        named = dict(zip(self.weights, weights, strict=True))
        y, after = _one_by_one(lambda *given: functional_call(self.module, named, given), x, state, self.piece)
        return y, *flatten(after).values()


def _filled(form: State, tensors: Sequence[Tensor]) -> State:
    """These tensors as a state of this form."""
    rest = iter(tensors)
    return tree_map(lambda _: next(rest), form)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _varies(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_(_varies(t))


def _own(t: Tensor) -> Tensor:
    """The numbers alone: a state is often the last row of all that was computed, which it would keep alive."""
    return t.detach().clone() if t.untyped_storage().nbytes() > 2 * t.nbytes else t.detach()


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reading: _Reading, x: Tensor, *tensors: Tensor) -> Any:
        (state, weights), parts, y = reading.given(tensors), _slices(x.shape[1], reading.piece), None
        ctx.reading, ctx.before, ctx.sums = reading, [], [Sum(w) for w in weights]
        for here in parts:
            products = Products()
            ctx.before.append((state, torch.get_rng_state(), products))
            if here is parts[-1]:  # comes first in the backward pass
                ctx.last = reading.second(x[:, here], state, products, ctx.sums)
                out, state = ctx.last[0].detach(), tree_map(_own, ctx.last[1])
            else:
                out, state = reading.first(x[:, here], state, products)
            y = out.new_empty(*x.shape[:2], *out.shape[2:]) if y is None else y
            place = y.detach()[:, here]
            place.data.copy_(out)  # which the versions of what is kept do not count
            products.close(out, place)
            del out
        reading.after = state or {}
        after = [*flatten(reading.after).values()]
        ctx.save_for_backward(x, *tensors)
        ctx.mark_non_differentiable(*[t for t in after if not _varies(t)])
        return y, *after

    @staticmethod
    def backward(ctx: Any, d_y: Tensor, *d_after: Tensor) -> tuple[Tensor | None, ...]:
        reading: _Reading = ctx.reading
        x, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            with _random(ctx.before[0][1]):
                needed, inputs = ctx.needs_input_grad[1:], [x, *tensors]
                return None, *second_order(needed, reading.plain, inputs, [d_y, *d_after])
        _, weights = reading.given(tensors)
        last, sums, ctx.last, ctx.sums = ctx.last, ctx.sums, None, [Sum(w) for w in weights]
        d_x = torch.empty_like(x) if _varies(x) else None
        d_state: Sequence[Tensor | None] = d_after
        reading.renew()
        parts = _slices(x.shape[1], reading.piece)
        for here, (state, random, products) in zip(reversed(parts), reversed(ctx.before), strict=True):
            with _random(random):
                y, after, leaves = last or reading.second(x[:, here], state, products, sums)
            last = None
            reached = [(y, d_y[:, here]), *zip(flatten(after).values(), d_state, strict=True)]
            reached = [(out, d) for out, d in reached if d is not None and out.requires_grad]
            wanted = [t for t in leaves if t.requires_grad]
            outs, grads = [out for out, _ in reached], [d for _, d in reached]
            found = iter(torch.autograd.grad(outs, [*wanted, *weights], grads, allow_unused=True))
            of_leaves = [next(found) if t.requires_grad else None for t in leaves]
            if d_x is not None:
                d_x[:, here] = 0 if of_leaves[0] is None else of_leaves[0]
            d_state = of_leaves[1:]
            for each, new in zip(sums, found, strict=True):
                each.add(new)
            del y, after, leaves, reached, wanted, outs, grads, found, of_leaves  # before the next piece needs the room
        return None, d_x, *d_state, *[each.total for each in sums]


@contextmanager
def _random(state: Tensor) -> Iterator[None]:
    """With this state of the generator, and afterwards again with the one from before."""
    now = torch.get_rng_state()
    torch.set_rng_state(state)
    try:
        yield
    finally:
        torch.set_rng_state(now)
