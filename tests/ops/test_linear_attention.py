import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops import linear_attention, linear_attention_carry, linear_attention_reference
from remanence.ops.linear_attention import _by_chunks

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


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 40, 333])
def test_silu_inside_is_silu_before(obeys, draw, decay, T):
    """Also of parts of one tensor, whose gradients come side by side."""

    def before(*x, state=None):
        return linear_attention_reference(*(F.silu(t) for t in x[:3]), *x[3:], state=state)

    def inside(*x, state=None):
        return linear_attention(*x, state=state, silu=True, chunk_size=16)

    state = {"S": draw(99)(B, H, K, V)}
    obeys(inside, before, inputs(draw, T, decay), sorted({T // 3, T // 2}), state, tolerance=1e-8)


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


@pytest.mark.parametrize("decay", DECAYS)
def test_the_form_for_other_devices_is_the_loop_too(obeys, draw, decay):
    def op(q, k, v, g=None, state=None):
        start = q.new_zeros(B, H, K, V) if state is None else state["S"]
        y, S = _by_chunks(q, k, v, g, start, 32)
        return y, {"S": S}

    obeys(op, linear_attention_reference, inputs(draw, 70, decay, low=-20.0), [], {"S": draw(9)(B, H, K, V)})


@pytest.mark.parametrize("decay", DECAYS)
def test_views_are_read_in_place(draw, decay):
    x = [t.detach() for t in inputs(draw, 40, decay)]
    views = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in x]
    every_other = [torch.stack([t, -t], -1)[..., 0].requires_grad_() for t in x]
    want = linear_attention(*[t.requires_grad_() for t in x])[0]
    for strided in (views, every_other):
        y = linear_attention(*strided)[0]
        torch.testing.assert_close(y, want, rtol=0, atol=0)
        found, wanted = torch.autograd.grad(y.sum(), strided), torch.autograd.grad(want.sum(), x, retain_graph=True)
        for got, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
