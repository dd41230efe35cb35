"""SelectivBench: which hidden state of a grammar a string is in, held through gaps, noise and distractors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from remanence.catalogue import card
from remanence.evaluation.benchmarks.tasks import GroupedBatch, Task
from remanence.streams.grammar import Grammar


@dataclass(frozen=True)
class Selectivity(Task):
    """Name the hidden copy behind each symbol, from its token to the end of the gap that follows.

    A symbol and its gap answer once: the likeliest state of the mean probabilities over them. `chance` is the best that
    the symbol alone allows. `stretches` are gap durations, as multiples of the trained one, that are examined too.

    Source: SelectivBench (2026), arXiv:2601.12598.
    """

    grammar: Grammar = field(default_factory=Grammar)
    length: int = 64
    stretches: tuple[int, ...] = ()

    @property
    def vocabulary(self) -> int:
        return len(self.grammar.symbol_of)

    @property
    def chance(self) -> float:
        return self.grammar.floor

    def draw(self, batch: int, generator: torch.Generator) -> GroupedBatch:
        drawn = self.grammar.draw(batch, self.length, generator)
        return GroupedBatch(drawn.inputs, drawn.states, torch.ones_like(drawn.states, dtype=torch.bool), drawn.elements)

    def longer(self) -> Selectivity:
        return replace(self, length=2 * self.length)

    def stretched(self, times: int) -> Selectivity:
        """The same grammar with every gap `times` its longest, and as much more time."""
        grammar = replace(self.grammar, gap=times * self.grammar.gap, fixed_gap=True)
        return replace(self, grammar=grammar, length=times * self.length, stretches=())

    @property
    def exams(self) -> Mapping[str, Task]:
        stretched = {f"gap ×{n}": self.stretched(n) for n in self.stretches}
        return {"accuracy": self, "longer": self.longer()} | stretched


@card(
    "selectivbench",
    kind="benchmark",
    says="Grammars with ambiguous symbols: complexity, gaps with noise, distractors, and gaps beyond training.",
    source="arXiv:2601.12598",
)
def selectivbench(vocab: int = 9, ambiguities: int = 6, depth: int = 4, length: int = 64) -> dict[str, Task]:
    """The four tasks of the paper, small: it has ambiguities = depth = 20 to 40, 8 layers and 200,000 strings."""
    plain = Grammar(vocab, ambiguities, depth)
    gaps = replace(plain, gap=1.0, noise=0.2)
    distractors = replace(plain, gap=1.0, gap_prob=0.1, gap_start=length // 4, distractors=True)
    return {
        "complexity": Selectivity(plain, length),
        "gaps and noise": Selectivity(gaps, 2 * length, stretches=(2, 5)),
        "distractors": Selectivity(distractors, length),
    }
