"""A layer or a whole model over one sequence that is split over machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.errors import RemanenceError, StateError
from remanence.memory.base import Memory
from remanence.ops.exchange import Group, from_left, joined
from remanence.ops.sequence_parallel import POINTWISE, SPLIT, sequence_parallel
from remanence.ops.taps import Call, tap
from remanence.state import State, tree_map


@card(
    "lasp2",
    kind="tool",
    says="Splits a sequence over ranks: affine recurrences exchange states, once, in bytes that no length changes.",
    source="arXiv:2502.07563",
)
def run_split(module: nn.Module, x: Tensor, state: State | None = None, *, group: Group = None) -> tuple[Tensor, State]:
    """Run a memory, or a model of memories, over a sequence of which every rank holds a piece of the same length.

    Outputs, and gradients of inputs, are those of the whole sequence on one machine; gradients of parameters and of the
    given state, of which rank 0's counts, sum over ranks to them. Every rank must run backward through its outputs.
    Recurrences gather states; convolutions, token shifts and n-grams get their tail from the left neighbour; positions
    start where the piece does. Each recurrence costs one collective forwards and one backwards.

    Args:
        module: called as module(x, state) -> (y, state), with `initial_state(batch)`; state entries called "shift"
            are a memory's last input, "recent" a model's last tokens.
        x: the rank's piece, in order of ranks: [batch, time of the piece, ...].
        state: that before the first token of all; None is empty.
        group: a process group of `torch.distributed`; None is all processes.

    Returns: the piece's outputs, and the state after it: on the last rank that after the sequence.
    Raises: `RemanenceError` before the processes have joined, for a recurrence that is not affine, and for a memory
        that reads its state elsewhere than in an op, which ranks cannot know; `ShapeError` for a piece shorter than a
        convolution's tail. All are found before anything is sent.
    Source: LASP-2 (2025), arXiv:2502.07563.
    """
    group = joined(group)
    _check(module, x)
    begin: State = module.initial_state(x.shape[0]) if state is None else state  # type: ignore[operator]
    before = group.rank() * x.shape[1]

    def shifted(memory: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if "shift" not in args[1]:
            return None
        own = args[0][:, -1].to(args[1]["shift"].dtype).view_as(args[1]["shift"])
        return args[0], {**args[1], "shift": from_left(own, args[1]["shift"], group)}

    with _hooked(module, shifted), sequence_parallel(group):
        start = _placed(begin, before)
        if "recent" in begin and begin["recent"].shape[1]:
            own = x[:, x.shape[1] - begin["recent"].shape[1] :]
            start = {**start, "recent": from_left(own, begin["recent"], group)}
        return module(x, start)


Hook = Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]


@contextmanager
def _hooked(module: nn.Module, before: Hook) -> Iterator[None]:
    """In this block `before` may change what the memories of a module are called with."""
    hooks = [m.register_forward_pre_hook(before) for m in module.modules() if isinstance(m, Memory)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _placed(state: State, before: int) -> State:
    """A state whose positions and flags are those after so many tokens."""

    def place(t: Tensor) -> Tensor:
        if before and t.dtype == torch.bool:  # flags say that nothing has been read
            return torch.zeros_like(t)
        return t + before if t.dtype == torch.int64 and t.ndim == 1 else t

    return tree_map(place, state)


@torch.no_grad()
def _check(module: nn.Module, x: Tensor) -> None:
    """Read a few tokens whole, and in halves as two ranks would, the second without a state but what ops exchange."""
    few = x[:2, : x.shape[1] // 2 * 2][:, :8]
    half = few.shape[1] // 2
    empty: State = module.initial_state(len(few))  # type: ignore[operator]
    if not half:
        return
    calls: list[tuple[Any, State]] = []  # what kind, and the state that it left
    inputs: dict[nn.Module, Tensor] = {}

    def kind(call: Call) -> Any:
        return call.op, [x.shape for x in call.arguments.values() if isinstance(x, Tensor)]

    def first(call: Call) -> Any:
        if call.op not in (*SPLIT, *POINTWISE):
            raise RemanenceError(f"The op {call.op!r} cannot be split over ranks; these can: {', '.join(SPLIT)}.")
        result = call.run()
        if call.op in SPLIT:
            calls.append((kind(call), result[-1]))
        return result

    def second(call: Call) -> Any:
        if call.op not in SPLIT:
            return call.run()
        before = next(left)
        if kind(call) != before[0]:  # ranks would wait for each other
            raise StateError("what is read where depends on the tokens")
        return call.run(state=before[1])

    def note(memory: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[memory] = args[0]

    def blind(memory: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        state = tree_map(lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t, args[1])
        if "shift" in state:
            state["shift"] = inputs[memory][:, -1].to(state["shift"].dtype).view_as(state["shift"])
        return args[0], state

    want = module(few, empty)[0][:, half:]
    with tap(first), _hooked(module, note):
        module(few[:, :half], empty)
    left = iter([*calls, (None, {})])
    start = _placed(empty, half)
    if "recent" in empty:
        start = {**start, "recent": torch.cat([empty["recent"], few[:, :half]], 1)[:, half:]}
    try:
        with tap(second), _hooked(module, blind):
            got = module(few[:, half:], start)[0]
        same = bool(((got - want).abs() <= torch.finfo(want.dtype).eps ** 0.5 * (1 + want.abs().max())).all())
    except (StateError, RuntimeError):
        same = False
    if not same:
        name = type(module).__name__
        raise RemanenceError(f"{name} cannot be split over ranks: it reads its state elsewhere than in a recurrence.")
