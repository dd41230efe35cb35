"""Synthetic benchmarks: what a memory can hold, find again and keep track of, on the same data for each.

`names` lists them, `run` compares memories on one. Each is a card of kind "benchmark".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from remanence import catalogue
from remanence.catalogue import card
from remanence.evaluation.benchmarks.tasks import S5, Copying, Parity, Recall, Task

MEMORIES = ("gated-deltanet", "linear-attention", "min-lstm", "sliding-window")
"""What is compared when no memory is named."""


@card(
    "mqar",
    kind="benchmark",
    says="Multi-query associative recall: the value that once followed each key, asked after a pause.",
    source="arXiv:2312.04927",
)
def recall(pairs: int = 4, pause: int = 16, symbols: int = 8) -> dict[str, Task]:
    return {"mqar": Recall(pairs, pause, symbols)}


@card(
    "state-tracking",
    kind="benchmark",
    says="Running products in a group: parity, and the permutations of five things.",
    source="arXiv:2404.08819",
)
def state_tracking(parity: int = 16, s5: int = 16) -> dict[str, Task]:
    return {"parity": Parity(parity), "s5": S5(s5)}


@card(
    "copying",
    kind="benchmark",
    says="A string, then the same string again.",
    source="arXiv:2402.01032",
)
def copying(length: int = 6, symbols: int = 8) -> dict[str, Task]:
    return {"copying": Copying(length, symbols)}


def names() -> list[str]:
    """The benchmarks that `run` knows."""
    return sorted(catalogue.cards("benchmark"))


def run(
    name: str, memories: Sequence[str] | None = None, *, seed: int = 0, quick: bool = False, **settings: Any
) -> list[dict[str, Any]]:
    """Train a small stack of each memory on one benchmark and examine it: a row per task and memory.

    Args:
        name: one of `names()`.
        memories: names from the catalogue; None compares `MEMORIES`.
        seed: of data and weights.
        quick: half the steps: some seconds for each memory, not always enough to learn what it could.
        settings: of `remanence.evaluation.benchmarks.training.run_benchmark`: steps, dim, layers, batch, rate.

    Raises: `UnknownName`, with the nearest name, for a benchmark or memory that there is not.
    """
    from remanence.evaluation.benchmarks.training import STEPS, run_benchmark

    tasks = catalogue.find(name, "benchmark").make()
    steps = settings.pop("steps", STEPS // 2 if quick else STEPS)
    return run_benchmark(tasks, MEMORIES if memories is None else memories, steps=steps, seed=seed, **settings)
