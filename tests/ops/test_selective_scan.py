import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops.selective_scan import (
    _in_tensors,
    selective_scan,
    selective_scan_carry,
    selective_scan_reference,
)

RULES = ["mamba", "longhorn"]


def inputs(draw, T, rule, D=5, N=3, B=2):
    """x, delta, B, C that vary over time, and A, which does not."""
    noise = draw(T)
    x, b, c = noise(B, T, D), noise(B, T, N), noise(B, T, N)
    delta = noise(B, T, D).detach().square() / 4
    if rule == "longhorn":
        delta = delta / (1 + delta * b.detach().square().sum(-1, keepdim=True))
        return [x, delta.requires_grad_(), b, c], None
    A = -draw(1)(D, N).detach().exp()
    return [x, delta.requires_grad_(), b, c], A.requires_grad_()


def bound(op, A):
    def call(x, delta, B, C, state=None):
        return op(x, delta, A, B, C, state)

    return call


def both(A):
    return bound(selective_scan, A), bound(selective_scan_reference, A)


def rest(A):
    return [] if A is None else [A]


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=15)
@given(T=st.integers(0, 70), cuts=st.lists(st.integers(0, 70), max_size=4), given_state=st.booleans())
def test_any_cuts_give_the_loop(obeys, draw, rule, T, cuts, given_state):
    moving, A = inputs(draw, T, rule)
    state = {"h": draw(99)(2, 5, 3)} if given_state else None
    obeys(*both(A), moving, sorted(min(c, T) for c in cuts), state, others=rest(A), axis=1)


def test_the_law_notices_a_lost_state(obeys, draw):
    moving, A = inputs(draw, 20, "mamba")
    op, reference = both(A)
    with pytest.raises(AssertionError):
        obeys(lambda *x, state=None: op(*x), reference, moving, [10], axis=1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(1, 33, 3, 1), (2, 17, 300, 2), (3, 47, 7, 16)])
def test_wide_and_unaligned_shapes(obeys, draw, rule, shape):
    B, T, D, N = shape
    moving, A = inputs(draw, T, rule, D, N, B)
    obeys(*both(A), moving, [T // 3], others=rest(A), axis=1)


@pytest.mark.parametrize("rule", RULES)
def test_several_threads_give_what_one_gives(draw, rule):
    moving, A = inputs(draw, 40, rule, 150, 16)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        y, state = selective_scan(*moving[:2], A, *moving[2:])
        loss = y.sin().sum() + state["h"].cos().sum()
        found.append([y, state["h"], *torch.autograd.grad(loss, [*moving, *rest(A)])])
    torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_the_form_for_other_devices_is_the_same(draw, rule):
    (x, delta, B, C), A = inputs(draw, 150, rule)
    start = draw(5)(2, 5, 3)
    leaves = [x, delta, B, C, start, *rest(A)]
    found = []
    for y, h in (_in_tensors(x, delta, A, B, C, start), selective_scan_reference(x, delta, A, B, C, {"h": start})):
        h = h["h"] if isinstance(h, dict) else h
        found.append([y, h, *torch.autograd.grad(y.sin().sum() + h.cos().sum(), leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 30.0, 1e6])
def test_extreme_steps_in_float32(agrees_in_float32, draw, scale):
    (x, delta, B, C), A = inputs(draw, 200, "mamba")
    u = (x / (1 + scale * delta)).detach()  # what is written stays of order one
    agrees_in_float32(
        lambda u, delta, B, C, A: selective_scan(u, delta, A, B, C), [u, scale * delta, B, C, A], tolerance=2e-4
    )


def test_a_longhorn_step_may_forget_all(draw):
    """ε k² = 1: the old content is gone to the last bit, where a logarithm of the decay would be infinite."""
    x, C = draw(0)(1, 4, 2), torch.ones(1, 4, 1, dtype=torch.float64)
    one = torch.ones(1, 4, 2, dtype=torch.float64)
    y, _ = selective_scan(x, one, None, C, C)
    torch.testing.assert_close(y, x, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_carry(draw, rule):
    (x, delta, B, C), A = inputs(draw, 33, rule)
    M, N = selective_scan_carry(x, delta, A, B, C)
    start = draw(7)(2, 5, 3)
    want = selective_scan(x, delta, A, B, C, {"h": start})[1]["h"]
    torch.testing.assert_close(M * start + N, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_second_derivatives_are_those_of_the_loop(draw, rule):
    (x, delta, B, C), A = inputs(draw, 5, rule, D=2, N=2, B=1)

    def op(x, delta, B, C):
        y, state = selective_scan(x, delta, A, B, C)
        return y, state["h"]

    assert torch.autograd.gradgradcheck(op, (x, delta, B, C))


def test_a_forward_pass_without_gradients_keeps_nothing(draw):
    (x, delta, B, C), A = inputs(draw, 50, "mamba")
    with torch.no_grad():
        y, _ = selective_scan(x, delta, A, B, C)
    torch.testing.assert_close(y, selective_scan_reference(x, delta, A, B, C)[0], rtol=1e-9, atol=1e-9)


def test_bfloat16_is_kept_in_float32(draw):
    moving, A = inputs(draw, 9, "mamba")
    x, delta, B, C = (z.detach().bfloat16() for z in moving)
    y, state = selective_scan(x, delta, A.detach(), B, C)
    assert y.dtype == torch.bfloat16
    assert state["h"].dtype == torch.float32


def test_wrong_shapes_say_what_was_expected(draw):
    (x, delta, B, C), A = inputs(draw, 4, "mamba")
    with pytest.raises(ShapeError, match="delta must be"):
        selective_scan(x, delta[:, :3], A, B, C)
    with pytest.raises(ShapeError, match="A must be"):
        selective_scan(x, delta, A.mT, B, C)
    with pytest.raises(ShapeError, match="C must be"):
        selective_scan(x, delta, A, B, C[..., :1])


def test_what_memory_held_before_does_not_matter(draw):
    moving, A = inputs(draw, 40, "mamba")
    leaves = [z.detach().float().requires_grad_() for z in (*moving, A)]
    x, delta, B, C, A = leaves
    want = None
    for _ in range(20):
        litter = [np.full(n, np.nan, np.float32) for n in range(200, 330)]
        del litter
        y, state = selective_scan(x, delta, A, B, C)
        grads = torch.autograd.grad(y.sin().sum() + state["h"].sum(), leaves)
        want = grads if want is None else want
        assert all(torch.equal(g, w) for g, w in zip(grads, want, strict=True))
