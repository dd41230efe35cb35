import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops.neighborhood import neighborhood_attention, neighborhood_attention_reference, window_start

B, H, K, V = 2, 2, 4, 3
AXIS = st.tuples(st.integers(1, 9), st.integers(1, 3), st.booleans(), st.integers(0, 40))


def inputs(draw, *sizes):
    noise = draw(sum(sizes))
    return [noise(B, H, *sizes, K), noise(B, H, *sizes, K), noise(B, H, *sizes, V)]


def same(got, want, leaves):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    weights = torch.arange(1.0, want.numel() + 1).cos().view_as(want).double()
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), leaves),
        torch.autograd.grad((want * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(axis=AXIS)
def test_one_axis_is_the_masked_softmax(draw, axis):
    window, dilation, causal, more = axis
    options = {"window": window, "dilation": dilation, "causal": causal}
    x = inputs(draw, 10 * window * dilation // 9 + 1 + 3 * more)
    same(neighborhood_attention(*x, **options), neighborhood_attention_reference(*x, **options), x)


@settings(deadline=None, max_examples=15)
@given(axes=st.lists(AXIS, min_size=2, max_size=3))
def test_more_axes_are_the_masked_softmax(draw, axes):
    windows, dilations, causals = ([min(a[0], 3) for a in axes], [min(a[1], 2) for a in axes], [a[2] for a in axes])
    x = inputs(draw, *(w * d + a[3] % 5 for w, d, a in zip(windows, dilations, axes, strict=True)))
    options = {"window": windows, "dilation": dilations, "causal": causals}
    same(neighborhood_attention(*x, **options), neighborhood_attention_reference(*x, **options), x)


@pytest.mark.parametrize(
    ("window", "starts"), [(5, [0, 0, 0, 1, 2, 3, 4, 5, 5, 5]), (4, [0, 0, 0, 1, 2, 3, 4, 5, 6, 6])]
)
def test_windows_are_shifted_at_the_edges(window, starts):
    assert window_start(torch.arange(10), 10, window, causal=False).tolist() == starts


def test_a_window_over_everything_is_full_attention(draw):
    x = inputs(draw, 12)
    torch.testing.assert_close(neighborhood_attention(*x, window=12), F.scaled_dot_product_attention(*x))
    causal = neighborhood_attention(*x, window=12, causal=True)
    torch.testing.assert_close(causal, F.scaled_dot_product_attention(*x, is_causal=True))


def test_an_empty_axis_is_empty(draw):
    assert neighborhood_attention(*inputs(draw, 0), window=3).shape == (B, H, 0, V)


def test_impossible_arguments_are_refused(draw):
    x = inputs(draw, 6)
    with pytest.raises(ValueError, match="got window=4, dilation=2, length=6"):
        neighborhood_attention(*x, window=4, dilation=2)
    with pytest.raises(ValueError, match="one value per axis is needed, 1 in all"):
        neighborhood_attention(*x, window=(2, 2))
    with pytest.raises(ShapeError, match="one to three axes"):
        neighborhood_attention(x[0][0], x[1][0], x[2][0], window=2)
