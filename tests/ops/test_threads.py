"""Every part is done once, by several threads where they come, and faults reach the caller."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from remanence.ops.threads import share


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("parts", [1, 2, 7, 100])
def test_every_part_is_done_once(parts, threads):
    done = np.zeros(parts, int)

    def kernel(first: int, last: int, out: np.ndarray) -> None:
        out[first:last] += 1

    for _ in range(50):
        share(kernel, parts, threads, done)
    assert (done == 50).all()


def test_helpers_take_their_share():
    who = set()

    def kernel(first: int, last: int) -> None:
        who.add(threading.get_ident())
        time.sleep(0.02)

    share(kernel, 8, 2)
    assert len(who) == 2
    assert threading.get_ident() in who


def test_a_fault_reaches_the_caller_when_all_have_ended():
    ended = []

    def kernel(first: int, last: int) -> None:
        if first == 0:
            raise ValueError("part 0")
        time.sleep(0.01)
        ended.append(first)

    for _ in range(3):
        ended.clear()
        with pytest.raises(ValueError, match="part 0"):
            share(kernel, 4, 2)
        assert sorted(ended) == [1, 2, 3]


def test_callers_do_not_wait_for_each_other():
    """One caller's helpers may all be busy with another's work, also while that is waiting for the first."""
    met = threading.Barrier(2, timeout=10)

    def kernel(first: int, last: int) -> None:
        if first == 0:
            met.wait()

    with ThreadPoolExecutor(2) as pool:
        for each in [pool.submit(share, kernel, 8, 2) for _ in range(2)]:
            each.result(20)


def test_nothing_is_kept_of_what_was_shared():
    class Numbers:
        pass

    numbers = Numbers()
    gone = weakref.ref(numbers)
    share(lambda first, last, x: time.sleep(0.001), 8, 3, numbers)
    del numbers
    for _ in range(100):  # a helper may still be on its way to see that all is done
        gc.collect()
        if gone() is None:
            return
        time.sleep(0.01)
    assert gone() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_helpers_of_its_own():
    share(lambda first, last: None, 8, 2)
    child = os.fork()
    if not child:
        done = [0] * 8

        def kernel(first: int, last: int) -> None:
            done[first] += 1
            time.sleep(0.005)

        who = threading.active_count()
        share(kernel, 8, 2)
        os._exit(0 if done == [1] * 8 and threading.active_count() == who + 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
