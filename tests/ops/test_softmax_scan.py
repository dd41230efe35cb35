import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops.expgate import merge
from remanence.ops.softmax_scan import _by_doubling, _prepare, softmax_scan, softmax_scan_carry, softmax_scan_reference

B, D = 2, 3


def inputs(draw, T, width=1.0):
    noise = draw(T)
    return [(width * noise(B, T, D)).detach().requires_grad_(), noise(B, T, D)]


def parameters(draw, decay):
    noise = draw(77)
    return [(decay * -noise(D).exp()).detach().requires_grad_(), noise(D)]


def doubling(score, value, log_decay, bonus, state=None):
    y, w, u, m = _by_doubling(*_prepare(score, value, log_decay, bonus, state))
    return y, {"w": w, "u": u, "m": m}


@pytest.mark.parametrize("op", [softmax_scan, doubling])
@settings(deadline=None, max_examples=25)
@given(
    T=st.integers(0, 100),
    cuts=st.lists(st.integers(0, 100), max_size=4),
    width=st.sampled_from([1.0, 30.0]),
    decay=st.sampled_from([None, 1e-6, 0.3, 100.0]),
    given_state=st.booleans(),
)
def test_any_cuts_give_the_loop(obeys, draw, op, T, cuts, width, decay, given_state):
    noise = draw(99)
    state = None
    if given_state:
        u = noise(B, D).exp().detach().requires_grad_()
        state = {"w": noise(B, D), "u": u, "m": (20 * noise(B, D)).detach().requires_grad_()}
    g, bonus = (None, None) if decay is None else parameters(draw, decay)
    obeys(
        lambda s, v, state=None: op(s, v, g, bonus, state),
        lambda s, v, state=None: softmax_scan_reference(s, v, g, bonus, state),
        inputs(draw, T, width),
        sorted(min(c, T) for c in cuts),
        state,
        others=[] if decay is None or T == 0 else [g, bonus],
        axis=1,
    )


def test_the_law_notices_a_lost_state(obeys, draw):
    with pytest.raises(AssertionError):
        obeys(lambda *x, state=None: softmax_scan(*x), softmax_scan_reference, inputs(draw, 20), [10], axis=1)


def test_without_decay_it_is_the_softmax_of_each_prefix(draw):
    s, v = inputs(draw, 50, 20.0)
    y, _ = softmax_scan(s, v)
    want = torch.stack([(s[:, : t + 1].softmax(1) * v[:, : t + 1]).sum(1) for t in range(50)], 1)
    torch.testing.assert_close(y, want)


def test_with_decay_and_bonus_it_is_rwkv(draw):
    s, v = inputs(draw, 50, 3.0)
    g, bonus = parameters(draw, 0.3)
    t = torch.arange(50)
    past = (t[:, None] - 1 - t)[..., None] * g + s[:, None]
    logits = torch.where((t[:, None] > t)[..., None], past, -torch.inf)
    logits = torch.where((t[:, None] == t)[..., None], s[:, None] + bonus, logits)
    want = torch.einsum("btjd,bjd->btd", logits.softmax(2), v)
    torch.testing.assert_close(softmax_scan(s, v, g, bonus)[0], want)


def test_many_bands_and_threads(draw):
    noise = draw(5)
    s, v, g, bonus = noise(2, 300, 200), noise(2, 300, 200), (-noise(200).exp()).detach().requires_grad_(), noise(200)
    for x in zip(
        torch.autograd.grad(softmax_scan(s, v, g, bonus)[0].sin().sum(), [s, v, g, bonus]),
        torch.autograd.grad(doubling(s, v, g, bonus)[0].sin().sum(), [s, v, g, bonus]),
        strict=True,
    ):
        torch.testing.assert_close(*x, rtol=1e-9, atol=1e-9)


def test_float32_follows_float64_at_extreme_scores(agrees_in_float32, draw):
    g, bonus = (x.detach() for x in parameters(draw, 0.1))
    agrees_in_float32(lambda s, v: softmax_scan(s, v, g, bonus), inputs(draw, 600, 40.0))


def test_a_slow_decay_is_not_lost_in_float32(draw):
    """m + g = m in float32 when m = 1000 and g = 10⁻⁶: the past would never fade."""
    T = 100_000
    s, v = torch.full((1, T, 1), -1000.0), torch.zeros(1, T, 1)
    s[:, 0], v[:, 0] = 1000.0, 1.0
    _, state = softmax_scan(s, v, torch.tensor([-1e-6]))
    assert state["m"].item() == pytest.approx(1000 - 0.1, abs=1e-3)


def test_second_derivatives(draw):
    x = [*inputs(draw, 6), *parameters(draw, 0.3)]
    assert torch.autograd.gradgradcheck(lambda *x: softmax_scan(*x)[0], x)


def test_pieces_merge_by_maxima(draw):
    s, v = inputs(draw, 50, 5.0)
    g, _ = parameters(draw, 0.2)
    _, whole = softmax_scan(s, v, g)
    _, first = softmax_scan(s[:, :20], v[:, :20], g)
    joined = merge(first, *softmax_scan_carry(s[:, 20:], v[:, 20:], g))
    for name, x in whole.items():
        torch.testing.assert_close(joined[name], x)


def test_wrong_shapes_say_what_was_expected(draw):
    s, v = inputs(draw, 4)
    with pytest.raises(ShapeError, match="log_decay must be"):
        softmax_scan(s, v, torch.zeros(D + 1))
