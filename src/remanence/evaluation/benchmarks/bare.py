"""Recall by the inner learner alone: keys and values are given, nothing projects, mixes or gates them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.evaluation.benchmarks.training import warmed
from remanence.memory.fast_weight import FastWeightMemory
from remanence.state import State


class _Straight(nn.Module):
    """A convolution that sees the token alone."""

    def initial_state(self, batch: int) -> State:
        return {}

    def forward(
        self, x: Tensor, state: State, *, silu: bool, widths: Sequence[int]
    ) -> tuple[tuple[Tensor, ...], State]:
        return x.split(list(widths), -1), state


class _Constant(nn.Module):
    """Gates that are the same at every token. They are kept a tenth as large, and so learn ten times as fast."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.tenth = nn.Parameter(value.detach() / 10)

    def forward(self, x: Tensor) -> Tensor:
        return (10 * self.tenth).expand(*x.shape[:2], -1)


class _Heads(nn.Module):
    """[batch, heads, time, width] to [batch, time, heads·width]."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(2)


class BareMemory(FastWeightMemory):
    """`FastWeightMemory` without projections, convolution and readout; step, decay and the like are constants.

    Shapes: x [batch, time, 3·dim], query, key and value of each token; y [batch, time, dim]. A head takes its share of
    each; queries and keys are brought to unit length. Arguments as for `FastWeightMemory`.
    """

    def __init__(self, dim: int, **arguments: Any):
        super().__init__(dim, **arguments)
        parts = {"qkv": nn.Identity(), "conv": _Straight(), "gates": _Constant(self.gates.bias), "readout": _Heads()}
        for name, part in parts.items():
            self.add_module(name, part)

    def begin(self, x: Tensor, state: State | None) -> State:
        return self.initial_state(x.shape[0]) if state is None else state


class Drawn(NamedTuple):
    """Shapes: x [batch, time, 3·dim], values [batch, pairs, dim], answer int64 and mask bool [batch, time]."""

    x: Tensor
    values: Tensor
    answer: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Pairs:
    """Random keys with random values, told `times` times in random order, and asked for meanwhile.

    Keys and values are new in every sequence; a value has length 1 in each head. Every token is told one pair and asked
    for another that was told before, or with it; answers count in the second half. A share `corrupted` of the values
    told is something else: `outlier` times as long, in a random direction.
    """

    pairs: int = 8
    times: int = 8
    corrupted: float = 0.0
    outlier: float = 10.0

    def draw(self, batch: int, dim: int, heads: int, generator: torch.Generator) -> Drawn:
        time, length = self.pairs * self.times, (heads / dim) ** 0.5
        keys, values = torch.randn(2, batch, self.pairs, dim, generator=generator)
        values = values * length
        told = torch.rand(batch, time, generator=generator).argsort(1) % self.pairs
        asked = torch.randint(self.pairs, (batch, time), generator=generator)
        wrong = self.outlier * length * torch.randn(batch, time, dim, generator=generator)
        hit = torch.rand(batch, time, 1, generator=generator) < self.corrupted
        known = F.one_hot(told, self.pairs).cumsum(1).gather(2, asked[..., None])[..., 0] > 0

        def of(table: Tensor, which: Tensor) -> Tensor:
            return table.gather(1, which[..., None].expand(-1, -1, dim))

        x = torch.cat([of(keys, asked), of(keys, told), torch.where(hit, wrong, of(values, told))], -1)
        return Drawn(x, values, asked, known & (torch.arange(time) >= time // 2))


class Finder(nn.Module):
    """Which of a sequence's values the bare memory recalls: by the angle to what it read, after a linear map.

    Shapes: x [batch, time, 3·dim], values [batch, pairs, dim] -> logits [batch, time, pairs].
    """

    def __init__(self, memory: BareMemory):
        super().__init__()
        self.memory = memory
        self.out = nn.Linear(memory.dim, memory.dim)
        nn.init.eye_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.sharpness = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        y = F.normalize(self.out(self.memory(x)[0]), dim=-1)
        return self.sharpness.exp() * (y @ F.normalize(values, dim=-1).mT)


def recall(
    task: Pairs, arguments: dict[str, Any], *, dim: int, steps: int, batch: int, rate: float, seed: int
) -> float:
    """Share of right answers on 256 fresh sequences, once the memory's start and gates, and the map, have learned.

    AdamW, at a rate that is warmed up and lowered; 0 steps leave the memory as it is born. `arguments` are those of
    `FastWeightMemory`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Finder(BareMemory(dim, **arguments))
    heads, data = model.memory.heads, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = warmed(optimizer, rate, max(steps, 1))
    for _ in range(steps):
        x, values, answer, mask = task.draw(batch, dim, heads, data)
        loss = F.cross_entropy(model(x, values)[mask], answer[mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    x, values, answer, mask = task.draw(256, dim, heads, torch.Generator().manual_seed(seed + 2**32))
    with torch.no_grad():
        return float((model(x, values).argmax(-1) == answer)[mask].float().mean())
