import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops.lattice import REMEMBERED, _in_segments, lattice, lattice_reference

B, H, M, D = 2, 2, 4, 6
OPTIONS = [{}, {"correct": False}, {"by_slot": True}, {"renormalise": True}, {"by_slot": True, "renormalise": True}]


def inputs(draw, T, by_slot=False, **_):
    noise = draw(T)
    unit = [F.normalize(noise(B, H, T, n).detach(), dim=-1).requires_grad_() for n in (D if by_slot else M, M)]
    return [*unit, noise(B, H, T, D), noise(B, H, T).detach().sigmoid().requires_grad_()]


def segments(q, c, v, r, state, correct=True, renormalise=False, by_slot=False):
    if not v.shape[2]:
        return lattice_reference(q, c, v, r, state, by_slot=by_slot)
    y, S = _in_segments(q, c, v, r, state["S"], (correct, renormalise, by_slot))
    return y, {"S": S}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", [lattice, segments], ids=["compiled", "segments"])
@settings(deadline=None, max_examples=6)
@given(T=st.integers(0, 80), cuts=st.lists(st.integers(0, 80), max_size=3))
def test_any_form_and_cuts_give_the_loop(obeys, draw, form, options, T, cuts):
    def run(op):
        return lambda *x, state: op(*x, state, **options)

    state = {"S": draw(99)(B, H, M, D)}
    obeys(run(form), run(lattice_reference), inputs(draw, T, **options), sorted(min(c, T) for c in cuts), state)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_write_is_a_gradient_step_through_the_normalisation(draw, options):
    q, c, v, r = (x.detach()[:1, :1] for x in inputs(draw, 1, **options))
    S = draw(3)(1, 1, M, D)
    directions = F.normalize(S[0, 0], dim=-1)
    guess = directions.mT @ c[0, 0, 0]
    loss = (v[0, 0, 0] - guess).square().sum() / 2 if options.get("correct", True) else -v[0, 0, 0] @ guess
    want = S - r * torch.autograd.grad(loss, S)[0]
    want = F.normalize(want, dim=-1) if options.get("renormalise") else want
    y, state = lattice_reference(q, c, v, r, {"S": S}, **options)
    torch.testing.assert_close(state["S"], want, rtol=0, atol=1e-12)
    directions = F.normalize(want[0, 0], dim=-1)
    read = directions @ q[0, 0, 0] if options.get("by_slot") else directions.mT @ q[0, 0, 0]
    torch.testing.assert_close(y[0, 0, 0], read, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_float32_follows_float64(agrees_in_float32, draw, options):
    x = inputs(draw, 3 * REMEMBERED + 1, **options)
    agrees_in_float32(lambda *x: lattice(*x[:4], {"S": x[4]}, **options), [*x, draw(99)(B, H, M, D)])


def test_wrong_shapes_say_what_was_expected(draw):
    q, c, v, r = inputs(draw, 4)
    with pytest.raises(ShapeError, match="query must be"):
        lattice(q, c, v, r, {"S": draw(0)(B, H, M, D)}, by_slot=True)
    with pytest.raises(ShapeError, match="S must be"):
        lattice(q, c, v, r, {"S": draw(0)(B, H, M, D + 1)})


def test_second_derivatives_are_those_of_the_loop(draw):
    x = [t[:1, :1].detach().requires_grad_() for t in inputs(draw, 3)]
    state = draw(1)(1, 1, M, D)
    assert torch.autograd.gradgradcheck(lambda *x: lattice(*x[:4], {"S": x[4]})[0], [*x, state])
