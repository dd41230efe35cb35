"""Proofs of the projections, long convolutions and their kin: hand-made cases with a control that must fail."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import Check, proof
from remanence.evaluation.proofs.linear import gap, normals, seeded
from remanence.memory.ckconv import KernelNet
from remanence.memory.fixed_point_rnn import FixedPointRNN
from remanence.memory.lssl import LSSL
from remanence.memory.smr import SMR
from remanence.memory.tcnca import TCNCA
from remanence.memory.warp import WARP
from remanence.models.vssm import VSSM
from remanence.ops.dense_ssm import dense_ssm, dense_ssm_reference
from remanence.ops.hippo import hippo_matrices, legs, legs_read
from remanence.ops.long_conv import long_conv
from remanence.state import State, load, save


@proof("hippo", "One curve sampled 400 or 4,000 times leaves the same coefficients, and is read back from them.")
def hippo() -> tuple[Check, Check]:
    def curve(samples: int) -> tuple[Tensor, Tensor]:
        at = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
        return at, torch.sin(9 * at) + torch.cos(23 * at**2) / 2

    at, f = curve(1000)
    back = legs_read(legs(f[None, :, None], 64)[0][0, -1, 0], at)
    error = ((back - f).square().mean() / f.square().mean()).sqrt().item()

    def whole_past(f: Tensor) -> Tensor:
        return legs(f[None, :, None], 32)[0][0, -1, 0]

    def window(f: Tensor, length: int = 400) -> Tensor:
        A, B = hippo_matrices("legt", 32)
        joint = torch.linalg.matrix_exp(torch.cat([torch.cat([A, B[:, None]], 1) / length, A.new_zeros(1, 33)]))
        transition, write = joint[None, :-1, :-1], joint[None, :-1, -1]
        return dense_ssm(f[None, :, None], transition, write, write[:, None])[1]["h"][0, 0]

    def check(coefficients: Callable[[Tensor], Tensor]) -> Check:
        few, many = coefficients(curve(400)[1]), coefficients(curve(4000)[1])
        moved = ((few - many).norm() / many.norm()).item()
        return Check(moved < 0.01 and error < 0.01, f"coefficients differ by {moved:.1e}")

    system = check(whole_past)
    return Check(system.holds, f"{system.says}; read back with relative error {error:.1e}"), check(window)


@proof("lssl", "The kernel is the recurrence; half the step reads a signal sampled twice as finely to the same output.")
def lssl() -> tuple[Check, Check]:
    layer = seeded(lambda: LSSL(6, order=32), 0)
    phase = normals(0)(6)
    coarse, fine = (torch.sin(0.05 * torch.arange(0, 800, s).double()[:, None] + phase)[None] for s in (1.0, 0.5))
    with torch.no_grad():
        kernel = layer.kernel(800)[:, 0]
        recurrent, _ = dense_ssm_reference(coarse, *layer.system(), layer.C)
        same = gap(long_conv(coarse, kernel)[0], recurrent[..., 0])
        want, _ = layer(coarse)

        def check(step: float) -> Check:
            layer.log_step.add_(math.log(step))
            got = layer(fine)[0][:, ::2]
            layer.log_step.sub_(math.log(step))
            moved = ((got - want).norm() / want.norm()).item()
            return Check(same < 1e-10 and moved < 0.01, f"kernel off by {same:.0e}; output moved by {moved:.1%}")

        return check(0.5), check(1.0)  # the control convolves the finer signal with the same taps


@proof(
    "fixed-point-rnn",
    "Repeated diagonal scans become the dense recurrence if α is bounded; with α up to 1 they run away.",
)
def fixed_point_rnn() -> tuple[Check, Check]:
    x = normals(0)(2, 40, 16)

    def check(most: float) -> Check:
        layer = seeded(lambda: FixedPointRNN(16, most=most, rank=1), 0)
        with torch.no_grad():
            layer.decay.bias.fill_(-4)  # λ near 0: almost all depends on the mixer
            layer.mixer.alpha.bias.fill_(4)  # α near its bound
            u = layer.inward(x).chunk(2, -1)[0]
            given = (u, F.silu(layer.b(u)) * u, F.logsigmoid(layer.decay(u)), x.new_zeros(2, layer.width))
            h = torch.zeros_like(u)
            for _ in range(250):
                h = layer.step(*given, h)
            exact = layer.solve(*given)
        error = gap(h, exact) / exact.abs().max().item()
        return Check(error < 1e-10, f"relative distance from the closed form {error:.1e} with α below {most}")

    return check(0.45), check(1.0)


@proof("warp", "With A = I the weights are θ₀ + B(x_t − x₀), whatever the path; with A = 0.99 they are not.")
def warp() -> tuple[Check, Check]:
    path = normals(1)(2, 900, 3).cumsum(1)

    def check(A: float) -> Check:
        layer = seeded(lambda: WARP(3), 0)
        with torch.no_grad():
            layer.A.fill_(A)
            layer.B.add_(0.1 * normals(2)(*layer.B.shape))
            theta = layer(path)[1]["theta"]
            want = layer.theta + (path[:, -1] - path[:, 0]) @ layer.B.mT
        error = gap(theta, want)
        return Check(error < 1e-9, f"weights off by {error:.1e} after 900 tokens")

    return check(1.0), check(0.99)


@proof("ckconv", "A small network of sines becomes a kernel of 1,000 taps with 25 frequencies; one of ReLUs does not.")
def ckconv() -> tuple[Check, Check]:
    at = torch.linspace(-1, 1, 1000)
    draw = normals(0)
    frequency, weight, phase = torch.linspace(2.4, 60, 25).double(), draw(25), 6 * draw(25)
    target = (weight * torch.sin(at.double()[:, None] * frequency + phase)).sum(-1).float()

    def check(make: Callable[[], nn.Module], rate: float) -> Check:
        net = seeded(make, 0).float()
        optimizer = torch.optim.Adam(net.parameters(), rate)
        for _ in range(300):
            loss = (net(at)[:, 0] - target).square().mean() / target.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return Check(loss.item() < 0.02, f"relative squared error {loss.item():.2g} after 300 steps")

    relu = [nn.Unflatten(0, (-1, 1)), nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)]
    return check(lambda: KernelNet(1), 1.2e-2), check(lambda: nn.Sequential(*relu), 1e-2)


@proof("tcnca", "The gates see the receptive field and not one token more; a moving average never ends.")
def tcnca() -> tuple[Check, Check]:
    def check(move: str) -> Check:
        layer = seeded(lambda: TCNCA(4, move=move), 0)
        state = layer.move.initial_state(1)
        impulse = torch.zeros(1, 700, 4, dtype=torch.float64)
        impulse[:, 0] = 1
        with torch.no_grad():
            response = layer.move(impulse, state)[0] - layer.move(0 * impulse, state)[0]
        heard = response[0].abs().sum(-1) > 0
        last = int(heard.nonzero().max())
        return Check(bool(heard[:512].all()) and last == 511, f"an impulse is heard until {last} tokens later")

    return check("tcn"), check("ema")


@proof("smr", "Untrained it is its inner memory to the bit; its gate lets a linear memory hold what no linear one can.")
def smr() -> tuple[Check, Check]:
    draw = normals(0)
    x = draw(1, 2000, 4)
    inner = seeded(lambda: LSSL(4, order=8), 0)
    wrapped = SMR(4, inner=inner, width=2).double()
    with torch.no_grad():
        same = torch.equal(wrapped(x)[0], inner(x)[0])

    def linear(u: Tensor, lags: int = 8) -> Tensor:
        """A linear memory of each feature: its last inputs."""
        return torch.stack([F.pad(u, (0, 0, lag, 0))[:, : u.shape[1]] for lag in range(lags)], -1).flatten(2)[0]

    product = (x * F.pad(x, (0, 0, 1, 0))[:, :-1]).sum(-1)[0]  # u_t · u_{t−1}, summed over features
    with torch.no_grad():
        for p, value in zip(wrapped.conv.parameters(), ([1.0, 0.0], [0.0]), strict=True):
            p.copy_(torch.tensor(value).expand_as(p))  # the input is multiplied by the one before it
        factor, _ = wrapped.conv(x)

    def check(u: Tensor) -> Check:
        read = linear(u)
        fit = read @ torch.linalg.lstsq(read[:1000], product[:1000, None]).solution
        error = ((fit[1000:, 0] - product[1000:]).square().mean() / product[1000:].square().mean()).item()
        return Check(same and error < 0.01, f"products of neighbours read with relative squared error {error:.2g}")

    return check(x * factor), check(x)


@proof("vssm", "200 steps drawn in one pass are 100, a saved file, and 100 more; also one by one.")
def vssm() -> tuple[Check, Check]:
    model = seeded(lambda: VSSM(3, latent=4, hidden=16), 0)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        _, start = model.observe(normals(1)(2, 20, 3), model.initial_state(torch.tensor([3, 4])))
        whole, _ = model.generate(200, start)
        singles, state = [], start
        for _ in range(50):
            item, state = model.generate(1, state)
            singles.append(item)
        apart = gap(torch.cat(singles, 1), whole[:, :50])

        def check(between: Callable[[State], State]) -> Check:
            first, state = model.generate(100, start)
            save(between(state), Path(folder) / "state")
            second, _ = model.generate(100, load(Path(folder) / "state"))
            error = gap(torch.cat([first, second], 1), whole)
            return Check(max(error, apart) < 1e-10, f"pieces off by {error:.0e}, single steps by {apart:.0e}")

        forgets = check(lambda state: {**state, "position": torch.zeros_like(state["position"])})
        return check(lambda state: state), forgets  # the control draws its noise from the beginning again
