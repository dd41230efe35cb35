import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops import dispatch, gated_delta_rule, gated_delta_rule_carry, gated_delta_rule_reference
from remanence.ops.delta import _by_chunks

B, H, K, V = 2, 2, 5, 3


def inputs(draw, T, decay=True, low=-1.0, largest_beta=2.0):
    noise = draw(T)
    key = F.normalize(noise(B, H, T, K).detach(), dim=-1).requires_grad_()
    beta = (largest_beta * noise(B, H, T).detach().sigmoid()).requires_grad_()
    x = [noise(B, H, T, K), key, noise(B, H, T, V), beta]
    return [*x, (low * noise(B, H, T).detach().abs()).requires_grad_()] if decay else x


def chunked(chunk_size):
    return lambda *x, state=None: gated_delta_rule(*x, state=state, chunk_size=chunk_size)


@pytest.mark.parametrize("decay", [False, True])
@settings(deadline=None, max_examples=20)
@given(
    T=st.integers(0, 90),
    chunk_size=st.integers(1, 80),
    cuts=st.lists(st.integers(0, 90), max_size=4),
    given_state=st.booleans(),
)
def test_any_chunks_and_cuts_give_the_loop(obeys, draw, decay, T, chunk_size, cuts, given_state):
    state = {"S": draw(99)(B, H, K, V)} if given_state else None
    cuts = sorted(min(c, T) for c in cuts)
    obeys(chunked(chunk_size), gated_delta_rule_reference, inputs(draw, T, decay), cuts, state)


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize(("unit", "scale"), [(True, 1.0), (True, 0.3), (False, 0.3)])
@pytest.mark.parametrize("T", [1, 40, 333])
def test_unit_length_inside_is_unit_length_before(obeys, draw, decay, T, unit, scale):
    def length(x):
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() if unit else x

    def before(q, k, *x, state=None):
        return gated_delta_rule_reference(scale * length(q), length(k), *x, state=state)

    def inside(*x, state=None):
        return gated_delta_rule(*x, state=state, unit=unit, scale=scale, chunk_size=16)

    x = inputs(draw, T, decay)
    if unit:
        with torch.no_grad():
            x[1] *= 3 * torch.rand(x[1].shape[:-1], generator=torch.Generator().manual_seed(1))[..., None]
            x[1][:, :, T // 2] = 0
    obeys(inside, before, x, sorted({T // 3, T // 2}), {"S": draw(99)(B, H, K, V)}, tolerance=1e-8)


def test_the_law_notices_a_lost_state(obeys, draw):
    with pytest.raises(AssertionError):
        obeys(lambda *x, state=None: gated_delta_rule(*x), gated_delta_rule_reference, inputs(draw, 20), [10])


@pytest.mark.parametrize("low", [0.0, -1.0, -60.0, -1e4])
def test_extreme_decays_in_float32(agrees_in_float32, draw, low):
    x = inputs(draw, 150)
    x[4] = low * torch.rand(x[4].shape, generator=torch.Generator().manual_seed(0)).round()
    agrees_in_float32(gated_delta_rule, x)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_hard_triangular_systems_in_float32(agrees_in_float32, beta, spread):
    """Keys that (nearly) repeat and full writes: the chunk's system is as far from the identity as it gets."""
    noise = torch.Generator().manual_seed(1)
    keys = F.normalize(torch.ones(1, 1, 1, 16) + spread * torch.randn(1, 1, 192, 16, generator=noise), dim=-1)
    q, v = torch.randn(1, 1, 192, 16, generator=noise), torch.randn(1, 1, 192, 8, generator=noise)
    agrees_in_float32(gated_delta_rule, [q, keys, v, torch.full((1, 1, 192), beta)])


def test_overwriting_one_of_orthonormal_keys_leaves_the_others():
    keys = torch.eye(8, dtype=torch.float64)[None, None]
    key = torch.cat([keys, keys[:, :, 3:4]], 2)
    value = torch.randn(1, 1, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, state = gated_delta_rule(key, key, value, torch.ones(1, 1, 9, dtype=torch.float64))
    want = value[:, :, :8].clone()
    want[:, :, 3] = value[:, :, 8]
    torch.testing.assert_close(state["S"], want)


@pytest.mark.parametrize("decay", [False, True])
def test_carry(draw, decay):
    x = inputs(draw, 33, decay)
    M, N = gated_delta_rule_carry(*x[1:], chunk_size=8)
    start = draw(7)(B, H, K, V)
    want = gated_delta_rule(*x, state={"S": start})[1]["S"]
    torch.testing.assert_close(M @ start + N, want, rtol=1e-9, atol=1e-9)


def test_long_sequences_at_the_default_chunk(obeys, draw):
    obeys(gated_delta_rule, gated_delta_rule_reference, inputs(draw, 64 * 20 + 5, low=-0.1), [700], tolerance=1e-8)


def test_bfloat16_keeps_a_float32_state(draw):
    y, state = gated_delta_rule(*(t.detach().bfloat16() for t in inputs(draw, 20)))
    assert y.dtype == torch.bfloat16
    assert state["S"].dtype == torch.float32


def test_wrong_shape_says_what_was_expected(draw):
    q, k, v, beta, g = inputs(draw, 4)
    with pytest.raises(ShapeError, match="beta must be"):
        gated_delta_rule(q, k, v, beta[:, :, :3], g)


def test_second_derivatives_are_those_of_the_loop(draw):
    x = [(t[:1, :1, :, :2] if t.ndim == 4 else t[:1, :1]).detach().requires_grad_() for t in inputs(draw, 4)]
    assert torch.autograd.gradgradcheck(lambda *x: gated_delta_rule(*x, chunk_size=2)[0], x)


@pytest.mark.parametrize("decay", [False, True])
def test_the_form_for_other_devices_is_the_loop_too(obeys, draw, decay):
    def op(q, k, v, beta, g=None, state=None):
        start = q.new_zeros(B, H, K, V) if state is None else state["S"]
        y, S = _by_chunks(q, k, v, beta, g, start, 32)
        return y, {"S": S}

    obeys(op, gated_delta_rule_reference, inputs(draw, 70, decay), [], {"S": draw(9)(B, H, K, V)})


def test_views_are_read_in_place(draw):
    x = [t.detach() for t in inputs(draw, 40)]
    views = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in x]
    want, y = gated_delta_rule(*[t.requires_grad_() for t in x])[0], gated_delta_rule(*views)[0]
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    for got, expected in zip(torch.autograd.grad(y.sum(), views), torch.autograd.grad(want.sum(), x), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_second_derivatives_of_inputs_made_of_each_other(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 9, 3, generator=generator, dtype=torch.float64).requires_grad_()
    beta = torch.rand(1, 1, 9, generator=generator, dtype=torch.float64)
    found = []
    for floor in (0, 2**62):
        monkeypatch.setattr(dispatch, "COMPILED_FROM", floor)
        y = gated_delta_rule(x, x, 2 * x, beta)[0]
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
