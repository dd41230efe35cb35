"""What is particular to each projection and long convolution; the laws that all obey are tested in tests/laws."""

from __future__ import annotations

import copy
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from remanence.errors import ShapeError, StateError, UnknownName
from remanence.evaluation.proofs import convolution
from remanence.memory.base import Memory
from remanence.memory.ckconv import CKBlock, CKConv
from remanence.memory.fixed_point_rnn import FixedPointRNN, Mixer, mixed
from remanence.memory.hippo import HiPPO
from remanence.memory.lssl import LSSL, bilinear
from remanence.memory.parts import Derived
from remanence.memory.smr import SMR
from remanence.memory.tcnca import TCNCA, DilatedConvolutions, MovingAverage
from remanence.memory.warp import WARP
from remanence.models.vssm import VSSM, keyed_normal
from remanence.ops import steps
from remanence.ops.hippo import hippo_matrices, legs
from remanence.ops.long_conv import long_conv
from remanence.state import concat, flatten, fork, select

LAYERS = [
    HiPPO,
    LSSL,
    TCNCA,
    SMR,
    FixedPointRNN,
    partial(CKConv, depthwise=True),
    partial(CKBlock, horizon=20),
    partial(WARP, see=True),
]
VARIANTS = [
    partial(HiPPO, 4, order=6, measure="legt", window=10),
    partial(LSSL, 4, order=6, measure="legt", trainable=False, outputs=3),
    partial(TCNCA, 4, chunk=5, move="ema", order=3),
    partial(SMR, 4, inner="min-lstm-gru", squash=True),
    partial(FixedPointRNN, 4, rank=3, mixer="dplr", solver="exact"),
    partial(FixedPointRNN, 4, rank=2, most=1.0),
    partial(CKConv, 4, horizon=7, depthwise=True),
    partial(WARP, 3, width=4, depth=2, transition="dense"),
    partial(WARP, 3, width=4, start="network", see=True, deviation=True),
    partial(WARP, 3, width=4, depth=1, clip=0.3),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def x(dim: int, time: int = 9, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, time, dim, dtype=torch.float64)


def shaken(memory: Memory) -> Memory:
    memory.double()
    for p in memory.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return memory


@pytest.mark.parametrize("make", VARIANTS)
def test_every_variant_resumes(make: partial) -> None:
    memory = shaken(make())
    tokens = x(memory.dim, 75).requires_grad_()
    want, end = memory(tokens)
    pieces, state = [], None
    for piece in tokens.tensor_split([0, 1, 2, 40], dim=1):
        y, state = memory(piece, state)
        pieces.append(y)
    got = torch.cat(pieces, 1)
    size = 1 + want.detach().abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * size)
    for path, t in flatten(end).items():
        torch.testing.assert_close(flatten(state)[path], t, rtol=1e-9, atol=1e-9 * size)
    grads = [torch.autograd.grad(y.square().sum(), tokens)[0] for y in (got, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-8 * (1 + grads[1].abs().max().item()))


def test_arguments_out_of_range_are_refused_in_words() -> None:
    for build, words in [
        (lambda: HiPPO(4, measure="legz"), "'legs' or 'legt'.*'legz'"),
        (lambda: HiPPO(4, window=0), "window must be at least 1, got 0"),
        (lambda: LSSL(4, order=0), "order at least 1"),
        (lambda: CKConv(4, horizon=0), "horizon and hidden must be at least 1"),
        (lambda: CKConv(4).at_rate(0), "rate must be above 0, got 0"),
        (lambda: TCNCA(4, chunk=0), "at least 1, got 0"),
        (lambda: TCNCA(4, layers=0), "kernel, dilation and layers must be at least 1"),
        (lambda: SMR(4, inner=LSSL(5)), "must have dim=4, got 5"),
        (lambda: FixedPointRNN(4, most=1.5), r"most in \(0, 1\].*1.5"),
        (lambda: WARP(4, clip=-1.0), "clip above 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            build()
    for build, near in [
        (lambda: TCNCA(4, move="tnc"), "tcn"),
        (lambda: FixedPointRNN(4, mixer="householders"), "householder"),
        (lambda: FixedPointRNN(4, solver="iterated"), "iterate"),
        (lambda: WARP(4, transition="diag"), "diagonal"),
        (lambda: VSSM(4, likelihood="gauss"), "gaussian"),
        (lambda: SMR(4, inner="lsssl"), "lssl"),
    ]:
        with pytest.raises(UnknownName, match=near):
            build()


def test_what_is_derived_follows_the_weights() -> None:
    made = []
    derived = Derived(lambda p: made.append(1) or 2 * p)
    weight = torch.nn.Parameter(torch.ones(3))
    with torch.no_grad():
        derived(weight), derived(weight)
        assert len(made) == 1
        weight.data.mul_(3)  # no version counts this
        assert derived(weight).tolist() == [6, 6, 6]
        assert derived(weight.double()).dtype == torch.float64
    derived(weight).sum().backward()
    assert weight.grad is not None
    layer = LSSL(3, order=4)
    with torch.inference_mode():
        layer(torch.randn(1, 4, 3))
    layer.requires_grad_(False)
    inputs = torch.randn(1, 4, 3, requires_grad=True)
    layer(inputs)[0].sum().backward()  # what inference made must not be kept for this
    assert inputs.grad is not None


def test_hippo_remembers_what_its_cell_wrote() -> None:
    layer = HiPPO(3, order=8, channels=2).double()
    tokens = x(3, 70)
    written = []
    state = layer.initial_state(2)
    for t in range(70):
        _, state = layer(tokens[:, t : t + 1], state)
        written.append(F.linear(state["h"], layer.write.weight, layer.write.bias))
    torch.testing.assert_close(legs(torch.stack(written, 1), 8)[0][:, -1], state["c"], rtol=0, atol=1e-12)


def test_lssl_steps_by_the_bilinear_rule() -> None:
    A, B = hippo_matrices("legs", 8)
    step = torch.tensor([0.01], dtype=torch.float64)
    transition, write = bilinear(A, B, step.log())
    h, exact = torch.zeros(8, dtype=torch.float64), torch.linalg.solve(A, -B)
    for _ in range(5000):
        h = transition[0] @ h + write[0]
    torch.testing.assert_close(h, exact)  # a constant input settles where A h + B = 0
    near = torch.linalg.matrix_exp(A * 0.01)
    assert (transition[0] - near).abs().max() < 0.01


def test_lssl_keeps_its_precision_in_float32() -> None:
    layer = LSSL(8, order=64)
    tokens = torch.randn(1, 1500, 8)
    with torch.no_grad():
        got = layer(tokens)[0]
        want = copy.deepcopy(layer).double()(tokens.double())[0]
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_the_moving_average_is_its_kernel() -> None:
    move = MovingAverage(5, order=4).double()
    tokens = x(5, 200)
    decay, write, read = move.system()
    kernel = (read[..., None] * write[..., None] * decay[..., None] ** torch.arange(200)).sum(1)
    want = F.silu(long_conv(tokens, kernel)[0] + move.omega * tokens)
    torch.testing.assert_close(move(tokens, move.initial_state(2))[0], want, rtol=0, atol=1e-10)


def test_a_stream_of_one_row_moves_its_past_seldom_and_shares_it_with_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(steps, "STEP_FROM", 0)
    move = DilatedConvolutions(4, kernel=3, dilation=2, layers=2).double()
    tokens = torch.randn(1, 30, 4, dtype=torch.float64)
    same = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        want, _ = move(tokens, move.initial_state(1))
        state, y, states = move.initial_state(1), [], []
        for t, token in enumerate(tokens.split(1, 1)):
            other, before, copied = tokens.roll(7, 1)[:, t : t + 1], fork(state), copy.deepcopy(state)
            expected = move(other, before)
            out, after = move(token, state)
            same(move(other, state), expected)  # from the same state again, which is as it was
            same(move(other, copied), expected)
            y.append(out)
            states.append(state := after)
        same(torch.cat(y, 1), want)
        assert len({held["1"]["tail"].untyped_storage().data_ptr() for held in states}) == 30 // 5
        torch.save(state, tmp_path / "state.pt")
        same(move(token, torch.load(tmp_path / "state.pt")), move(token, state))


def test_tcnca_attends_only_within_the_chunk() -> None:
    layer = shaken(TCNCA(4, chunk=10, kernel=1, layers=1))
    tokens = x(4, 30)
    tokens.requires_grad_()
    layer(tokens)[0][:, 14].sum().backward()
    heard = tokens.grad.abs().sum((0, 2)) > 0
    assert heard.tolist() == [10 <= t <= 14 for t in range(30)]
    assert DilatedConvolutions(4, kernel=3, dilation=2, layers=3).receptive_field == 15


def test_smr_starts_as_its_inner_memory() -> None:
    for squash in (False, True):
        layer = SMR(4, inner="min-lstm-gru", squash=squash)
        tokens = torch.randn(2, 9, 4)
        assert torch.equal(layer(tokens)[0], layer.inner(tokens)[0])


def test_ckconv_is_a_convolution_over_its_horizon() -> None:
    layer = CKConv(3, horizon=20).double()
    tokens = x(3, 50).requires_grad_()
    kernel = layer.kernel()
    want = F.conv1d(F.pad(tokens.mT, (19, 0)), kernel.flip(-1), layer.bias).mT
    torch.testing.assert_close(layer(tokens)[0], want, rtol=0, atol=1e-10)
    assert layer.penalty() > 0


def test_ckconv_reads_a_finer_signal_to_nearly_the_same_output() -> None:
    layer = CKConv(2, horizon=200).double()
    coarse, fine = (
        torch.sin(torch.arange(0, 700, s).double()[:, None] / torch.tensor([7, 11]))[None] for s in (1, 0.5)
    )
    with torch.no_grad():
        want = layer(coarse)[0][:, 200:]
        got = layer.at_rate(2)(fine)[0][:, ::2][:, 200:]
        wrong = layer(fine)[0][:, ::2][:, 200:]
    assert (got - want).norm() < 0.05 * want.norm() < (wrong - want).norm()
    assert layer.at_rate(2).net is layer.net
    assert layer.at_rate(0.5).taps == 100


def test_ckconv_starts_with_unit_gain_and_sine_layers() -> None:
    layer = CKConv(3, omega=7.0)
    first, second, _ = layer.net
    torch.testing.assert_close(first.gain, first.weight.norm(dim=1))
    assert second.weight.abs().max() <= math.sqrt(6 / 32) / 7


@pytest.mark.parametrize("kind", ["householder", "dplr"])
def test_a_mixer_is_the_product_or_sum_of_reflections(kind: str) -> None:
    mixer = Mixer(5, 3, kind, 1.0).double()
    u, before, v = x(5), x(5), x(5)
    U, K = mixer(u, before)
    alpha = mixer.alpha(torch.cat([u, before], -1)).sigmoid()
    want = v
    for r in range(3):
        on = want if kind == "householder" else v
        along = 2 * alpha[..., r, None] * (U[..., r, :] * on).sum(-1, keepdim=True)
        want = want - along * U[..., r, :]
    torch.testing.assert_close(mixed((U, K), v), want, rtol=1e-5, atol=1e-5)  # α stays a millionth below its most


@pytest.mark.parametrize("arguments", [{}, {"rank": 2}, {"rank": 2, "mixer": "dplr"}])
def test_the_fixed_point_is_the_dense_recurrence(arguments: dict) -> None:
    layer = shaken(FixedPointRNN(4, **arguments))
    tokens = x(4, 30)
    fast = layer(tokens)[1]["h"]
    u = layer.inward(tokens).chunk(2, -1)[0]
    keep, bx = torch.sigmoid(layer.decay(u)), F.silu(layer.b(u)) * u
    h = torch.zeros(2, 8, dtype=torch.float64)
    one = torch.eye(8, dtype=torch.float64)
    for t in range(30):
        U, K = layer.mixer(u[:, t], h)
        Q, Lambda = one - U.mT @ K @ U, torch.diag_embed(keep[:, t])
        right = Lambda @ h[..., None] + (one - Lambda) @ Q @ bx[:, t, :, None]
        h = torch.linalg.solve(Lambda + (one - Lambda) @ Q, right)[..., 0]
    torch.testing.assert_close(fast, h, rtol=0, atol=1e-10)


def test_the_iteration_settles_by_itself_and_else_gives_way() -> None:
    for most, wanted in ((0.45, 0), (1.0, 1)):
        layer = FixedPointRNN(8, most=most, iterations=400).double()
        layer.decay.bias.data.fill_(-4)
        layer.mixer.alpha.bias.data.fill_(4)
        calls = []
        solve = layer.solve
        layer.solve = lambda *a, calls=calls, solve=solve: calls.append(1) or solve(*a)
        y, _ = layer(x(8, 20))
        assert len(calls) == wanted
        assert y.isfinite().all()


def test_warp_is_a_network_of_time_until_the_input_moves() -> None:
    layer = WARP(3, width=5, horizon=10)
    start = layer.initial_state(1)["theta"][:, None]
    y, state = layer(torch.randn(1, 4, 3))
    want = torch.cat([layer.read(start, torch.full((1, 1), t), torch.zeros(1, 1, 3)) for t in (1, 2, 3, 4)], 1)
    torch.testing.assert_close(y, want)
    assert torch.equal(state["theta"], start[:, 0])


def test_warp_forecasts_what_it_would_say_when_fed_back() -> None:
    layer = shaken(WARP(3, width=4, deviation=True, see=True))
    y, state = layer(x(3, 6))
    ahead, end = layer.forecast(state, 4)
    fed, last = y[:, -1:], state
    for t in range(4):
        torch.testing.assert_close(ahead[:, t : t + 1], fed)
        fed, last = layer(fed, last)
    torch.testing.assert_close(end["theta"], last["theta"])
    assert layer.forecast(state, 0)[0].shape == (2, 0, 3)
    mean, deviation, _ = layer.predict(x(3, 6))
    assert mean.shape == deviation.shape
    assert (deviation > 0).all()


def test_keyed_noise_is_normal_and_depends_on_nothing_but_its_key() -> None:
    seed, zero = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    whole = keyed_normal(seed, zero, 8000, 2)
    assert torch.equal(keyed_normal(seed[1:], zero[1:] + 70, 30, 2), whole[1:, 70:100])
    moments = [whole.mean(), whole.var() - 1, whole.pow(4).mean() - 3, (whole[:, 1:] * whole[:, :-1]).mean()]
    assert max(abs(m.item()) for m in moments) < 0.1
    assert abs((whole[0] * whole[1]).mean()) < 0.05
    assert abs((whole[..., 0] * whole[..., 1]).mean()) < 0.05


def test_vssm_rows_are_streams_of_their_own() -> None:
    model = VSSM(3, latent=4, hidden=8, layers=1).double()
    with torch.no_grad():
        _, state = model.observe(x(3), model.initial_state(torch.tensor([1, 2])))
        both, _ = model.generate(20, state)
        swapped, _ = model.generate(20, concat([select(state, 1), select(state, 0)]))
    torch.testing.assert_close(swapped, both.flip(0))
    assert (both[0] - both[1]).abs().max() > 0.1
    with pytest.raises(StateError, match="prior"):
        model.generate(3, {**VSSM(3, latent=4, hidden=12, layers=1).initial_state(torch.tensor([1]))})
    with pytest.raises(ShapeError, match="dim=3"):
        model.elbo(x(4))
    with pytest.raises(ValueError, match="at least 0"):
        model.generate(-1, state)


def test_the_bound_is_below_the_evidence_and_training_closes_the_gap() -> None:
    model = VSSM(2, latent=1, hidden=4, layers=0).double()  # no memory: factor analysis, whose evidence is known
    mixing, source = torch.tensor([[1.5, -0.8]], dtype=torch.float64), torch.Generator().manual_seed(0)

    def data(rows: int) -> torch.Tensor:
        z, e = (torch.randn(rows, 16, n, generator=source, dtype=torch.float64) for n in (1, 2))
        return z @ mixing + 0.5 * e

    def gap_per_step() -> float:
        blank, nothing = torch.zeros(1, 1, 2).double(), torch.zeros(1, 1, dtype=torch.bool)
        mean, log_std, _ = model.expect_latents(blank, nothing)
        factor = model.decoder.out.weight @ model.decoder.inward.weight * log_std.exp()[0, 0]
        covariance = factor @ factor.mT + torch.diag((2 * model.log_scale).exp())
        tokens = data(1000)
        evidence = torch.distributions.MultivariateNormal(model.decode(mean)[0][0, 0], covariance).log_prob(tokens)
        return (evidence.sum(1) - model.elbo(tokens, generator=source)).mean().item() / 16

    with torch.no_grad():
        before = gap_per_step()
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(150):
        optimizer.zero_grad()
        (-model.elbo(data(32), generator=source).mean() / 16).backward()
        optimizer.step()
    with torch.no_grad():
        after = gap_per_step()
    assert -0.01 < after < 0.1 < before


def test_the_prior_sees_the_prefix_and_no_more() -> None:
    model = VSSM(2, latent=3, hidden=8, layers=1, likelihood="bernoulli").double()
    for p in model.prior.out.parameters():
        p.data.normal_()
    tokens = torch.randint(0, 2, (1, 12, 2)).double()
    other = tokens.clone()
    other[:, 5:] = 1 - other[:, 5:]
    seen = torch.arange(12) < 5
    assert torch.equal(model.expect_latents(tokens, seen[None])[0], model.expect_latents(other, seen[None])[0])
    some, all_of_it = (model.divergence(tokens, torch.tensor([n])) for n in (5, 12))
    assert (some != all_of_it).all()
    assert (model.divergence(tokens, torch.tensor([5]), free=9.0) >= 12 * 9).all()


@pytest.mark.parametrize("id", ["hippo", "lssl", "fixed_point_rnn", "warp", "tcnca", "smr", "vssm"])
def test_proofs_hold_and_their_controls_do_not(id: str) -> None:
    system, control = getattr(convolution, id)()
    assert system.holds, system.says
    assert not control.holds, control.says


def test_the_example_of_the_docs_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "convolutions.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(page), "exec"), {"__name__": "example"})
