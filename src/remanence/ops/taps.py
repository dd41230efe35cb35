"""Seeing and changing what a layer asks of its recurrence, without touching the layer.

Layers differ in their gates; what they ask of an op does not. So what is to work on every layer (filtering tokens,
widening states, splitting a sequence over machines, quantising) works here, on the arguments of the op.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Roles:
    """Which argument of an op is what: `decay` (logarithms), `write` (zero writes nothing), `value`, and time's axis.

    The op is linear in `value`, feature by feature.
    """

    decay: str
    write: str
    value: str
    time: int


ROLES = {
    "scan": Roles("log_decay", "b", "b", 1),
    "linear_attention": Roles("log_decay", "key", "value", 2),
    "gated_delta_rule": Roles("log_decay", "beta", "value", 2),
}
"""The recurrences that can be tapped by role."""
TAPPED = (*ROLES, "causal_conv", "window_attention")


@dataclass(frozen=True)
class Call:
    """One call of an op: its name, its arguments by name (defaults included), and `run(**changed)` to go on with it."""

    op: str
    arguments: dict[str, Any]
    run: Callable[..., Any]

    @property
    def roles(self) -> Roles | None:
        """What the arguments are, for a recurrence; None for other ops."""
        return ROLES.get(self.op)

    def skipping(self, keep: Tensor) -> dict[str, Any]:
        """Arguments with which the tokens where `keep` is False leave the state as it was; they still read.

        Shapes: `keep` is bool, of the decay's shape, or of one that stands for it: [B, T] or [B, H, T].
        """
        roles = self.roles
        assert roles is not None
        changed = {}
        for name in {roles.decay, roles.write}:
            x = self.arguments[name]
            if x is None:
                continue
            k = keep
            if k.ndim == 2 and roles.time == 2:
                k = k[:, None]
            while k.ndim < x.ndim:
                k = k[..., None]
            if k.ndim > x.ndim:  # a write strength per head under decays per feature: nothing is to be left over
                k = k.any(-1)
            changed[name] = x.masked_fill(~k, 0)
        return changed


Handler = Callable[[Call], Any]
_handlers: ContextVar[tuple[Handler, ...]] = ContextVar("handlers", default=())


@contextmanager
def tap(handler: Handler) -> Iterator[None]:
    """Every call of an op in this block, in this thread, goes to `handler(call)`, whose result is the op's.

    The innermost handler comes first; what it runs, and ops that it calls itself, go through the outer ones.
    """
    install()
    token = _handlers.set((*_handlers.get(), handler))
    try:
        yield
    finally:
        _handlers.reset(token)


def tapped(op: F) -> F:
    """The same op, open to `tap`."""
    signature = inspect.signature(op)

    def through(handlers: tuple[Handler, ...], arguments: dict[str, Any]) -> Any:
        if not handlers:
            return op(**arguments)
        *outer, handler = handlers
        token = _handlers.set(tuple(outer))
        try:
            run = lambda **changed: through(tuple(outer), {**arguments, **changed})  # noqa: E731
            return handler(Call(op.__name__, arguments, run))
        finally:
            _handlers.reset(token)

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        handlers = _handlers.get()
        if not handlers:
            return op(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return through(handlers, dict(bound.arguments))

    call.open_to_taps = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def install() -> None:
    """Open the ops of the package, once: layers call them by attribute (`ops.scan`)."""
    from remanence import ops

    for name in TAPPED:
        if not hasattr(op := getattr(ops, name), "open_to_taps"):
            setattr(ops, name, tapped(op))
