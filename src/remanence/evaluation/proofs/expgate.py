"""Proofs of the exponential gates, the running softmaxes, the slots and the attentions: each with a control."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import Check, proof
from remanence.evaluation.proofs.linear import gap, normals, seeded
from remanence.memory.aaren import Aaren
from remanence.memory.attention import WindowAttention
from remanence.memory.base import Memory
from remanence.memory.gsa import ABC
from remanence.memory.parts import merge, rotate, split
from remanence.memory.softmax import SoftmaxAttention
from remanence.memory.xlstm import MLSTM
from remanence.ops.expgate import expgate, expgate_reference
from remanence.ops.expgate import merge as join
from remanence.ops.neighborhood import neighborhood_attention, neighborhood_attention_reference
from remanence.ops.slots import slots, slots_reference
from remanence.ops.softmax_scan import softmax_scan


@proof("xlstm-7b", "With gates of e^±100 in float32 it is the loop in float64; a shut gate lets it only decay.")
def xlstm() -> tuple[Check, Check]:
    draw = normals(0)
    q, k, v = draw(1, 2, 300, 8), draw(1, 2, 300, 8), draw(1, 2, 300, 8)
    forget = F.logsigmoid(3 + draw(1, 2, 300))
    write = (60 * draw(1, 2, 300)).clamp(-100, 100)
    want, _ = expgate_reference(q, k, v, forget, write)
    narrow = (q.float(), k.float(), v.float(), forget.float(), write.float())

    def unscaled(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, write: Tensor) -> Tensor:
        counted = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        sums, _ = ops.linear_attention(q, k * write.exp()[..., None], counted, forget)
        return sums[..., :-1] / sums[..., -1:].abs().clamp(min=1)

    layer = seeded(lambda: MLSTM(16, heads=2, cap=None), 0)
    with torch.no_grad():
        _, before = layer(draw(1, 9, 16))
        layer.gates.weight.zero_()
        layer.gates.bias[:2] = -math.inf
        _, after = layer(draw(1, 5, 16), before)
        kept = 5 * F.logsigmoid(layer.gates.bias[2:])
        then, now = (before["m"] + kept).exp(), after["m"].exp()
        off = gap(after["C"] * now[..., None, None], before["C"] * then[..., None, None])

    def check(y: Tensor) -> Check:
        wrong = gap(y.double(), want) / want.abs().max().item()
        return Check(wrong < 1e-3 and off < 1e-9, f"off by {wrong:.1g}; shut, off from pure decay by {off:.0e}")

    return check(expgate(*narrow)[0]), check(unscaled(*narrow))  # without its running maximum


@proof("rwkv", "WKV in float32 is the softmax over decayed keys, one of which is 100, as float64 has it.")
def rwkv() -> tuple[Check, Check]:
    draw = normals(1)
    time, width = 200, 16
    k, v = 3 * draw(1, time, width), draw(1, time, width)
    k[:, 50] = 100
    g, u = -draw(width).exp(), draw(width)
    t = torch.arange(time)
    past = (t[:, None] - 1 - t)[..., None] * g + k[:, None]
    logits = torch.where((t[:, None] > t)[..., None], past, -math.inf)
    logits = torch.where((t[:, None] == t)[..., None], k[:, None] + u, logits)
    want = torch.einsum("btjd,bjd->btd", logits.softmax(2), v)
    narrow = (k.float(), v.float(), g.float(), u.float())

    def unscaled(k: Tensor, v: Tensor, g: Tensor, u: Tensor) -> Tensor:
        sums = torch.zeros(2, 1, width)
        out = []
        for s, x in zip(k.unbind(1), v.unbind(1), strict=True):
            now = torch.stack([(s + u).exp() * x, (s + u).exp()])
            out.append((sums + now)[0] / (sums + now)[1])
            sums = g.exp() * sums + torch.stack([s.exp() * x, s.exp()])
        return torch.stack(out, 1)

    def check(y: Tensor) -> Check:
        wrong = gap(y.double(), want)
        return Check(wrong < 1e-4, f"off by {wrong:.1g}")

    return check(softmax_scan(*narrow)[0]), check(unscaled(*narrow))  # without its running maximum


@proof("aaren", "It is softmax attention with a learnt query, also when two halves are read apart and merged.")
def aaren() -> tuple[Check, Check]:
    draw = normals(2)
    layer = seeded(lambda: Aaren(16, heads=2), 2)
    x = draw(1, 60, 16)
    with torch.no_grad():
        layer.query.mul_(30)
        k, v = split(layer.key(x), 2), split(layer.value(x), 2)
        scores = (k * layer.query[:, None]).sum(-1) / 8**0.5
        future = torch.ones(60, 60, dtype=torch.bool).triu(1)
        shares = scores[:, :, None].expand(-1, -1, 60, -1).masked_fill(future, -math.inf).softmax(-1)
        off = gap(layer(x)[0], layer.out(merge(shares @ v)))
        spread = (scores.max() - scores.min()).item()

    def features(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: s.repeat_interleave(16 // s.shape[1], 1) for n, s in state.items()}

    def check(by_maxima: bool) -> Check:
        with torch.no_grad():
            whole = layer(x)[1]
            first, last = (features(layer(part)[1]) for part in (x[:, :30], x[:, 30:]))
            both = join(first, torch.zeros(16), last) if by_maxima else {n: first[n] + last[n] for n in first}
            wrong = max(off, gap(both["w"] / both["u"], whole["w"] / features(whole)["u"]))
        return Check(wrong < 1e-9, f"off by {wrong:.1g}, with scores {spread:.0f} apart")

    return check(True), check(False)  # sums of halves scaled by different maxima do not add


@proof("gsa", "Two passes are the loop, and a slot whose gate is shut is read back whole after 2,000 tokens.")
def gsa() -> tuple[Check, Check]:
    draw = normals(3)
    tokens, M, K = 2001, 4, 8
    k = F.normalize(draw(1, 1, tokens, K), dim=-1)
    v = draw(1, 1, tokens, K)
    q = 40 * k[:, :, :1].expand(-1, -1, tokens, -1)

    def check(shut: bool) -> Check:
        keep = torch.full((1, 1, tokens, M), 0.9, dtype=torch.float64)
        keep[:, :, 0] = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
        if shut:
            keep[:, :, 1:, 0] = 1
        g = keep.log().clamp(min=-60)
        y, _ = slots(q, k, v, 1 - keep, g)
        inputs = (q, k, v, 1 - keep, g)
        a, b, c, d, e = (x[:, :, :-40] for x in inputs)
        _, before = slots(a, b, c, d, e)
        a, b, c, d, e = (x[:, :, -40:] for x in inputs)
        want, _ = slots_reference(a, b, c, d, e, before)
        off, lost = gap(y[:, :, -40:], want), gap(y[:, :, -1], v[:, :, 0])
        return Check(off < 1e-9 and lost < 1e-3, f"passes off by {off:.0e}; what was read back, by {lost:.1g}")

    return check(True), check(False)  # the same slot, forgetting as the others do


@proof("abc", "With a slot for each token its last reading is softmax attention; fewer slots hold averages.")
def abc() -> tuple[Check, Check]:
    tokens, K = 12, 6
    draw = normals(4)

    def check(many: int) -> Check:
        layer = seeded(lambda: ABC(K + tokens, heads=1, slots=many), 4)
        x = torch.cat([draw(1, tokens, K), torch.eye(tokens, dtype=torch.float64)[None]], -1)
        with torch.no_grad():  # the input says which token it is, and thereby to which slot it goes
            layer.gate.weight.zero_()
            layer.gate.weight[torch.arange(tokens) % many, K + torch.arange(tokens)] = 100
            q, k, v = (split(part, 1) for part in F.silu(layer.qkv(x)).chunk(3, -1))
            want = (q[:, :, -1:] @ k.mT).softmax(-1) @ v
            want = layer.out(layer.norm(F.silu(merge(want))))
            off = gap(layer(x)[0][:, -1:], want)
        return Check(off < 1e-9, f"off from softmax attention by {off:.1g} with {many} slots for {tokens} tokens")

    return check(tokens), check(1)


@proof("softmax", "What was read 300 tokens ago is attended to exactly, and the state grows to hold it.")
def softmax() -> tuple[Check, Check]:
    x = normals(5)(1, 400, 16)
    full = seeded(lambda: SoftmaxAttention(16, heads=2), 5)
    near = seeded(lambda: WindowAttention(16, heads=2, window=100), 5)
    near.load_state_dict(full.state_dict())
    start = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        q, k, v = full.project(x)
        q, k = (rotate(part, start, full.frequencies) for part in (q, k))
        want = full.out(merge(F.scaled_dot_product_attention(q, k, v, is_causal=True)))

    def check(layer: Memory) -> Check:
        with torch.no_grad():
            first, state = layer(x[:, :130])
            rest, state = layer(x[:, 130:], state)
        off = gap(torch.cat([first, rest], 1), want)
        held = max(t.shape[2] for t in state.values() if t.ndim == 4)
        return Check(off < 1e-9, f"off by {off:.1g}, with room for {held} tokens in the state")

    return check(full), check(near)


@proof("neighborhood-attention", "Every position attends to exactly w neighbours per axis, at the edges too.")
def neighborhood() -> tuple[Check, Check]:
    sizes, window, dilation = (11, 14), (5, 3), (2, 3)
    draw = normals(6)
    q, k, v = (draw(1, 1, *sizes, 4) for _ in range(3))
    places = torch.eye(11 * 14, dtype=torch.float64).view(1, 1, *sizes, -1)
    nothing = torch.zeros_like(q)

    def check(causal: bool) -> Check:
        attend, define = (
            partial(op, window=window, dilation=dilation, causal=causal)
            for op in (neighborhood_attention, neighborhood_attention_reference)
        )
        seen = (attend(nothing, nothing, places) > 0).sum(-1)  # the shares of all places, when all are alike
        off = gap(attend(q, k, v), define(q, k, v))
        return Check(
            off < 1e-9 and bool((seen == 15).all()),
            f"{seen.min()} to {seen.max()} neighbours of 15; off from the masked softmax by {off:.0e}",
        )

    return check(False), check(True)  # a causal axis has fewer at its start
