"""What each retention is by definition, and what it is for."""

import pytest
import torch
from torch.nn import functional as F

from remanence.ops.fast_weight import fast_weight, fast_weight_state
from remanence.ops.retention import RETENTIONS, Bregman, Divergence, Elastic, Shrink

ALPHAS = [-1.0, 0.0, 0.5, 1.0, 1.5, 2.0]
ONE = torch.ones((), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(ratio, alpha):
    """f′ of the power family."""
    return ratio.log() if alpha == 1 else (ratio.pow(alpha - 1) - 1) / (alpha - 1)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("size", [0.3, 30.0])
def test_a_divergence_balances_loss_and_change_on_the_simplex(alpha, size):
    each = Divergence(alpha, 2.0)
    W, change = each.start(normal(3, 4, 5)), size * normal(3, 4, 5, seed=1)
    moved = each.move(W, ONE, change, ONE)
    assert (moved >= 0).all()
    torch.testing.assert_close(moved.sum(-1), torch.full((3, 4), 2.0, dtype=torch.float64), rtol=0, atol=1e-12)
    # at the least of -<change, W'> + Σ W f(W'/W) with the row's sum held, the derivative is one number per row
    force = slope((moved / W).clamp(min=1e-200), alpha) - change
    held = moved > 1e-12
    level = torch.where(held, force, -torch.inf).amax(-1, keepdim=True)
    assert torch.where(held, level - force, 0.0).abs().max() < 1e-5
    if alpha > 1:  # and where a weight is 0 it does not pay to raise it
        assert torch.where(held, 0.0, level - force).max() < 1e-5


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_divergence_has_the_gradients_of_its_definition(alpha):
    W, change, retain = Divergence().start(normal(2, 3, 4)), 0.5 * normal(2, 3, 4, seed=1), torch.rand(2, 1, 1).double()
    inputs = [x.requires_grad_() for x in (W, retain, change)]
    assert torch.autograd.gradcheck(lambda *x: Divergence(alpha).move(*x, ONE), inputs)


def test_divergences_agree_on_small_steps_and_part_on_large_ones():
    W, change = Divergence().start(normal(4, 6)), normal(4, 6, seed=1)
    small, large = ([Divergence(a).move(W, ONE, size * change, ONE) for a in ALPHAS] for size in (1e-4, 3.0))
    assert max((x - small[0]).abs().max() for x in small) < 1e-7
    assert min((x - large[0]).abs().max() for x in large[1:]) > 1e-2


def test_chi_squared_lets_weights_reach_zero_and_decay_lets_them_return():
    each = Divergence(2.0)
    W = each.move(torch.full((1, 4), 0.25).double(), ONE, torch.tensor([[3.0, 0.0, 0.0, -9.0]]).double(), ONE)
    assert W[0, -1] == 0
    assert Divergence(1.0).move(torch.full((1, 4), 0.25).double(), ONE, -9 * torch.eye(1, 4).double(), ONE).min() > 0
    back = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).double()
    assert each.move(W, ONE, back, ONE)[0, -1] < 1e-12
    assert each.move(W, 0.9 * ONE, back, ONE)[0, -1] > 0.02


def test_shrink_is_the_least_of_its_penalties():
    each, W, change, step = Shrink(0.7), normal(4, 5), normal(4, 5, seed=1), 0.5 * ONE
    moved = each.move(W, 0.9 * ONE, change, step)

    def cost(X):
        return 0.5 * (X - 0.9 * W - change).square().sum((-2, -1)) + 0.7 * step * X.abs().sum((-2, -1))

    nearby = moved + 0.01 * normal(200, 4, 5, seed=2)
    assert (cost(nearby) > cost(moved)).all()
    assert 0 < (moved == 0).sum() < 20


@pytest.mark.parametrize("each", [Shrink(0.3), Elastic(0.2)])
def test_elastic_nets_keep_only_the_weights_that_are_needed(each):
    """A sparse map of 16 by 16, 3 inputs to an output, from noisy values: the zeros are found; by decay alone, none."""
    width, T = 16, 600
    sparse = normal(width, width) * (normal(width, width, seed=1).argsort(-1) < 3)
    key = F.normalize(normal(1, 1, T, width, seed=2), dim=-1)
    value = key @ sparse.mT + 0.05 * normal(1, 1, T, width, seed=3)
    zero, step = [torch.zeros(1, width, width).double()], torch.full((1, 1, T), 0.5).double()

    def learned(retention):
        state = fast_weight_state(zero, 1, momentum=False, retention=retention)
        kept = torch.full_like(step, -1e-4)
        A = fast_weight(key, key, value, step, state, retain_log=kept, chunk_size=4, retention=retention)[1]
        W = A["weight"]["0"][0, 0]
        return W if retention is None else retention.link(W)

    W, plain = learned(each), learned(None)
    right = (W == 0) == (sparse == 0)
    assert right.double().mean() > 0.75
    assert (plain == 0).sum() == 0


def test_bounded_weights_stay_within_bounds_and_small_ones_are_plain():
    each = Bregman()
    assert each.link(100 * normal(5, 5)).abs().max() <= 1
    small = 1e-4 * normal(5, 5)
    torch.testing.assert_close(each.link(each.start(small)), small, rtol=1e-6, atol=0)
    assert Bregman(torch.asinh).link(100 * ONE) > 5


def test_where_nothing_is_written_nothing_is_forgotten():
    W, none = normal(4, 5), torch.zeros(()).double()
    for name, each in RETENTIONS.items():
        if hasattr(each, "move"):
            start = each.start(W)
            torch.testing.assert_close(each.move(start, ONE, 0 * W, none), start, msg=name)


def test_numbers_out_of_range_are_refused():
    wrong = {
        "alpha must lie in": lambda: Divergence(3.0),
        "c must be above 0": lambda: Divergence(1.0, 0.0),
        "gamma must be above 0": lambda: Shrink(0.0),
        "slope must be above 0": lambda: Bregman(torch.tanh, 0.0),
    }
    for said, make in wrong.items():
        with pytest.raises(ValueError, match=said):
            make()
