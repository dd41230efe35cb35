"""The compiled forms that make every token's weights are the definition."""

import pytest
import torch
from torch.nn import functional as F

from remanence.ops import dispatch, orthogonal
from remanence.ops.fast_weight import fast_weight, fast_weight_reference, fast_weight_state
from remanence.ops.objectives import OBJECTIVES
from remanence.state import flatten

B, H, K, C = 2, 2, 3, 4
RULES = {
    "two layers in a window": {"window": 3},
    "one layer": {"shapes": [(5, K)], "residual": False},
    "three layers, wide and tall": {"shapes": [(2, K), (6, 2), (K, 6)], "steps": 2},
    "without momentum": {"momentum": False, "window": 2},
    "read before the write": {"read": "before", "norm": True},
    "gated": {"gated": True, "shapes": [(5, K), (5, K), (K, 5)], "window": 2, "norm": True},
    "gated, before, another loss": {
        "gated": True, "shapes": [(2, K), (2, K), (K, 2)], "read": "before", "objective": OBJECTIVES["huber"],
    },
    "a window, a bound": {"window": 3, "steps": 0, "bound": 0.5},
    "a window, gated, without momentum": {
        "gated": True, "shapes": [(5, K), (5, K), (K, 5)], "window": 2, "steps": 0, "momentum": False, "bound": 1.0,
    },
    "a window on a matrix, read before": {"shapes": [(K, K)], "window": 2, "steps": 0, "read": "before"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    monkeypatch.setattr(dispatch, "COMPILED_FROM", 0)


def case(name, T, dtype=torch.float64):
    """A function of the leaves to outputs and state, given the op; and the leaves."""
    rule = {"shapes": [(5, K), (K, 5)], "steps": 5, "residual": True, "momentum": True, **RULES[name]}
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    shapes, window, momentum = rule.pop("shapes"), rule.pop("window", 0), rule.pop("momentum")
    out = shapes[-1][0]
    leaves = {
        "query": normal(B, H, T, K),
        "key": F.normalize(normal(B, H, T, K), dim=-1),
        "value": normal(B, H, T, out),
    }
    leaves |= {"step": 0.3 * normal(B, H, T).sigmoid(), "retain_log": F.logsigmoid(normal(B, H, T) + 2)}
    leaves |= {"momentum_log": F.logsigmoid(normal(B, H, T) + 1)} if momentum else {}
    leaves |= {"window": normal(B, H, T, window).sigmoid()} if window else {}
    norm = [1 + 0.3 * normal(H, out), 0.3 * normal(H, out)] if rule.pop("norm", False) else []
    weights = [0.7 * normal(H, *shape) for shape in shapes]
    rule["orthogonal"] = rule.pop("steps")

    def run(op, *given, cuts=()):
        named, rest = dict(zip(leaves, given, strict=False)), given[len(leaves) :]
        start, affine = rest[len(norm) :], rest[: len(norm)] or None
        state = fast_weight_state(list(start), B, momentum=momentum, window=window or 1)
        y = []
        for part in zip(*(x.tensor_split(cuts, 2) for x in named.values()), strict=True):
            out, state = op(
                **dict(zip(named, part, strict=True)), state=state, chunk_size=C, norm=affine or None, **rule
            )
            y.append(out)
        return torch.cat(y, 2), *(x for x in flatten(state).values() if x.is_floating_point())

    return run, [x.requires_grad_() for x in (*leaves.values(), *norm, *weights)]


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def projected(outputs):
    g = torch.Generator().manual_seed(9)
    return sum((torch.randn(x.shape, generator=g, dtype=x.dtype) * x).sum() for x in outputs)


@pytest.mark.parametrize("name", RULES)
def test_it_is_the_recurrence_at_any_cut(name):
    run, leaves = case(name, 11)
    want = run(fast_weight_reference, *leaves)
    wanted = torch.autograd.grad(projected(want), leaves)
    for cuts in ([], [3, 3, 6]):
        got = run(fast_weight, *leaves, cuts=cuts)
        close(got, want)
        for x, y in zip(torch.autograd.grad(projected(got), leaves), wanted, strict=True):
            assert (x - y).abs().max() < 1e-9 * max(1, y.abs().max())
        with torch.no_grad():
            close(run(fast_weight, *leaves, cuts=cuts), want)


def test_its_second_derivatives_are_those_of_the_plain_form(monkeypatch):
    run, leaves = case("without momentum", 5)

    def second():
        first = torch.autograd.grad(projected(run(fast_weight, *leaves)), leaves, create_graph=True)
        return torch.autograd.grad(projected(first), leaves)

    got = second()
    monkeypatch.setattr(dispatch, "COMPILED_FROM", 2**40)
    close(got, second(), 1e-7)


def test_a_token_that_teaches_nothing_moves_nothing_and_has_a_gradient():
    """A step of norm 0: without momentum, of a window closed by its gates."""
    run, leaves = case("without momentum", 3)
    with torch.no_grad():
        leaves[5].zero_()
        leaves[4].zero_()
    y, *state = run(fast_weight, *leaves)
    assert all(x.isfinite().all() for x in torch.autograd.grad(projected([y]), leaves))
    weights = [x for x in state if x.shape == (B, H, 5, K)]
    close(weights[-1], leaves[-2].expand(B, H, 5, K))


def test_single_precision_stays_near():
    run, leaves = case("two layers in a window", 40)
    want = run(fast_weight_reference, *leaves)[0]
    got = run(fast_weight, *(x.float() for x in leaves))[0]
    assert (got - want).norm() < 1e-3 * want.norm()


def test_many_steps_take_the_plain_form():
    """On squares rounding grows with every step."""
    q, W = torch.zeros(1, 1, 4, 3), [torch.zeros(1, 1, 5, 3)]
    assert orthogonal.worth(q, W, orthogonal.MOST_STEPS)
    assert not orthogonal.worth(q, W, orthogonal.MOST_STEPS + 1)
