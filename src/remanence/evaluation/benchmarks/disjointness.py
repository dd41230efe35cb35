"""Set disjointness: what the order of reading does to a memory that must choose what to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from remanence.catalogue import card
from remanence.evaluation.benchmarks.tasks import Batch, Task


@dataclass(frozen=True)
class Disjointness(Task):
    """Two sets that share one thing: which? Who reads the short set first need keep only that while reading the long.

    `a₁ … a_m | b₁ … b_n ?`: elements are tokens below `symbols`, then come the mark and the question, at which the
    answer is the shared element. Half of the rows begin with the short set, unless `first` says which does.
    `repeat` gives the whole prompt twice, which is the remedy of the paper: on the second reading a memory knows
    what it looks for, whatever the order.

    Source: Just Read Twice, Arora et al. 2024, arXiv:2407.05483.
    """

    short: int = 2
    long: int = 12
    symbols: int = 32
    first: str = "either"
    repeat: bool = False

    def __post_init__(self) -> None:
        if self.first not in ("short", "long", "either"):
            raise ValueError(f"Disjointness: first must be 'short', 'long' or 'either', got {self.first!r}.")
        if not 1 <= self.short <= self.long or self.short + self.long - 1 > self.symbols:
            raise ValueError(
                "Disjointness: 1 ≤ short ≤ long and short + long - 1 ≤ symbols must hold, "
                f"got short={self.short}, long={self.long}, symbols={self.symbols}."
            )

    @property
    def vocabulary(self) -> int:
        return self.symbols + 2

    @property
    def chance(self) -> float:
        return 1 / self.short

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        things = torch.rand(batch, self.symbols, generator=generator).argsort(1)
        shared, others = things[:, :1], things[:, 1:]
        short = _shuffled(torch.cat([shared, others[:, : self.short - 1]], 1), generator)
        long = _shuffled(torch.cat([shared, others[:, self.short - 1 :][:, : self.long - 1]], 1), generator)
        mark, question = (torch.full((batch, 1), self.symbols + i) for i in range(2))
        turn = torch.rand(batch, 1, generator=generator) < {"short": 2.0, "long": -1.0, "either": 0.5}[self.first]
        either = torch.cat([short, mark, long, question], 1), torch.cat([long, mark, short, question], 1)
        prompt = torch.where(turn, either[0], either[1])
        inputs = torch.cat([prompt, prompt], 1) if self.repeat else prompt
        targets, mask = torch.zeros_like(inputs), torch.zeros(inputs.shape, dtype=torch.bool)
        targets[:, -1:], mask[:, -1] = shared, True
        return Batch(inputs, targets, mask)

    def longer(self) -> Disjointness:
        return replace(self, long=min(2 * self.long, self.symbols - self.short + 1))

    @property
    def exams(self) -> Mapping[str, Task]:
        return {f"{which} first": replace(self, first=which) for which in ("short", "long")}


def _shuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    return x.gather(1, torch.rand(x.shape, generator=generator).argsort(1))


@card(
    "set-disjointness",
    kind="benchmark",
    says="The element that two sets share, by which set is read first; and the same when the prompt is read twice.",
    source="arXiv:2407.05483",
    covers="jrt",
)
def set_disjointness(short: int = 2, long: int = 12, symbols: int = 24) -> dict[str, Task]:
    once = Disjointness(short, long, symbols)
    return {"once": once, "twice": replace(once, repeat=True)}
