"""Synthetic tasks: endless seeded data of which every answer is known, and what a guess would get.

A task draws batches. `inputs` is what a model reads, `targets` what it should answer at each position where `mask`
is true (elsewhere the target is 0 and means nothing). No answer stands in the inputs at or before its position,
other than where the task is to find it.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Shapes: `inputs` int64 [batch, time], or floating [batch, time, features] where tokens are mixtures;
    `targets` int64 [batch, time], `mask` bool [batch, time]."""

    inputs: Tensor
    targets: Tensor
    mask: Tensor


class GroupedBatch(NamedTuple):
    """A batch whose inputs may be numbers, and where several positions give one answer together.

    Shapes: `inputs` int64 [batch, time] or floating [batch, time, features]; `targets`, `mask` as in `Batch`;
    `groups` int64 [batch, time]: masked positions of a row with the same number answer once.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    groups: Tensor


class Task(ABC):
    """Where batches come from: `vocabulary` tokens, and `chance`, the accuracy of the best guess."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of tokens, inputs and answers together."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of who knows which answers are possible, but remembers nothing of the order."""

    @abstractmethod
    def draw(self, batch: int, generator: torch.Generator) -> Batch | GroupedBatch:
        """`batch` fresh sequences; the same for the same state of `generator`."""

    @abstractmethod
    def longer(self) -> Task:
        """The same task, with twice as much to hold, or twice as long."""

    @property
    def exams(self) -> Mapping[str, Task]:
        """What a model trained on this task is examined on: a column of the table, and the task it comes from."""
        return {"accuracy": self, "longer": self.longer()}


def score(logits: Tensor, batch: Batch | GroupedBatch) -> tuple[int, int]:
    """Right answers and all answers of a batch: the likeliest token; over a group, of the mean probabilities.

    Shapes: logits [batch, time, vocabulary].
    """
    mask = batch.mask
    if isinstance(batch, Batch):
        return int((logits.argmax(-1) == batch.targets)[mask].sum()), int(mask.sum())
    row = torch.arange(mask.shape[0])[:, None].expand_as(mask)
    width = int(batch.groups.max()) + 1
    index = (row * width + batch.groups)[mask]
    _, index = index.unique(return_inverse=True)
    together = logits.new_zeros(int(index.max()) + 1, logits.shape[-1]).index_add_(0, index, logits.softmax(-1)[mask])
    target = torch.zeros(len(together), dtype=torch.long).index_put_((index,), batch.targets[mask])
    return int((together.argmax(-1) == target).sum()), len(together)


def _distinct(batch: int, many: int, of: int, generator: torch.Generator) -> Tensor:
    """[batch, many] numbers below `of`, no two alike in a row."""
    return torch.rand(batch, of, generator=generator).argsort(1)[:, :many]


def _from(first: int, inputs: Tensor) -> Tensor:
    """The mask that asks at position `first` and at all after it."""
    return (torch.arange(inputs.shape[1]) >= first).expand_as(inputs)


@dataclass(frozen=True)
class Recall(Task):
    """Multi-query associative recall: key-value pairs, a pause, then each key again in another order.

    `k₁ v₁ … k_P v_P · · · k_π(1) … k_π(P)`: at each key after the pause the answer is the value that followed it.
    Keys are tokens below `symbols`, values the next `symbols`, the pause is the token after those. `together` gives a
    key and its value as one token, the sum of both (inputs are then features): no layer need look back to the token
    before, which some memories are made for and others learn slowly, and what is measured is the memory alone.

    Source: Zoology, Arora et al. 2023, arXiv:2312.04927. There the queries stand at random distances; here all come
        after `pause` tokens, so that what reaches back no further than the pause can only guess.
    """

    pairs: int = 8
    pause: int = 32
    symbols: int = 24
    together: bool = False

    @property
    def vocabulary(self) -> int:
        return 2 * self.symbols + 1

    @property
    def chance(self) -> float:
        return 1 / self.pairs

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        keys = _distinct(batch, self.pairs, self.symbols, generator)
        values = _distinct(batch, self.pairs, self.symbols, generator) + self.symbols
        order = _distinct(batch, self.pairs, self.pairs, generator)
        told = torch.stack([keys, values], 2).flatten(1)
        pause = torch.full((batch, self.pause), 2 * self.symbols)
        inputs = torch.cat([told, pause, keys.gather(1, order)], 1)
        if self.together:
            features = torch.nn.functional.one_hot(inputs, self.vocabulary).float()
            told, rest = features.split([2 * self.pairs, self.pause + self.pairs], 1)
            features = torch.cat([told.unflatten(1, (-1, 2)).sum(2), rest], 1)
            inputs = inputs[:, self.pairs :]
        targets = torch.zeros_like(inputs)
        targets[:, -self.pairs :] = values.gather(1, order)
        mask = _from(inputs.shape[1] - self.pairs, inputs)
        return Batch(features if self.together else inputs, targets, mask)

    def longer(self) -> Recall:
        return replace(self, pause=2 * self.pause)


@dataclass(frozen=True)
class Rebound(Task):
    """Recall of the latest: each of `pairs` keys is bound `times` times, in random order, then asked for once.

    Keys are of `symbols`, values of as many more; a key and its value are one token, the sum of both (inputs are
    features), and queries are keys alone. `chance` is that of who knows all values of the key, and not which came last.

    Source: Zoology, arXiv:2312.04927, for the many queries; the rebinding is there to tell what overwrites from what
        can only add.
    """

    pairs: int = 8
    pause: int = 0
    symbols: int = 16
    times: int = 2

    @property
    def vocabulary(self) -> int:
        return 2 * self.symbols + 1

    @property
    def chance(self) -> float:
        return 1 / self.times

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        told = self.times * self.pairs
        keys = _distinct(batch, self.pairs, self.symbols, generator)
        which = _distinct(batch, told, told, generator) % self.pairs
        values = torch.randint(self.symbols, (batch, told), generator=generator) + self.symbols
        latest = torch.zeros_like(keys).scatter_reduce(1, which, torch.arange(told).expand_as(which), "amax")
        order = _distinct(batch, self.pairs, self.pairs, generator)
        pause = torch.full((batch, self.pause), 2 * self.symbols)
        tokens = torch.cat([keys.gather(1, which), pause, keys.gather(1, order)], 1)
        inputs = torch.nn.functional.one_hot(tokens, self.vocabulary).float()
        inputs[:, :told] += torch.nn.functional.one_hot(values, self.vocabulary)
        targets = torch.zeros_like(tokens)
        targets[:, -self.pairs :] = values.gather(1, latest.gather(1, order))
        return Batch(inputs, targets, _from(told + self.pause, tokens))

    def longer(self) -> Rebound:
        return replace(self, pairs=min(2 * self.pairs, self.symbols))


@dataclass(frozen=True)
class Parity(Task):
    """Whether the ones so far are odd in number: the smallest state that no fixed depth of positive decays tracks.

    Inputs are 0 and 1; the answer, at every position from `first` on, is their running sum modulo 2. What is
    longer asks only beyond the length before, where no model has been trained.

    Source: Merrill, Petty, Sabharwal 2024, "The Illusion of State in State-Space Models", arXiv:2404.08819.
    """

    length: int = 32
    first: int = 0

    @property
    def vocabulary(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 1 / 2

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        inputs = torch.randint(2, (batch, self.length), generator=generator)
        return Batch(inputs, inputs.cumsum(1) % 2, _from(self.first, inputs))

    def longer(self) -> Parity:
        return Parity(2 * self.length, first=self.length)


@cache
def permutations() -> Tensor:
    """The 120 permutations of five things in lexical order: int64 [120, 5]; row 0 changes nothing."""
    return torch.tensor(list(itertools.permutations(range(5))))


@cache
def products() -> Tensor:
    """`products()[a, b]`: the number of the permutation that is `a` first, then `b`. int64 [120, 120]."""
    places = permutations()
    after = places[:, None].expand(120, 120, 5).gather(2, places[None].expand(120, 120, 5))
    weights = torch.tensor([625, 125, 25, 5, 1])
    number = torch.zeros(3125, dtype=torch.long)
    number[(places * weights).sum(1)] = torch.arange(120)
    return number[(after * weights).sum(2)]


@dataclass(frozen=True)
class S5(Task):
    """The product of all permutations so far: state tracking in a group that is not solvable.

    Inputs are numbers of permutations of five things, `permutations()[token]`; the answer, at every
    position from `first` on, is the number of the product of all so far. `chance` is that of late positions: early
    products are few.

    Source: Merrill, Petty, Sabharwal 2024, arXiv:2404.08819, whose tokens are all 120 elements. Here they
        are three of them (nothing, a swap of the first two, a turn of all five), which generate the group.
    """

    length: int = 16
    first: int = 0

    MOVES = ((0, 1, 2, 3, 4), (1, 0, 2, 3, 4), (1, 2, 3, 4, 0))

    @property
    def vocabulary(self) -> int:
        return 120

    @property
    def chance(self) -> float:
        return 1 / 120

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        numbers = {tuple(p): n for n, p in enumerate(permutations().tolist())}
        moves = torch.tensor([numbers[move] for move in self.MOVES])
        inputs = moves[torch.randint(len(moves), (batch, self.length), generator=generator)]
        targets, now = torch.empty_like(inputs), torch.zeros(batch, dtype=torch.long)
        for t in range(self.length):
            now = products()[now, inputs[:, t]]
            targets[:, t] = now
        return Batch(inputs, targets, _from(self.first, inputs))

    def longer(self) -> S5:
        return S5(2 * self.length, first=self.length)


@dataclass(frozen=True)
class Copying(Task):
    """A string, a mark, then as many blanks as it had letters: answer the string, letter by letter.

    `s₁ … s_L | · … ·`: at the mark the answer is `s₁`, at the i-th blank `s_{i+1}`. Letters are tokens below
    `symbols`, then come the mark and the blank. Nothing of what is answered is read again, so that
    place alone finds the next letter.

    Source: Jelassi et al. 2024, "Repeat After Me", arXiv:2402.01032, where the letters answered are fed back.
    """

    length: int = 12
    symbols: int = 8

    @property
    def vocabulary(self) -> int:
        return self.symbols + 2

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        letters = torch.randint(self.symbols, (batch, self.length), generator=generator)
        mark = torch.full((batch, 1), self.symbols)
        blanks = torch.full((batch, self.length - 1), self.symbols + 1)
        inputs = torch.cat([letters, mark, blanks], 1)
        targets = torch.cat([torch.zeros_like(letters), letters], 1)
        return Batch(inputs, targets, _from(self.length, inputs))

    def longer(self) -> Copying:
        return Copying(2 * self.length, self.symbols)
