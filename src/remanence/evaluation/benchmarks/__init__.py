"""Synthetic benchmarks: what a memory can hold, find again and keep track of, on the same data for each.

`names` lists them, `run` compares memories on one. Each is a card of kind "benchmark": a function that returns tasks
by name, or a `Suite` where what takes part is not simply one stack per memory.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from remanence import catalogue
from remanence.catalogue import card
from remanence.errors import unknown
from remanence.evaluation.benchmarks.tasks import S5, Copying, Parity, Rebound, Recall, Task

if TYPE_CHECKING:
    from remanence.evaluation.benchmarks.training import Entry, Progress

MEMORIES = ("gated-deltanet", "linear-attention", "min-lstm", "sliding-window")
"""What is compared when no memory is named."""


@dataclass(frozen=True)
class Suite:
    """Tasks, and how memories take part in them: `entries` turns their names into what is trained.

    `training` are settings of the training, and `quick` those of a short one (half the steps by default); `memories`
    are compared when none is named; `measure(tasks, entries, seed=..., on_progress=..., **training)`
    makes the rows where `training.run_benchmark` does not.
    """

    tasks: Mapping[str, Task]
    entries: Callable[[Sequence[str]], Sequence[str | Entry]] = list
    training: Mapping[str, Any] | None = None
    quick: Mapping[str, Any] | None = None
    memories: Sequence[str] = MEMORIES
    measure: Callable[..., list[dict[str, Any]]] | None = None


@card(
    "mqar",
    kind="benchmark",
    says="Multi-query associative recall: the value that once followed each key, asked after a pause.",
    source="arXiv:2312.04927",
)
def recall(
    pairs: int = 4, pause: int = 16, symbols: int = 8, together: bool = False, times: int = 1
) -> dict[str, Task]:
    """`times` above 1 binds each key as often, key and value in one token, and asks for the latest value."""
    return {"mqar": Rebound(pairs, pause, symbols, times) if times > 1 else Recall(pairs, pause, symbols, together)}


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


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """`["pairs=16", "retrieval=true"]` as a dictionary of numbers, truths and words.

    Raises: `ValueError` for what is not NAME=VALUE.
    """
    settings: dict[str, Any] = {}
    for part in given:
        name, equals, value = part.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"A setting reads like pairs=16, got {part!r}.")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def run(
    name: str,
    memories: Sequence[str] | None = None,
    *,
    seed: int = 0,
    seeds: int = 1,
    quick: bool = False,
    on_progress: Progress | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Train a small stack of each memory on one benchmark and examine it: a row per task and memory.

    Args:
        name: one of `names()`.
        memories: names from the catalogue, or patterns such as `"3*gla, softmax"`; None compares `MEMORIES`, or what
            the benchmark does when none is named.
        seed: of data and weights.
        seeds: how many to do all with, from `seed` on. Rows then hold means, and under "spread", by column, how far the
            scores of single seeds lie from them at most.
        quick: half the steps: some seconds for each memory, not always enough to learn what it could.
        on_progress: is told what is about to be trained, the how-manieth it is, and of how many.
        settings: of the benchmark itself (`pairs=16`), or of `remanence.evaluation.benchmarks.training.run_benchmark`:
            steps, dim, layers, batch, rate, mixers.

    Raises: `UnknownName`, with the nearest name, for a benchmark, memory or setting that there is not; `ValueError` for
        no seeds.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}.")
    from remanence.evaluation.benchmarks.training import STEPS, run_benchmark

    make = catalogue.find(name, "benchmark").make
    own = set(inspect.signature(make).parameters)
    made = make(**{k: v for k, v in settings.items() if k in own})
    suite = made if isinstance(made, Suite) else Suite(made)
    training = {"steps": STEPS, **(suite.training or {})}
    common = (
        {"steps", "dim", "layers", "batch", "rate", "mixers", "arguments"} if suite.measure is None else set(training)
    )
    for setting in settings:
        if setting not in own | common:
            raise unknown(f"setting of {name}", setting, own | common - {"arguments"})
    if quick:
        training |= suite.quick or {"steps": training["steps"] // 2}
    training |= {k: v for k, v in settings.items() if k not in own}
    entries = suite.entries(suite.memories if memories is None else memories)
    measure = suite.measure or run_benchmark
    found = []
    for each in range(seed, seed + seeds):
        found += measure(suite.tasks, entries, seed=each, on_progress=on_progress, **training)
    return found if seeds == 1 else _means(found)


def _means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for those of the same task and memory; what one seed could not measure, the mean leaves out."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault(tuple(row.get(name) for name in ("task", "memory", "not_measured")), []).append(row)
    means = []
    for same in alike.values():
        mean, spread = dict(same[0]), {}
        for column in [c for c in mean if any(isinstance(row[c], float) for row in same)]:
            values = [row[column] for row in same if row[column] is not None]
            mean[column] = sum(values) / len(values)
            spread[column] = max(abs(value - mean[column]) for value in values)
        means.append(mean | {"spread": spread} if spread else mean)
    return means
