"""What is particular to the diagonal state spaces; the laws that all obey are tested in tests/laws."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from remanence import catalogue
from remanence.errors import ShapeError, UnknownName
from remanence.evaluation.proofs import ssm
from remanence.memory import LRU, S4D, S5, S7, Longhorn, Mamba, StableSSM
from remanence.memory.longhorn import implicit_step
from remanence.memory.reparameterise import KINDS, decay, decay_weight, rate, rate_weight
from remanence.memory.s5 import hold, normal_hippo
from remanence.memory.s7 import bounded
from remanence.state import nbytes

ALL = [LRU, S4D, S5, S7, Longhorn, Mamba, StableSSM]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def x(dim: int, time: int = 9, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, time, dim, dtype=torch.float64)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_arguments_out_of_range_are_refused_in_words() -> None:
    for build, words in [
        (lambda: Mamba(8, states=0), "Mamba: dim, width, states and rank must be at least 1, got 8, 16, 0, 1"),
        (lambda: Longhorn(8, rank=-1), "Longhorn: dim, width"),
        (lambda: LRU(8, r_min=0.9, r_max=0.5), "0 ≤ r_min < r_max ≤ 1"),
        (lambda: S5(8, states=6, blocks=2), "multiple of 2·heads"),
        (lambda: S4D(8, states=5), "S4D: states must be a positive even number, got 5"),
        (lambda: S7(8, rank=0), "S7: dim, states and rank"),
    ]:
        with pytest.raises(ValueError, match=words):
            build()
    with pytest.raises(UnknownName, match="did you mean 'legs'"):
        S4D(8, start="leg")
    for layer in (LRU, S4D, S5):
        with pytest.raises(UnknownName, match="did you mean 'softplus'"):
            layer(8, stable="softmax")
    with pytest.raises(ShapeError, match="gaps must be"):
        S5(8)(torch.zeros(1, 3, 8), gaps=torch.ones(1, 2))


def mamba_loop(layer: Mamba, u: torch.Tensor) -> torch.Tensor:
    """The published block, token by token, written without any part of the library."""
    N, rank = layer.states, layer.rank
    h = torch.zeros(u.shape[0], layer.width, N, dtype=u.dtype)
    out = []
    inner, z = layer.in_proj(u).chunk(2, -1)
    weight, bias = layer.conv.weight, layer.conv.bias
    conv = F.conv1d(inner.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=layer.width)
    inner = F.silu(conv[..., : u.shape[1]].mT)
    for t in range(u.shape[1]):
        dt, B, C = layer.x_proj(inner[:, t]).split([rank, N, N], -1)
        if layer.norm_eps is not None:
            dt, B, C = (s * (s.square().mean(-1, keepdim=True) + layer.norm_eps).rsqrt() for s in (dt, B, C))
        raw = layer.dt_proj(dt)
        if isinstance(layer, Longhorn):
            step = 1 / (1 + (-raw).exp() + B.square().sum(-1, keepdim=True))
            keep = 1 - step[..., None] * B[:, None].square()
        else:
            step = F.softplus(raw)
            keep = (step[..., None] * -layer.A_log.exp()).exp()
        h = keep * h + (step * inner[:, t])[..., None] * B[:, None]
        y = (h * C[:, None]).sum(-1) + layer.D * inner[:, t]
        out.append(layer.out_proj(y * F.silu(z[:, t])))
    return torch.stack(out, 1)


@pytest.mark.parametrize("layer", [Mamba, Longhorn])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"norm_eps": 1e-6}, {"bias": True, "conv_bias": False, "width": 10, "states": 3, "rank": 2, "conv": 2}],
)
def test_mamba_is_the_published_block(layer: type, arguments: dict) -> None:
    memory = layer(8, **arguments).double()
    u = x(8, time=30)
    close(memory(u)[0], mamba_loop(memory, u))


def test_mamba_starts_as_published() -> None:
    layer = Mamba(64)
    assert (layer.width, layer.states, layer.rank) == (128, 16, 4)
    close(layer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16), 1e-5)
    step = F.softplus(layer.dt_proj.bias)
    assert 1e-3 * 0.999 < step.min() < step.max() < 0.1001
    assert layer.dt_proj.weight.abs().max() <= 0.5
    assert torch.equal(layer.D, torch.ones(128))
    names = {n.split(".")[0] for n, _ in layer.named_parameters()}
    assert names == {"in_proj", "conv", "x_proj", "dt_proj", "A_log", "D", "out_proj"}


def test_a_hook_on_the_step_sizes_may_skip_tokens() -> None:
    layer = Mamba(8).double()
    u = x(8, time=12)
    layer.step_size.register_forward_hook(lambda _, __, delta: torch.cat([delta[:, :6], 0 * delta[:, 6:]], 1))
    close(layer(u)[1]["h"], layer(u[:, :6])[1]["h"])


def test_longhorn_has_no_rates_and_forgets_what_it_takes_in() -> None:
    assert "A_log" not in dict(Longhorn(8).named_parameters())
    beta, key = torch.rand(50, 1) * 10, torch.randn(50, 3) * 100
    decays = 1 - implicit_step(beta, key) * key.square()
    assert decays.min() >= 0
    assert decays.max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_reparameterisations_have_inverses(kind: str) -> None:
    r = torch.tensor([1e-4, 0.01, 0.5, 1.5], dtype=torch.float64)
    close(rate(rate_weight(r, kind), kind), r)
    d = torch.tensor([0.01, 0.5, 0.9, 0.9999], dtype=torch.float64)
    close(decay(decay_weight(d, kind), kind), d)


@pytest.mark.parametrize(("kind", "even"), [("best", True), ("exp", False), ("softplus", False), ("direct", False)])
def test_only_best_keeps_slope_and_weight_in_proportion(kind: str, even: bool) -> None:
    d = torch.tensor([0.9, 0.99, 0.999, 0.9999], dtype=torch.float64)
    w = decay_weight(d, kind).requires_grad_()
    (slope,) = torch.autograd.grad(decay(w, kind).sum(), w)
    criterion = slope.abs() / (1 - d).square() / w.detach().abs()
    assert torch.allclose(criterion, torch.full_like(d, 2.0)) == even


def test_best_reaches_its_range() -> None:
    w = torch.linspace(-1000, 1000, 2001, dtype=torch.float64)
    values = decay(w, "best")
    assert 0 <= values.min() < values.max() < 1
    assert decay(torch.zeros(()), "best", b=0.5) == -1


def test_lru_starts_on_its_ring_and_gamma_follows() -> None:
    layer = LRU(300, r_min=0.9, r_max=0.999, max_phase=math.pi / 10).double()
    radius = decay(layer.nu, "exp")
    assert 0.9 - 1e-5 <= radius.min() < 0.91
    assert 0.99 < radius.max() <= 0.999 + 1e-5
    close(layer.gamma.exp(), (1 - radius.square()).sqrt(), 1e-5)
    assert layer.theta.exp().max() <= math.pi / 10 + 1e-5


def test_lru_with_a_direct_and_negative_radius_turns_by_half() -> None:
    layer = LRU(4, stable="direct").double()
    u = x(4)
    want, _ = layer(u)
    with torch.no_grad():
        layer.nu.neg_()
        layer.theta.copy_((layer.theta.exp() + math.pi).log())
    close(layer(u)[0], want)


def test_the_normal_part_of_hippo_is_diagonalised() -> None:
    n = 12
    values, vectors = normal_hippo(n)
    values, vectors = torch.cat([values, values.conj()]), torch.cat([vectors, vectors.conj()], 1)
    root = (2 * torch.arange(n, dtype=torch.float64) + 1).sqrt()
    legs = -(torch.outer(root, root).tril() - torch.diag(torch.arange(n, dtype=torch.float64)))
    normal = legs + 0.5 * torch.outer(root, root)
    close((vectors @ torch.diag(values) @ vectors.mH).real, normal, 1e-11)
    close((vectors.mH @ vectors).real, torch.eye(n, dtype=torch.float64), 1e-12)


def test_the_hold_keeps_its_digits_for_small_steps() -> None:
    A = torch.complex(torch.tensor([-0.5, -0.5]), torch.tensor([0.0, 90.0]))
    a, held = hold(A, torch.tensor(1e-4))
    wide_a, wide_held = hold(A.to(torch.complex128), torch.tensor(1e-4, dtype=torch.float64))
    exact = (torch.exp(A.to(torch.complex128) * 1e-4) - 1) / A.to(torch.complex128)
    close(wide_held, exact, 1e-11)
    assert ((held - exact).abs() / exact.abs()).max() < 1e-6
    close(a.to(torch.complex128), wide_a, 1e-7)


def test_s5_with_equal_gaps_is_s5_and_one_long_gap_is_several_short_ones() -> None:
    layer = S5(4).double()
    u = x(4, time=8)
    close(layer(u, gaps=torch.ones(2, 8))[0], layer(u)[0])
    held = u[:, :1].expand(-1, 8, -1)
    close(layer(held)[1]["h"], layer(u[:, :1], gaps=torch.full((2, 1), 8.0))[1]["h"])


def test_s5_resumes_with_its_gaps() -> None:
    layer = S5(4).double()
    u, gaps = x(4, time=20), torch.rand(2, 20, dtype=torch.float64) * 5
    want, after = layer(u, gaps=gaps)
    first, state = layer(u[:, :7], gaps=gaps[:, :7])
    second, state = layer(u[:, 7:], state, gaps[:, 7:])
    close(torch.cat([first, second], 1), want)
    close(state["h"], after["h"])


@pytest.mark.parametrize("start", ["lin", "inv", "legs"])
def test_s4d_starts_as_published(start: str) -> None:
    layer = S4D(4, states=8, start=start)
    close(rate(layer.real), torch.full((4, 4), 0.5), 1e-5)
    n = torch.arange(4.0)
    known = {"lin": math.pi * n, "inv": 8 / math.pi * (8 / (2 * n + 1) - 1), "legs": normal_hippo(8)[0].imag.float()}
    close(layer.imaginary, known[start].expand(4, 4), 1e-5)


def test_s4d_modes_are_those_of_a_real_system_of_twice_the_size() -> None:
    """The factor 2: with its conjugates written out, the sum over modes is real and the same."""
    layer = S4D(3, states=6).double()
    a, c = layer.kernel()
    a, c = torch.cat([a, a.conj()], 1), torch.cat([c, c.conj()], 1) / 2
    h, y = torch.zeros_like(a), []
    u = x(3, time=20, batch=1)
    for token in u[0]:
        h = a * h + token[:, None]
        total = (c * h).sum(-1)
        assert total.imag.abs().max() < 1e-12
        y.append(total.real)
    out = F.gelu(torch.stack(y) + layer.D * u[0])
    close(layer(u)[0][0], F.glu(layer.out(out), -1))


def test_stable_ssm_is_s4d_but_for_its_rates() -> None:
    layer, plain = StableSSM(4, states=8).double(), S4D(4, states=8).double()
    plain.load_state_dict({**layer.state_dict(), "real": rate(layer.real, "best").log()})
    u = x(4)
    close(layer(u)[0], plain(u)[0])


def test_s7_is_its_definition() -> None:
    layer = S7(8, states=5, rank=3).double()
    u = x(8, time=15)
    h, y = torch.zeros(2, 5, dtype=torch.float64), []
    for token in u.unbind(1):
        moved, beta, D = layer.steer(token).split([5, 5, 8], -1)
        write, read = layer.codes(token).chunk(2, -1)
        B = torch.einsum("br,rnd->bnd", write, layer.B.weight.view(3, 5, 8))
        C = torch.einsum("br,drn->bdn", read, layer.C.weight.view(8, 3, 5))
        h = bounded(layer.Lambda + moved) * h + (B @ token[..., None])[..., 0] + beta
        y.append((C @ h[..., None])[..., 0] + D * token)
    y = torch.stack(y, 1)
    close(layer(u)[0], layer.gate(F.gelu(y)).sigmoid() * y)
    assert bounded(layer.Lambda).min() > 0.93


def test_state_bytes_are_what_the_docstrings_say() -> None:
    assert nbytes(Mamba(16).initial_state(1)) == 4 * (32 * 16 + 3 * 32)
    assert nbytes(Longhorn(16).initial_state(1)) == 4 * (32 * 16 + 3 * 32)
    assert nbytes(LRU(16).initial_state(1)) == 4 * 2 * 16
    assert nbytes(S5(16).initial_state(1)) == 4 * 16
    assert nbytes(S4D(16).initial_state(1)) == 4 * 16 * 64
    assert nbytes(S7(16).initial_state(1)) == 4 * 4


def test_the_examples_of_the_docs_run() -> None:
    page = Path(__file__).parents[2] / "docs" / "state-spaces.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("id", [i for i, p in catalogue.proofs().items() if p.run.__module__ == ssm.__name__])
def test_the_proof_holds_and_its_control_does_not(id: str) -> None:
    system, control = catalogue.proofs()[id].run()
    assert system.holds, system.says
    assert not control.holds, control.says
