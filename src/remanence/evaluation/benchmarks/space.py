"""The design space of memories that learn at test time, measured: rows of answers, four tasks, one table."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from remanence.catalogue import card
from remanence.errors import RemanenceError, unknown
from remanence.evaluation.benchmarks import Suite
from remanence.evaluation.benchmarks.bare import Pairs, recall
from remanence.evaluation.benchmarks.tasks import Parity, Task
from remanence.evaluation.benchmarks.training import Entry, Progress, run_benchmark
from remanence.learning.learner import Learner
from remanence.memory.fast_weight import KEPT, OPTIMIZERS, ROWS, STRUCTURES, FastWeightMemory
from remanence.models.language import LanguageModel
from remanence.ops.fast_weight import READS
from remanence.ops.objectives import OBJECTIVES
from remanence.ops.retention import RETENTIONS
from remanence.optim.adamw import AdamW
from remanence.state import nbytes
from remanence.streams import open_source

MEMORY = "fast-weight"
CENTRE: Mapping[str, Any] = {
    "structure": "mlp",
    "objective": "squared",
    "retention": "decay",
    "optimizer": "gradient",
    "chunk_size": 16,
    "read": "after",
}
"""The memory whose answers are changed one at a time."""
ANSWERS: Mapping[str, Sequence[Any]] = {
    "structure": STRUCTURES,
    "objective": tuple(OBJECTIVES),
    "retention": (*KEPT, *RETENTIONS),
    "optimizer": tuple(OPTIMIZERS),
    "chunk_size": (1, 4, 16, 64),
    "read": READS,
}
"""The answers there are to each question; any other chunk size is one, too."""
NAMED = {"log-cosh", "tanh", "shrink", "hellinger", "reverse-kl"}
"""Answers near to others (absolute, sigmoid, elastic, chi-squared), measured where they are named."""
SEGMENT = 64
"""Bytes between two steps of the learner on the stream."""


@card(
    "space",
    kind="benchmark",
    says="The six answers of `FastWeightMemory`, one changed at a time or crossed: recall, outliers, parity, bytes.",
    source="arXiv:2504.13173",
)
def space(
    structure: Any = None,
    objective: Any = None,
    retention: Any = None,
    optimizer: Any = None,
    chunk_size: Any = None,
    read: Any = None,
    heads: int = 4,
    expand: int = 2,
    max_step: float = 2.0,
    bound: float = 2.0,
    pairs: int = 8,
    times: int = 8,
    corrupted: float = 0.1,
    outlier: float = 10.0,
    parity: int = 16,
    stream: str = "builtin:mixed:2500",
) -> Suite:
    """A row for each memory. With no answers given, `CENTRE` and what differs from it in one answer, but for `NAMED`.

    Args:
        structure, objective, retention, optimizer, chunk_size, read: answers to cross, "matrix,mlp" or a sequence;
            the questions not named keep the answer of `CENTRE`.
        heads, expand, max_step, bound: of every memory. Steps go up to 2, beyond 1 so that a write may overturn what
            the key held, which parity needs.
        pairs, times, corrupted, outlier: of recall, see `bare.Pairs`; of plain recall no value is corrupted.
        parity: length of the sequences of bits on which tracking is learned.
        stream: what is read for bits per byte, as `remanence learn` takes it.

    The memories that take part by name are those of `memory.fast_weight.ROWS`. Where a memory fails, the others go on:
    its score is None, and a row after all others says what was `not_measured`, and why.

    Raises: `UnknownName` for an answer that there is none of.
    """
    given = {"structure": structure, "objective": objective, "retention": retention}
    given |= {"optimizer": optimizer, "chunk_size": chunk_size, "read": read}
    crossed = {question: _listed(question, answers) for question, answers in given.items() if answers is not None}
    common = {"heads": heads, "expand": expand, "max_step": max_step, "bound": bound}

    def entries(names: Sequence[str]) -> list[Entry]:
        rows = [] if names and not crossed else grid(crossed) if crossed else around()
        titled = {title(row): common | row for row in rows}
        for name in names:
            if name not in ROWS:
                raise unknown("row of FastWeightMemory", name, ROWS)
            titled[name] = common | ROWS[name]
        return [Entry(name, MEMORY, arguments={MEMORY: arguments}) for name, arguments in titled.items()]

    told = {"recall": Pairs(pairs, times), "noisy recall": Pairs(pairs, times, corrupted, outlier)}

    def measure(
        tasks: Mapping[str, Task], entries: Sequence[Entry], on_progress: Progress | None, **training: Any
    ) -> list[dict[str, Any]]:
        open_source(stream)  # a stream that is not there should be known at once
        for entry in entries[:1]:  # what is compiled or read from disk at the first use is not the first row's time
            _row(entry, told, tasks, stream, **training | {"steps": 1, "batch": 1, "bytes": SEGMENT})
        rows: list[dict[str, Any]] = []
        lacking: list[dict[str, Any]] = []
        for i, entry in enumerate(entries):
            if on_progress:
                on_progress(entry.title, i + 1, len(entries))
            row, reasons = _row(entry, told, tasks, stream, **training)
            rows += [row] if row else []
            lacking += [{"memory": entry.title, "not_measured": reason} for reason in reasons]
        return rows + lacking

    return Suite(
        {"tracking": Parity(parity)},
        entries,
        {"steps": 80, "dim": 32, "layers": 1, "batch": 16, "rate": 1e-2, "bytes": 10_000},
        quick={"steps": 3, "batch": 4, "bytes": 256},
        memories=(),
        measure=measure,
    )


def around() -> list[dict[str, Any]]:
    """`CENTRE`, and every memory that differs from it in one answer, but for the `NAMED`."""
    changed = [{q: a} for q, answers in ANSWERS.items() for a in answers if a != CENTRE[q] and a not in NAMED]
    return [{**CENTRE, **change} for change in [{}, *changed]]


def grid(crossed: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the answers given; the other questions keep the answer of `CENTRE`."""
    chosen = itertools.product(*crossed.values())
    return [{**CENTRE, **dict(zip(crossed, answers, strict=True))} for answers in chosen]


def title(answers: Mapping[str, Any]) -> str:
    """What differs from `CENTRE`, or all answers of the centre itself."""
    changed = [f"{question}={answer}" for question, answer in answers.items() if answer != CENTRE[question]]
    return " ".join(changed) or f"centre ({' '.join(map(str, CENTRE.values()))})"


def _listed(question: str, given: Any) -> list[Any]:
    """Answers as a list, each checked."""
    answers = given.split(",") if isinstance(given, str) else list(given) if hasattr(given, "__iter__") else [given]
    if question == "chunk_size":
        if not all(str(a).isdecimal() and int(a) for a in answers):
            raise ValueError(f"chunk_size is a number of tokens, or several like 1,16, got {given!r}.")
        return [int(a) for a in answers]
    for answer in answers:
        if answer not in ANSWERS[question]:
            raise unknown(question, str(answer), ANSWERS[question])
    return answers


def _row(
    entry: Entry, told: Mapping[str, Pairs], tasks: Mapping[str, Task], stream: str, **training: Any
) -> tuple[dict[str, Any], list[str]]:
    """The scores of one memory, None where it failed, and why; nothing but the reason where there is no such memory."""
    arguments, begun = dict(entry.arguments[MEMORY]), time.process_time()
    small = {name: training[name] for name in ("dim", "rate", "seed")}
    trained, layers = small | {name: training[name] for name in ("steps", "batch")}, training["layers"]
    try:
        with torch.random.fork_rng(devices=[]):
            held = layers * nbytes(FastWeightMemory(training["dim"], **arguments).initial_state(1))
    except ValueError as refused:
        return {}, [str(refused)]

    def track() -> tuple[float, float]:
        (found,) = run_benchmark(tasks, [entry], layers=layers, **trained)
        return found["accuracy"], found["longer"]

    measures: dict[tuple[str, ...], Callable[[], Any]] = {
        **{(name,): partial(recall, task, arguments, **trained) for name, task in told.items()},
        ("tracking", "longer"): track,
        ("bits_per_byte",): partial(prequential, entry, stream, training["bytes"], layers=layers, **small),
    }
    row: dict[str, Any] = {"memory": entry.title}
    reasons = []
    for columns, measure in measures.items():
        row |= dict.fromkeys(columns)
        try:
            found = measure()
            row |= zip(columns, found if len(columns) > 1 else [found], strict=True)
        except RemanenceError as failed:
            reasons.append(f"{columns[0].replace('_', ' ')}: {failed}")
    return row | {"state_bytes": held, "seconds": round(time.process_time() - begun, 1)}, reasons


def prequential(entry: Entry, stream: str, bytes: int, *, dim: int, layers: int, rate: float, seed: int) -> float:
    """Bits per byte of a stream's first `bytes`, each byte predicted before it is learned: the network alone.

    Raises: `StreamError` for a stream that cannot be read.
    """
    data = b""
    for segment in open_source(stream).read(0):
        data += segment.data
        if len(data) >= bytes:
            break
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(f"{layers}*{entry.pattern}", dim=dim, ngrams=(), arguments=entry.arguments)
    learner = Learner(model, AdamW(model.parameters(), lr=rate))
    tokens = torch.tensor(list(data[:bytes]))[None]
    return torch.cat([learner.observe(piece).bits for piece in tokens.split(SEGMENT, dim=1)], dim=1).mean().item()
