import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops import window_attention, window_attention_reference

B, H, K, V = 2, 2, 4, 3


def inputs(draw, T):
    noise = draw(T)
    return [noise(B, H, T, K), noise(B, H, T, K), noise(B, H, T, V)]


def with_options(op, **options):
    return lambda *x, state=None: op(*x, state=state, **options)


@settings(deadline=None, max_examples=40)
@given(
    T=st.integers(0, 60),
    window=st.sampled_from([1, 2, 7, 31, 200, None]),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    prefix=st.sampled_from([None, 1, B]),
    seen=st.sampled_from([None, (0, 3), (500, 12)]),
)
def test_any_windows_and_cuts_give_the_loop(obeys, draw, T, window, cuts, prefix, seen):
    noise = draw(99)
    prefix = None if prefix is None else (noise(prefix, H, 3, K), noise(prefix, H, 3, V))
    state = None
    if seen is not None:
        room = 14 if window is None else window - 1
        seen = torch.tensor(seen).clamp(max=room if window is None else 500)
        state = {"k": noise(B, H, room, K), "v": noise(B, H, room, V), "seen": seen}
    options = {"window": window, "prefix": prefix}
    obeys(
        with_options(window_attention, **options),
        with_options(window_attention_reference, **options),
        inputs(draw, T),
        sorted(min(c, T) for c in cuts),
        state,
        others=prefix or (),
    )


def test_many_blocks(obeys, draw):
    options = {"window": 50}
    obeys(
        with_options(window_attention, **options),
        with_options(window_attention_reference, **options),
        inputs(draw, 433),
        [130],
    )


@pytest.mark.parametrize("window", [37, None])
@pytest.mark.parametrize("threads", [1, 3])
def test_heads_of_queries_share_keys_and_threads_share_heads(obeys, draw, window, threads):
    noise, before = draw(5), torch.get_num_threads()
    q, k, v = noise(1, 4, 433, K), noise(1, 2, 433, K), noise(1, 2, 433, V)
    prefix = (noise(1, 2, 300, K), noise(1, 2, 300, V))
    options = {"window": window, "prefix": prefix}
    ops = with_options(window_attention, **options), with_options(window_attention_reference, **options)
    torch.set_num_threads(threads)
    try:
        obeys(*ops, [q, k, v], [130], others=prefix)
    finally:
        torch.set_num_threads(before)


def test_wide_heads_are_held_in_fewer_columns(obeys, draw):
    noise = draw(6)
    options = {"window": None}
    obeys(
        with_options(window_attention, **options),
        with_options(window_attention_reference, **options),
        [noise(1, 1, 150, 300), noise(1, 1, 150, 300), noise(1, 1, 150, 5)],
        [70],
    )


@pytest.mark.parametrize("window", [5, None])
def test_second_derivatives_are_those_of_the_definition(draw, window):
    noise = draw(7)
    leaves = [noise(1, 2, 9, K), noise(1, 1, 9, K), noise(1, 1, 9, V)]

    def second(op):
        loss = (op(*leaves, window=window)[0] * torch.arange(1.0, V + 1)).square().sum()
        slopes = torch.autograd.grad(loss, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in slopes), leaves)

    for got, want in zip(second(window_attention), second(window_attention_reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_the_law_notices_a_lost_state(obeys, draw):
    def forgetful(*x, state=None):
        return window_attention(*x, window=8)

    with pytest.raises(AssertionError):
        obeys(forgetful, with_options(window_attention_reference, window=8), inputs(draw, 20), [10])


def test_a_window_as_long_as_the_sequence_is_causal_attention(draw):
    q, k, v = inputs(draw, 300)
    y, _, _ = window_attention(q, k, v, window=300)
    torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_what_left_the_window_cannot_be_seen(draw):
    q, k, v = (x.detach() for x in inputs(draw, 30))
    y = window_attention(q, k, v, window=10)[0][:, :, 29]
    for t, seen in ((19, False), (20, True)):
        other = v.clone()
        other[:, :, t] += 1
        assert torch.equal(window_attention(q, k, other, window=10)[0][:, :, 29], y) is not seen


def test_pieces_merge_by_logsumexp(draw):
    q, k, v = inputs(draw, 12)
    whole, total, _ = window_attention(
        q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], window=6, prefix=(k[:, :, :6], v[:, :, :6])
    )
    late, late_total, _ = window_attention(q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], window=6)
    scores = q[:, :, 6:] @ k[:, :, :6].mT / K**0.5
    early, early_total = scores.softmax(-1) @ v[:, :, :6], scores.logsumexp(-1)
    torch.testing.assert_close(torch.logaddexp(late_total, early_total), total)
    weight = (late_total - total).exp()[..., None]
    torch.testing.assert_close(weight * late + (1 - weight) * early, whole)


def test_large_scores_stay_finite_in_float32(agrees_in_float32, draw):
    q, k, v = inputs(draw, 40)
    agrees_in_float32(lambda *x: window_attention(*x, window=9), [100 * q, 10 * k, v], tolerance=1e-3)


def test_rows_have_positions_of_their_own(draw):
    q, k, v = inputs(draw, 9)
    _, _, state = window_attention(q[:1, :, :5], k[:1, :, :5], v[:1, :, :5], window=4)
    _, _, fresh = window_attention(q[1:, :, :0], k[1:, :, :0], v[1:, :, :0], window=4)
    both = {name: torch.cat([state[name], fresh[name]]) for name in state}
    y, _, after = window_attention(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], window=4, state=both)
    torch.testing.assert_close(y[:1], window_attention(q[:1], k[:1], v[:1], window=4)[0][:, :, 5:])
    torch.testing.assert_close(y[1:], window_attention(q[1:, :, 5:], k[1:, :, 5:], v[1:, :, 5:], window=4)[0])
    assert after["seen"].tolist() == [9, 4]


def test_wrong_arguments_say_what_was_expected(draw):
    q, k, v = inputs(draw, 4)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        window_attention(q, k, v, window=0)
    with pytest.raises(ShapeError, match="multiple of the 2 heads of key, got 3"):
        window_attention(torch.cat([q, q[:, :1]], 1), k, v, window=3)
    with pytest.raises(ShapeError, match="query must be"):
        window_attention(q[:, :, :2], k, v, window=3)
