"""Train one small model per memory on the same data, and measure what it can do."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from remanence import catalogue, state
from remanence.evaluation.benchmarks.tasks import Task
from remanence.models.language import LanguageModel

STEPS = 400
SETTINGS: Mapping[str, Mapping[str, Any]] = {"sliding-window": {"window": 8}}
"""Arguments of memories in the benchmarks: two layers of this window reach no further back than the pause of `mqar`."""


def accuracy(model: LanguageModel, task: Task, *, batches: int, batch: int, seed: int) -> float:
    """Share of masked positions answered rightly, on `batches` fresh batches of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    right = total = 0
    with torch.no_grad():
        for _ in range(batches):
            inputs, targets, mask = task.draw(batch, generator)
            right += int((model(inputs)[0].argmax(-1) == targets)[mask].sum())
            total += int(mask.sum())
    return right / total


def train(
    name: str,
    task: Task,
    *,
    steps: int,
    seed: int,
    dim: int,
    layers: int,
    batch: int,
    rate: float,
    arguments: Mapping[str, Mapping[str, Any]] = SETTINGS,
) -> LanguageModel:
    """A stack of `layers` memories of one name, after `steps` batches of the task; `seed` fixes data and weights.

    AdamW, the rate warmed up over a tenth of the steps and lowered to zero along a cosine.
    """
    # The initial weights come from the global generator: it is put back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(f"{layers}*{name}", vocabulary=task.vocabulary, dim=dim, ngrams=(), arguments=arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=min(0.1, 1 - 1 / steps), cycle_momentum=False
    )
    data = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs, targets, mask = task.draw(batch, data)
        loss = F.cross_entropy(model(inputs)[0][mask], targets[mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def run_benchmark(
    tasks: Mapping[str, Task],
    memories: Sequence[str],
    *,
    steps: int = STEPS,
    seed: int = 0,
    dim: int = 64,
    layers: int = 2,
    batch: int = 32,
    rate: float = 5e-3,
    arguments: Mapping[str, Mapping[str, Any]] = SETTINGS,
) -> list[dict[str, Any]]:
    """A row per task and memory: `task`, `memory`, `accuracy`, `longer` (accuracy on `task.longer()`, which no training
    saw), `chance`, `state_bytes` (one sequence), `parameters`, `seconds` (training).

    Every memory trains on the same batches and is examined on the same others.

    `arguments` go to the memories by name; they are named in the row's `memory`.

    Raises: `UnknownName` for a memory that nothing goes by, before anything is trained.
    """
    for name in memories:
        catalogue.find(name, "memory")
    how: dict[str, Any] = {"steps": steps, "dim": dim, "layers": layers, "batch": batch, "rate": rate}
    rows = []
    for title, task in tasks.items():
        for name in memories:
            start = time.perf_counter()
            model = train(name, task, seed=seed, arguments=arguments, **how)
            seconds = time.perf_counter() - start
            exam = {"batches": 4, "batch": 64, "seed": seed + 2**32}
            rows.append(
                {
                    "task": title,
                    "memory": name + "".join(f" {k}={v}" for k, v in arguments.get(name, {}).items()),
                    "accuracy": accuracy(model, task, **exam),
                    "longer": accuracy(model, task.longer(), **exam),
                    "chance": task.chance,
                    "state_bytes": state.nbytes(model.initial_state(1)),
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "seconds": round(seconds, 1),
                }
            )
    return rows
