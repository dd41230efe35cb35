"""What can be wrong with an input, said in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class RemanenceError(Exception):
    """A fault that the user can mend; its text is one sentence that says how."""


class ShapeError(RemanenceError, ValueError):
    """A tensor of another shape than the one expected."""


class StateError(RemanenceError, ValueError):
    """A state that belongs to another model, width or batch."""


class UnknownName(RemanenceError, KeyError):
    """A name that nothing goes by."""

    def __str__(self) -> str:
        return str(self.args[0])


class CheckpointError(RemanenceError):
    """A checkpoint that is damaged, foreign, or of another run."""


class StreamError(RemanenceError):
    """A source that cannot be read, or that changed while it was read."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None when nothing is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(what: str, name: str, known: Iterable[str]) -> UnknownName:
    """An error for a name that is not among `known`, with the nearest one that is."""
    known = sorted(known)
    close = nearest(name, known)
    hint = f"did you mean {close!r}?" if close else f"known: {', '.join(known)}."
    return UnknownName(f"There is no {what} called {name!r}; {hint}")


@cache
def _split(axes: str) -> tuple[str, ...]:
    return tuple(axes.split())


def expect(where: str, name: str, x: Tensor, axes: str, hint: str = "", **known: int) -> None:
    """Raise `ShapeError` unless `x` has the named axes, those in `known` with the given lengths."""
    names = _split(axes)
    shape = x.shape
    if len(shape) == len(names):
        for a, n in known.items():
            if shape[names.index(a)] != n:
                break
        else:
            return
    want = ", ".join(f"{a}={known[a]}" if a in known else a for a in names)
    remedy = f" {hint}" if hint and x.ndim != len(names) else ""
    raise ShapeError(f"{where}: {name} must be [{want}], got {list(shape)}.{remedy}")
