"""Work that is shared out to threads, of which the caller is one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import count
from queue import SimpleQueue
from typing import Any


def share(kernel: Callable[..., Any], parts: int, threads: int, *arguments: Any) -> None:
    """Call `kernel(first, last, *arguments)` for 0 … `parts` − 1, which know nothing of each other.

    The caller begins at once, and helpers take what is left when they have woken up, so that short work does not wait
    for them. They sleep in between: a busy neighbour costs its share of a core and no more. There are more jobs than
    threads, since then whoever is held up takes fewer.

    Raises: what a call raised, when all have ended.
    """
    if threads <= 1:
        kernel(0, parts, *arguments)
        return
    work = _Work(kernel, arguments, parts, min(parts, 4 * threads))
    _team.call(work, threads - 1)
    work.help()
    work.ended.acquire()
    if work.error is not None:
        raise work.error


class _Work:
    """Jobs to be taken by whoever comes, and a lock that is free when the last of them has ended."""

    __slots__ = ("arguments", "done", "ended", "error", "jobs", "kernel", "parts", "taken")

    def __init__(self, kernel: Callable[..., Any], arguments: tuple[Any, ...], parts: int, jobs: int):
        self.kernel, self.arguments, self.parts, self.jobs = kernel, arguments, parts, jobs
        self.taken, self.done = count(), count()  # whose `next` no other thread can interrupt
        self.ended = threading.Lock()
        self.ended.acquire()
        self.error: BaseException | None = None

    def help(self) -> None:
        kernel, arguments, parts, jobs = self.kernel, self.arguments, self.parts, self.jobs
        while (job := next(self.taken)) < jobs:
            try:
                kernel(parts * job // jobs, parts * (job + 1) // jobs, *arguments)
            except BaseException as error:
                self.error = error
            if next(self.done) == jobs - 1:
                self.ended.release()


class _Team:
    """Threads that wait for work; as many as were ever needed."""

    def __init__(self) -> None:
        self.works: SimpleQueue[_Work] = SimpleQueue()
        self.helpers = 0
        self.hiring = threading.Lock()

    def call(self, work: _Work, helpers: int) -> None:
        while self.helpers < helpers:
            with self.hiring:
                if self.helpers < helpers:
                    threading.Thread(target=self._wait, args=(self.works,), name="remanence", daemon=True).start()
                    self.helpers += 1
        for _ in range(helpers):
            self.works.put(work)

    @staticmethod
    def _wait(works: SimpleQueue[_Work]) -> None:
        while True:
            works.get().help()


_team = _Team()


def _new_team() -> None:
    global _team
    _team = _Team()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_team)  # a child has none of its parent's threads
