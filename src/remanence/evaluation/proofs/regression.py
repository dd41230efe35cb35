"""What exact regression at test time finds that a step or a sum does not."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import Check, proof
from remanence.memory.base import Memory
from remanence.memory.memory_caching import MemoryCaching
from remanence.ops.least_squares import (
    least_squares,
    least_squares_reference,
    recursive_least_squares,
    recursive_least_squares_state,
    regress,
)
from remanence.ops.ttt import ttt, ttt_state
from remanence.state import State, tree_map

PAIRS, WIDTH = 64, 16


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alike() -> tuple[Tensor, Tensor]:
    """64 unit keys that share a direction twice as strong as what tells them apart, and a linear map's values."""
    key = F.normalize(normals(0, PAIRS, WIDTH) + 2 * normals(1, WIDTH), dim=-1)
    return key[None, None], (key @ normals(2, WIDTH, WIDTH))[None, None]


@proof(
    "mesa",
    "Told 64 pairs of a linear map under keys that resemble each other, it recalls them to 1e-6 of their size, and 16 "
    "steps of its solver in 16 features are exact; its control, a delta rule, misses 1e-3.",
)
def mesa() -> tuple[Check, Check]:
    key, value = alike()
    one = torch.ones(1, 1, PAIRS, dtype=torch.float64)
    nothing = torch.zeros(1, 1, WIDTH, WIDTH, dtype=torch.float64)

    def recall(G: Tensor, H: Tensor, ridge: Tensor) -> float:
        read = key @ torch.linalg.solve(H + torch.diag_embed(ridge), G)
        return float((read - value).norm() / value.norm())

    ridge = torch.full((1, WIDTH), 1e-9, dtype=torch.float64)
    _, told = least_squares(key, key, value, one, ridge)
    wide = torch.ones(1, WIDTH, dtype=torch.float64)
    decay = torch.full_like(one, -0.05)
    exact = least_squares_reference(key, key, value, one, wide, decay)[0]
    solved = least_squares(key, key, value, one, wide, decay, steps=WIDTH)[0]
    gap = float((solved - exact).norm() / exact.norm())
    error = recall(told["G"], told["H"], ridge)
    _, state = ops.gated_delta_rule(key, key, value, one)
    control = recall(state["S"], nothing, torch.ones_like(ridge))
    return (
        Check(error <= 1e-6 and gap <= 1e-8, f"error {error:.0e}; 16 steps are off by {gap:.0e}"),
        Check(control <= 1e-3, f"error {control:.3f} with a step per token"),
    )


@proof(
    "ttt",
    "Reading 2000 pairs of a quadratic map once, TTT-MLP ends with a prequential error of at most 0.4 of the values' "
    "variance; its control, TTT-Linear at its best of three steps, stays above 0.9.",
)
@torch.no_grad()
def test_time_training() -> tuple[Check, Check]:
    tokens, width, last = 2000, 8, 500
    key = 2 * F.normalize(normals(3, tokens, width), dim=-1)
    value = (key @ normals(4, width, width)) * (key @ normals(5, width, width))
    value = (value - value.mean(0)) / value.std(0)

    def error(hidden: list[int], step: float) -> float:
        widths = [width, *hidden, width]
        start = [normals(6 + i, 1, n, m) * m**-0.5 for i, (m, n) in enumerate(pairwise(widths))]
        average = 1 / torch.arange(1, 17, dtype=torch.float64)
        k, v = key[None, None], value[None, None]
        scale, shift = torch.ones(1, width, dtype=torch.float64), torch.zeros(1, width, dtype=torch.float64)
        theta = torch.full((1, 1, tokens), step, dtype=torch.float64)
        # what a query reads has its own token written: asked for the key to come, it has not yet seen that key's value
        y, _ = ttt(
            k[:, :, 1:],
            k[:, :, :-1],
            v[:, :, :-1],
            theta[:, :, 1:],
            average,
            scale,
            shift,
            ttt_state([F.pad(W, (0, 1)) for W in start], 1),
        )
        return float((y - v[:, :, 1:])[:, :, -last:].square().mean())

    deep, flat = error([64], 0.3), min(error([], step) for step in (0.03, 0.1, 0.3))
    says = "error {:.3f} of the variance"
    return Check(deep <= 0.4, says.format(deep)), Check(flat < 0.9, says.format(flat))


class Told(Memory):
    """Linear attention from a stream of [query, key, value, topic] to what is read; nothing is learned."""

    def __init__(self, width: int):
        super().__init__()
        self.dim, self.width = 4 * width, width
        self.size = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def initial_state(self, batch: int) -> State:
        return {"S": self.size.new_zeros(batch, 1, self.width, self.width)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        q, k, v, _ = x[:, None].chunk(4, -1)
        y, after = ops.linear_attention(q, k, v * self.size, None, state)
        return torch.cat([y[:, 0], x[..., self.width :]], -1), after


@proof(
    "memory-caching",
    "Of 256 pairs in 16 segments, each with a topic, 32 features recall at least 95 % when the ends of segments are "
    "kept and gated by topic, all of them or one; its controls, linear attention alone and a plain sum, at most 40 %.",
)
@torch.no_grad()
def memory_caching() -> tuple[Check, Check]:
    width, segments, pairs = 32, 16, 16
    keys = F.normalize(normals(10, segments, pairs, width), dim=-1)
    values = F.normalize(normals(11, 64, width), dim=-1)
    which = torch.randint(64, (segments, pairs), generator=torch.Generator().manual_seed(12))
    topic = F.normalize(normals(13, segments, 1, width), dim=-1).expand(-1, pairs, -1)
    nothing = torch.zeros_like(keys)
    text = torch.cat([nothing, keys, values[which], topic], -1).flatten(0, 1)[None]
    asked = torch.cat([keys, nothing, nothing, topic], -1).flatten(0, 1)

    def recall(memory: Memory) -> float:
        state = tree_map(lambda t: t.expand(len(asked), *t.shape[1:]), memory(text)[1])
        read = memory(asked[:, None], state)[0][:, 0, :width]
        return (torch.cdist(read, values).argmin(1) == which.flatten()).double().mean().item()

    def cached(variant: str, **arguments: Any) -> float:
        memory = MemoryCaching(
            4 * width, memory=Told(width), variant=variant, segment=pairs, independent=True, **arguments
        ).double()
        memory.score.weight.copy_(torch.block_diag(torch.zeros(3 * width, 3 * width), 20 * torch.eye(width)))
        return recall(memory)

    gated, sparse = cached("gated"), cached("sparse", top=1)
    alone, plain = recall(Told(width)), cached("residual")
    return (
        Check(min(gated, sparse) >= 0.95, f"{gated:.1%} recalled with all segments gated, {sparse:.1%} with one"),
        Check(max(alone, plain) > 0.4, f"{alone:.1%} without caching, {plain:.1%} with the plain sum"),
    )


@proof(
    "test-time-regression",
    "Recall of 64 pairs under similar keys: regression errs at most 1e-6 where a step per token errs 5 times less than "
    "a sum; and an affine map reads a straight line at its edge to 1e-9, as its control, a local mean, does not.",
)
def test_time_regression() -> tuple[Check, Check]:
    key, value = alike()
    one = torch.ones(1, 1, PAIRS, dtype=torch.float64)
    start = recursive_least_squares_state(torch.full((1, WIDTH), 1e-9, dtype=torch.float64), 1, WIDTH)
    exact = recursive_least_squares(key, key, value, start)[1]["W"]
    batch = regress(key, key, value, torch.ones(1, 1, PAIRS, PAIRS, dtype=torch.float64), ridge=1e-9)
    step = ops.gated_delta_rule(key, key, value, one)[1]["S"]
    total = ops.linear_attention(key, key, value)[1]["S"]
    scale = ((key @ total) * value).sum() / (key @ total).square().sum()  # the best that a sum can do
    errors = [float((key @ W - value).square().sum() / value.square().sum()) for W in (scale * total, step, exact)]
    ordered = errors[0] > 5 * errors[1] and errors[1] > 5 * errors[2] and errors[2] <= 1e-12
    gap = float((key @ exact - batch).abs().max())

    place = torch.linspace(0, 1, 101, dtype=torch.float64)[None, None, :, None]
    edge, line = place[:, :, -1:], 3 * place - 1
    weights = ((edge - place.mT) / 0.1).square().mul(-0.5).exp()

    def off(order: str) -> float:
        return float((regress(edge, place, line, weights, order=order, ridge=1e-12) - line[:, :, -1:]).abs())

    affine, mean = off("affine"), off("constant")
    says = "squared errors {:.2f} by a sum, {:.3f} by steps, {:.0e} exactly; {:.0e} off the batch solution; ".format
    return (
        Check(ordered and gap <= 1e-6 and affine <= 1e-9, says(*errors, gap) + f"{affine:.0e} off at the edge"),
        Check(mean <= 1e-9, f"{mean:.2f} off at the edge"),
    )
