"""A layer or a whole model over one sequence that is split over machines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.ops.sequence_parallel import Group, from_left, joined, sequence_parallel
from remanence.state import State


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
    Raises: `RemanenceError` before the processes have joined, or for a recurrence that cannot be split (one that is not
        affine); `ShapeError` for a piece shorter than a convolution's tail.
    Source: LASP-2 (2025), arXiv:2502.07563. A memory that reads its state outside an op, before the first token is
        written (RWKV-6), is not covered.
    """
    group = joined(group)
    begin: State = module.initial_state(x.shape[0]) if state is None else state  # type: ignore[operator]

    def shifted(memory: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(args) < 2 or args[1] is None or "shift" not in args[1]:
            return None
        own = args[0][:, -1].to(args[1]["shift"].dtype).view_as(args[1]["shift"])
        return args[0], {**args[1], "shift": from_left(own, args[1]["shift"], group)}

    hooks = [m.register_forward_pre_hook(shifted) for m in module.modules() if isinstance(m, Memory)]
    try:
        with sequence_parallel(group):
            return module(x, _placed(begin, x, group))
    finally:
        for hook in hooks:
            hook.remove()


def _placed(state: State, x: Tensor, group: Group) -> State:
    """The state as the tokens to the left leave it, where that is known without running them."""
    before = group.rank() * x.shape[1]
    placed: State = {}
    for name, t in state.items():
        if isinstance(t, dict):
            placed[name] = _placed(t, x, group)
        elif name == "recent" and t.shape[1]:
            placed[name] = from_left(x[:, x.shape[1] - t.shape[1] :].to(t.dtype), t, group)
        elif before and t.dtype == torch.bool:  # flags say that nothing has been read
            placed[name] = torch.zeros_like(t)
        else:
            placed[name] = t + before if t.dtype == torch.int64 and t.ndim == 1 else t
    return placed
