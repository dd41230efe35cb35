"""Proofs of the outer-product memories: lightning, Mamba-2, GateLoop, HGRN2, RWKV-6, LightNet, JRT, RecurrentGemma."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import Check, proof
from remanence.evaluation.proofs.linear import gap, normals, seeded
from remanence.memory.base import Memory
from remanence.memory.gateloop import GateLoop, gate_loop
from remanence.memory.gla import GLA
from remanence.memory.hgrn2 import HGRN2
from remanence.memory.jrt import PrefixLinearAttention, read_twice
from remanence.memory.lightnet import LightNet
from remanence.memory.lightning import LightningAttention, head_slopes, lightning_attention
from remanence.memory.mamba2 import Mamba2
from remanence.memory.parts import merge, split
from remanence.memory.recurrentgemma import RecurrentGemma
from remanence.memory.rwkv6 import RWKV6, read_before_write
from remanence.state import nbytes


@proof("lightning-attention-tnl", "Half of what the bottom layer read is left after ln 2 / s tokens; the top keeps it.")
def lightning_attention_tnl() -> tuple[Check, Check]:
    heads, tokens = 4, 10_000
    half_life = (0.6931471805599453 / head_slopes(heads)).round().long()
    x = torch.zeros(1, 1 + tokens, 16, dtype=torch.float64)
    x[:, 0] = normals(0)(16)  # then zeros, which write nothing

    def check(layers: int) -> Check:
        def left(layer: int, n: int) -> Tensor:
            memory = seeded(lambda: LightningAttention(16, heads=heads, layer=layer, layers=12), 0)
            first, after = (memory(x[:, : 1 + m])[1]["S"].flatten(2).norm(dim=-1)[0] for m in (0, n))
            return after / first

        with torch.no_grad():
            half = torch.stack([left(0, n)[h] for h, n in enumerate(half_life.tolist())])
            kept = left(layers - 1, tokens).min().item()
        says = ", ".join(f"{share:.2f} after {n}" for share, n in zip(half.tolist(), half_life.tolist(), strict=True))
        return Check(
            gap(half, torch.full_like(half, 0.5)) < 0.07 and kept > 0.9,
            f"bottom layer: {says}; layer {layers}: {kept:.2g} after {tokens:,}",
        )

    return check(12), check(6)  # half-way up the decays are still those of a local memory


@proof("lightning-attention-2", "For any tile it is the loop, at a cost per token that length does not raise.")
def lightning_attention_2() -> tuple[Check, Check]:
    draw = normals(1)
    slopes = head_slopes(2)

    def one_tile(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        steps = torch.arange(q.shape[2]).to(q)
        decay = -s.to(q)[:, None, None] * (steps[:, None] - steps)
        return ((q @ k.mT) * decay.masked_fill(decay > 0, -torch.inf).exp()) @ v

    def tiled(tile: int) -> Callable[..., Tensor]:
        return lambda q, k, v, s: lightning_attention(q, k, v, s, tile=tile)[0]

    def gradients(f: Callable[..., Tensor]) -> Tensor:
        qkv = [x.clone().requires_grad_() for x in small]
        y = f(*qkv, slopes)
        return torch.cat([y.flatten(), *(g.flatten() for g in torch.autograd.grad(y.square().sum(), qkv))])

    small = [draw(1, 2, 150, 4) for _ in range(3)]
    decays = -slopes[:, None].expand(1, 2, 150)
    loop = gradients(lambda q, k, v, s: ops.linear_attention_reference(q, k, v, decays)[0])

    def seconds(f: Callable[..., Tensor], length: int) -> float:
        """Of the processor, per token: a busy machine does not count."""
        qkv = [draw(1, 2, length, 32).float() for _ in range(3)]
        threads, took = torch.get_num_threads(), []
        torch.set_num_threads(1)
        try:
            for _ in range(8):
                start = time.process_time()
                f(*qkv, slopes)
                took.append(time.process_time() - start)
        finally:
            torch.set_num_threads(threads)
        return min(took) / length

    def check(forms: dict[int, Callable[..., Tensor]], timed: int) -> Check:
        error = max(gap(gradients(f), loop) for f in forms.values())
        growth = seconds(forms[timed], 2048) / seconds(forms[timed], 256)
        tiles = ", ".join(str(tile) for tile in forms)
        return Check(
            error < 1e-9 and growth < 3,
            f"tiles of {tiles}: error {error:.0e} with gradients; a token costs {growth:.1f} times as much at 8 times "
            "the length",
        )

    system = check({tile: tiled(tile) for tile in (1, 7, 64, 150)}, timed=64)
    return system, check({150: one_tile}, timed=150)  # scores alone, without a state between tiles


@proof("mamba2", "It is Mamba's selective scan whose decays are tied within each head; untied ones it cannot express.")
def mamba2() -> tuple[Check, Check]:
    inner, N, T = 16, 6, 70
    layer = seeded(lambda: Mamba2(8, state_size=N, head_dim=4, conv=1, conv_bias=False), 2)
    u = normals(2)(1, T, 8)

    def check(spread: Tensor) -> Check:
        """Mamba's own recurrence, channel by channel and state by state, with decay rates A [inner, N]."""
        z, mixed, step = layer.inward(u).split([inner, inner + 2 * N, 4], dim=-1)
        x, B, C = F.silu(mixed * layer.conv.weight[:, 0]).split([inner, N, N], dim=-1)
        step = F.softplus(step + layer.step_bias).repeat_interleave(4, dim=-1)
        A = -layer.rate.exp().repeat_interleave(4)[:, None] * spread
        h, y = torch.zeros(1, inner, N, dtype=torch.float64), []
        for t in range(T):
            h = (step[:, t, :, None] * A).exp() * h + (step * x)[:, t, :, None] * B[:, t, None]
            y.append((h * C[:, t, None]).sum(-1) + layer.skip.repeat_interleave(4) * x[:, t])
        normed = F.rms_norm(torch.stack(y, 1) * F.silu(z), (inner,), eps=1e-5)
        error = gap(layer(u)[0], layer.out(normed))
        return Check(error < 1e-9, f"largest difference {error:.0e}")

    with torch.no_grad():
        return check(torch.ones(N, dtype=torch.float64)), check(torch.linspace(0.5, 1.5, N, dtype=torch.float64))


@proof("gateloop", "Phases of π count parity over 2,000 bits, and scores carry the cosine of the turn between tokens.")
def gateloop() -> tuple[Check, Check]:
    draw = normals(3)
    q, k, size, angle = draw(1, 2, 60, 3), draw(1, 2, 60, 3), draw(1, 2, 60, 3), 3 * draw(1, 2, 60, 3)
    v, g = draw(1, 2, 60, 4), -size.abs()
    y, _ = gate_loop(q, k, v, g, angle, torch.zeros(1, 2, 6, 4, dtype=torch.float64))
    G, turn = g.cumsum(2), angle.cumsum(2)
    apart = (x[:, :, :, None] - x[:, :, None] for x in (G, turn))
    size, phase = next(apart), next(apart)
    scores = (q[:, :, :, None] * k[:, :, None] * size.clamp(max=0).exp() * phase.cos()).sum(-1).tril()
    error = gap(y, scores @ v)

    bits = (draw(1, 2000) > 0).double()
    x = torch.zeros(1, 2000, 3, dtype=torch.float64)
    x[..., 0], x[:, 0, 1], x[..., 2] = bits, 1, 1  # the bit, whether the stream begins, one

    def check(turns: bool) -> Check:
        layer = seeded(lambda: GateLoop(3), 3)
        with torch.no_grad():
            for p in layer.parameters():
                p.zero_()
            layer.transition.weight[0, 0] = -80 if turns else -40  # 40 or −40 keep all; 0 keeps half
            layer.transition.bias[0] = 40
            layer.qkv.weight[0, 2] = layer.qkv.weight[3, 1] = layer.qkv.weight[6, 2] = 1
            layer.gate.weight[0, 2] = 1
            layer.out.weight.copy_(torch.eye(3))
            odd = (layer(x)[0][0, :, 0] < 0).double()
        right = (odd == (bits.cumsum(1)[0] - bits[0, 0]) % 2).double().mean().item()
        return Check(right == 1 and error < 1e-9, f"{right:.0%} of parities; attention form: error {error:.0e}")

    return check(turns=True), check(turns=False)  # with real, positive transitions a bit can only make it forget


@proof("hgrn2", "With the key tied to the gate, a constant value is approached row by row and never overshot.")
def hgrn2() -> tuple[Check, Check]:
    draw = normals(4)
    layer = seeded(lambda: HGRN2(8, heads=1, lower_bound=0.5), 4)
    with torch.no_grad():
        decay = split(layer.log_decay(2 * draw(1, 300, 8)), 1).expand(8, -1, -1, -1)
    value = torch.linspace(1, 2, 8, dtype=torch.float64).expand(8, 1, 300, 8)
    row = torch.eye(8, dtype=torch.float64)[:, None, None].expand(8, 1, 300, 8)  # batch i reads row i

    def check(key: Tensor) -> Check:
        rows, _ = ops.linear_attention(row, key, value, decay)
        above, distance = (rows / value).max().item() - 1, gap(rows[:, :, -1], value[:, :, -1])
        return Check(
            above < 1e-9 and distance < 1e-9, f"at most {max(above, 0):.1g} too high; {distance:.1g} off after 300"
        )

    return check(-torch.expm1(decay)), check(draw(1, 1, 300, 8).sigmoid().expand(8, -1, -1, -1))


@proof("rwkv6", "It reads before it writes; without decay and with a bonus of one that is plain linear attention.")
def rwkv6() -> tuple[Check, Check]:
    draw = normals(5)
    r, k, v, g, u = draw(1, 2, 90, 4), draw(1, 2, 90, 4), draw(1, 2, 90, 4), -draw(1, 2, 90, 4).exp(), draw(2, 1, 4)
    S = start = draw(1, 2, 4, 4)
    loop = []
    for t in range(90):
        kv = k[:, :, t, :, None] * v[:, :, t, None]
        loop.append((r[:, :, t, None] @ (S + u.mT * kv))[:, :, 0])
        S = g[:, :, t, :, None].exp() * S + kv
    y, end = read_before_write(r, k, v, g, u, start)
    error = max(gap(y, torch.stack(loop, 2)), gap(end, S))
    x = draw(1, 90, 8)

    def check(bonus: float) -> Check:
        layer = seeded(lambda: RWKV6(8, heads=2), 5)
        with torch.no_grad():
            layer.decay_base.fill_(-100)
            layer.bonus.fill_(bonus)
            before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
            r, k, v, gate = (  # at the start the blends do not depend on the input
                linear(x + (before - x) * mix)
                for linear, mix in zip(
                    (layer.receptance, layer.key, layer.value, layer.gate), layer.mix[[3, 1, 2, 4]], strict=True
                )
            )
            plain, _ = ops.linear_attention(split(r, 2), split(k, 2), split(v, 2))
            want = layer.out(layer.norm(merge(plain)[0]) * F.silu(gate[0]))
            difference = gap(layer(x)[0][0], want)
        return Check(
            error < 1e-9 and difference < 1e-9,
            f"error {error:.0e} to the loop; {difference:.1g} to linear attention with a bonus of {bonus:g}",
        )

    return check(1.0), check(0.0)


@proof("lightnet", "Each key feature is a softmax over all tokens read, so their order does not matter.")
def lightnet() -> tuple[Check, Check]:
    draw = normals(6)
    x, order = draw(1, 80, 16), torch.randperm(79, generator=torch.Generator().manual_seed(6))
    shuffled = torch.cat([x[:, order], x[:, 79:]], 1)
    layer = seeded(lambda: LightNet(16, heads=2, gate_rank=4), 6)
    with torch.no_grad():
        q, k, v = (split(part, 2) for part in layer.qkv(x).chunk(3, -1))
        shares = torch.stack([k[:, :, : t + 1].softmax(2).mT @ v[:, :, : t + 1] for t in range(80)], 2)
        read = (F.silu(q)[..., None, :] @ shares)[..., 0, :] / 8**0.5
        want = layer.out(layer.norm(merge(read)) * F.silu(layer.gate(x)))

    def check(memory: Memory, want: Tensor) -> Check:
        with torch.no_grad():
            y = memory(x)[0]
            error, moved = gap(y, want), gap(memory(shuffled)[0][:, -1], y[:, -1])
        return Check(
            error < 1e-9 and moved < 1e-9, f"error {error:.0e}; shuffling what came before moves it by {moved:.1g}"
        )

    decayed = seeded(lambda: GLA(16, heads=2), 6)
    with torch.no_grad():
        return check(layer, want), check(decayed, decayed(x)[0])


@proof("jrt", "The prefix is read knowing its end, and a context that is read twice is read knowing the question.")
def jrt() -> tuple[Check, Check]:
    draw = normals(7)
    M = 12
    context, question = draw(1, 20, 8), draw(1, 4, 8)

    def reaches(memory: Memory, x: Tensor, source: slice, reader: slice) -> float:
        x = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(memory(x)[0][:, reader].square().sum(), x)
        return found[:, source].abs().max().item()

    def check(prefix: int, times: int) -> Check:
        layer = seeded(lambda: PrefixLinearAttention(8, heads=2, features=4, prefix=prefix), 7)
        back = reaches(layer, context, slice(M - 1, M), slice(0, 1))
        ahead = reaches(layer, context, slice(M, M + 1), slice(M - 1, M))
        causal = seeded(lambda: GLA(8, heads=2, rank=2), 7)
        prompt = read_twice(context, question, times=times)
        last = slice(24 * (times - 1), 24 * (times - 1) + 20)  # where the context is read for the last time
        asked = reaches(causal, prompt, slice(20, 24), last)
        return Check(
            back > 1e-9 and ahead == 0 and asked > 1e-9,
            f"slopes: first output by the prefix's last token {back:.1g}, that by what follows {ahead:.1g}; "
            f"last reading of the context by the question {asked:.1g}",
        )

    return check(M, times=2), check(0, times=1)


@proof("recurrentgemma", "It remembers beyond its windows in constant memory; attention alone does not.")
def recurrentgemma() -> tuple[Check, Check]:
    x = normals(8)(1, 60, 8)
    other = x.clone()
    other[:, 0] += 1
    with torch.device("meta"):  # the 2B model, without its weights
        measured = nbytes(RecurrentGemma(2560).initial_state(1))
    formula = 18 * (4 * (1 + 3) * 2560 + 1) + 8 * (4 * 2 * 2047 * 256 + 8)

    def check(*pattern: str) -> Check:
        stack = seeded(lambda: RecurrentGemma(8, layers=3, heads=2, window=4, pattern=pattern), 8)
        with torch.no_grad():
            moved = gap(stack(x)[0][:, -1], stack(other)[0][:, -1])
            after = nbytes(stack(x)[1])
        constant = after == nbytes(stack.initial_state(1))
        return Check(
            moved > 1e-9 and constant and measured == formula,
            f"a change 59 tokens ago moves the output by {moved:.1g} through windows of 4; {after:,} bytes (2B model: "
            f"{measured:,})",
        )

    return check("recurrent", "recurrent", "attention"), check("attention")
