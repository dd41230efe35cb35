"""In-context retrieval: questions about a text that no state smaller than the text can answer, and a search that can.

Each task states the least number of bits that a state must hold. With `retrieval=True` the question is also put to the
text as a regular expression, and what it finds stands before the place of the answer: then the state need hold little.

Source: RNNs are not Transformers (Yet), Wen et al. 2024, arXiv:2402.18510.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from remanence.catalogue import card
from remanence.evaluation.benchmarks.tasks import Batch, Task

FIRST = 0x4E00
"""Token n is written as the character of this number plus n: a block without signs that mean something to a search."""


class Questions(NamedTuple):
    """Shapes: `text` int64 [batch, n], `question` int64 [batch, m], `answer` int64 [batch]."""

    text: Tensor
    question: Tensor
    answer: Tensor


def written(tokens: list[int]) -> str:
    """Tokens as text, one character each."""
    return "".join(chr(FIRST + token) for token in tokens)


@dataclass(frozen=True)
class TextTask(Task):
    """`text | question [found] =`, with the answer at `=`. Letters are tokens below `symbols`, then come the signs.

    Args:
        length: letters of the text.
        symbols: different letters.
        retrieval: search the text for the question, and show what is found.
        most: the longest text that the vocabulary allows for.
    """

    length: int = 24
    symbols: int = 32
    retrieval: bool = False
    most: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.length <= self.most or self.symbols < 2:
            name = type(self).__name__
            raise ValueError(
                f"{name}: 1 ≤ length ≤ {self.most} and symbols ≥ 2 must hold, got length={self.length}, "
                f"symbols={self.symbols}."
            )

    @property
    def extra(self) -> int:
        """First of the tokens that only this kind of task has."""
        return self.symbols + 3

    @property
    def vocabulary(self) -> int:
        return self.extra

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def bits(self) -> float:
        """What a state must hold to answer every question about every text."""
        return self.length * math.log2(self.symbols)

    @abstractmethod
    def ask(self, batch: int, generator: torch.Generator) -> Questions:
        """Texts, a question about each, and the answers."""

    @abstractmethod
    def pattern(self, question: list[int]) -> str:
        """The regular expression that finds what the question asks for."""

    def widest(self) -> int:
        """The most letters that a search may find."""
        return 1

    def search(self, text: list[int], question: list[int]) -> list[int]:
        """What the question's expression finds in the text, as tokens."""
        found = re.findall(self.pattern(question), written(text))
        return [ord(c) - FIRST for match in found for c in "".join(match)]

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        text, question, answer = self.ask(batch, generator)
        mark, equals, blank = (torch.full((batch, 1), self.symbols + i) for i in range(3))
        parts = [text, mark, question]
        if self.retrieval:
            found = blank.expand(batch, self.widest()).clone()
            for row, (t, q) in enumerate(zip(text.tolist(), question.tolist(), strict=True)):
                tokens = self.search(t, q)
                found[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            parts.append(found)
        inputs = torch.cat([*parts, equals], 1)
        targets, mask = torch.zeros_like(inputs), torch.zeros(inputs.shape, dtype=torch.bool)
        targets[:, -1], mask[:, -1] = answer, True
        return Batch(inputs, targets, mask)

    def longer(self) -> TextTask:
        return replace(self, length=2 * self.length)


@dataclass(frozen=True)
class Index(TextTask):
    """Which letter stands at a place? The place is written in four digits of base four."""

    @property
    def vocabulary(self) -> int:
        return self.extra + 4

    def ask(self, batch: int, generator: torch.Generator) -> Questions:
        text = torch.randint(self.symbols, (batch, self.length), generator=generator)
        place = torch.randint(self.length, (batch, 1), generator=generator)
        digits = place // torch.tensor([64, 16, 4, 1]) % 4
        return Questions(text, self.extra + digits, text.gather(1, place)[:, 0])

    def pattern(self, question: list[int]) -> str:
        place = sum((q - self.extra) * 4 ** (3 - i) for i, q in enumerate(question))
        return f"^.{{{place}}}(.)"


@dataclass(frozen=True)
class NextLetter(TextTask):
    """Which letter follows these `gram - 1`, which stand together once? With `gram=2` this is associative recall."""

    gram: int = 2

    def ask(self, batch: int, generator: torch.Generator) -> Questions:
        n = self.gram - 1
        while True:
            text = torch.randint(self.symbols, (batch, self.length), generator=generator)
            if self.gram == 2 and self.length <= self.symbols:
                text = torch.rand(batch, self.symbols, generator=generator).argsort(1)[:, : self.length]
            grams = text.unfold(1, n, 1)[:, :-1]
            everywhere = text.unfold(1, n, 1)
            once = (grams[:, :, None] == everywhere[:, None]).all(-1).sum(-1) == 1
            if bool(once.any(1).all()):
                break
        place = (torch.rand(once.shape, generator=generator) * once).argmax(1)
        rows = torch.arange(batch)
        return Questions(text, grams[rows, place], text[rows, place + n])

    def pattern(self, question: list[int]) -> str:
        return f"{written(question)}(.)"


@dataclass(frozen=True)
class Count(TextTask):
    """How often does a letter occur? Numbers are tokens of their own."""

    symbols: int = 8

    @property
    def vocabulary(self) -> int:
        return self.extra + self.most + 1

    @property
    def chance(self) -> float:
        """Of who always says the commonest number."""
        n, p = self.length, 1 / self.symbols
        return max(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1))

    @property
    def bits(self) -> float:
        return math.log2(math.comb(self.length + self.symbols - 1, self.symbols - 1))

    def ask(self, batch: int, generator: torch.Generator) -> Questions:
        text = torch.randint(self.symbols, (batch, self.length), generator=generator)
        letter = torch.randint(self.symbols, (batch, 1), generator=generator)
        return Questions(text, letter, self.extra + (text == letter).sum(1))

    def pattern(self, question: list[int]) -> str:
        return written(question)

    def widest(self) -> int:
        return self.length


@dataclass(frozen=True)
class IsTree(TextTask):
    """Is the graph of these edges a tree? `length` counts nodes; there is one edge fewer, in random order.

    Where it is none, an edge was moved to where it closes a circle. A search for a node finds its neighbours: one
    search is not enough here, `remanence.evaluation.diagnostics.retrieval` asks many.
    """

    length: int = 8

    @property
    def vocabulary(self) -> int:
        return self.extra + 2

    @property
    def chance(self) -> float:
        return 1 / 2

    @property
    def bits(self) -> float:
        return self.length * math.log2(self.length)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 4 <= self.length <= self.symbols:
            raise ValueError(f"IsTree: 4 ≤ length ≤ symbols must hold, got {self.length}, {self.symbols}.")

    def ask(self, batch: int, generator: torch.Generator) -> Questions:
        def below(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        texts, answers = [], []
        for _ in range(batch):
            edges = [(below(i), i) for i in range(1, self.length)]
            tree = below(2)
            while not tree:
                out = below(len(edges))
                left = edges[:out] + edges[out + 1 :]
                part = components(self.length, left)
                a, b = below(self.length), below(self.length)
                if a < b and part[a] == part[b] and (a, b) not in edges:
                    edges = [*left, (a, b)]
                    break
            names = torch.randperm(self.symbols, generator=generator)[: self.length]
            order = torch.randperm(len(edges), generator=generator)
            pairs = names[torch.tensor(edges)][order]
            turn = torch.rand(len(edges), 2, generator=generator).argsort(1)
            texts.append(pairs.gather(1, turn).flatten())
            answers.append(self.extra + tree)
        nothing = torch.zeros(batch, 0, dtype=torch.long)
        return Questions(torch.stack(texts), nothing, torch.tensor(answers))

    def pattern(self, question: list[int]) -> str:
        """The neighbours of a node: what stands in a pair with it. Pairs without it are read over two by two."""
        node = written(question)
        return f"{node}(.)|(.){node}|.."

    def longer(self) -> IsTree:
        return replace(self, length=min(2 * self.length, self.symbols))


def components(nodes: int, edges: list[tuple[int, int]]) -> list[int]:
    """The number of the part of the graph that each node belongs to."""
    part = list(range(nodes))
    for a, b in edges:
        part = [part[a] if p == part[b] else p for p in part]
    return part


@card(
    "rnn-in-context-retrieval",
    kind="benchmark",
    says="Index, recall, c-gram, count and is-a-tree: what a small state cannot answer, and a search can.",
    source="arXiv:2402.18510",
)
def in_context_retrieval(length: int = 16, symbols: int = 32, retrieval: bool = False) -> Mapping[str, Task]:
    """Add attention by a pattern such as `"2*gla, sliding-window"`, or a search by `retrieval=True`."""
    how = {"retrieval": retrieval}
    return {
        "index": Index(length, symbols, **how),
        "recall": NextLetter(length, symbols, **how),
        "cgram": NextLetter(length, symbols, **how, gram=3),
        "count": Count(length, **how),
        "is-tree": IsTree(min(8, symbols), symbols),
    }
