"""States are data: nested dictionaries of tensors whose first axis is the batch.

Every function here works on the state of any memory or model. None alters its argument.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from remanence.errors import StateError

State = dict[str, Any]
"""Keys are names, values tensors `[batch, ...]` or further states."""
Form = dict[str, Any]
"""Keys are names, values pairs (shape after the batch, kind) or further forms."""


def tree_map(fn: Callable[..., Tensor], state: State, *others: State) -> State:
    """A state of the same form, with `fn` applied to each tensor (and its counterparts in `others`)."""
    return {
        name: tree_map(fn, value, *(o[name] for o in others))
        if isinstance(value, dict)
        else fn(value, *(o[name] for o in others))
        for name, value in state.items()
    }


def flatten(state: State, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a state by dotted path."""
    flat: dict[str, Tensor] = {}
    for name, value in state.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = value
    return flat


def unflatten(flat: dict[str, Tensor]) -> State:
    """The inverse of `flatten` (but for empty sub-states, which hold nothing)."""
    state: State = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        at = state
        for name in parents:
            at = at.setdefault(name, {})
        at[leaf] = value
    return state


def nbytes(state: State) -> int:
    """Bytes that the state's tensors hold."""
    return sum(t.numel() * t.element_size() for t in flatten(state).values())


def fork(state: State) -> State:
    """An independent copy that shares no memory with the original; gradients flow through it."""
    return tree_map(torch.clone, state)


def detach(state: State) -> State:
    """The same values, cut off from the graph that made them."""
    return tree_map(Tensor.detach, state)


def select(state: State, rows: int | Sequence[int] | Tensor) -> State:
    """The state of some rows of the batch."""
    if isinstance(rows, int):
        rows = [rows]
    index = torch.as_tensor(rows, dtype=torch.long)
    return tree_map(lambda t: t.index_select(0, index.to(t.device)), state)


def concat(states: Iterable[State]) -> State:
    """Several states as one, row after row."""
    states = list(states)
    if not states:
        raise StateError("concat needs at least one state, got none.")
    forms = [{p: t.shape[1:] for p, t in flatten(s).items()} for s in states]
    if any(form != forms[0] for form in forms):
        raise StateError("concat needs states of one layer: these differ in their names or widths.")
    return tree_map(lambda *ts: torch.cat(ts), states[0], *states[1:])


def kind(t: Tensor) -> str:
    """What a tensor's numbers are, whatever their precision: floating, complex, integer or bool."""
    return _kind(t.dtype)


@cache
def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "floating" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


def form(state: State) -> Form:
    """What stays the same for every batch and precision: per tensor its shape after the batch, and its kind."""
    return {n: form(v) if isinstance(v, dict) else (v.shape[1:], kind(v)) for n, v in state.items()}


def fits(state: State, like: Form, batch: int) -> bool:
    """Whether a state has this form and so many rows."""
    if state.keys() != like.keys():
        return False
    for name, want in like.items():
        value = state[name]
        if isinstance(want, dict):
            if not isinstance(value, dict) or not fits(value, want, batch):
                return False
        elif isinstance(value, dict) or value.shape != (batch, *want[0]) or _kind(value.dtype) != want[1]:
            return False
    return True


def check_state(where: str, state: State, like: State) -> None:
    """Raise `StateError` unless `state` has the names, shapes and kinds (floating, integer, ...) of `like`.

    Precision may differ: a state read in float64 goes on in float32.
    """
    got, want = flatten(state), flatten(like)
    if missing := want.keys() - got.keys():
        raise StateError(f"{where}: this state belongs to another layer: it has no {sorted(missing)[0]!r}.")
    if extra := got.keys() - want.keys():
        raise StateError(f"{where}: this state belongs to another layer: {sorted(extra)[0]!r} is not expected.")
    for path, t in want.items():
        if got[path].shape != t.shape:
            raise StateError(
                f"{where}: state {path!r} must be {list(t.shape)}, got {list(got[path].shape)}: "
                "it is of another width or batch."
            )
        if kind(got[path]) != kind(t):
            raise StateError(f"{where}: state {path!r} must be {kind(t)}, got {got[path].dtype}.")


def save(state: State, path: str | Path) -> None:
    """Write a state to a safetensors file, atomically."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    save_file({p: t.detach().contiguous().clone() for p, t in flatten(state).items()}, temporary)
    with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load(path: str | Path) -> State:
    """Read a state that `save` wrote; runs no code from the file.

    Raises: `StateError` when the file is damaged or not a state; `FileNotFoundError` when it is not there.
    """
    try:
        return unflatten(load_file(path))
    except SafetensorError as error:
        raise StateError(f"{path} is not a saved state, or it is damaged ({error}).") from None
