"""Proofs of the diagonal state spaces: hand-made cases with a control that must fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from remanence.catalogue import Check, proof
from remanence.evaluation.proofs.linear import gap, normals, seeded
from remanence.memory.longhorn import implicit_step
from remanence.memory.lru import LRU
from remanence.memory.mamba import Mamba
from remanence.memory.reparameterise import decay, decay_weight
from remanence.memory.s4d import S4D
from remanence.memory.s5 import S5
from remanence.memory.s7 import bounded
from remanence.ops.complex_scan import complex_scan, diagonal_ssm
from remanence.ops.selective_scan import selective_scan


@proof("mamba", "With Δ chosen by the token, a marked value is held unchanged over 1000 tokens of noise.")
def mamba() -> tuple[Check, Check]:
    layer = seeded(lambda: Mamba(3, width=3, states=1, rank=1, conv=1, bias=True), 0)
    value, marker, one = torch.eye(3, dtype=torch.float64)
    with torch.no_grad():  # nothing but the recurrence between input and output: SiLU(z) = z = 100 at width 0
        for p in layer.parameters():
            p.zero_()
        layer.in_proj.weight[:3] = torch.eye(3)
        layer.in_proj.bias[3:] = 100
        layer.conv.weight.fill_(1)
        layer.x_proj.weight[:] = torch.stack([marker, one, one])  # δ, B and C
        layer.out_proj.weight[0] = value / 100
    draw = normals(0)
    x = torch.stack([draw(1050), torch.full((1050,), -4.0, dtype=torch.float64), torch.ones(1050)], -1)[None]
    x[0, 40, 1] = 0.05  # the marked token: SiLU(0.05) = 0.026, and SiLU(−4) = −0.07

    def check(selective: bool) -> Check:
        with torch.no_grad():
            layer.dt_proj.weight.fill_(1000 if selective else 0)
            y, _ = layer(x)
        kept = gap(y[0, 40:, 0], y[0, 40, 0].expand(1010))
        return Check(kept < 1e-9, f"the marked value {y[0, 40, 0]:.2g} moves by {kept:.1g} over 1000 tokens of noise")

    return check(True), check(False)


@proof("longhorn", "Its step minimises the online loss exactly, and the decay lies in (0, 1] for any key and β.")
def longhorn() -> tuple[Check, Check]:
    draw = normals(1)
    key, x, beta = 3 * draw(200, 4), draw(200, 1), draw(200, 1).exp()
    eye = torch.eye(4, dtype=torch.float64)

    def check(step: Callable[[Tensor, Tensor], Tensor]) -> Check:
        s, worst = torch.zeros(4, dtype=torch.float64), 0.0
        for k, target, b in zip(key, x, beta, strict=True):
            new = s - step(b, k) * (s @ k - target) * k
            best = torch.linalg.solve(eye + b * k[:, None] * k, s + b * target * k)  # of ‖s' − s‖² + β (s'·k − x)²
            worst, s = max(worst, gap(new, best)), best
        left = 1 - step(beta, key) * key.square()
        inside = bool(((left > 0) & (left <= 1)).all())
        # with one state per feature the layer's diagonal is the whole matrix
        one, delta = key[None, :, :1], step(beta, key[:, :1])[None]
        y, _ = selective_scan(x[None], delta, None, one, torch.ones_like(one))
        loop, h = [], torch.zeros(1, dtype=torch.float64)
        for k, target, b in zip(key[:, 0], x, beta, strict=True):
            h = (h + b * target * k) / (1 + b * k * k)
            loop.append(h)
        worst = max(worst, gap(y[0], torch.stack(loop)))
        says = f"{worst:.0e} from the minimum, decays from {left.min():.2g} to {left.max():.2g}"
        return Check(inside and worst < 1e-9, says)

    return check(implicit_step), check(lambda beta, key: beta)  # the control takes the plain gradient step


@proof("s7", "No input drives the transition out of [−1, 1): the state stays bounded on inputs of ±1000.")
def s7() -> tuple[Check, Check]:
    draw = normals(2)
    steered = -4 - torch.arange(8.0, dtype=torch.float64) + 1000 * draw(1, 100_000, 8).sign() * draw(8).abs()
    steered[:, ::2] = 0.3 * draw(1, 50_000, 8)  # and where the transition is near −1
    written = 1000 * draw(1, 100_000, 8).sign()

    def check(transition: Callable[[Tensor], Tensor]) -> Check:
        a = transition(steered)
        h, _ = complex_scan(a, written)
        inside = bool(((a >= -1) & (a < 1)).all())
        largest = h.abs().max().item()
        bound = written.abs().sum(1).max().item()  # what adding up all that was written would give
        held = math.isfinite(largest) and largest <= bound
        return Check(inside and held, f"transitions from {a.min():.3g} to {a.max():.3g}, states up to {largest:.2g}")

    return check(bounded), check(lambda x: 1 - x.square())


@proof("s4d", "The recurrence of the modes is the convolution with their kernel, by FFT over the whole sequence.")
def s4d() -> tuple[Check, Check]:
    layer = seeded(lambda: S4D(8, states=16), 3)
    u = normals(3)(2, 1500, 8)
    with torch.no_grad():
        a, c = layer.kernel()
        y, _ = diagonal_ssm(u, a, c)
        lags = torch.arange(1500, dtype=torch.float64)
        kernel = (c[..., None] * (a.log()[..., None] * lags).exp()).sum(1).real

    def check(length: int) -> Check:
        product = torch.fft.rfft(u.mT, n=length) * torch.fft.rfft(kernel, n=length)
        error = gap(torch.fft.irfft(product, n=length)[..., :1500].mT, y) / y.abs().max().item()
        return Check(error < 1e-12, f"relative error {error:.0e} with transforms of length {length}")

    return check(3000), check(1500)  # a transform no longer than the sequence wraps around


@proof("s5", "Read at random times, a forced oscillation is the differential equation's own solution.")
def s5() -> tuple[Check, Check]:
    layer = seeded(lambda: S5(2, states=8), 4)
    draw = normals(4)
    gaps = 0.2 + 4 * draw(1, 400).square()
    time = gaps.cumsum(1)[0]
    force = draw(2)
    with torch.no_grad():
        layer.real.fill_(math.log(0.02))
        layer.log_step.zero_()  # the usual step is one unit of time
        layer.D.zero_()
        layer.gate.weight.zero_()
        layer.gate.bias.fill_(60)  # open
        layer.C[1] = -layer.C[0]  # GELU(y) − GELU(−y) = y for the tanh form too
        A = torch.complex(-layer.real.exp(), layer.imaginary)
        B, C = torch.complex(layer.B[:, 0], layer.B[:, 1]), torch.complex(layer.C[0, :, 0], layer.C[0, :, 1])
        h = (torch.exp(A * time[:, None]) - 1) / A * (B @ force.to(B.dtype))  # of h' = A h + B u, from rest
        want = 2 * (h @ C).real

        def check(gaps: Tensor) -> Check:
            y, _ = layer(force.expand(1, 400, 2), gaps=gaps)
            error = gap(y[0, :, 0] - y[0, :, 1], want) / want.abs().max().item()
            return Check(error < 1e-9, f"relative error {error:.1g} at 400 times over {time[-1]:.0f} units")

        return check(gaps), check(gaps.mean().expand_as(gaps))


@proof("lru", "White noise leaves states of mean square one at initialisation, on the whole disc and near its rim.")
def lru() -> tuple[Check, Check]:
    noise = normals(5)(4, 3000, 32)

    def check(normalised: bool) -> Check:
        found = []
        for r_min, r_max in ((0.0, 1.0), (0.9, 0.999)):
            layer = seeded(partial(LRU, 32, states=256, r_min=r_min, r_max=r_max), 5)
            with torch.no_grad():
                if not normalised:
                    layer.gamma.zero_()
                _, early = layer(noise)
                found.append(early["h"].square().sum(-1).mean().item())
        says = ", ".join(f"{m:.2f}" for m in found)
        return Check(all(abs(m - 1) < 0.15 for m in found), f"mean |h|² {says} on the disc, near the rim")

    return check(True), check(False)


@proof("stablessm", "With perturbed weights a power-law memory stays what it was, however slow its slowest modes.")
def stablessm() -> tuple[Check, Check]:
    lags = torch.logspace(0, 6, 200, dtype=torch.float64)
    target = (1 + lags) ** -1.5

    def kernel(weights: Tensor, kind: str, parts: Tensor) -> Tensor:
        return (decay(weights, kind)[:, None].log() * lags).exp().T @ parts

    def modes(number: int) -> tuple[Tensor, Tensor]:
        """Decays and parts of (1 + t)^−1.5 = ∫ √r e^{−r} e^{−r t} dr / Γ(1.5), by the trapezoid rule in log r."""
        r = torch.linspace(math.log(10.0 ** (-number / 16)), math.log(20), number, dtype=torch.float64).exp()
        return (-r).exp(), r**1.5 * (-r).exp() / math.gamma(1.5) * (r[1] / r[0]).log()

    def check(*kinds: str) -> Check:
        holds, says = True, []
        for kind in kinds:
            errors = []
            for number in (32, 64, 128):
                value, parts = modes(number)
                weights = decay_weight(value, kind)
                perturbed = weights * (1 + 1e-2 * normals(number)(number).sign())
                errors.append(gap(kernel(perturbed, kind, parts), target))
            holds = holds and max(errors) < 0.05
            says.append(f"{kind} " + ", ".join(f"{e:.2g}" for e in errors))
        return Check(holds, f"error with 32, 64, 128 modes: {'; '.join(says)}")

    return check("exp", "best"), check("direct")
