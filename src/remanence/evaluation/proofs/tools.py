"""Proofs of what is built on layers: each tool at what it is for, beside a control without its idea."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from remanence import ops
from remanence.catalogue import Check, proof
from remanence.learning.initial_states import InitialStates
from remanence.memory.base import Memory
from remanence.memory.resona import Resona
from remanence.models.longmamba import extend
from remanence.models.oprm import read_chunks
from remanence.models.quamba import QuantLinear, hadamard
from remanence.models.simba import contributions, prune_tokens
from remanence.models.statex import Expanded
from remanence.ops import sequence_parallel
from remanence.state import State, nbytes


def normals(seed: int) -> Callable[..., Tensor]:
    """A source of normal numbers in float64 that disturbs no other."""
    source = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)


class Pairs(Memory):
    """Linear attention from a stream of [query, key, value, log decay] to what is read; nothing is learned.

    Shapes: x [batch, time, 3·width + 1], y the same, its first `width` features what was read.
    """

    def __init__(self, width: int):
        super().__init__()
        self.dim, self.width = 3 * width + 1, width
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def initial_state(self, batch: int) -> State:
        return {"S": self.scale.new_zeros(batch, 1, self.width, self.width)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        q, k, v, g = (part[:, None] for part in x.split([*[self.width] * 3, 1], -1))
        y, after = ops.linear_attention(q, k, self.scale * v, -g[..., 0].abs(), state)
        return torch.cat([y[:, 0], x[..., self.width :]], -1), after


@proof("simba", "Of 512 tokens, 16 answer the last one: all are kept where chance keeps 2, and with them the answer.")
def simba() -> tuple[Check, Check]:
    draw = normals(0)
    K, T, needles = 32, 512, 16
    basis = torch.linalg.qr(draw(K, K)).Q
    x = torch.zeros(1, T, 3 * K + 1, dtype=torch.float64)
    place = torch.rand(T, generator=torch.Generator().manual_seed(1)).argsort()[:needles].sort().values
    place = place[place < T - 1]
    asked, other = basis[: K // 2], basis[K // 2 :]
    x[0, :, K : 2 * K] = other[torch.arange(T) % (K // 2)]
    x[0, place, K : 2 * K] = asked[torch.arange(len(place))]
    x[0, :, 2 * K : 3 * K] = draw(T, K)
    x[0, -1, :K] = asked[: len(place)].sum(0)
    x[0, :, -1] = 0.002
    memory = Pairs(K)

    def check(scores: Tensor) -> Check:
        kept = prune_tokens(scores, len(place) + 1)[0]
        found = int(torch.isin(place, kept).sum())
        with torch.no_grad():
            whole, part = memory(x)[0][0, -1, :K], memory(x[:, kept])[0][0, -1, :K]
        # the decay between needles goes with the tokens: compare directions, not sizes
        agreement = torch.cosine_similarity(whole, part, dim=0).item()
        says = f"{found} of {len(place)} needles kept, the answer's cosine with that of all tokens is {agreement:.2f}"
        return Check(found == len(place) and agreement > 0.9, says)

    random = torch.rand(1, T, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return check(contributions(memory, x)), check(random)


class Projected(Memory):
    """A delta rule whose keys are a few features of the token, [key, value] to what is read under that key."""

    def __init__(self, features: Tensor):
        super().__init__()
        self.map = nn.Parameter(features)
        self.dim = 2 * features.shape[1]

    def initial_state(self, batch: int) -> State:
        return {"S": self.map.new_zeros(batch, 1, len(self.map), self.dim // 2)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        key, value = x[:, None].chunk(2, -1)
        k = key @ self.map.mT
        k = k / k.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        write = value.any(-1).to(k.dtype)  # a token without a value only asks
        y, after = ops.gated_delta_rule(k, k, value, write, None, state)
        return torch.cat([y, value], -1)[:, 0], after


@proof("statex", "8 rows lose 32 pairs, 64 recall them in the same layer; silent new rows leave its outputs alone.")
def statex() -> tuple[Check, Check]:
    draw = normals(3)
    pairs, dim, room = 32, 64, 8
    keys, values = draw(pairs, dim) / dim**0.5, draw(pairs, dim) / dim**0.5
    text = torch.cat([torch.cat([keys, values], 1), torch.cat([keys, torch.zeros_like(values)], 1)])[None]
    memory = Projected(draw(room, dim))
    before = memory(text)[0]

    def recall(y: Tensor) -> float:
        return (torch.cdist(y[0, pairs:, :dim], values).argmin(1) == torch.arange(pairs)).double().mean().item()

    silent, wide = Expanded(memory, 8, init="zero"), Expanded(memory, 8)
    change = (silent(text)[0] - before).abs().max().item()
    growth = nbytes(wide.initial_state(1)) / nbytes(memory.initial_state(1))
    (maps,) = wide.features.parameters()
    with torch.no_grad():  # what training would find: new rows that are keys and queries alike
        maps.zero_()
        maps[: len(maps) // 2, :dim] = maps[len(maps) // 2 :, :dim] = draw(len(maps) // 2, dim)
    got = recall(wide(text)[0])
    says = f"{got:.0%} of {pairs} recalled, {growth:g} times the bytes, outputs moved by {change:.0e} before"
    control = recall(before)
    return (
        Check(got > 0.9 and growth == 8 and change < 1e-9, says),
        Check(control > 0.9, f"{control:.0%} recalled without the new rows"),
    )


@proof("longmamba", "At 8 times the trained length slow heads hold what they did in training; fast ones are untouched.")
def longmamba() -> tuple[Check, Check]:
    trained, length = 1000, 8000
    source = torch.Generator().manual_seed(0)

    def steps(rows: int, time: int) -> Tensor:
        z = torch.randn(rows, time, generator=source, dtype=torch.float64)
        return nn.functional.softplus(z - 1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slow, self.fast = Pairs(2), Pairs(2)

        def forward(self, dt: Tensor) -> tuple[Tensor, Tensor]:
            x = torch.zeros(*dt.shape, 7, dtype=torch.float64)
            x[:, 0, 2], x[:, 0, 4] = 1, 1  # one fact, at the very beginning
            x[:, -1, 0] = 1  # which is asked for at the very end
            slow, fast = (torch.cat([x[..., :6], rate * dt[..., None]], -1) for rate in (0.01, 5))
            slow[:, 0, 6] = 0.05  # a fact has a large step
            return self.slow(slow)[0][:, -1, 0], self.fast(fast)[0]

    model = Model()
    calibration = steps(16, trained)
    text = steps(1, length)
    with torch.no_grad():
        left = model(calibration)[0].mean().item()
        plain, local = model(text)
        wrapped = extend(model, [calibration], lengths=(trained, 2 * trained, length))
        for memory in wrapped:
            memory.total = length
        filtered, still = model(text)
    same = torch.equal(local, still)

    def check(now: Tensor) -> Check:
        says = f"{now.item():.1g} of the first fact is left after {length} tokens, {left:.1g} after {trained}"
        return Check(now.item() >= left / 2 and same, says)

    return check(filtered), check(plain)


@proof("length-generalization", "Fitted on 64 tokens, it holds at 2048 if states were passed, not if all began empty.")
def length_generalization() -> tuple[Check, Check]:
    T, far, rows, width, noise = 64, 2048, 8, 120, 0.1
    decay = torch.tensor([0.998, 0.8], dtype=torch.float64).log()
    draw = normals(5)
    w, shift = draw(4, width), 2 * draw(width)

    def read(x: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Features of a slow sum, a fast mean and the token; the fast mean, which is to be told; the state after."""
        h, after = ops.scan(decay.expand(*x.shape, 2), torch.stack([x, 0.2 * x], -1), state)
        seen = torch.cat([h * torch.tensor([0.05, 1.0]), x[..., None], torch.ones_like(x[..., None])], -1)
        return torch.tanh(seen @ w + shift), h[..., 1], after

    def empty(n: int) -> State:
        return {"h": torch.zeros(n, 2, dtype=torch.float64)}

    def check(policy: str) -> Check:
        starts, final = InitialStates(policy, seed=1), None
        more = normals(6)
        gram, moment = 1e-6 * torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        for _ in range(60):
            features, target, final = read(0.5 + more(rows, T), starts.draw(empty(rows), final))
            features, target = features.flatten(0, 1), (target + noise * more(rows, T)).flatten()
            gram, moment = gram + features.mT @ features, moment + features.mT @ target
        readout = torch.linalg.solve(gram, moment)
        features, target, _ = read(0.5 + more(rows, far), empty(rows))
        loss = (features @ readout - target).square().mean(0) + noise**2
        near, late = loss[T // 2 : T].mean().item(), loss[-T:].mean().item()
        return Check(late < 1.05 * near, f"squared error {near:.3g} before token {T}, {late:.3g} before {far}")

    return check("state-passing"), check("zero")


class Lookup(nn.Module):
    """A language model by hand: tokens are pairs or questions, logits are what a linear memory reads."""

    def __init__(self, keys: Tensor, values: Tensor, order: Tensor):
        super().__init__()
        self.memory, self.values = Pairs(keys.shape[1]), values
        n = len(keys)
        self.table = torch.zeros(2 * n, self.memory.dim, dtype=torch.float64)
        self.table[:n, keys.shape[1] : 2 * keys.shape[1]] = keys
        self.table[:n, 2 * keys.shape[1] : 3 * keys.shape[1]] = values[order]
        self.table[n:, : keys.shape[1]] = keys

    def initial_state(self, batch: int) -> State:
        return self.memory.initial_state(batch)

    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.memory(self.table[tokens], state)
        return 12 * y[..., : self.values.shape[1]] @ self.values.mT, state


@proof("oprm", "2048 pairs overflow a 64 × 64 state; asked in chunks of 32, the surest chunk has the answer.")
def oprm() -> tuple[Check, Check]:
    n, K, asked = 2048, 64, 40
    draw = normals(7)
    keys, values = (x / x.norm(dim=1, keepdim=True) for x in (draw(n, K), draw(256, K)))
    source = torch.Generator().manual_seed(8)
    answer = torch.randint(256, (n,), generator=source)
    model = Lookup(keys, values, answer)
    context = torch.randperm(n, generator=source)

    def check(chunk: int) -> Check:
        right = 0
        for key in range(asked):
            reading = read_chunks(model, context, torch.tensor([n + key]), chunk=chunk, batch=64)
            right += int(reading.best[0].argmax() == answer[key])
        return Check(right / asked > 0.9, f"{right / asked:.0%} of {asked} answers right, by chunks of {chunk}")

    return check(32), check(n)


@proof("resona", "A random string of 512 letters is copied by look-up, not by a 32 × 32 state or a shuffled index.")
def resona() -> tuple[Check, Check]:
    letters, length, K = 64, 512, 32
    draw = normals(9)
    code, pair = (x / x.norm(dim=-1, keepdim=True) for x in (draw(letters, K), draw(letters, letters, K)))
    string = torch.randint(letters, (length,), generator=torch.Generator().manual_seed(10))
    text = torch.cat([string, string])
    last, before = text.roll(1), text.roll(2)
    x = torch.cat([pair[last, text], pair[before, last], code[text], torch.zeros(len(text), 1)], 1)[None].double()
    base = Pairs(K)
    layer = Resona(x.shape[2], memory=base, chunk=32, top=1, budget=32, heads=1).double()
    with torch.no_grad():
        one = torch.eye(x.shape[2], dtype=torch.float64)
        for linear in (layer.query, layer.key, layer.value, layer.out):
            linear.weight.zero_()
        layer.query.weight[:K, :K] = 20 * x.shape[2] ** 0.5 * one[:K, :K]
        layer.key.weight[:K, K : 2 * K] = one[:K, :K]
        layer.value.weight[:K, 2 * K : 3 * K] = one[:K, :K]
        layer.out.weight.copy_(100 * one)
        layer.gate.weight.zero_()
        layer.gate.bias.fill_(9)

    def copied(memory: Memory) -> float:
        with torch.no_grad():
            y = memory(x)[0][0, length:-1, :K]
        return ((y @ code.mT).argmax(1) == text[length + 1 :]).double().mean().item()

    class Shuffled(Resona):
        def _find(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
            found, there = super()._find(*arguments)
            return found.roll(4, 1), there.roll(4, 1)

    shuffled = Shuffled(x.shape[2], memory=base, chunk=32, top=1, budget=32, heads=1).double()
    shuffled.load_state_dict(layer.state_dict())
    alone, right, wrong = copied(base), copied(layer), copied(shuffled)
    return (
        Check(right > 0.8 and alone < 0.3, f"{right:.0%} copied, {alone:.0%} by the state alone"),
        Check(wrong > 0.8, f"{wrong:.0%} copied with a shuffled index"),
    )


@proof("quamba", "Two outliers of 60 times in 256 features: rotated before rounding to 8 bits, the error is under 2%.")
def quamba() -> tuple[Check, Check]:
    draw = normals(12)
    linear = nn.Linear(256, 128, bias=False).double()
    linear.weight.data = draw(128, 256) / 16
    x = draw(1000, 256)
    x[:, [17, 200]] *= 60
    want = linear(x)

    def check(rotate: bool) -> Check:
        largest = (x @ hadamard(256) if rotate else x).abs().max()
        with torch.no_grad():
            error = ((QuantLinear(linear, largest, rotate=rotate)(x) - want).norm() / want.norm()).item()
        return Check(error < 0.02, f"relative error {error:.1%}")

    return check(True), check(False)


class Counted:
    """A group of ranks that notes its collectives."""

    def __init__(self, group: Any):
        self.group = group
        self.calls: list[int] = []

    def rank(self) -> int:
        return int(self.group.rank())

    def size(self) -> int:
        return int(self.group.size())

    def allgather(self, out: Any, x: Any) -> Any:
        self.calls.append(x[0].nbytes)
        return self.group.allgather(out, x)


@proof("lasp2", "Four ranks with a quarter each give what one gives, gradients too, by one exchange per direction.")
def lasp2() -> tuple[Check, Check]:
    ranks, T, K = 4, 40, 8
    draw = normals(13)
    q, k, v, out = (draw(1, 2, T, K) for _ in range(4))
    k = k / k.norm(dim=-1, keepdim=True)
    decay, beta = -draw(1, 2, T).abs(), draw(1, 2, T).sigmoid()
    forms: dict[str, Callable[..., Any]] = {
        "gated": lambda a, q, k, v, g, b: a.linear_attention(q, k, v, g),
        "delta": lambda a, q, k, v, g, b: a.gated_delta_rule(q, k, v, b, g),
    }

    def run(where: Any, form: str, part: slice) -> list[Tensor]:
        mine = [x[:, :, part].clone().requires_grad_() for x in (q, k, v, decay, beta)]
        y, _ = forms[form](where, *mine)
        used = mine if form == "delta" else mine[:4]
        return [y.detach(), *torch.autograd.grad((y * out[:, :, part]).sum(), used)]

    parts = [slice(r * T // ranks, (r + 1) * T // ranks) for r in range(ranks)]
    found: dict[tuple[str, int], list[Tensor]] = {}
    calls: dict[tuple[str, int], int] = {}
    store = dist.HashStore()

    def rank(r: int) -> None:
        group = Counted(dist.ProcessGroupGloo(store, r, ranks, timedelta(seconds=60)))
        for form in forms:
            found[form, r] = run(_Split(group), form, parts[r])
            calls[form, r] = len(group.calls)
            group.calls.clear()

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def check(pieces: dict[tuple[str, int], list[Tensor]]) -> Check:
        worst = 0.0
        for form in forms:
            together = [torch.cat(p, 2) for p in zip(*(pieces[form, r] for r in range(ranks)), strict=True)]
            whole = run(ops, form, slice(0, T))
            worst = max([worst, *((a - b).abs().max().item() for a, b in zip(together, whole, strict=True))])
        exchanged = set(calls.values()) == {2}
        return Check(worst < 1e-9 and exchanged, f"largest difference {worst:.0e} of outputs and gradients")

    alone = {(form, r): run(ops, form, parts[r]) for form in forms for r in range(ranks)}
    return check(found), check(alone)


class _Split:
    """The split ops over one group, under their own names."""

    def __init__(self, group: Any):
        self.group = group

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(getattr(sequence_parallel, name), group=self.group)
