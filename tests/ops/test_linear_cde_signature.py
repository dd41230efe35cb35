import itertools

import pytest
import torch

from remanence.errors import ShapeError
from remanence.ops.linear_cde import linear_cde, linear_cde_carry, linear_cde_reference
from remanence.ops.signature import chen, levels, signature, signature_reference


def normals(seed):
    source = torch.Generator().manual_seed(seed)
    return lambda *shape, scale=1.0: scale * torch.randn(*shape, generator=source, dtype=torch.float64)


def inputs(T, dense, driven=True, seed=0):
    draw = normals(seed)
    shape = (3, 4, 4) if dense else (3, 4)
    made = [draw(2, T, 3, scale=0.3), draw(*shape, scale=0.5), draw(4, 3) if driven else None, draw(2, 4)]
    return [x if x is None else x.requires_grad_() for x in made]


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def grads(y, state, leaves):
    draw = normals(9)
    loss = (y * draw(*y.shape)).sum() + sum((s * draw(*s.shape)).sum() for s in state.values())
    leaves = [x for x in leaves if x is not None]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("driven", [False, True])
@pytest.mark.parametrize("T", [0, 1, 37])
def test_the_fast_cde_is_its_definition(T, dense, driven):
    dX, A, B, h = inputs(T, dense, driven)
    want, want_state = linear_cde_reference(dX, A, B, {"h": h})
    got, got_state = linear_cde(dX, A, B, {"h": h}, chunk_size=8)
    close(got, want)
    close(got_state, want_state)
    close(grads(got, got_state, [dX, A, B, h]), grads(want, want_state, [dX, A, B, h]))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 13, 30])
def test_a_cde_may_be_cut_anywhere(cut, dense):
    dX, A, B, h = inputs(30, dense)
    want, want_state = linear_cde(dX, A, B, {"h": h}, chunk_size=7)
    first, state = linear_cde(dX[:, :cut], A, B, {"h": h}, chunk_size=7)
    second, state = linear_cde(dX[:, cut:], A, B, state, chunk_size=7)
    close(torch.cat([first, second], 1), want)
    close(state, want_state)
    M, n = linear_cde_carry(dX, A, B)
    close((M * h if not dense else torch.einsum("bij,bj->bi", M, h)) + n, want_state["h"])


def test_a_cde_step_solves_its_equation():
    dX, A, B, h = (x.detach() for x in inputs(1, True))
    fine = 2000
    want = h
    for _ in range(fine):  # the midpoint rule along the straight line

        def slope(h):
            return torch.einsum("bd,dij,bj->bi", dX[:, 0], A, h) + dX[:, 0] @ B.mT

        want = want + slope(want + slope(want) / (2 * fine)) / fine
    torch.testing.assert_close(linear_cde(dX, A, B, {"h": h})[1]["h"], want, rtol=1e-6, atol=1e-6)


def test_a_diagonal_cde_is_a_dense_one():
    dX, A, B, h = inputs(20, False)
    close(linear_cde(dX, A, B, {"h": h})[0], linear_cde(dX, torch.diag_embed(A), B, {"h": h})[0])


def test_tiny_steps_are_exact_and_have_gradients():
    dX, A, B, h = inputs(5, False)
    small = (1e-9 * dX.detach()).requires_grad_()
    y, _ = linear_cde(small, A, B, {"h": h})
    close(y, linear_cde(small, torch.diag_embed(A), B, {"h": h})[0])
    assert torch.autograd.grad(y.sum(), small)[0].isfinite().all()


@pytest.mark.parametrize("T", [0, 1, 29])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_the_fast_signature_is_its_definition(T, depth):
    draw = normals(1)
    dX = draw(2, T, 2, scale=0.4).requires_grad_()
    start = draw(2, sum(2**k for k in range(1, depth + 1))).requires_grad_()
    want, want_state = signature_reference(dX, depth, {"S": start})
    got, got_state = signature(dX, depth, {"S": start}, chunk_size=8)
    close(got, want)
    close(got_state, want_state)
    close(grads(got, got_state, [dX, start]), grads(want, want_state, [dX, start]))


@pytest.mark.parametrize("cut", [0, 1, 17, 29])
def test_a_signature_may_be_cut_anywhere_and_joined_by_chen(cut):
    dX = normals(2)(2, 29, 3, scale=0.4)
    want, want_state = signature(dX, 3, chunk_size=8)
    first, state = signature(dX[:, :cut], 3, chunk_size=8)
    second, end = signature(dX[:, cut:], 3, state, chunk_size=8)
    close(torch.cat([first, second], 1), want)
    close(end, want_state)
    close(chen(state["S"], signature(dX[:, cut:], 3)[1]["S"], 3), want_state["S"])


def test_levels_are_iterated_integrals_and_obey_the_shuffle_product():
    dX = normals(3)(1, 40, 2, scale=0.4)
    one, two, three = (level[0] for level in levels(signature(dX, 3)[1]["S"], 2))
    close(one, dX.sum(1)[0])
    path = torch.cat([torch.zeros(1, 1, 2).double(), dX.cumsum(1)], 1)[0]
    middle = (path[1:] + path[:-1]) / 2
    close(two.view(2, 2), torch.einsum("ti,tj->ij", middle, dX[0]))
    for i, j, k in itertools.product(range(2), repeat=3):
        words = three.view(2, 2, 2)
        close(one[i] * two.view(2, 2)[j, k], words[i, j, k] + words[j, i, k] + words[j, k, i])


def test_shapes_that_cannot_be_are_refused():
    dX = torch.zeros(2, 5, 3)
    with pytest.raises(ShapeError, match="A must be"):
        linear_cde(dX, torch.zeros(2, 4))
    with pytest.raises(ShapeError, match="B must be"):
        linear_cde(dX, torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(ShapeError, match="dX must be"):
        signature(dX[0], 2)
    with pytest.raises(ValueError, match="depth"):
        signature(dX, 0)
