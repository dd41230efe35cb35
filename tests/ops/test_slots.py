import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops import linear_attention
from remanence.ops.slots import slots, slots_carry, slots_reference, value_decayed

B, H, K, V, M = 2, 2, 4, 3, 5


def inputs(draw, T, decay=1.0):
    noise = draw(T)
    g = (-decay * noise(B, H, T, M).exp()).detach().requires_grad_()
    return [noise(B, H, T, K), noise(B, H, T, K), noise(B, H, T, V), noise(B, H, T, M), g]


@settings(deadline=None, max_examples=30)
@given(
    T=st.integers(0, 100),
    cuts=st.lists(st.integers(0, 100), max_size=4),
    chunk=st.sampled_from([1, 7, 16, 64]),
    decay=st.sampled_from([1e-6, 1.0, 30.0]),
    given_state=st.booleans(),
)
def test_any_chunks_and_cuts_give_the_loop(obeys, draw, T, cuts, chunk, decay, given_state):
    noise = draw(99)
    state = {"K": noise(B, H, M, K), "V": noise(B, H, M, V)} if given_state else None
    obeys(
        lambda *x, state=None: slots(*x, state, chunk_size=chunk),
        slots_reference,
        inputs(draw, T, decay),
        sorted(min(c, T) for c in cuts),
        state,
    )


def test_the_law_notices_a_lost_state(obeys, draw):
    with pytest.raises(AssertionError):
        obeys(lambda *x, state=None: slots(*x), slots_reference, inputs(draw, 20), [10])


def test_decay_on_values_is_decay_on_keys_transposed(draw):
    """The states of both are each other's transposes; only their readers stand on opposite sides."""
    q, k, _, w, g = inputs(draw, 70)
    _, by_value = value_decayed(q, k, w, g, chunk_size=16)
    _, by_key = linear_attention(w, w, k, g)
    torch.testing.assert_close(by_value["S"], by_key["S"].mT)


def test_slots_that_never_forget_and_hold_one_token_each_are_softmax_attention(draw):
    q, k, v, _, _ = inputs(draw, M)
    one_each = torch.eye(M, dtype=torch.float64).expand(B, H, M, M)
    y, _ = slots(q, k, v, one_each, torch.zeros_like(one_each))
    empty = slots(q, k, v, one_each, torch.zeros_like(one_each))[1]
    torch.testing.assert_close(empty["K"], k)
    want = (q[:, :, -1:] @ k.mT).softmax(-1) @ v  # the last token finds every slot filled
    torch.testing.assert_close(y[:, :, -1:], want)


def test_float32_follows_float64_at_hard_forgetting(agrees_in_float32, draw):
    agrees_in_float32(slots, inputs(draw, 300, 20.0))


def test_the_carry_is_affine(draw):
    q, k, v, w, g = inputs(draw, 30)
    noise = draw(3)
    start = {"K": noise(B, H, M, K), "V": noise(B, H, M, V)}
    _, end = slots(q, k, v, w, g, start)
    over, N = slots_carry(k, v, w, g)
    for name in end:
        torch.testing.assert_close(over * start[name] + N[name], end[name])


def test_wrong_shapes_say_what_was_expected(draw):
    q, k, v, w, g = inputs(draw, 4)
    with pytest.raises(ShapeError, match="log_decay must be"):
        slots(q, k, v, w, g[..., :2])
