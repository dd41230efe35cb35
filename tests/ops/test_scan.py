import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops import scan, scan_carry, scan_reference


def inputs(draw, T, D=5, B=2):
    noise = draw(T)
    return [(-3 * noise(B, T, D).abs()).detach().requires_grad_(), noise(B, T, D)]


@settings(deadline=None, max_examples=25)
@given(T=st.integers(0, 70), cuts=st.lists(st.integers(0, 70), max_size=4), given_state=st.booleans())
def test_any_cuts_give_the_loop(obeys, draw, T, cuts, given_state):
    state = {"h": draw(99)(2, 5)} if given_state else None
    obeys(scan, scan_reference, inputs(draw, T), sorted(min(c, T) for c in cuts), state, axis=1)


def test_the_law_notices_a_lost_state(obeys, draw):
    def forgetful(log_decay, b, state=None):
        return scan(log_decay, b)

    with pytest.raises(AssertionError):
        obeys(forgetful, scan_reference, inputs(draw, 20), [10], axis=1)


@pytest.mark.parametrize("low", [0.0, -1.0, -60.0, -1e4])
def test_extreme_decays_in_float32(agrees_in_float32, draw, low):
    noise = draw(3)
    log_decay = low * torch.rand(2, 300, 5, generator=torch.Generator().manual_seed(0)).round()
    agrees_in_float32(scan, [log_decay, noise(2, 300, 5)])


def test_carry(draw):
    log_decay, b = inputs(draw, 33)
    M, N = scan_carry(log_decay, b)
    start = draw(7)(2, 5)
    torch.testing.assert_close(M * start + N, scan(log_decay, b, {"h": start})[1]["h"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 200, 3), (2, 129, 130), (9, 64, 17)])
def test_wide_and_unaligned_shapes(obeys, draw, shape):
    B, T, D = shape
    obeys(scan, scan_reference, inputs(draw, T, D, B), [T // 3], axis=1)


def test_strided_inputs_and_gradients_of_gradients_of_nothing(draw):
    log_decay, b = (x.detach() for x in inputs(draw, 40))
    strided = log_decay.mT.contiguous().mT, b.mT.contiguous().mT
    torch.testing.assert_close(scan(*strided), scan(log_decay, b))
    only_b = b.clone().requires_grad_()
    scan(log_decay, only_b)[0].sum().backward()
    assert only_b.grad is not None


def test_bfloat16_is_kept_in_float32(draw):
    log_decay, b = (x.detach().bfloat16() for x in inputs(draw, 9))
    h, state = scan(log_decay, b)
    assert h.dtype == state["h"].dtype == torch.float32
    torch.testing.assert_close(h, scan(log_decay.float(), b.float())[0])


def test_second_derivatives_are_those_of_the_loop(draw):
    log_decay, b = inputs(draw, 6, D=2, B=1)
    assert torch.autograd.gradgradcheck(lambda g, b: scan(g, b)[0], (log_decay, b))


def test_wrong_shape_says_what_was_expected(draw):
    log_decay, b = inputs(draw, 4)
    with pytest.raises(ShapeError, match="log_decay must be"):
        scan(log_decay[:, :3], b)
