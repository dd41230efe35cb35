"""Train one small model per memory on the same data, and measure what it can do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence import catalogue, state
from remanence.evaluation.benchmarks.tasks import Task, score
from remanence.models.language import LanguageModel, parse_pattern

Progress = Callable[[str, int, int], None]
"""Is told what comes, the how-manieth it is, and of how many."""
STEPS = 400
SETTINGS: Mapping[str, Mapping[str, Any]] = {"sliding-window": {"window": 8}}
"""Arguments of memories in the benchmarks: two layers of this window reach no further back than the pause of `mqar`."""


@dataclass(frozen=True)
class Entry:
    """What takes part: a stack by its pattern, under a title; `dim` and `arguments` where they are not the common ones.

    A pattern of a single name stands for as many such layers as the benchmark stacks.
    """

    title: str
    pattern: str
    dim: int | None = None
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Silent(nn.Module):
    """A channel mixer that adds nothing. Shapes: [..., dim] to [..., dim]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class Reader(LanguageModel):
    """A language model that also reads numbers: a token given as features is the same mixture of embeddings.

    Args: as `LanguageModel`; without `mixers` its blocks are memories alone.

    Shapes: `tokens` int64 [batch, time], or floating [batch, time, features] with features ≤ vocabulary.
    """

    def __init__(self, pattern: str, *, mixers: bool = True, **arguments: Any):
        super().__init__(pattern, **arguments)
        if not mixers:
            for block in self.blocks:
                block.mixer_norm, block.mixer = nn.Identity(), Silent()

    def _embed(self, tokens: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        if not tokens.is_floating_point():
            return super()._embed(tokens, recent)
        return tokens @ self.embedding.weight[: tokens.shape[-1]], recent


def accuracy(model: LanguageModel, task: Task, *, batches: int, batch: int, seed: int) -> float:
    """Share of the answers that are right, on `batches` fresh batches of `seed`."""
    return examine(model, task, batches=batches, batch=batch, seed=seed)[0]


def examine(model: LanguageModel, task: Task, *, batches: int, batch: int, seed: int) -> tuple[float, float]:
    """Share of right answers, and mean cross-entropy in bits, on `batches` fresh batches of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    right = total = positions = 0
    bits = 0.0
    with torch.no_grad():
        for _ in range(batches):
            drawn = task.draw(batch, generator)
            logits = model(drawn.inputs)[0]
            found, asked = score(logits, drawn)
            right, total, positions = right + found, total + asked, positions + int(drawn.mask.sum())
            bits += float(F.cross_entropy(logits[drawn.mask], drawn.targets[drawn.mask], reduction="sum")) / math.log(2)
    return right / total, bits / positions


def warmed(optimizer: torch.optim.Optimizer, rate: float, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The rate, warmed up over a tenth of the steps (two at least) and lowered to zero along a cosine."""
    share = max(0.1, 2 / steps) if steps > 2 else 0.0
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=share, cycle_momentum=False
    )


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
    mixers: bool = True,
    arguments: Mapping[str, Mapping[str, Any]] = SETTINGS,
) -> LanguageModel:
    """A stack after `steps` batches of the task; `seed` fixes data and weights.

    `name` is a pattern as in `LanguageModel`; a single name means `layers` of it, with channel mixers between them or
    without. AdamW, the rate warmed up over a tenth of the steps and lowered to zero along a cosine.
    """
    pattern = f"{layers}*{name}" if len(parse_pattern(name)) == 1 and "*" not in name else name
    # The initial weights come from the global generator: it is put back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Reader(pattern, vocabulary=task.vocabulary, dim=dim, ngrams=(), mixers=mixers, arguments=arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = warmed(optimizer, rate, steps)
    data = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        drawn = task.draw(batch, data)
        loss = F.cross_entropy(model(drawn.inputs)[0][drawn.mask], drawn.targets[drawn.mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def run_benchmark(
    tasks: Mapping[str, Task],
    memories: Sequence[str | Entry],
    *,
    steps: int = STEPS,
    seed: int = 0,
    dim: int = 64,
    layers: int = 2,
    batch: int = 32,
    rate: float = 5e-3,
    mixers: bool = True,
    arguments: Mapping[str, Mapping[str, Any]] = SETTINGS,
    on_progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A row per task and memory: `task`, `memory`, a share of right answers for each of the task's `exams` (most
    have `accuracy` and `longer`, on what no training saw), `loss` (bits per answer), `chance`, `state_bytes` (one
    sequence as it was trained on, once it is read), `parameters`, `seconds` (training).

    Every memory trains on the same batches and is examined on the same others. A memory is a name, a pattern like
    `"3*gla, softmax"`, or an `Entry`.

    `arguments` go to the memories by name; they are named in the row's `memory`.

    Raises: `UnknownName` for a memory that nothing goes by, before anything is trained.
    """
    entries = [m if isinstance(m, Entry) else Entry(_titled(m, arguments), m) for m in memories]
    for name in {name for entry in entries for name in parse_pattern(entry.pattern)}:
        catalogue.find(name, "memory")
    rows: list[dict[str, Any]] = []
    for title, task in tasks.items():
        for entry in entries:
            if on_progress:
                on_progress(f"{title}, {entry.title}", len(rows) + 1, len(tasks) * len(entries))
            how: dict[str, Any] = {"steps": steps, "dim": entry.dim or dim, "layers": layers, "batch": batch}
            start = time.perf_counter()
            given = {**arguments, **entry.arguments}
            model = train(entry.pattern, task, seed=seed, rate=rate, mixers=mixers, arguments=given, **how)
            seconds = time.perf_counter() - start
            exam = {"batches": 4, "batch": 64, "seed": seed + 2**32}
            one = task.draw(1, torch.Generator().manual_seed(seed))
            with torch.no_grad():
                held = model(one.inputs)[1]
            results = {column: (examined, *examine(model, examined, **exam)) for column, examined in task.exams.items()}
            loss = next((bits for examined, _, bits in results.values() if examined == task), None)
            rows.append(
                {"task": title, "memory": entry.title}
                | {column: share for column, (_, share, _) in results.items()}
                | {
                    "loss": examine(model, task, **exam)[1] if loss is None else loss,
                    "chance": task.chance,
                    "state_bytes": state.nbytes(held),
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "seconds": round(seconds, 1),
                }
            )
    return rows


def _titled(pattern: str, arguments: Mapping[str, Mapping[str, Any]]) -> str:
    """A pattern with the arguments that its memories are given."""
    told = (f" {k}={v}" for name in dict.fromkeys(parse_pattern(pattern)) for k, v in arguments.get(name, {}).items())
    return pattern + "".join(told)
