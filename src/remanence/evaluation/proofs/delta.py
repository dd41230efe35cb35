"""Proofs of the delta rules and of what is built on them: hand-made cases with a control that must fail."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import Check, proof
from remanence.evaluation.proofs.linear import gap, normals, seeded
from remanence.memory.base import Memory
from remanence.memory.efla import EFLA
from remanence.memory.gated_deltanet import spread
from remanence.memory.lattice import Lattice
from remanence.memory.mom import MoM
from remanence.ops.dplr import dplr
from remanence.state import State


@proof("deltanet", "Writes that reflect (β = 2) count bits modulo two for ten thousand tokens; β ≤ 1 cannot.")
def deltanet() -> tuple[Check, Check]:
    bits = torch.randint(0, 2, (10_000,), generator=torch.Generator().manual_seed(20))
    parity = 1.0 - 2.0 * (bits.cumsum(0) % 2).double()
    key = F.one_hot(torch.zeros(1, 1, len(bits), dtype=torch.int64), 4).double()
    value = torch.zeros(1, 1, len(bits), 1, dtype=torch.float64)
    one = {"S": key[:, :, :1].mT.clone()}

    def check(most: float) -> Check:
        y, _ = ops.gated_delta_rule(key, key, value, most * bits.double()[None, None], None, one)
        error = gap(y[0, 0, :, 0], parity)
        return Check(error < 1e-9, f"largest error {error:.1g} over {len(bits)} tokens with β ≤ {most:g}")

    return check(2.0), check(1.0)


@proof("kimi-delta", "Equal decays give the gated delta rule; and one feature can forget all while another keeps all.")
def kimi_delta() -> tuple[Check, Check]:
    draw = normals(21)
    q, k, v = draw(1, 2, 80, 8), F.normalize(draw(1, 2, 80, 8), dim=-1), draw(1, 2, 80, 8)
    beta, g = draw(1, 2, 80).sigmoid(), -draw(1, 2, 80).abs()

    def rule(k: Tensor, v: Tensor, beta: Tensor, g: Tensor, q: Tensor) -> Tensor:
        written = beta[..., None] * k
        return dplr(q, written, v, -g.exp() * k, written, g)[0]

    error = gap(rule(k, v, beta, g[..., None].expand_as(k), q), ops.gated_delta_rule(q, k, v, beta, g)[0])
    keys = torch.eye(2, dtype=torch.float64)[[0, 1, 0, 1]][None, None]
    values = torch.tensor([[3.0], [5.0], [0.0], [0.0]], dtype=torch.float64)[None, None]
    write = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]], dtype=torch.float64)

    def check(decay: list[float]) -> Check:
        floor = torch.zeros(1, 1, 4, 2, dtype=torch.float64)
        floor[:, :, 2] = torch.tensor(decay)
        forgotten, kept = rule(keys, values, write, floor, keys)[0, 0, 2:, 0].tolist()
        holds = error < 1e-12 and abs(forgotten) < 1e-12 and kept == 5
        return Check(holds, f"error {error:.0e} against gated delta; {forgotten:.1g} of 3 and {kept:.3g} of 5 are left")

    return check([-60.0, 0.0]), check([-60.0, -60.0])  # one decay per head forgets both


@proof("rwkv7", "With η = 1 and no decay it is DeltaNet; with the removal doubled, any swaps of three are exact.")
def rwkv7() -> tuple[Check, Check]:
    draw = normals(22)
    r, k, v = draw(1, 1, 60, 6), F.normalize(draw(1, 1, 60, 6), dim=-1), draw(1, 1, 60, 6)
    delta, _ = ops.gated_delta_rule(r, k, v, torch.ones(1, 1, 60, dtype=torch.float64))
    error = gap(dplr(r, k, v, -k, k, torch.zeros_like(k))[0], delta)
    pairs = torch.tensor([[0, 1], [0, 2], [1, 2]])
    swaps = pairs[torch.randint(0, 3, (3000,), generator=torch.Generator().manual_seed(22))]
    one = torch.eye(3, dtype=torch.float64)
    removed = ((one[swaps[:, 0]] - one[swaps[:, 1]]) / math.sqrt(2))[None, None]
    nothing = torch.zeros_like(removed)
    order = torch.arange(3)
    for i, j in swaps.tolist():
        order[[i, j]] = order[[j, i]]

    def check(c: float) -> Check:
        _, state = dplr(nothing, nothing, nothing, -removed, c * removed, nothing, {"S": one[None, None]})
        drift = gap(state["S"][0, 0], one[order])
        return Check(
            error < 1e-12 and drift < 1e-9, f"error {error:.0e} against DeltaNet, {drift:.1g} after 3000 swaps"
        )

    return check(2.0), check(1.0)


@proof("deltaproduct", "Four reflections per token are any permutation of five things; one is not even a 3-cycle.")
def deltaproduct() -> tuple[Check, Check]:
    source = torch.Generator().manual_seed(23)
    permutations = [torch.randperm(5, generator=source).tolist() for _ in range(2000)]
    one = torch.eye(5, dtype=torch.float64)
    state = list(range(5))
    want = []
    for p in permutations:
        state = [state[i] for i in p]
        want.append(state.index(0))

    def check(writes: int) -> Check:
        keys, beta = torch.zeros(2000, writes, 5, dtype=torch.float64), torch.zeros(2000, writes, dtype=torch.float64)
        for t, p in enumerate(permutations):
            for n, (i, j) in enumerate(transpositions(p)[:writes]):
                keys[t, n], beta[t, n] = (one[i] - one[j]) / math.sqrt(2), 2
        keys, beta = keys.flatten(0, 1)[None, None], beta.flatten()[None, None]
        q = spread(torch.arange(1.0, 6, dtype=torch.float64).expand(1, 1, 2000, 5), writes, -1)
        y, _ = ops.gated_delta_rule(q, keys, torch.zeros_like(keys), beta, None, {"S": one[None, None]})
        places = y[0, 0, writes - 1 :: writes, 0] - 1  # where the first thing is
        error = gap(places, torch.tensor(want, dtype=torch.float64))
        return Check(error < 1e-9, f"largest error {error:.1g} in a place, over 2000 permutations, {writes} per token")

    return check(4), check(1)


def transpositions(permutation: list[int]) -> list[tuple[int, int]]:
    """Swaps of two rows, first to last, that bring row `permutation[i]` to place i for every i."""
    at, swaps = list(range(len(permutation))), []
    for i, wanted in enumerate(permutation):
        j = at.index(wanted)
        if i != j:
            at[i], at[j] = at[j], at[i]
            swaps.append((i, j))
    return swaps


@proof("efla", "Its step solves the differential equation exactly, and no key of any length makes the state grow.")
def efla() -> tuple[Check, Check]:
    draw = normals(24)
    k, v, S = draw(1, 1, 300, 16), draw(1, 1, 300, 16), draw(1, 1, 16, 16)
    beta = torch.full((1, 1, 300), 0.5, dtype=torch.float64)
    layer = seeded(lambda: EFLA(16, heads=1), 24)

    def check(write: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Check:
        key, strength = write(k, beta)
        _, one = ops.gated_delta_rule(key[:, :, :1], key[:, :, :1], v[:, :, :1], strength[..., :1], None, {"S": S})
        column, row = k[0, 0, :1].mT, v[0, 0, :1]
        flow = torch.zeros(32, 32, dtype=torch.float64)  # of S above a constant that it is driven by
        flow[:16, :16], flow[:16, 16:] = -column @ column.mT, column @ row
        start = torch.cat([S[0, 0], torch.eye(16, dtype=torch.float64)])
        error = gap(one["S"][0, 0], (torch.linalg.matrix_exp(0.5 * flow) @ start)[:16])
        _, end = ops.gated_delta_rule(key, key, v, strength)
        size = end["S"].norm().item()
        return Check(error < 1e-11 and size < 100, f"error {error:.1g} of one step, |S| = {size:.2g} after 300")

    return check(layer.write), check(lambda k, beta: (k, beta))  # Euler's step is the plain delta rule


@proof("lattice", "Writes are at right angles to what the slots hold, and a thing often repeated is soon known.")
def lattice() -> tuple[Check, Check]:
    layer = seeded(lambda: Lattice(16, heads=2, slots=4), 25)
    draw = normals(25)
    x, same = draw(1, 1, 16), draw(1, 2, 4, 1) * draw(1, 2, 1, 8)

    def check(additive: bool) -> Check:
        state = layer.initial_state(1)
        along, changes, shrinks = 0.0, [], 0.0
        for _ in range(200):
            before = state["S"]
            _, state = layer(x, state)
            if additive:
                state = {**state, "S": before + same}
            change = state["S"] - before
            along = max(along, (before * change).sum(-1).abs().max().item())
            shrinks = max(shrinks, (before.norm(dim=-1) - state["S"].norm(dim=-1)).max().item())
            changes.append(change.norm().item())
        holds = along < 1e-12 and shrinks < 1e-12 and changes[-1] < 0.05 * changes[4]
        return Check(
            holds, f"at most {along:.0e} along a slot; the 200th write moved {changes[-1] / changes[4]:.1g} of the 5th"
        )

    with torch.no_grad():
        return check(additive=False), check(additive=True)


class Raw(Memory):
    """A bare delta rule on tokens [key (8), value (8), whether to write, which of two streams (2)]."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def initial_state(self, batch: int) -> State:
        return {"S": torch.zeros(batch, 1, 8, 8, dtype=torch.float64)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        k, v, write, stream = x[:, None].split([8, 8, 1, 2], -1)
        y, state = ops.gated_delta_rule(k, k, v, write[..., 0], None, state)
        return torch.cat([k, y, write, stream], -1)[:, 0], state


@proof("mom", "Two streams with the same keys, sent to two memories, are both recalled exactly; one memory mixes them.")
def mom() -> tuple[Check, Check]:
    draw = normals(26)
    keys, values = torch.linalg.qr(draw(8, 8)).Q, draw(2, 8, 8)
    stream = torch.eye(2, dtype=torch.float64)[:, None].expand(2, 8, 2)
    told = torch.cat([keys.expand(2, 8, 8), values, torch.ones(2, 8, 1), stream], -1).transpose(0, 1).flatten(0, 1)
    asked = torch.cat([keys.expand(2, 8, 8), torch.zeros(2, 8, 9), stream], -1).flatten(0, 1)
    x = torch.cat([told, asked])[None]  # the streams take turns, then each is asked

    def check(memories: int) -> Check:
        layer = seeded(lambda: MoM(19, memories=memories, top=1, shared=False, memory=Raw), 26)
        with torch.no_grad():
            layer.router.weight.zero_()
            layer.router.weight[:, -2:] = 10 * torch.eye(memories, 2)
            y, state = layer(x)
            error = gap(y[0, 16:, 8:16], values.flatten(0, 1))
            _, after = layer(x[:, :1], state)
        left = [name for name in state if torch.equal(state[name]["S"], after[name]["S"])]
        return Check(
            error < 1e-9 and left == ["1"],
            f"error {error:.1g} of 16 answers; untouched by a token of the first stream: {', '.join(left) or 'none'}",
        )

    return check(2), check(1)
