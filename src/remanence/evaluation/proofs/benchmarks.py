"""The synthetic benchmarks tell memories apart: what should solve each does, and what cannot does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from remanence.catalogue import Check, proof
from remanence.evaluation.benchmarks.tasks import Copying, Parity, Recall, Task
from remanence.evaluation.benchmarks.training import run_benchmark


def _row(task: Task, memory: str, steps: int, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What one layer of `memory` can do after a few seconds of training."""
    given = {memory: arguments}
    return run_benchmark({"task": task}, [memory], steps=steps, dim=32, layers=1, rate=1e-2, arguments=given)[0]


def _check(row: dict[str, Any], column: str, above: float) -> Check:
    guess = f"who knows the answers but not their order: {row['chance']:.3f}"
    return Check(row[column] > above, f"{row['memory']}: {row[column]:.3f} right ({guess})")


@proof("mqar", "A matrix memory finds values beyond a pause; attention with a window shorter than the pause does not.")
def recall() -> tuple[Check, Check]:
    task = Recall(pairs=2, pause=8, symbols=4)
    return (
        _check(_row(task, "gated-deltanet", 120, {}), "accuracy", 0.75),
        _check(_row(task, "sliding-window", 120, {"window": 8}), "accuracy", 0.75),
    )


@proof(
    "state-tracking", "Parity is tracked twice as long as trained with negative eigenvalues, not with positive ones."
)
def state_tracking() -> tuple[Check, Check]:
    system, control = (_row(Parity(16), "gated-deltanet", 100, {"negative": n}) for n in (True, False))
    return _check(system, "longer", 0.9), _check(control, "longer", 0.9)


@proof("copying", "A memory that reaches the whole string copies it; a window shorter than the string does not.")
def copying() -> tuple[Check, Check]:
    task = Copying(length=6, symbols=4)
    system, control = (_row(task, "sliding-window", 150, {"window": w}) for w in (8, 4))
    return _check(system, "accuracy", 0.9), _check(control, "accuracy", 0.9)
