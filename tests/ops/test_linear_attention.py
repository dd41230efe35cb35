import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops import linear_attention, linear_attention_carry, linear_attention_reference

B, H, K, V = 2, 2, 5, 3
DECAYS = ["none", "head", "key"]


def inputs(draw, T, decay, low=-4.0):
    noise = draw(T)
    q, k, v = noise(B, H, T, K), noise(B, H, T, K), noise(B, H, T, V)
    shape = {"none": None, "head": (B, H, T), "key": (B, H, T, K)}[decay]
    return [q, k, v] if shape is None else [q, k, v, (low * noise(*shape).abs()).detach().requires_grad_()]


def chunked(chunk_size):
    return lambda *x, state=None: linear_attention(*x, state=state, chunk_size=chunk_size)


@pytest.mark.parametrize("decay", DECAYS)
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
    obeys(chunked(chunk_size), linear_attention_reference, inputs(draw, T, decay), cuts, state)


def test_the_law_notices_a_lost_state(obeys, draw):
    with pytest.raises(AssertionError):
        obeys(lambda *x, state=None: linear_attention(*x), linear_attention_reference, inputs(draw, 20, "head"), [10])


@pytest.mark.parametrize("decay", ["head", "key"])
@pytest.mark.parametrize("low", [0.0, -1.0, -60.0, -1e4])
def test_extreme_decays_in_float32(agrees_in_float32, draw, decay, low):
    x = inputs(draw, 150, decay)
    x[3] = low * torch.rand(x[3].shape, generator=torch.Generator().manual_seed(0)).round()
    agrees_in_float32(linear_attention, x)


def test_one_shot_split_of_the_decay_fails_where_the_halving_does_not(draw):
    q, k, v, g = (x.detach().float() for x in inputs(draw, 64, "key", low=-10.0))
    G = g.cumsum(2)
    split = ((q * G.exp()) @ (k * (-G).exp()).mT).tril() @ v
    assert not split.isfinite().all()
    assert linear_attention(q, k, v, g)[0].isfinite().all()


@pytest.mark.parametrize("decay", DECAYS)
def test_carry(draw, decay):
    x = inputs(draw, 33, decay)
    M, N = linear_attention_carry(*x[1:], chunk_size=8)
    start = draw(7)(B, H, K, V)
    want = linear_attention(*x, state={"S": start})[1]["S"]
    torch.testing.assert_close(M * start + N, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("decay", DECAYS)
def test_long_sequences_at_the_default_chunk(obeys, draw, decay):
    obeys(
        linear_attention, linear_attention_reference, inputs(draw, 64 * 20 + 5, decay, low=-0.5), [700], tolerance=1e-8
    )


def test_bfloat16_keeps_a_float32_state(draw):
    x = [t.detach().bfloat16() for t in inputs(draw, 20, "head")]
    y, state = linear_attention(*x)
    assert y.dtype == torch.bfloat16
    assert state["S"].dtype == torch.float32


def test_wrong_shape_says_what_was_expected(draw):
    q, k, v, g = inputs(draw, 4, "head")
    with pytest.raises(ShapeError, match="log_decay must be"):
        linear_attention(q, k, v, g[:, :, :3])
    with pytest.raises(ShapeError, match="value must be"):
        linear_attention(q, k, v[:, :1], g)


@pytest.mark.parametrize("decay", DECAYS)
def test_second_derivatives_are_those_of_the_loop(draw, decay):
    x = [t[:1, :1, :, :2].detach().requires_grad_() if t.ndim == 4 else t[:1, :1] for t in inputs(draw, 4, decay)]
    x = [t.detach().requires_grad_() for t in x]
    assert torch.autograd.gradgradcheck(lambda *x: linear_attention(*x, chunk_size=2)[0], x)
