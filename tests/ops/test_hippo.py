import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops.hippo import (
    _cell_by_tokens,
    hippo_matrices,
    legs,
    legs_carry,
    legs_read,
    legs_reference,
    legs_transitions,
    projected_cell,
)


@settings(deadline=None, max_examples=20)
@given(
    T=st.sampled_from([0, 1, 2, 7, 64, 65, 90]),
    order=st.sampled_from([1, 2, 9]),
    cuts=st.lists(st.integers(0, 90), max_size=3),
    far=st.sampled_from([None, 0, 5, 1000]),
)
def test_any_cuts_give_the_matrix_exponential(obeys, draw, T, order, cuts, far):
    noise = draw(T)
    state = None
    if far is not None:  # rows at different positions
        state = {"c": noise(2, 3, order), "position": torch.tensor([far, far + 3 * bool(far)])}
    obeys(
        lambda f, state: legs(f, order, state),
        lambda f, state: legs_reference(f, order, state),
        [noise(2, T, 3)],
        sorted(min(c, T) for c in cuts),
        state,
        axis=1,
    )


def test_the_matrices_are_those_of_the_paper():
    A, B = hippo_matrices("legs", 3)
    want = torch.tensor([[-1, 0, 0], [-(3**0.5), -2, 0], [-(5**0.5), -(15**0.5), -3]])
    torch.testing.assert_close(A.float(), want)
    torch.testing.assert_close(B.float(), torch.tensor([1.0, 3, 5]).sqrt())
    A, _ = hippo_matrices("legt", 2)
    torch.testing.assert_close(A.float(), torch.tensor([[-1, 3**0.5], [-(3**0.5), -3]]))
    with pytest.raises(ValueError, match="'legs' or 'legt'"):
        hippo_matrices("legz", 3)


def test_a_polynomial_history_is_read_back(draw):
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    f = (3 * t**3 - t)[None, :, None]
    c, _ = legs(f, 5)
    torch.testing.assert_close(legs_read(c[0, -1, 0], t), f[0, :, 0], rtol=0, atol=1e-5)


def test_high_orders_stay_exact(draw):
    f = draw(0)(1, 200, 1)
    torch.testing.assert_close(legs(f, 64)[0], legs_reference(f, 64)[0], rtol=0, atol=1e-8)


def test_single_steps_make_the_whole(draw):
    f = draw(0)(2, 70, 3)
    want, _ = legs(f, 12)
    A, b = legs_transitions(torch.zeros(2, dtype=torch.int64), 70, 12)
    c = torch.zeros(2, 3, 12, dtype=torch.float64)
    for t in range(70):
        c = c @ A[:, t].mT + f[:, t, :, None] * b[:, t, None]
    torch.testing.assert_close(c, want[:, -1], rtol=0, atol=1e-10)


def test_the_carry_gives_the_end_from_any_start(draw):
    f, start = draw(0)(2, 80, 3), draw(1)(2, 3, 7)
    for position in (torch.tensor([0, 40]), torch.tensor([5, 5])):
        M, L = legs_carry(f, 7, position)
        want = legs(f, 7, {"c": start, "position": position})[1]["c"]
        torch.testing.assert_close(start @ M.mT + L, want, rtol=0, atol=1e-10)
    assert torch.equal(legs_carry(f, 7)[1], legs(f, 7)[1]["c"])
    torch.testing.assert_close(legs_carry(f[:, :0], 7)[0][0], torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-12)


def test_float32(agrees_in_float32, draw):
    agrees_in_float32(lambda f: legs(f, 32), [draw(0)(2, 300, 3)])


def test_a_wrong_shape_is_refused(draw):
    with pytest.raises(ShapeError, match="batch, time, features"):
        legs(draw(0)(3, 4), 8)


@pytest.mark.parametrize(("B", "T", "H", "C", "N"), [(1, 2, 5, 1, 4), (3, 9, 4, 2, 3)])
def test_the_compiled_cell_is_its_definition(B, T, H, C, N):
    torch.manual_seed(0)
    shapes = (B, T, 2 * H), (2 * H, H + C * N), (C, H), (C,), (B, T, N, N), (B, T, N), (B, H), (B, C, N)
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    for i in (0, 1, 2, 3, 6, 7):
        inputs[i].requires_grad_()
    learnt = [x for x in inputs if x.requires_grad]
    ups = torch.randn(B, T, H, dtype=torch.float64), torch.randn(B, C, N, dtype=torch.float64)
    got, want = projected_cell(*inputs), _cell_by_tokens(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    found, due = (torch.autograd.grad(y, learnt, ups) for y in (got, want))
    torch.testing.assert_close(found, due, rtol=1e-10, atol=1e-10)
