import sys

import pytest
import torch

from remanence.errors import ShapeError
from remanence.ops.delta import gated_delta_rule_reference
from remanence.ops.delta_network import delta_network, delta_network_reference
from remanence.ops.inner_network import fast_weight_read

module = sys.modules[delta_network.__module__]


def draw(T, layers=2, residual=False, seed=0, K=5, V=None):
    g = torch.Generator().manual_seed(seed)
    V = V or (K if residual else 3)

    def normal(*shape):
        return torch.randn(2, 3, *shape, generator=g, dtype=torch.float64)

    widths = [K] + [7] * (layers - 1) + [V]
    inputs = [normal(T, K), torch.nn.functional.normalize(normal(T, K), dim=-1), normal(T, V)]
    inputs += [0.3 * normal(T).sigmoid(), -normal(T).square() * 0.3]
    networks = [[normal(widths[i + 1], widths[i]) / widths[i] ** 0.5 for i in range(layers)] for _ in range(2)]
    for t in [*inputs, *networks[0], *networks[1]]:
        t.requires_grad_()
    return inputs, *networks


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def grads(y, weights, leaves):
    g = torch.Generator().manual_seed(1)
    total = sum((t * torch.randn(t.shape, generator=g, dtype=t.dtype)).sum() for t in [y, *weights])
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("T", [0, 1, 2, 9])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dot", [False, True])
def test_all_at_once_is_one_by_one(T, layers, residual, dot):
    inputs, anchor, weights = draw(T, layers, residual)
    leaves = [*inputs, *anchor, *weights]
    y, after = delta_network(*inputs, anchor, weights, residual=residual, dot=dot)
    want, want_after = delta_network_reference(*inputs, anchor, weights, residual=residual, dot=dot)
    close(y, want)
    close(after, want_after)
    close(grads(y, after, leaves), grads(want, want_after, leaves))


def test_pieces_hand_on_their_weights(monkeypatch):
    inputs, anchor, weights = draw(9)
    leaves = [*inputs, *anchor, *weights]
    whole = delta_network(*inputs, anchor, weights, bound=0.1)
    monkeypatch.setattr(module, "PIECE", 4)
    pieces = delta_network(*inputs, anchor, weights, bound=0.1)
    close(pieces, whole)
    close(grads(*pieces, leaves), grads(*whole, leaves))


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_a_cut_changes_nothing_and_lost_weights_show(cut):
    inputs, anchor, weights = draw(9)
    y, after = delta_network(*inputs, anchor, weights, bound=0.1)
    first, between = delta_network(*(x[:, :, :cut] for x in inputs), anchor, weights, bound=0.1)
    second, last = delta_network(*(x[:, :, cut:] for x in inputs), anchor, between, bound=0.1)
    close(torch.cat([first, second], 2), y)
    close(last, after)
    if 0 < cut < 9:
        lost, _ = delta_network(*(x[:, :, cut:] for x in inputs), anchor, weights, bound=0.1)
        assert (lost - second).abs().max() > 1e-3


def test_a_matrix_under_the_dot_product_is_the_gated_delta_rule():
    """Up to the order of decay and error: the value that the rule sees after the decay."""
    (query, key, value, step, retain_log), anchor, (W,) = draw(6, layers=1)
    _, (after,) = delta_network(query, key, value, step, retain_log, anchor, [W], dot=True)
    a = retain_log.exp()
    _, want = gated_delta_rule_reference(query, key, a[..., None] * value, step / a, retain_log, {"S": W.mT})
    close(after.mT, want["S"])


def test_no_steps_and_no_decay_is_a_network_that_stands_still():
    (query, key, value, step, retain_log), anchor, weights = draw(6, residual=True)
    y, after = delta_network(query, key, value, 0 * step, 0 * retain_log, anchor, weights, residual=True)
    close(y, fast_weight_read(query, weights, residual=True))
    close(after, weights)


def test_without_a_query_the_same_is_written():
    (query, key, value, step, retain_log), anchor, weights = draw(6)
    y, after = delta_network(None, key, value, step, retain_log, anchor, weights)
    assert y is None
    close(after, delta_network(query, key, value, step, retain_log, anchor, weights)[1])


def test_bounded_steps_mend_no_more_than_the_error():
    (_, key, value, step, retain_log), anchor, _ = draw(1)
    many = [x.expand(2, 3, 10, *x.shape[3:]) for x in (key, value, 1e3 + step, 0 * retain_log)]
    _, loose = delta_network(None, *many, anchor, anchor)
    _, bound = delta_network(None, *many, anchor, anchor, bound=0.1)
    before = (fast_weight_read(key, anchor) - value).square().sum()
    assert (fast_weight_read(key, loose) - value).square().sum() > 1e6 * before
    assert (fast_weight_read(key, bound) - value).square().sum() < 2 * before


def test_shapes_are_checked():
    inputs, anchor, weights = draw(4)
    for at, name in ((1, "key"), (2, "value"), (3, "step"), (4, "retain_log")):
        wrong = list(inputs)
        wrong[at] = wrong[at][:, :1, :, ..., :-1] if at < 3 else wrong[at][:, :1]
        with pytest.raises(ShapeError, match=name):
            delta_network(*wrong, anchor, weights)
