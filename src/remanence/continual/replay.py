"""Experience replay: a uniform sample of the stream's past, kept within a byte budget and learned again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from remanence.catalogue import card
from remanence.continual.base import Batch, Strategy
from remanence.errors import StateError, unknown

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(amount: int | str) -> int:
    """A number of bytes from a whole number or a text: `4096`, `"512kB"`, `"8 MB"`, `"1.5 GiB"`.

    kB, MB and GB are powers of 1000, KiB, MiB and GiB of 1024.
    Raises: `ValueError` for what is no positive amount; `UnknownName` for a unit that is not listed here.
    """
    if isinstance(amount, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", amount)
        if not found:
            raise ValueError(f"An amount of bytes is written like 4096, '512kB' or '8MB', got {amount!r}.")
        number, unit = found.groups()
        if unit and unit not in UNITS:
            raise unknown("unit of bytes", unit, UNITS)
        amount = int(float(number) * UNITS[unit or "B"])
    if isinstance(amount, bool) or not isinstance(amount, int) or amount < 1:
        raise ValueError(f"An amount of bytes must be a whole number of at least 1, got {amount!r}.")
    return amount


@card(
    "replay",
    kind="strategy",
    says="Relearns rows drawn from a uniform sample of the past, kept within a byte budget.",
    source="arXiv:1902.10486",
    small={"budget": 160, "rows": 2},
)
class Replay(Strategy):
    """Experience replay from a reservoir of segments (Chaudhry et al. 2019; reservoir sampling: Vitter 1985).

    Each fresh row of a batch is one segment. Whatever the length of the stream, every segment read so far
    is equally likely to be among those kept. Each step learns `rows` kept segments beside the fresh ones,
    drawn with replacement before the fresh ones are stored, so nothing is replayed before it was predicted.

    A segment takes as few bytes as its kind allows: rows of tokens whose targets are their inputs shifted by
    one are kept once (time + 1 tokens), tokens below 256 as single bytes, all else as it came. The first
    batch fixes the row's shape and types, and all memory is taken then. Rows of another shape (the short
    last one of a text) are neither stored nor accompanied by replay; nor is a row stored whose first input
    is outside the vocabulary (a mark for the beginning of the stream).

    Args:
        budget: bytes for the kept segments, as `parse_bytes` reads them.
        rows: segments replayed per step, at least 1. The data loss weighs them like fresh rows.
        seed: of the sampling, which uses a generator of its own.

    Raises: `ValueError` for rows below 1, a budget that is no positive amount or, at the first batch, smaller
    than one segment, and for tokens that outgrow the type that the first batch or `model.vocabulary` fixed.
    """

    def __init__(self, budget: int | str = "8MB", *, rows: int = 1, seed: int = 0):
        if rows < 1:
            raise ValueError(f"replay: rows must be at least 1, got {rows}.")
        self.budget, self.rows = parse_bytes(budget), rows
        self.generator = torch.Generator().manual_seed(seed)
        self.vocabulary: int | None = None
        self.kept: dict[str, Tensor] = {}
        self.seen = 0

    @property
    def capacity(self) -> int:
        """Segments that fit into the budget; 0 before the first batch."""
        return next(iter(self.kept.values())).shape[0] if self.kept else 0

    @property
    def filled(self) -> int:
        """Segments kept now."""
        return min(self.seen, self.capacity)

    def attach(self, model: torch.nn.Module) -> None:
        vocabulary = getattr(model, "vocabulary", None)
        self.vocabulary = vocabulary if isinstance(vocabulary, int) else None

    def collect(self, batch: Batch) -> Batch:
        if not self.kept:
            self._allocate(batch)
        fresh = self._segments(batch)
        if fresh is None:
            return batch
        mixed = self._with_replay(batch)
        self._store(fresh)
        return mixed

    def state_dict(self) -> dict[str, Any]:
        own = {"budget": self.budget, "seen": self.seen, "generator": self.generator.get_state()}
        return own | {f"kept.{name}": x.clone() for name, x in self.kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises: `StateError` when the budget differs."""
        if state.get("budget") != self.budget:
            raise StateError(f"This replay has a budget of {self.budget} bytes, the state {state.get('budget')}.")
        self.seen = int(state["seen"])
        self.generator.set_state(state["generator"])
        self.kept = {n.removeprefix("kept."): x.clone() for n, x in state.items() if n.startswith("kept.")}

    def state_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.kept.values())

    def _allocate(self, batch: Batch) -> None:
        segments = _as_segments(batch, once=_shifted(batch))
        kinds = {name: self._dtype(name, x, batch) for name, x in segments.items()}
        size = sum(x[0].numel() * kinds[name].itemsize for name, x in segments.items())
        capacity = self.budget // size
        if capacity < 1:
            raise ValueError(f"replay: a budget of {self.budget} bytes cannot hold one segment of {size} bytes.")
        self.kept = {name: torch.zeros(capacity, *x.shape[1:], dtype=kinds[name]) for name, x in segments.items()}

    def _dtype(self, name: str, x: Tensor, batch: Batch) -> torch.dtype:
        # a label per row is not worth narrowing, and labels to come may be larger than those of the first batch
        if x.dtype != torch.int64 or x.ndim < 2:
            return x.dtype
        sample = batch.targets if name == "tokens" else x
        top = max(int(sample.max()), (self.vocabulary or 1) - 1)
        if sample.min() < 0 or top > torch.iinfo(torch.int32).max:
            return torch.int64
        return torch.uint8 if top < 256 else torch.int32

    def _segments(self, batch: Batch) -> dict[str, Tensor] | None:
        """The fresh rows as they are kept, before narrowing; None when they have another shape."""
        once = "tokens" in self.kept
        if once and not _shifted(batch):
            if batch.inputs.shape == batch.targets.shape and batch.inputs.shape[1] > 1:
                raise ValueError("replay: the stream began with targets that are the shifted inputs; these are not.")
            return None
        segments = _as_segments(batch, once)
        if any(x.shape[1:] != self.kept[name].shape[1:] for name, x in segments.items()):
            return None
        if once:
            inside = _fits(segments["tokens"][:, 0], self.kept["tokens"].dtype)
            segments = {"tokens": segments["tokens"][inside]}
        for name, x in segments.items():
            if not _fits(x, self.kept[name].dtype).all():
                raise ValueError(
                    f"replay: {name} up to {int(x.max())} do not fit {self.kept[name].dtype}, which the first batch "
                    "fixed; give the model a `vocabulary`, or begin with a batch that holds the largest."
                )
        return segments

    def _with_replay(self, batch: Batch) -> Batch:
        if not self.filled:
            return batch
        index = torch.randint(self.filled, (self.rows,), generator=self.generator)
        drawn = {name: x[index] for name, x in self.kept.items()}
        if "tokens" in drawn:
            drawn = {"inputs": drawn["tokens"][:, :-1], "targets": drawn["tokens"][:, 1:]}
        return batch.extended(drawn["inputs"].to(batch.inputs), drawn["targets"].to(batch.targets))

    def _store(self, segments: dict[str, Tensor]) -> None:
        for row in range(len(next(iter(segments.values())))):
            self.seen += 1
            slot = self.seen - 1
            if slot >= self.capacity:
                slot = int(torch.randint(self.seen, (), generator=self.generator))
            if slot < self.capacity:
                for name, x in segments.items():
                    self.kept[name][slot] = x[row]


def _shifted(batch: Batch) -> bool:
    x, y = batch.inputs[: batch.fresh], batch.targets[: batch.fresh]
    tokens = x.ndim == 2 and x.shape == y.shape and x.dtype == y.dtype == torch.int64
    return tokens and x.shape[1] > 1 and torch.equal(x[:, 1:], y[:, :-1])


def _as_segments(batch: Batch, once: bool) -> dict[str, Tensor]:
    inputs, targets = batch.inputs[: batch.fresh].detach().cpu(), batch.targets[: batch.fresh].detach().cpu()
    return {"tokens": torch.cat([inputs, targets[:, -1:]], 1)} if once else {"inputs": inputs, "targets": targets}


def _fits(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == x.dtype:
        return torch.ones_like(x, dtype=torch.bool)
    bounds = torch.iinfo(dtype)
    return (x >= bounds.min) & (x <= bounds.max)
