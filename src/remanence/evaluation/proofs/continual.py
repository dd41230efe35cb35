"""Proofs against forgetting, on a chain of small Markov languages over one alphabet.

Naive training on the second language takes the first from about 1 bit per token to about 5; a strategy has to
keep the first and still learn the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.catalogue import Check, proof
from remanence.continual import EWC, Batch, Replay, Strategy
from remanence.learning.learner import Learner
from remanence.optim import InfiniteSchedule

ALPHABET, ROWS, TIME = 24, 8, 24


class TrigramNet(nn.Module):
    """Predicts each token from the three before it, so that the context tells the languages apart."""

    def __init__(self, dim: int = 16, hidden: int = 64):
        super().__init__()
        self.embed = nn.Embedding(ALPHABET + 1, dim)
        self.mix, self.out = nn.Linear(3 * dim, hidden), nn.Linear(hidden, ALPHABET)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [rows, time] -> logits [rows, time, alphabet]."""
        e = self.embed(F.pad(tokens, (2, 0), value=ALPHABET))
        return self.out(torch.relu(self.mix(torch.cat([e[:, 2:], e[:, 1:-1], e[:, :-2]], -1))))


@dataclass(frozen=True)
class Chain:
    """What a run over a chain of languages left behind, in bits per token on held-back text.

    `learned`: each language when it ended; `final`: each at the end of the chain; `jump`: the largest rise of
    the mean over the languages seen before, within 60 steps after a switch.
    """

    learned: list[float]
    final: list[float]
    jump: float


def _language(generator: torch.Generator) -> Tensor:
    rows = (-torch.log(torch.rand(ALPHABET, ALPHABET, generator=generator))).pow(-7 / 3)
    return rows / rows.sum(1, keepdim=True)


def _text(language: Tensor, rows: int, generator: torch.Generator) -> Batch:
    tokens = [torch.randint(ALPHABET, (rows,), generator=generator)]
    for _ in range(TIME):
        tokens.append(torch.multinomial(language[tokens[-1]], 1, generator=generator)[:, 0])
    x = torch.stack(tokens, 1)
    return Batch(x[:, :-1], x[:, 1:], rows)


@torch.no_grad()
def _bits(model: nn.Module, held: Sequence[Batch]) -> list[float]:
    return [F.cross_entropy(model(b.inputs).flatten(0, 1), b.targets.flatten()).item() / math.log(2) for b in held]


def _chain(
    strategies: Sequence[Strategy] = (),
    *,
    languages: int = 2,
    steps: int = 250,
    rate: float = 3e-3,
    schedule: Callable[[int], float] | None = None,
    seed: int = 1,
) -> Chain:
    """Learn one language after the other, 8 rows of 24 tokens per step."""
    generator = torch.Generator().manual_seed(seed)
    chain = [_language(generator) for _ in range(languages)]
    held = [_text(language, 48, generator) for language in chain]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TrigramNet()
    learner = Learner(model, torch.optim.AdamW(model.parameters(), lr=rate), strategies, schedule=schedule)
    learned, jump = [], 0.0
    for i, language in enumerate(chain):
        stream = _text(language, steps * ROWS, generator)
        before = sum(_bits(model, held[:i]))
        for step in range(steps):
            rows = slice(step * ROWS, (step + 1) * ROWS)
            learner.observe(Batch(stream.inputs[rows], stream.targets[rows], ROWS, task=i))
            if i and step < 60 and step % 10 == 9:
                jump = max(jump, (sum(_bits(model, held[:i])) - before) / i)
        learner.boundary(i)
        learned += _bits(model, [held[i]])
    return Chain(learned, _bits(model, held), jump)


def _kept(run: Chain, forgotten: float, learned: float) -> Check:
    lost = run.final[0] - run.learned[0]
    says = f"first language {run.learned[0]:.2f} -> {run.final[0]:.2f} bits, second {run.final[1]:.2f}"
    return Check(lost <= forgotten and run.final[1] <= learned, says)


@proof("replay", "With 10 kB of the past, a second language costs the first under 0.5 bits, and is learned itself.")
def replay() -> tuple[Check, Check]:
    run, naive = _chain([Replay("10kB", rows=ROWS)]), _chain()
    return _kept(run, 0.5, naive.final[1] + 0.15), _kept(naive, 0.5, naive.final[1] + 0.15)


class _Uniform(EWC):
    """The control: the same total importance, spread evenly over all weights."""

    def on_boundary(self, task: str | int | None = None) -> None:
        super().on_boundary(task)
        total = sum(float(x.sum()) for x in self.importance.values())
        count = sum(x.numel() for x in self.importance.values())
        for x in self.importance.values():
            x.fill_(total / count)


@proof("ewc", "It forgets under a third of what naive training does for 0.2 bits; equal importance is no such bargain.")
def ewc() -> tuple[Check, Check]:
    naive = _chain()
    # evenly spread, a strength that forgets as little costs more, and one that costs as little forgets more
    run, evenly = _chain([EWC(3000.0)]), _chain([_Uniform(2000.0)])
    bounds = (naive.final[0] - naive.learned[0]) / 3, naive.final[1] + 0.2
    without = _kept(naive, *bounds)
    control = _kept(evenly, *bounds)
    says = f"equal importance: {control.says}; naive: {without.says}"
    return _kept(run, *bounds), Check(control.holds or without.holds, says)


def _rewarmed(steps: int) -> Callable[[int], float]:
    """The control: a warm-up and a cosine for each language."""
    warmup = max(1, steps // 20)

    def rate(step: int) -> float:
        at = step % steps
        if at < warmup:
            return (at + 1) / (warmup + 1)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * (at - warmup) / (steps - warmup))) / 2

    return rate


@proof("infinite-lr", "Over four languages it loses less, at every switch and in the end, than a cosine for each.")
def infinite_lr() -> tuple[Check, Check]:
    steps = 150
    endless = InfiniteSchedule(steps // 20, steps // 10, 0.3).annealed(4 * steps - steps // 5, steps // 5)
    runs = [_chain(languages=4, steps=steps, rate=5e-3, schedule=schedule) for schedule in (endless, _rewarmed(steps))]
    system, control = (
        Check(
            sum(run.final) / 4 < 4.2 and run.jump < 3,
            f"mean of the four {sum(run.final) / 4:.2f} bits, last {run.final[-1]:.2f}, worst jump {run.jump:.2f}",
        )
        for run in runs
    )
    return system, control
