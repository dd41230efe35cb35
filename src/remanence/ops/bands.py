"""Kernels over bands of features, which know nothing of each other, on as many threads as PyTorch uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


def bands(features: int, work: int) -> list[tuple[int, int]]:
    """The bounds of one band per thread; a single band when `work` (in numbers touched) is not worth a second."""
    threads = torch.get_num_threads() if work >= 2**16 else 1
    width = max(1, -(-features // threads))
    return [(first, min(first + width, features)) for first in range(0, features, width)]


def run(jobs: Sequence[Callable[[], object]]) -> None:
    """All of them, the first in the caller's own thread; they must release the interpreter's lock to gain by it."""
    if not jobs:
        return
    others = [_pool(len(jobs) - 1).submit(job) for job in jobs[1:]]
    jobs[0]()
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bands")
