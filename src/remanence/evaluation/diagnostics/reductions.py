"""The edges of the family tree that are equations: a member, with its change undone, is its parent.

Each reduction gives two errors: between the two as they should agree, and with the condition left out, where they
should not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.memory.deltanet import DeltaNet
from remanence.memory.deltaproduct import DeltaProduct
from remanence.memory.gsa import ABC
from remanence.memory.lightnet import LightNet
from remanence.memory.lightning import lightning_attention
from remanence.memory.retnet import RetNet
from remanence.ops.complex_scan import diagonal_ssm
from remanence.ops.dplr import dplr
from remanence.ops.selective_scan import selective_scan
from remanence.ops.taps import Call, tap

Errors = tuple[float, float]
T = 70


def _normals(seed: int) -> Callable[..., Tensor]:
    source = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=source, dtype=torch.float64)


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((a - b).abs().max() / b.abs().max())


def _seeded(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def _qkv(seed: int, K: int = 6, V: int = 5) -> tuple[Tensor, Tensor, Tensor, Callable[..., Tensor]]:
    draw = _normals(seed)
    return draw(2, 3, T, K), F.normalize(draw(2, 3, T, K), dim=-1), draw(2, 3, T, V), draw


def mamba_is_s4d() -> Errors:
    """With constant step, input and output maps, Mamba is a real diagonal S4D: a convolution (Euler's input map)."""
    draw = _normals(0)
    x, A = draw(2, T, 4), -draw(4, 3).exp()
    step, B, C = draw(4).exp() / 10, draw(3), draw(3)
    want, _ = diagonal_ssm(x, (step[:, None] * A).exp() + 0j, step[:, None] * B * C + 0j)

    def mamba(delta: Tensor) -> Tensor:
        return selective_scan(x, delta, A, B.expand(2, T, 3), C.expand(2, T, 3))[0]

    return _apart(mamba(step.expand_as(x)), want), _apart(mamba(step * draw(2, T, 4).exp()), want)


def mamba2_is_mamba() -> Errors:
    """With all N rates of a head equal, and a step per head, Mamba is Mamba-2."""
    draw = _normals(1)
    heads, width, N = 2, 3, 5
    x, step, B, C = draw(2, T, heads * width), draw(2, T, heads).exp() / 10, draw(2, T, N), draw(2, T, N)
    rate = -draw(heads).exp()
    value = (x.unflatten(-1, (heads, width)) * step[..., None]).transpose(1, 2)
    k, q = (part[:, None].expand(2, heads, T, N) for part in (B, C))
    want = ops.linear_attention(q, k, value, (rate * step).transpose(1, 2))[0].transpose(1, 2).flatten(2)
    delta = step.repeat_interleave(width, -1)

    def mamba(A: Tensor) -> Tensor:
        return selective_scan(x, delta, A, B, C)[0]

    tied = rate.repeat_interleave(width)[:, None].expand(-1, N)
    return _apart(mamba(tied), want), _apart(mamba(tied * draw(heads * width, N).exp()), want)


def gla_is_mamba2() -> Errors:
    """With equal decays of all key features, gated linear attention is the core of Mamba-2."""
    q, k, v, draw = _qkv(2)
    g = -draw(2, 3, T).abs()
    want, _ = ops.linear_attention(q, k, v, g)
    untied = g[..., None] * draw(2, 3, T, 6).exp()
    return (
        _apart(ops.linear_attention(q, k, v, g[..., None].expand_as(k).contiguous())[0], want),
        _apart(ops.linear_attention(q, k, v, untied)[0], want),
    )


def gated_deltanet_is_outer() -> Errors:
    """Without the term that erases, the gated delta rule is gated linear attention with keys βk."""
    q, k, v, draw = _qkv(3)
    beta, g = draw(2, 3, T).sigmoid(), -draw(2, 3, T).abs()
    decay, written = g[..., None].expand_as(k).contiguous(), beta[..., None] * k
    want, _ = ops.linear_attention(q, written, v, g)

    def rule(erase: Tensor) -> Tensor:
        return dplr(q, written, v, -decay.exp() * k, erase, decay)[0]

    whole = _apart(rule(written), ops.gated_delta_rule(q, k, v, beta, g)[0])
    return max(_apart(rule(0 * written), want), whole), _apart(rule(written), want)


def kimi_delta_is_gated_deltanet() -> Errors:
    """With equal decays of all key features, Kimi Delta is Gated DeltaNet."""
    q, k, v, draw = _qkv(4)
    beta, g = draw(2, 3, T).sigmoid(), -draw(2, 3, T).abs()
    want, _ = ops.gated_delta_rule(q, k, v, beta, g)

    def kimi(decay: Tensor) -> Tensor:
        return dplr(q, beta[..., None] * k, v, -decay.exp() * k, beta[..., None] * k, decay)[0]

    tied = g[..., None].expand_as(k).contiguous()
    return _apart(kimi(tied), want), _apart(kimi(tied * draw(2, 3, T, 6).exp()), want)


def deltaproduct_is_deltanet() -> Errors:
    """One write per token, without decay and gate: the layer is DeltaNet's, weight by weight."""
    x = _normals(5)(2, T, 8)
    parent = _seeded(lambda: DeltaNet(8, heads=2))

    def product(writes: int) -> Tensor:
        child = _seeded(
            lambda: DeltaProduct(8, heads=2, writes=writes, negative=False, decay=False, gate=False, expand_v=1)
        )
        same = {n: w for n, w in parent.state_dict().items() if child.state_dict()[n].shape == w.shape}
        child.load_state_dict(same, strict=False)
        return child(x)[0]

    with torch.no_grad():
        want = parent(x)[0]
        return _apart(product(1), want), _apart(product(2), want)


def retnet_is_lightning() -> Errors:
    """Without rotary phases, what RetNet asks of its recurrence is lightning attention with other slopes."""
    x = _normals(6)(2, T, 8)
    layer = _seeded(lambda: RetNet(8, heads=2))
    assert isinstance(layer, RetNet)
    read: list[Tensor] = []

    def keep(call: Call) -> Any:
        answer = call.run()
        if call.op == "linear_attention":
            read.append(answer[0])
        return answer

    def split(weight: Tensor) -> list[Tensor]:
        return [p.unflatten(-1, (2, -1)).transpose(1, 2) for p in (x @ weight.mT).chunk(2, -1)]

    with torch.no_grad():
        q, k = split(layer.qk.weight)
        v = (x @ layer.v.weight.mT).unflatten(-1, (2, -1)).transpose(1, 2)
        want, _ = lightning_attention(q, k * layer.head_dim**-0.5, v, -layer.log_decay)
        with tap(keep):
            layer(x)
        turned = layer.frequencies
        layer.frequencies = 0 * turned
        with tap(keep):
            layer(x)
    return _apart(read[1], want), _apart(read[0], want)


def lightnet_is_abc() -> Errors:
    """LightNet is the second pass of ABC, read with queries in place of the share of each slot."""
    x = _normals(7)(2, T, 8)
    light = _seeded(lambda: LightNet(8, heads=2))
    slots = _seeded(lambda: ABC(8, heads=2, slots=4))
    assert isinstance(light, LightNet)
    assert isinstance(slots, ABC)
    asked: list[Call] = []

    def keep(call: Call) -> Any:
        asked.append(call)
        return call.run()

    with torch.no_grad():
        with tap(keep):
            light(x)
        call = next(c for c in asked if c.op == "linear_attention")
        want = call.run()[0]
        scores = light.qkv(x).chunk(3, -1)[1]
        q, v = call.arguments["query"], call.arguments["value"]

        def second_pass(logits: Tensor) -> Tensor:
            write, log_decay, _ = slots.write(logits, slots.initial_state(2))
            return ops.linear_attention(q, write, v, log_decay)[0]

        return _apart(second_pass(scores), want), _apart(second_pass(scores.flip(-1)), want)


REDUCTIONS: dict[tuple[str, str], Callable[[], Errors]] = {
    ("mamba", "s4d"): mamba_is_s4d,
    ("mamba2", "mamba"): mamba2_is_mamba,
    ("gla", "mamba2"): gla_is_mamba2,
    ("gated-deltanet", "gla"): gated_deltanet_is_outer,
    ("kimi-delta", "gated-deltanet"): kimi_delta_is_gated_deltanet,
    ("deltaproduct", "deltanet"): deltaproduct_is_deltanet,
    ("retnet", "lightning-attention-tnl"): retnet_is_lightning,
    ("lightnet", "abc"): lightnet_is_abc,
}
"""(a, b): a, under the condition that the function names, is b."""
