"""Strings of a random regular grammar whose states the symbols alone do not tell, with gaps, distractors and noise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

STEP = 0.1
"""The duration of one token, in the units in which gaps are given."""


class Strings(NamedTuple):
    """What `Grammar.draw` gives.

    Shapes: `inputs` float32 [batch, time, vocab]; the others int64 [batch, time]: `symbols` is the symbol that stands
    there, or -1 for silence; `states` the hidden state, held through the gap that follows its symbol; `elements` the
    number of the element of the string that the position belongs to.
    """

    inputs: Tensor
    symbols: Tensor
    states: Tensor
    elements: Tensor


@dataclass(frozen=True)
class Grammar:
    """A random grammar of `vocab` symbols; symbol 0 is the terminal, which ends a string.

    `ambiguities` of the other symbols have `depth` hidden copies each. From a state every symbol leads to at most one
    of its copies, picked at random, and is allowed with probability min(1, copies · density); allowed symbols are
    equally likely. So the hidden state follows from the past, though not from the symbol. After the terminal a new
    string begins in one of `starts` states, of different symbols. Tables in which some state cannot reach the terminal
    are drawn again.

    Args:
        gap: longest silence after a symbol, in durations of which a token lasts 0.1; uniform from 0.1, or just
            `gap` with `fixed_gap`. 0 leaves no gaps.
        noise: uniform noise from [0, noise] is added to all inputs.
        gap_prob: how many symbols are followed by a gap at all; `gap_start`: from which element of the string on.
        distractors: fill the gaps with symbols that are illegal at that point, instead of zeros.
        seed: of the grammar; the strings come from the generator given to `draw`.

    Raises: `ValueError` for impossible sizes, or when no valid grammar is found in 1000 tries.
    Source: SelectivBench, arXiv:2601.12598, and its code, whose experiments have density 0.4 and four start states.
        There two start states may be copies of one symbol, which nothing read can tell apart, and the terminal may be
        a distractor for what follows it; here neither can happen.
    """

    vocab: int = 9
    ambiguities: int = 4
    depth: int = 4
    gap: float = 0.1
    noise: float = 0.0
    gap_prob: float = 1.0
    gap_start: int = 0
    distractors: bool = False
    fixed_gap: bool = False
    density: float = 0.4
    starts: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.ambiguities < self.vocab or self.depth < 1 or not 1 <= self.starts < self.vocab:
            raise ValueError(
                "Grammar: ambiguities and starts must be less than vocab, starts and depth at least 1, got "
                f"vocab={self.vocab}, ambiguities={self.ambiguities}, depth={self.depth}, starts={self.starts}."
            )
        if self.gap < 0 or self.noise < 0 or not 0 <= self.gap_prob <= 1:
            raise ValueError(
                "Grammar: gap and noise must not be negative and gap_prob a probability, "
                f"got gap={self.gap}, noise={self.noise}, gap_prob={self.gap_prob}."
            )

    @cached_property
    def symbol_of(self) -> Tensor:
        """The symbol of each hidden state: int64 [states]; state 0 is the terminal."""
        copies = [1] + [self.depth] * self.ambiguities + [1] * (self.vocab - 1 - self.ambiguities)
        return torch.repeat_interleave(torch.arange(self.vocab), torch.tensor(copies))

    @cached_property
    def table(self) -> Tensor:
        """Where each symbol leads: `table[state, symbol]` is the next state, or -1 where it is illegal."""
        source = torch.Generator().manual_seed(self.seed)
        states, copies = len(self.symbol_of), self.symbol_of.bincount()
        first = copies.cumsum(0) - copies
        for _ in range(1000):
            copy = (torch.rand(states, self.vocab, generator=source) * copies).long().clamp(max=copies - 1)
            allowed = torch.rand(states, self.vocab, generator=source) < copies * self.density
            table = torch.where(allowed, first + copy, -1)
            # the terminal leads to the start states only
            begin = 1 + torch.randperm(self.vocab - 1, generator=source)[: self.starts]
            table[0] = -1
            table[0, begin] = (first + copy[0])[begin]
            reached = torch.arange(states) == 0
            for _ in range(states):
                reached = reached | (reached[table.clamp(min=0)] & (table >= 0)).any(1)
            if reached.all():
                return table
        raise ValueError(
            f"Grammar: no grammar of density {self.density} in which every state can end was found; raise density."
        )

    @cached_property
    def chain(self) -> Tensor:
        """The probability of each next state: float64 [states, states]."""
        legal = self.table >= 0
        chain = torch.zeros(len(self.table), len(self.table), dtype=torch.float64)
        chain.scatter_add_(1, self.table.clamp(min=0), legal.double())
        return chain / legal.sum(1, keepdim=True)

    @cached_property
    def stationary(self) -> Tensor:
        """How often each state is visited in the long run: float64 [states]."""
        n = len(self.chain)
        equations = torch.cat(
            [self.chain.mT - torch.eye(n, dtype=torch.float64), torch.ones(1, n, dtype=torch.float64)]
        )
        ones = torch.zeros(n + 1, 1, dtype=torch.float64)
        ones[-1] = 1
        return torch.linalg.lstsq(equations, ones, driver="gelsd").solution[:, 0]

    @property
    def floor(self) -> float:
        """How often the best guess from the symbol alone names the state: near 1/depth for ambiguous symbols."""
        share = torch.zeros(self.vocab, dtype=torch.float64)
        return float(share.scatter_reduce_(0, self.symbol_of, self.stationary, "amax").sum())

    def draw(self, batch: int, time: int, generator: torch.Generator) -> Strings:
        """`batch` rows of `time` tokens, string after string; each row begins with a new one."""
        state = torch.zeros(batch, dtype=torch.long)
        element, left = state - 1, state.clone()
        longest = round(self.gap / STEP)
        symbols, states, elements = (torch.empty(batch, time, dtype=torch.long) for _ in range(3))
        for t in range(time):
            legal = self.table[state] >= 0
            chosen = (torch.rand(batch, self.vocab, generator=generator) * legal).argmax(1)
            illegal = torch.rand(batch, self.vocab, generator=generator) * ~legal
            new = left == 0
            filler = torch.where(legal.all(1), -1, illegal.argmax(1)) if self.distractors else -torch.ones_like(state)
            state = torch.where(new, self.table[state, chosen], state)
            symbols[:, t] = torch.where(new, chosen, filler)
            pause = torch.rand(batch, generator=generator) < self.gap_prob
            length = (torch.rand(batch, generator=generator) * (longest - 1)).round().long() + 1
            length = torch.full_like(length, longest) if self.fixed_gap or not longest else length
            element = element + new
            gap = torch.where(pause & (element >= self.gap_start), length, 0)
            left = torch.where(new, gap, left - 1)
            states[:, t], elements[:, t] = state, element
        inputs = torch.nn.functional.one_hot(symbols + 1, self.vocab + 1)[..., 1:].float()
        if self.noise:
            inputs = inputs + self.noise * torch.rand(inputs.shape, generator=generator)
        return Strings(inputs, symbols, states, elements)

    def track(self, symbols: Tensor) -> Tensor:
        """The hidden states of what was read, by the table alone; what is illegal is taken for a distractor.

        Shapes: int64 [batch, time] -> int64 [batch, time].
        """
        state, out = torch.zeros(len(symbols), dtype=torch.long), torch.empty_like(symbols)
        for t in range(symbols.shape[1]):
            after = self.table[state, symbols[:, t].clamp(min=0)]
            state = torch.where((symbols[:, t] >= 0) & (after >= 0), after, state)
            out[:, t] = state
        return out
