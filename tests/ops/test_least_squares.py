import pytest
import torch
from torch.nn import functional as F

from remanence import ops
from remanence.errors import ShapeError
from remanence.ops.least_squares import (
    least_squares,
    least_squares_reference,
    local_regression,
    local_regression_reference,
    recursive_least_squares,
    recursive_least_squares_reference,
    recursive_least_squares_state,
    regress,
)

B, H, K, V = 2, 3, 5, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(T, seed=0):
    q, k, v = (draw(B, H, T, n, seed=seed + i) for i, n in enumerate((K, K, V)))
    return [q, F.normalize(k, dim=-1), v]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def grads(y, state, leaves):
    ends = (y, *state.values())
    loss = sum((t * draw(*t.shape, seed=20 + i)).sum() for i, t in enumerate(ends))
    return torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("steps", [30, None])
@pytest.mark.parametrize("decayed", [True, False])
@pytest.mark.parametrize("cuts", [[], [9], [0, 1, 1, 20]])
def test_least_squares_is_its_reference(steps, decayed, cuts):
    T = 37
    extra = [draw(B, H, T, seed=5).sigmoid(), draw(H, K, seed=6).exp(), -draw(B, H, T, seed=7).abs()]
    q, k, v, b, ridge, g = leaves = [x.requires_grad_() for x in inputs(T) + extra]
    leaves, g = (leaves, g) if decayed else (leaves[:5], None)
    start = draw(B, H, K, K, seed=8)
    start = {"H": start @ start.mT, "G": draw(B, H, K, V, seed=9).requires_grad_()}
    leaves = [*leaves, start["G"]]
    want, want_state = least_squares_reference(q, k, v, b, ridge, g, start)
    pieces, state = [], start
    for piece in zip(*(x.tensor_split(cuts, 2) for x in (q, k, v, b, g if decayed else q)), strict=True):
        y, state = least_squares(*piece[:4], ridge, piece[4] if decayed else None, state, steps=steps)
        pieces.append(y)
    got = torch.cat(pieces, 2)
    close(got, want)
    close(state, want_state)
    close(grads(got, state, leaves), grads(want, want_state, leaves))


def test_conjugate_gradients_need_as_many_steps_as_there_are_features():
    q, k, v = inputs(40)
    b, ridge = torch.ones(B, H, 40, dtype=torch.float64), torch.ones(H, K, dtype=torch.float64)
    want, _ = least_squares_reference(q, k, v, b, ridge)
    errors = [(least_squares(q, k, v, b, ridge, steps=n)[0] - want).abs().max().item() for n in (1, 2, K)]
    assert errors[0] > errors[1] > 1e-4
    assert errors[2] < 1e-10


def test_what_least_squares_refuses():
    q, k, v = inputs(3)
    b, ridge = torch.ones(B, H, 3, dtype=torch.float64), torch.ones(H, K, dtype=torch.float64)
    with pytest.raises(ShapeError, match="ridge must be"):
        least_squares(q, k, v, b, ridge[:1])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        least_squares(q, k, v, b, ridge, steps=0)
    y, _ = least_squares(*(x.requires_grad_() for x in (q, k, v)), b, ridge)
    (first,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("T", "cuts"), [(0, []), (1, []), (37, []), (37, [9]), (37, [0, 1, 1, 20])])
def test_recursive_least_squares_is_its_reference_and_the_batch_solution(weighted, T, cuts):
    q, k, v = leaves = [x.requires_grad_() for x in inputs(T)]
    b = draw(B, H, T, seed=5).sigmoid().requires_grad_() if weighted else None
    leaves = [*leaves, b] if weighted else leaves
    ridge = draw(H, K, seed=6).exp().requires_grad_()
    start = recursive_least_squares_state(ridge, B, V)
    want, want_state = recursive_least_squares_reference(q, k, v, start, b)
    pieces, state = [], start
    for piece in zip(*(x.tensor_split(cuts, 2) for x in (q, k, v, q if b is None else b)), strict=True):
        y, state = recursive_least_squares(*piece[:3], state, None if b is None else piece[3], chunk_size=8)
        pieces.append(y)
    got = torch.cat(pieces, 2)
    close(got, want)
    close(state, want_state)
    close(grads(got, state, [*leaves, ridge]), grads(want, want_state, [*leaves, ridge]))
    ones = torch.ones(B, H, T, dtype=torch.float64)
    close(got, least_squares_reference(q, k, v, ones if b is None else b, ridge)[0])


def test_regress_is_what_a_solver_of_least_squares_finds():
    q, k, v = inputs(23)
    q = q[:, :, :7]
    w = draw(B, H, 7, 23, seed=4).exp()
    ones = torch.ones(*k.shape[:3], 1, dtype=torch.float64)

    def found(design, at):
        root = w[..., None].sqrt()
        M = torch.linalg.lstsq(root * design[:, :, None], root * v[:, :, None]).solution
        return (at[..., None, :] @ M)[..., 0, :]

    close(regress(q, k, v, w, order="constant"), found(ones, ones[:, :, :7]))
    close(regress(q, k, v, w, order="linear", ridge=0.0), found(k, q))
    affine = found(torch.cat([ones, k], -1), torch.cat([ones[:, :, :7], q], -1))
    close(regress(q, k, v, w, order="affine", ridge=0.0), affine)
    close(regress(q, k, v, 1e-200 * w, order="affine", ridge=0.0), affine)
    with pytest.raises(ValueError, match="order must be one of"):
        regress(q, k, v, w, order="cubic")


def test_softmax_attention_is_a_local_mean_and_linear_attention_a_regression_that_takes_the_keys_for_orthonormal():
    q, k, v = inputs(9)
    w = ((q @ k.mT).softmax(-1)).tril()
    close(regress(q, k, v, w, order="constant"), torch.softmax((q @ k.mT).masked_fill(w == 0, -torch.inf), -1) @ v)
    eye = torch.eye(K, dtype=torch.float64).expand(B, H, K, K)
    lower = torch.ones(B, H, K, K, dtype=torch.float64).tril()
    # with the keys read so far orthonormal, the optimum and the sum of outer products are one, up to the ridge
    read = regress(q[:, :, :K], eye, v[:, :, :K], lower, order="linear", ridge=1e-12)
    close(read, (q[:, :, :K] @ eye.mT).tril() @ v[:, :, :K])


@pytest.mark.parametrize("order", ["constant", "linear", "affine"])
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(("T", "cuts"), [(0, []), (1, []), (17, []), (17, [0, 1, 1, 9])])
def test_local_regression_is_its_reference(order, kernel, T, cuts):
    leaves = [x.requires_grad_() for x in inputs(T)]
    bandwidth = draw(H, seed=5).exp().requires_grad_() if kernel else None
    how = {"window": 4, "order": order, "bandwidth": bandwidth}
    want, want_state = local_regression_reference(*leaves, **how)
    pieces, state = [], None
    for piece in zip(*(x.tensor_split(cuts, 2) for x in leaves), strict=True):
        y, state = local_regression(*piece, **how, state=state)
        pieces.append(y)
    got = torch.cat(pieces, 2)
    close(got, want)
    close(state, want_state)
    if T:
        leaves = [*leaves, bandwidth] if kernel else leaves
        ends = [({n: t for n, t in s.items() if n != "seen"}) for s in (state, want_state)]
        close(grads(got, ends[0], leaves), grads(want, ends[1], leaves))


def test_a_local_mean_of_unit_vectors_is_softmax_attention_and_a_gaussian_kernel():
    q, k, v = (F.normalize(x, dim=-1) for x in inputs(9))
    bandwidth = torch.full((H,), 0.3, dtype=torch.float64)
    y, _ = local_regression(q, k, v, window=9, order="constant", bandwidth=bandwidth)
    scale = K**0.5 / 0.3
    close(y, ops.window_attention(scale * q, k, v, window=9)[0])
    gaussian = (torch.cdist(q, k).square() / -0.6).exp().tril()
    close(y, regress(q, k, v, gaussian, order="constant"))


def test_one_pair_in_single_precision_is_answered_by_its_value():
    q, k, v = (x.float() for x in inputs(1))
    y, _ = local_regression(q, F.normalize(k, dim=-1), v, window=3, order="affine")
    torch.testing.assert_close(y, v, rtol=1e-3, atol=1e-3)
