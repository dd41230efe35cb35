import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops import gated_delta_rule_reference
from remanence.ops.dplr import REMEMBERED, dplr, dplr_carry, dplr_chunked, dplr_reference

B, H, K, V = 2, 2, 5, 3


def inputs(draw, T, decay=True, low=-1.0):
    """Transitions that shrink: what is read along a unit vector is taken away, in part or twice."""
    noise = draw(T)
    unit = F.normalize(noise(B, H, T, K).detach(), dim=-1)
    taken = (-unit).requires_grad_()
    given_back = (unit * 2 * noise(B, H, T, K).detach().sigmoid()).requires_grad_()
    x = [noise(B, H, T, K), noise(B, H, T, K), noise(B, H, T, V), taken, given_back]
    return [*x, (low * noise(B, H, T, K).detach().abs()).requires_grad_()] if decay else x


def in_chunks(size):
    def op(*x, state=None):
        x = list(x) + [None] * (6 - len(x))
        S = x[2].new_zeros(*x[1].shape[:2], x[1].shape[3], x[2].shape[3]) if state is None else state["S"]
        if not x[1].shape[2]:
            return x[2], {"S": S}
        y, S = dplr_chunked(*x, S, size)
        return y, {"S": S}

    return op


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("form", ["compiled", "chunked"])
@settings(deadline=None, max_examples=12)
@given(
    T=st.integers(0, 90),
    chunk_size=st.integers(1, 80),
    cuts=st.lists(st.integers(0, 90), max_size=4),
    given_state=st.booleans(),
)
def test_any_form_and_cuts_give_the_loop(obeys, draw, form, decay, T, chunk_size, cuts, given_state):
    state = {"S": draw(99)(B, H, K, V)} if given_state else None
    op = dplr if form == "compiled" else in_chunks(chunk_size)
    obeys(op, dplr_reference, inputs(draw, T, decay), sorted(min(c, T) for c in cuts), state)


def test_the_law_notices_a_lost_state(obeys, draw):
    with pytest.raises(AssertionError):
        obeys(lambda *x, state=None: dplr(*x), dplr_reference, inputs(draw, 20), [10])


@pytest.mark.parametrize("op", [dplr, in_chunks(64)], ids=["compiled", "chunked"])
@pytest.mark.parametrize("low", [0.0, -1.0, -60.0, -1e4])
def test_extreme_decays_in_float32(agrees_in_float32, draw, op, low):
    x = inputs(draw, 150)
    x[5] = low * torch.rand(x[5].shape, generator=torch.Generator().manual_seed(0)).round()
    if op is not dplr:
        x[5] = x[5].clamp(min=-60)
    agrees_in_float32(op, x)


@pytest.mark.parametrize("op", [dplr, in_chunks(64)], ids=["compiled", "chunked"])
def test_repeated_keys_in_float32(agrees_in_float32, op):
    """Keys that (nearly) repeat and full writes: the chunk's system is as far from the identity as it gets."""
    noise = torch.Generator().manual_seed(1)
    key = F.normalize(torch.ones(1, 1, 1, 16) + 0.1 * torch.randn(1, 1, 192, 16, generator=noise), dim=-1)
    q, v = torch.randn(1, 1, 192, 16, generator=noise), torch.randn(1, 1, 192, 8, generator=noise)
    agrees_in_float32(op, [q, key, v, -key, key])


def test_with_one_decay_for_all_features_it_is_the_gated_delta_rule(draw):
    noise = draw(3)
    q, k, v = noise(B, H, 50, K), F.normalize(noise(B, H, 50, K), dim=-1), noise(B, H, 50, V)
    beta, g = noise(B, H, 50).sigmoid(), -noise(B, H, 50).abs()
    want, end = gated_delta_rule_reference(q, k, v, beta, g)
    written = beta[..., None] * k
    got, state = dplr(q, written, v, -g.exp()[..., None] * k, written, g[..., None].expand_as(k))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state["S"], end["S"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [False, True])
def test_carry(draw, decay):
    x = inputs(draw, 33, decay)
    M, N = dplr_carry(*x[1:], chunk_size=8)
    start = draw(7)(B, H, K, V)
    want = dplr(*x, state={"S": start})[1]["S"]
    torch.testing.assert_close(M @ start + N, want, rtol=1e-9, atol=1e-9)


def test_long_sequences_and_many_features(obeys, draw):
    noise = draw(0)
    T, K, V = 8 * REMEMBERED + 5, 37, 70
    unit = F.normalize(noise(1, 2, T, K).detach(), dim=-1)
    x = [noise(1, 2, T, K), noise(1, 2, T, K), noise(1, 2, T, V)]
    x += [w.requires_grad_() for w in (-unit, unit * noise(1, 2, T, K).detach().sigmoid(), -0.1 * unit.abs())]
    obeys(dplr, dplr_reference, x, [100], tolerance=1e-8)


def test_two_threads_give_what_one_gives(draw):
    noise = draw(5)
    x = [noise(2, 3, 80, 64).detach() for _ in range(5)]
    x[3] = x[4] * 0
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = dplr(*x)[0]
        torch.set_num_threads(2)
        got = dplr(*x)[0]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got, want)


def test_bfloat16_keeps_a_float32_state(draw):
    y, state = dplr(*(t.detach().bfloat16() for t in inputs(draw, 20)))
    assert y.dtype == torch.bfloat16
    assert state["S"].dtype == torch.float32


def test_bad_arguments_say_what_was_expected(draw):
    q, k, v, a, b, g = inputs(draw, 4)
    with pytest.raises(ShapeError, match="b must be"):
        dplr(q, k, v, a, b[:, :, :3], g)
    with pytest.raises(ShapeError, match="log_decay must be"):
        dplr(q, k, v, a, b, g[..., 0])
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got -2"):
        dplr(q, k, v, a, b, g, chunk_size=-2)


def test_second_derivatives_are_those_of_the_loop(draw):
    x = [t[:1, :1, :, :2].detach().requires_grad_() for t in inputs(draw, 4)]
    assert torch.autograd.gradgradcheck(lambda *x: dplr(*x)[0], x)
