"""The compiled steps are the definitions: outputs and states, of any layout, with and without the optional parts."""

from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F

from remanence.errors import ShapeError
from remanence.memory.griffin import BlockLinear
from remanence.memory.parts import HeadNorm, RMSNorm, rotate, token_shift
from remanence.ops import layer_steps, steps
from remanence.ops.conv import causal_conv, causal_conv_reference
from remanence.ops.delta import gated_delta_rule, gated_delta_rule_reference
from remanence.ops.dplr import dplr, dplr_reference
from remanence.ops.linear_attention import linear_attention, linear_attention_reference
from remanence.ops.norm import normalise_reference
from remanence.ops.scan import scan, scan_reference
from remanence.ops.selective_scan import selective_scan, selective_scan_reference
from remanence.ops.softmax_scan import softmax_scan, softmax_scan_reference

B, H, K, V, D, N = 2, 3, 4, 5, 6, 3


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    """Tokens of any size take the compiled form; a test that would pass without it fails."""
    torch.manual_seed(0)
    monkeypatch.setattr(steps, "STEP_FROM", 0)
    with torch.no_grad():
        yield


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def decays(*shape: int) -> torch.Tensor:
    g = -numbers(*shape).exp()
    g.view(-1)[0] = -1e5  # below the floor
    return g


def heads(width: int) -> torch.Tensor:
    """[B, H, 1, width] as layers make it: a view of [B, 1, H, width], of a slice."""
    return numbers(B, 1, 2 * H * width)[..., H * width :].unflatten(-1, (H, width)).transpose(1, 2)


def check(monkeypatch, name, op, reference, *inputs, state, **how):
    step = Mock(side_effect=getattr(steps, name))
    monkeypatch.setattr(steps, name, step)
    kept = {n: t.clone() for n, t in state.items()}
    y, after = op(*inputs, state=state, **how)
    want, want_after = reference(*inputs, state=state, **how)
    assert step.called
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after, want_after, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, kept, rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("bias", [None, D])
@pytest.mark.parametrize("silu", [False, True])
def test_causal_conv(monkeypatch, width, bias, silu):
    x = numbers(B, 1, 2 * D)[..., :D] * 30
    bias = None if bias is None else numbers(D)
    state = {"tail": numbers(B, width - 1, D)}
    check(
        monkeypatch, "causal_conv", causal_conv, causal_conv_reference, x, numbers(D, width), bias,
        state=state, silu=silu,
    )  # fmt: skip


def test_silu_at_the_ends():
    x = torch.tensor([[[-1e4, -700.0, -90.0, -59.0, 0.0, 90.0, 1e4]]])
    y, _ = steps.causal_conv(x, torch.ones(7, 1), None, torch.zeros(1, 0, 7), True)
    torch.testing.assert_close(y, F.silu(x), rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_normalise(weighted, gated, mean):
    x, gate = heads(V), heads(V) if gated else None
    weight = numbers(V) if weighted else None
    want = normalise_reference(x, weight, gate, eps=1e-5, mean=mean, scale=0.3)
    torch.testing.assert_close(steps.normalise(x, weight, gate, 1e-5, mean, 0.3), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [None, F.silu, torch.sigmoid])
@pytest.mark.parametrize("bias", [False, True])
def test_norm_of_each_head(kind, bias):
    norm = HeadNorm(H, H * V, eps=1e-3).double()
    norm.weight.copy_(numbers(H * V))
    norm.bias = torch.nn.Parameter(numbers(H * V)) if bias else None
    y, gate = numbers(B, 2, H * V) * 20, None if kind is None else numbers(B, 2, H * V)
    want = norm(y, gate, kind or F.silu)
    for t in range(2):
        at = slice(t, t + 1)
        got = norm(y[:, at], None if gate is None else gate[:, at], kind or F.silu)
        torch.testing.assert_close(got, want[:, at], rtol=1e-12, atol=1e-12)


def test_norm_gated_by_a_sigmoid():
    norm = RMSNorm(D).double()
    norm.weight.copy_(numbers(D))
    y, gate = numbers(B, 1, D), numbers(B, 1, D)
    want = normalise_reference(y, norm.weight, eps=1e-5) * gate.sigmoid()
    torch.testing.assert_close(norm(y, gate, torch.sigmoid), want, rtol=1e-12, atol=1e-12)


def test_rotate():
    x, frequencies = heads(2 * K), torch.rand(K, dtype=torch.float64)
    start = torch.tensor([3, 10**12])
    want = rotate(torch.cat([x, x], 2), start, frequencies)[:, :, :1]
    torch.testing.assert_close(rotate(x, start, frequencies), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(steps.rotate(x, start, frequencies), want, rtol=1e-12, atol=1e-12)


def test_token_shift():
    x, last, mix = numbers(B, 3, D), numbers(B, D), numbers(4, D)
    want, newest = token_shift(x, last, mix)
    for t in range(3):
        now, last = token_shift(x[:, t : t + 1], last, mix)
        each = token_shift(x[:, t : t + 1], x[:, t], mix[:, None, None].expand(4, B, 1, D).contiguous())[0]
        torch.testing.assert_close(torch.stack(now), torch.stack(want)[:, :, t : t + 1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.stack(each), x[:, t : t + 1].expand(4, B, 1, D), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, newest, rtol=0, atol=0)


def rg_lru(u, gates, rate, empty, start):
    """The recurrence alone: behind a convolution that sees one token, and a gate that lets everything through."""
    mixed = torch.cat([torch.full_like(u, 100), u], -1)
    conv = torch.ones(u.shape[2], 1, dtype=u.dtype), None, u.new_zeros(len(u), 0, u.shape[2])
    y, h, _ = layer_steps.rg_lru_token(mixed, conv, *gates, rate.expm1().log(), empty, start)
    torch.testing.assert_close(y[:, 0], 100 * h)
    return h


def test_rg_lru_maps_block_by_block():
    gates = [BlockLinear(H * K, H).double() for _ in range(2)]
    for gate in gates:
        gate.bias.copy_(numbers(H * K))
    u, rate, start = numbers(B, 1, H * K), numbers(H * K).exp(), numbers(B, H * K)
    decay, into = (gate(u).sigmoid()[:, 0] for gate in gates)
    log_a, empty = -8 * decay * rate, torch.tensor([True, False])
    scale = torch.where(empty[:, None], 1.0, (-torch.expm1(2 * log_a)).sqrt())
    want = log_a.exp() * start + scale * into * u[:, 0]
    h = rg_lru(u, [(gate.weight, gate.bias) for gate in gates], rate, empty, start)
    torch.testing.assert_close(h, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("bonus", [False, True])
def test_softmax_scan(monkeypatch, decay, bonus):
    inputs = 30 * numbers(B, 1, D), numbers(B, 1, D), decays(D) if decay else None, numbers(D) if bonus else None
    state = {"w": numbers(B, D), "u": numbers(B, D).exp(), "m": 10 * numbers(B, D)}
    check(monkeypatch, "softmax_scan", softmax_scan, softmax_scan_reference, *inputs, state=state)


@pytest.mark.parametrize("rate", [1e-9, 1e-4, 0.03, 0.5, 5.0])
def test_rg_lru_keeps_the_variance_at_every_rate(rate):
    empty = torch.zeros(1, dtype=torch.bool)
    for dtype, exact in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        one = torch.ones(1, 1, 1, dtype=dtype)
        half, open_ = (0 * one, torch.zeros(1, dtype=dtype)), (0 * one, torch.full((1,), 50, dtype=dtype))
        rates = torch.tensor([rate], dtype=torch.float64).to(dtype)
        h = rg_lru(one, [half, open_], rates, empty, torch.zeros(1, 1, dtype=dtype))
        want = (-torch.expm1(2 * -4 * torch.tensor([[rate]], dtype=torch.float64))).sqrt()
        torch.testing.assert_close(h.double(), want, rtol=exact, atol=0)


def test_states_of_another_shape_are_refused():
    for S in (numbers(B, H, K, V + 1), numbers(B + 1, H, K, V)):
        with pytest.raises(ShapeError, match="state must be"):
            linear_attention(heads(K), heads(K), heads(V), state={"S": S})
    with pytest.raises(ShapeError, match="state must be"):
        scan(decays(B, 1, D), numbers(B, 1, D), {"h": numbers(B, D + 1)})


def test_scan(monkeypatch):
    check(monkeypatch, "scan", scan, scan_reference, decays(B, 1, D), numbers(B, 1, D), state={"h": numbers(B, D)})


@pytest.mark.parametrize("kind", ["none", "head", "key"])
def test_linear_attention(monkeypatch, kind):
    g = {"none": None, "head": decays(B, 1, H).mT, "key": decays(B, H, 1, K)}[kind]
    state = {"S": numbers(B, H, K, V)}
    inputs = heads(K), heads(K), heads(V), g
    check(monkeypatch, "linear_attention", linear_attention, linear_attention_reference, *inputs, state=state)


@pytest.mark.parametrize("decay", [False, True])
def test_gated_delta_rule(monkeypatch, decay):
    inputs = heads(K), heads(K), heads(V), numbers(B, 1, H).mT.sigmoid(), decays(B, 1, H).mT if decay else None
    state = {"S": numbers(B, H, V, K).mT}
    check(monkeypatch, "gated_delta_rule", gated_delta_rule, gated_delta_rule_reference, *inputs, state=state)


@pytest.mark.parametrize("decay", [False, True])
def test_dplr(monkeypatch, decay):
    inputs = *(heads(n) for n in (K, K, V, K, K)), decays(B, H, 1, K) if decay else None
    check(monkeypatch, "dplr", dplr, dplr_reference, *inputs, state={"S": numbers(B, H, K, V)})


@pytest.mark.parametrize("exact", [False, True])
def test_selective_scan(monkeypatch, exact):
    A = -numbers(D, N).exp() if exact else None
    inputs = numbers(B, 1, D), numbers(B, 1, D).exp(), A, numbers(B, 1, N), numbers(B, 1, N)
    check(
        monkeypatch, "selective_scan", selective_scan, selective_scan_reference, *inputs,
        state={"h": numbers(B, D, N)},
    )  # fmt: skip


def test_gradients_take_the_other_form():
    x = numbers(1, 1, 600)
    assert steps.worth(x)
    with torch.enable_grad():
        assert not steps.worth(x)
    assert not steps.worth(x, x.float())
