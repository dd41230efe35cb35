import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops import causal_conv, causal_conv_reference


@settings(deadline=None, max_examples=30)
@given(
    T=st.integers(0, 40),
    width=st.sampled_from([1, 2, 4, 9]),
    cuts=st.lists(st.integers(0, 40), max_size=4),
    biased=st.booleans(),
    given_state=st.booleans(),
    silu=st.booleans(),
)
def test_any_cuts_give_the_loop(obeys, draw, T, width, cuts, biased, given_state, silu):
    noise = draw(T)
    weight, bias = noise(3, width), noise(3) if biased else None
    state = {"tail": noise(2, width - 1, 3)} if given_state else None
    obeys(
        lambda x, state: causal_conv(x, weight, bias, state, silu=silu),
        lambda x, state: causal_conv_reference(x, weight, bias, state, silu=silu),
        [noise(2, T, 3)],
        sorted(min(c, T) for c in cuts),
        state,
        others=[weight] if bias is None else [weight, bias],
        axis=1,
    )


def test_the_law_notices_a_lost_state(obeys, draw):
    weight = draw(1)(3, 4)
    with pytest.raises(AssertionError):
        obeys(
            lambda x, state: causal_conv(x, weight),
            lambda x, state: causal_conv_reference(x, weight, state=state),
            [draw(2)(2, 20, 3)],
            [10],
            others=[weight],
            axis=1,
        )


def test_it_is_a_depthwise_convolution(draw):
    x, weight, bias = draw(0)(2, 30, 3), draw(1)(3, 4), draw(2)(3)
    want = F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=3).mT
    torch.testing.assert_close(causal_conv(x, weight, bias)[0], want)


def test_float32(agrees_in_float32, draw):
    for silu in (False, True):
        x = [10 * draw(0)(2, 200, 3), draw(1)(3, 4)]
        agrees_in_float32(lambda x, w, silu=silu: causal_conv(x, w, silu=silu), x)


@pytest.mark.parametrize("silu", [False, True])
def test_second_derivatives_are_those_of_the_loop(draw, silu):
    x = [draw(0)(1, 4, 2), draw(1)(2, 3), draw(2)(2)]
    assert torch.autograd.gradgradcheck(lambda *x: causal_conv(*x, silu=silu)[0], x)


def test_bfloat16_keeps_a_float32_tail(draw):
    y, state = causal_conv(draw(0)(2, 9, 3).bfloat16(), draw(1)(3, 4))
    assert y.dtype == torch.bfloat16
    assert state["tail"].dtype == torch.float32


def test_wrong_width_says_what_was_expected(draw):
    with pytest.raises(ShapeError, match="features=3"):
        causal_conv(draw(0)(2, 9, 5), draw(1)(3, 4))


@pytest.mark.parametrize("T", [0, 1, 2, 200])
@pytest.mark.parametrize("silu", [False, True])
def test_parts_are_those_of_the_whole(draw, T, silu):
    x, weight, bias, tail = draw(0)(2, T, 300), draw(1)(300, 4), draw(2)(300), draw(3)(2, 3, 300)
    leaves = [x, weight, bias, tail]
    whole, after = causal_conv(x, weight, bias, {"tail": tail}, silu=silu)
    parts, end = causal_conv(x, weight, bias, {"tail": tail}, silu=silu, widths=[130, 7, 163])
    assert [part.shape for part in parts] == [(2, T, n) for n in (130, 7, 163)]
    assert torch.equal(torch.cat(parts, -1), whole)
    assert torch.equal(end["tail"], after["tail"])

    # of the middle part nothing is asked; the gradients of the others lie apart
    def gradients(first, last, **how):
        return torch.autograd.grad(first.sin().sum() + last.square().sum(), leaves, retain_graph=True, **how)

    ends = (whole[..., :130], whole[..., 137:]), (parts[0], parts[2])
    wanted, found = (gradients(*pair) for pair in ends)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    twice = [gradients(*pair, create_graph=True) for pair in ends]
    wanted, found = (torch.autograd.grad(sum(g.square().sum() for g in grads), leaves) for grads in twice)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
