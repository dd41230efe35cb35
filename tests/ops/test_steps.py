"""The compiled steps are the definitions: outputs and states, of any layout, with and without the optional parts."""

from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F

from remanence.ops import steps
from remanence.ops.conv import causal_conv, causal_conv_reference
from remanence.ops.delta import gated_delta_rule, gated_delta_rule_reference
from remanence.ops.dplr import dplr, dplr_reference
from remanence.ops.linear_attention import linear_attention, linear_attention_reference
from remanence.ops.norm import normalise_reference
from remanence.ops.scan import scan, scan_reference
from remanence.ops.selective_scan import selective_scan, selective_scan_reference

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
