import pytest
import torch
from numba.core.runtime import _nrt_python as nrt
from numba.core.runtime import rtsys

from remanence.ops import dispatch, whole_chunks
from remanence.ops.fast_weight import fast_weight, fast_weight_state
from remanence.ops.objectives import Dot, Huber, LogCosh, PNorm, Shifted
from remanence.ops.phases import piece_sizes, whole_sizes
from remanence.ops.ttt import ttt, ttt_state

B, H, K, C = 2, 2, 4, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def titans(T, layers, momentum, norm, bound, thresholds=False, K=K, hidden=6, **answers):
    widths = [K] + [hidden] * (layers - 1) + [K]
    weights = [0.4 * draw(H, widths[i + 1], widths[i], seed=10 + i) for i in range(layers)]
    q, k, v = (draw(B, H, T, K, seed=i) for i in range(3))
    step, retain, eta = draw(B, H, T, seed=3).sigmoid(), -draw(B, H, T, seed=4).exp(), -draw(B, H, T, seed=5).exp()
    affine = [1 + 0.2 * draw(H, K, seed=6), 0.2 * draw(H, K, seed=7)] if norm else []
    leaves = [q, k, v, 0.3 * step, 0.1 * retain, *([eta] if momentum else []), *affine, *weights]
    leaves += [draw(B, H, T, seed=8).exp()] if thresholds else []

    def run(q, k, v, step, retain, *rest):
        rest, threshold = (rest[:-1], rest[-1]) if thresholds else (rest, None)
        state = fast_weight_state(rest[-layers:], B, momentum=momentum)
        gates = {"retain_log": retain, "momentum_log": rest[0] if momentum else None, "threshold": threshold}
        scale = tuple(rest[momentum : momentum + 2]) if norm else None
        y, state = fast_weight(
            q, k, v, step, state, **gates, chunk_size=C, residual=True, norm=scale, bound=0.5 if bound else None,
            **answers,
        )  # fmt: skip
        return y, *state["weight"].values(), *state.get("momentum", {}).values()

    return run, leaves


def test_time_training(T, layers):
    widths = [K] + [6] * (layers - 1) + [K]
    weights = [0.3 * draw(H, widths[i + 1], widths[i] + 1, seed=10 + i) for i in range(layers)]
    q, k, v = (draw(B, H, T, K, seed=i) for i in range(3))
    norm = 1 + 0.2 * draw(H, K, seed=5), 0.2 * draw(H, K, seed=6)
    average = 1 / torch.arange(1, C + 1, dtype=torch.float64)
    angle = draw(C, K // 2, seed=4)
    turn = torch.stack([angle.cos(), angle.sin()], 1)

    def run(q, k, v, step, average, scale, shift, *weights):
        y, state = ttt(q, k, v, step, average, scale, shift, ttt_state(weights, B), turn=turn)
        return y, *state["anchor"].values(), *state["sum"].values()

    return run, [q, k, v, 0.5 * draw(B, H, T, seed=3).sigmoid(), average, *norm, *weights]


test_time_training.__test__ = False
CASES = {
    "a perceptron with momentum": lambda: titans(19, 2, True, False, True),
    "three layers, a norm, steps as given": lambda: titans(18, 3, False, True, False),
    "a matrix and a norm": lambda: titans(18, 1, True, True, True),
    "read at the anchor": lambda: titans(19, 2, True, True, True, read="anchor"),
    "a matrix read at the anchor": lambda: titans(18, 1, False, False, True, read="anchor"),
    "wide, read at the anchor": lambda: titans(19, 2, True, True, True, read="anchor", K=16, hidden=32),
    "wide": lambda: titans(19, 3, True, False, True, K=32, hidden=16),
    "read before the write": lambda: titans(18, 2, True, False, True, read="before"),
    "the dot product": lambda: titans(18, 2, True, True, True, objective=Dot()),
    "the dot product as given": lambda: titans(18, 2, False, False, False, objective=Dot(), read="anchor"),
    "a cubic loss": lambda: titans(18, 2, False, True, True, objective=PNorm(3.0)),
    "a loss of power 1": lambda: titans(18, 1, True, False, True, objective=PNorm(1.0)),
    "a loss of power 2.6": lambda: titans(18, 1, True, False, True, objective=PNorm(2.6)),
    "log-cosh": lambda: titans(18, 2, False, False, True, objective=LogCosh(2.0)),
    "Huber": lambda: titans(18, 2, False, True, True, thresholds=True, objective=Huber()),
    "Huber by coordinate": lambda: titans(18, 2, True, False, True, objective=Huber("coordinate")),
    "Yaad's": lambda: titans(18, 2, False, True, True, thresholds=True, objective=Huber("mixture")),
    "a shifted error": lambda: titans(18, 2, False, False, True, objective=Shifted(0.3)),
    "test-time training": lambda: test_time_training(18, 2),
}


def outcome(run, leaves, floor, monkeypatch, order):
    monkeypatch.setattr(dispatch, "COMPILED_FROM", floor)
    monkeypatch.setattr(whole_chunks, "EVERY", 2)
    monkeypatch.setattr(whole_chunks, "SPAN", 2 * C)
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    ends = run(*leaves)
    found = sum((x * draw(*x.shape, seed=30 + i)).sum() for i, x in enumerate(ends))
    first = torch.autograd.grad(found, leaves, create_graph=order == 2, materialize_grads=True)
    if order == 1:
        return [*ends, *first]
    again = sum((x * draw(*x.shape, seed=50 + i)).sum() for i, x in enumerate(first))
    return [*first, *torch.autograd.grad(again, leaves, materialize_grads=True)]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_compiled_form_and_its_derivatives_are_those_of_the_plain_one(case, order, monkeypatch):
    run, leaves = CASES[case]()
    compiled, plain = (outcome(run, leaves, floor, monkeypatch, order) for floor in (0, 2**62))
    for got, want in zip(compiled, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_numbers_follow_wide_ones(dtype):
    run, leaves = titans(64, 2, True, False, True)
    wide = run(*leaves)[0]
    got = run(*(x.to(dtype) for x in leaves))[0]
    assert got.dtype == dtype
    error = (got.double() - wide).norm() / wide.norm()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("length", [0, 3, 4, 9, 23])
@pytest.mark.parametrize("phase", [0, 1, 3])
@pytest.mark.parametrize("most", [1, 8, 100])
def test_whole_chunks_stay_together(length, phase, most):
    sizes = whole_sizes(length, phase, C, most)
    assert sum(sizes) == length
    edges = [phase + sum(sizes[:i]) for i in range(1, len(sizes))]
    assert all(edge % C == 0 for edge in edges)
    assert len(sizes) <= len(piece_sizes(length, phase, C))
    assert all(size <= max(most, C) for size in sizes)


@pytest.mark.parametrize("read", ["after", "anchor"])
def test_what_the_kernels_take_they_give_back(read):
    """Most of them count no references; one that nobody counts down would be memory lost at every chunk."""
    run, leaves = titans(19, 2, True, True, True, thresholds=True, objective=Huber("norm"), read=read)
    leaves = [x.requires_grad_() for x in leaves]

    def once():
        torch.autograd.grad(run(*leaves)[0].sum(), leaves, allow_unused=True)

    once()  # compiles
    nrt.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats()
        once()
        after = rtsys.get_allocation_stats()
    finally:
        nrt.memsys_disable_stats()
    assert after.mi_alloc > before.mi_alloc
    assert after.mi_alloc - before.mi_alloc == after.mi_free - before.mi_free
