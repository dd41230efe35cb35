"""Proofs of the linear memories and of their baselines: hand-made cases with a control that must fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import Check, proof
from remanence.memory.attention import WindowAttention
from remanence.memory.griffin import Griffin
from remanence.memory.hgrn import HGRN, LowerBounds
from remanence.memory.min_lstm_gru import MinGRU, MinLSTM
from remanence.memory.parts import rotate
from remanence.memory.retnet import RetNet
from remanence.ops.min_cell import positive

Draw = Callable[..., Tensor]
M = TypeVar("M", bound=nn.Module)


def normals(seed: int) -> Draw:
    """A source of normal numbers in float64 that disturbs no other."""
    source = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)


def seeded(make: Callable[[], M], seed: int) -> M:
    """A layer in float64, initialised without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double()


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinite if anything is not finite."""
    worst = (a - b).abs().max()
    return worst.item() if worst.isfinite() else math.inf


@proof("linear-attention", "The state form is the quadratic form, and each output a convex mixture of the values read.")
def linear_attention() -> tuple[Check, Check]:
    draw = normals(0)
    q, k, v = draw(2, 2, 50, 8), draw(2, 2, 50, 8), draw(2, 2, 50, 8)
    low, high = v.cummin(2).values, v.cummax(2).values

    def check(feature: Callable[[Tensor], Tensor]) -> Check:
        v_and_one = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        y, _ = ops.linear_attention(feature(q), feature(k), v_and_one)
        mean = y[..., :-1] / y[..., -1:]
        weights = (feature(q) @ feature(k).mT).tril()
        error = gap(mean, weights @ v / weights.sum(-1, keepdim=True))
        outside = torch.maximum(low - mean, mean - high).max().item()
        return Check(error < 1e-9 and outside < 1e-9, f"error {error:.0e}, {max(outside, 0.0):.2g} outside the hull")

    return check(lambda x: F.elu(x) + 1), check(lambda x: x)


@proof("retnet", "The response to an impulse n tokens ago is γⁿ times the cosines of its rotary phases.")
def retnet() -> tuple[Check, Check]:
    layer = seeded(lambda: RetNet(32, heads=4), 0)
    n = torch.arange(300, dtype=torch.float64)
    key = torch.zeros(1, 4, 300, 8, dtype=torch.float64)
    key[:, :, 0] = 1
    value = torch.zeros(1, 4, 300, 1, dtype=torch.float64)
    value[:, :, 0] = 1
    phase = (n[:, None] * layer.frequencies).cos().sum(-1) * 2
    want = (1 - 2.0 ** -(5 + torch.arange(4, dtype=torch.float64)))[:, None] ** n * phase

    def check(start: int, queries_from: int) -> Check:
        q = rotate(torch.ones_like(key), torch.tensor([queries_from]), layer.frequencies)
        k = rotate(key, torch.tensor([start]), layer.frequencies)
        y, _ = ops.linear_attention(q, k, value, layer.log_decay[None, :, None].expand(1, 4, 300))
        error = gap(y[0, ..., 0], want)
        return Check(error < 1e-8, f"largest error {error:.0e} over 300 lags and 4 decays, read at token {start}")

    return check(10**8, 10**8), check(10**8, 0)  # the control forgot its position


@proof("gla", "Decays down to −40 per token and feature: the chunked form is the loop.")
def gla() -> tuple[Check, Check]:
    draw = normals(1)
    q, k, v = (draw(1, 2, 150, 8).float() for _ in range(3))
    g = -40 * torch.sigmoid(3 * draw(1, 2, 150, 8)).float()
    want, _ = ops.linear_attention_reference(q.double(), k.double(), v.double(), g.double())

    def one_shot(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        G = g.cumsum(2)
        return ((q * G.exp()) @ (k * (-G).exp()).mT).tril() @ v

    def check(y: Tensor, most: float) -> Check:
        error = gap(y.double(), want)
        return Check(error < most, f"largest error {error:.0e} in {str(y.dtype).removeprefix('torch.')}")

    exact, _ = ops.linear_attention(q.double(), k.double(), v.double(), g.double())
    single = check(ops.linear_attention(q, k, v, g)[0], 1e-4)
    double = check(exact, 1e-9)
    system = Check(single.holds and double.holds, f"{double.says}, {single.says}")
    return system, check(one_shot(q, k, v, g), 1e-4)


@proof("hgrn", "Whatever the input, an impulse outlives the half-life ln 2 / −ln γ, and γ never falls with depth.")
def hgrn() -> tuple[Check, Check]:
    draw = normals(2)
    bounds = LowerBounds(4, 16).double()
    bounds.logits.data = 2 * draw(4, 16)
    gamma = bounds()
    rising = bool((gamma.diff(dim=0) >= 0).all())
    x = 10 * draw(1, 400, 16)

    def check(lower_bound: float | LowerBounds) -> Check:
        layer = seeded(lambda: HGRN(16, lower_bound=lower_bound, layer=3), 2)
        layer.forget.bias.data.fill_(-30)  # every gate says: forget
        log_decay = layer.log_decay(x)
        h, _ = ops.scan(log_decay, torch.zeros_like(log_decay), {"h": torch.ones(1, 16, dtype=torch.float64)})
        half_life = math.log(2) / -gamma[3].log()
        enough = h[0, half_life.long() - 1, torch.arange(16)]
        least = enough[half_life >= 1].min().item()
        return Check(rising and least >= 0.5 - 1e-9, f"at least {least:.2g} is left at the promised half-life")

    with torch.no_grad():
        return check(bounds), check(0.0)


@proof("min-lstm-gru", "The scan of logarithms is the textbook loop; its state stays in the hull of what was read.")
def min_lstm_gru() -> tuple[Check, Check]:
    draw = normals(3)
    forget, write = 12 * draw(1, 300, 4), 12 * draw(1, 300, 4)
    candidate = positive(3 * draw(1, 300, 4))
    start = torch.full((1, 4), 0.5, dtype=torch.float64)
    f, i = forget.sigmoid(), write.sigmoid()

    def check(keep: Tensor, log_keep: Tensor, log_write: Tensor) -> Check:
        h, loop = start, []
        for k, w, c in zip(keep.unbind(1), log_write.exp().unbind(1), candidate.unbind(1), strict=True):
            h = k * h + w * c
            loop.append(h)
        y, _ = ops.scan(log_keep, log_write.exp() * candidate, {"h": start})
        error = gap(y, torch.stack(loop, 1))
        beyond = (y - torch.cat([start[:, None], candidate], 1).cummax(1).values[:, 1:]).max().item()
        return Check(error < 1e-9 and beyond < 1e-9, f"error {error:.0e}, {max(beyond, 0):.2g} beyond the hull")

    gru = check(1 - i, *MinGRU(4).shares(write))
    lstm = check(f / (f + i), *MinLSTM(4).shares(torch.cat([forget, write], -1)))
    system = Check(gru.holds and lstm.holds, f"minGRU: {gru.says}; minLSTM: {lstm.says}")
    return system, check(f, F.logsigmoid(forget), F.logsigmoid(write))  # minLSTM without f + i = 1


@proof("griffin", "Slow or fast, a channel's variance is at most its input's: the factor √(1 − a²) holds it.")
def griffin() -> tuple[Check, Check]:
    a = torch.tensor([0.43, 0.9, 0.99, 0.999], dtype=torch.float64)
    layer = seeded(lambda: Griffin(4, conv=1), 4)
    with torch.no_grad():  # open gates, and nothing but the recurrence between input and output
        for p in layer.parameters():
            p.zero_()
        layer.inward.weight[4:] = layer.out.weight[:] = torch.eye(4)
        layer.inward.bias[:4] = 10  # GeLU(10) = 10
        layer.conv.weight.fill_(0.1)
        layer.input_gate.bias.fill_(40)
        layer.decay_gate.bias.fill_(40)
        layer.base[:] = torch.expm1(-a.log() / 8).log()
    impulse = torch.zeros(1, 10000, 4, dtype=torch.float64)
    impulse[:, 0] = 1

    def check(empty: bool) -> Check:
        state = layer.initial_state(1)
        with torch.no_grad():
            response, _ = layer(impulse, {**state, "empty": torch.tensor([empty])})
        variance = response[0].square().sum(0)  # of the stationary output, for white noise of variance 1
        figures = ", ".join(f"{v:.2f} at a = {r:g}" for v, r in zip(variance.tolist(), a.tolist(), strict=True))
        return Check(variance.max().item() < 1 + 1e-6, f"variance {figures}")

    return check(empty=False), check(empty=True)  # the first token of a stream is written with factor 1


@proof("gated-deltanet", "It overwrites a key's value, and at the gate's floor nothing read before can be read again.")
def gated_deltanet() -> tuple[Check, Check]:
    draw = normals(5)
    k = torch.linalg.qr(draw(16, 16)).Q[:8]
    keys = torch.cat([k, k, k])[None, None]
    old, new = draw(8, 16), draw(8, 16)
    values = torch.cat([old, new, torch.zeros_like(new)])[None, None]
    write = torch.tensor([1.0] * 16 + [0.0] * 8, dtype=torch.float64)[None, None]

    def check(floor: float) -> Check:
        y, S = ops.gated_delta_rule(keys, keys, values, write)
        overwritten = gap(y[0, 0, 16:], new)
        separator = torch.tensor([[[floor] + [0.0] * 7]], dtype=torch.float64)
        after, _ = ops.gated_delta_rule(
            keys[:, :, :8], keys[:, :, :8], values[:, :, 16:], write[..., 16:], separator, S
        )
        left = after.abs().max().item()
        return Check(
            overwritten < 1e-9 and left < 1e-9,
            f"error {overwritten:.0e} after overwriting; {left:.1g} left after the switch",
        )

    return check(-60.0), check(0.0)  # without a gate this is DeltaNet


@proof("sliding-window", "A change w tokens ago leaves the output as it was, to the bit; one token nearer changes it.")
def sliding_window() -> tuple[Check, Check]:
    window, t = 16, 60
    layer = seeded(lambda: WindowAttention(32, heads=2, window=window), 6)
    x = normals(6)(1, 80, 32)

    def check(changed: int) -> Check:
        other = x.clone()
        other[:, changed] += 10
        with torch.no_grad():
            difference = gap(layer(x)[0][:, t], layer(other)[0][:, t])
        return Check(difference == 0, f"a change at t − {t - changed} moves y_t by {difference:.2g} (window {window})")

    return check(t - window), check(t - window + 1)
