"""Seeing and changing what a layer asks of its recurrence, without touching the layer.

Layers differ in their gates; what they ask of an op does not. So what is to work on every layer (filtering tokens,
widening states, splitting a sequence over machines, quantising) works here, on the arguments of the op.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Roles:
    """Which argument of a recurrence is what.

    `decay` says how much is forgotten (0 forgets nothing); `writes` gives for each argument that writes the entry with
    which it writes nothing; outputs are linear in `value`, feature by feature; `time` is the axis of tokens.
    """

    decay: str
    writes: Mapping[str, float]
    value: str
    time: int


ROLES = {
    "scan": Roles("log_decay", {"b": 0.0}, "b", 1),
    "selective_scan": Roles("delta", {"delta": 0.0}, "x", 1),
    "linear_attention": Roles("log_decay", {"key": 0.0}, "value", 2),
    "gated_delta_rule": Roles("log_decay", {"beta": 0.0}, "value", 2),
    "dplr": Roles("log_decay", {"key": 0.0, "b": 0.0}, "value", 2),
    "expgate": Roles("log_forget", {"log_input": -math.inf}, "value", 2),
}
"""The recurrences whose arguments are known by role."""


@dataclass(frozen=True)
class Call:
    """One call of an op: its name, its arguments by name (defaults included), and `run(**changed)` to go on with it."""

    op: str
    arguments: dict[str, Any]
    run: Callable[..., Any]

    @property
    def roles(self) -> Roles | None:
        """What the arguments are; None for ops that are not in `ROLES`."""
        return ROLES.get(self.op)

    @property
    def forgetting(self) -> Tensor | None:
        """How much each token takes away, ≥ 0, in the decay's own units; None where nothing decays."""
        decay = None if self.roles is None else self.arguments[self.roles.decay]
        return None if decay is None else decay.abs()

    def skipping(self, keep: Tensor) -> dict[str, Any]:
        """Arguments with which the tokens where `keep` is False leave the state as it was; they still read.

        `keep` is bool, [batch, time] or with the axes of the decay. Where a whole head has one write strength but a
        decay per feature, the head is written if any feature is kept.
        """
        roles = self.roles
        assert roles is not None
        changed = {}
        for name, nothing in {roles.decay: 0.0, **roles.writes}.items():
            x, k = self.arguments[name], keep
            if x is None:
                continue
            if k.ndim == 2 and roles.time == 2:
                k = k[:, None]
            while k.ndim < x.ndim:
                k = k[..., None]
            changed[name] = x.masked_fill(~(k if k.ndim == x.ndim else k.any(-1)), nothing)
        return changed


Handler = Callable[[Call], Any]
_handlers: ContextVar[tuple[Handler, ...]] = ContextVar("handlers", default=())


@contextmanager
def tap(handler: Handler) -> Iterator[None]:
    """Every call of an op in this block, in this thread, goes to `handler(call)`, whose result is the op's.

    The innermost handler comes first; what it runs, and ops that it calls itself, go through the outer ones.
    """
    token = _handlers.set((*_handlers.get(), handler))
    try:
        yield
    finally:
        _handlers.reset(token)


def watched() -> bool:
    """Whether calls of ops go to a handler: then nothing may be read of a state but through them."""
    return bool(_handlers.get())


def tapped(op: F, plain: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> F:
    """The same op, open to `tap`. `plain` makes its arguments those of the recurrence alone, for handlers."""
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
        arguments = dict(bound.arguments)
        return through(handlers, arguments if plain is None else plain(arguments))

    return call  # type: ignore[return-value]
