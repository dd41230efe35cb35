"""Ctrl-C and SIGTERM, answered where a pause does no harm."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Stop:
    """Whether Ctrl-C or SIGTERM asked to stop: to be looked at between two items, so that none is half learned."""

    def __init__(self) -> None:
        self.requested = self.waiting = False

    def __call__(self, *_: Any) -> None:
        self.requested = True
        if self.waiting:
            raise KeyboardInterrupt

    def while_waiting(self, items: Iterator[T]) -> Iterator[T]:
        """The items; a request that comes while the next one is awaited need not wait for it: a pipe may be silent."""
        while True:
            self.waiting = True
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.waiting = False
            yield item


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """Catch both signals while this lasts (in the main thread; elsewhere none comes)."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
