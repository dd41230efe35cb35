from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.nn import functional as F

from remanence.errors import ShapeError, StateError
from remanence.ops.fast_weight import fast_weight, fast_weight_reference, fast_weight_state, momentum_coefficients
from remanence.ops.inner_network import inner_gradient
from remanence.ops.objectives import OBJECTIVES
from remanence.ops.retention import RETENTIONS, Divergence, Elastic, Lq, Sequential, Shrink
from remanence.state import concat, flatten, nbytes, select, tree_map

B, H, K = 2, 2, 3


def draw(T, layers=2, momentum=True, V=K, seed=0):
    """Inputs and first weights, all of which receive gradients."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    q, k, v = normal(B, H, T, K), F.normalize(normal(B, H, T, K), dim=-1), normal(B, H, T, V)
    gates = {"step": 0.2 * normal(B, H, T).sigmoid(), "retain_log": F.logsigmoid(normal(B, H, T) + 2)}
    if momentum:
        gates["momentum_log"] = F.logsigmoid(normal(B, H, T))
    widths = [K] + [4] * (layers - 1) + [V]
    weights = [0.7 * normal(H, o, i) for i, o in pairwise(widths)]
    leaves = [x.requires_grad_() for x in (q, k, v, *gates.values(), *weights)]
    return (q, k, v), gates, weights, leaves


def run(fn, inputs, gates, state, chunk_size, cuts=(), **options):
    names, pieces = list(gates), []
    for part in zip(*(x.tensor_split(cuts, dim=2) for x in (*inputs, *gates.values())), strict=True):
        named = dict(zip(names, part[3:], strict=True))
        y, state = fn(*part[:3], named.pop("step"), state, **named, chunk_size=chunk_size, **options)
        pieces.append(y)
    return torch.cat(pieces, 2), state


def head(inputs, gates, n):
    return [x[:, :, :n] for x in inputs], {name: x[:, :, :n] for name, x in gates.items()}


def rest(inputs, gates, n):
    return [x[:, :, n:] for x in inputs], {name: x[:, :, n:] for name, x in gates.items()}


def grads(y, state, leaves):
    """Gradients of a fixed random projection of the outputs and of the final state."""
    g = torch.Generator().manual_seed(9)
    total = sum(
        (x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum()
        for x in (y, *flatten(state).values())
        if x.is_floating_point()
    )
    return torch.autograd.grad(total, leaves, retain_graph=True)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def compare(T, layers, momentum, chunk_size, cuts=(), V=K, **options):
    inputs, gates, weights, leaves = draw(T, layers, momentum, V)
    state = fast_weight_state(weights, B, momentum=momentum)
    want, want_state = run(fast_weight_reference, inputs, gates, state, chunk_size, **options)
    got, got_state = run(fast_weight, inputs, gates, state, chunk_size, cuts, **options)
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    close(grads(got, got_state, leaves), grads(want, want_state, leaves))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    "rule", [{"read": "before"}, {"residual": True, "bound": 0.5}, {"read": "anchor", "bound": 1.0}]
)
def test_a_matrix_that_learns_from_every_token_is_the_recurrence(order, rule):
    (q, k, v), gates, weights, leaves = draw(71, 1, order > 0)
    if order == 2:
        gates["second_log"] = F.logsigmoid(torch.linspace(-3, 3, 71, dtype=torch.float64).expand(B, H, -1))
    state = fast_weight_state(weights, B, momentum=order)
    want, want_state = run(fast_weight_reference, (q, k, v), gates, state, 1, **rule)
    got, got_state = run(fast_weight, (q, k, v), gates, state, 1, [5, 5, 70], **rule)
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    close(grads(got, got_state, leaves), grads(want, want_state, leaves))


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("momentum", [True, False])
def test_chunked_is_the_recurrence(layers, momentum):
    compare(11, layers, momentum, chunk_size=4, residual=layers % 2 == 0)


@pytest.mark.parametrize("read", ["after", "before", "anchor"])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_tokens_without_gradients_one_by_one_are_the_recurrence(read, momentum, layers):
    inputs, gates, weights, _ = draw(7, layers, momentum)
    state, rule = fast_weight_state(weights, B, momentum=momentum), {"read": read, "residual": True, "bound": 0.5}
    want, want_state = run(fast_weight_reference, inputs, gates, state, 3, **rule)
    with torch.no_grad():
        got, got_state = run(fast_weight, inputs, gates, state, 3, [*range(1, 7)], **rule)
    close(got, want.detach())
    close(flatten(got_state), tree_map(Tensor.detach, flatten(want_state)))


def test_a_bound_keeps_a_repeated_token_from_diverging():
    (q, k, v), _, weights, _ = draw(1, momentum=False)
    q, k, v = (x.detach().repeat(1, 1, 256, 1) for x in (q, k, 3 * v))
    step, state = q.new_full(q.shape[:3], 0.5), fast_weight_state([W.detach() for W in weights], B, momentum=False)
    bounded, _ = fast_weight(q, k, v, step, state, chunk_size=16, bound=0.5)
    free, _ = fast_weight(q, k, v, step, state, chunk_size=16)
    assert not free[:, :, -1].norm() < 1e3
    read, _ = fast_weight(k, k, v, step, state, chunk_size=16, bound=0.5)
    assert bounded.isfinite().all()
    close(read[:, :, -1], v[:, :, -1], 1e-2)


def test_values_may_be_wider_than_keys():
    compare(7, 2, True, chunk_size=3, V=5)


@settings(max_examples=20, deadline=None)
@given(T=st.integers(1, 14), chunk_size=st.sampled_from([1, 3, 5, 64]), data=st.data())
def test_any_cut_is_the_recurrence(T, chunk_size, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=4)))
    compare(
        T, 2, data.draw(st.booleans()), chunk_size, cuts, residual=True, bound=data.draw(st.sampled_from([None, 0.5]))
    )


def test_a_lost_momentum_is_noticed():
    inputs, gates, weights, _ = draw(10)
    start = fast_weight_state(weights, B)
    want, _ = run(fast_weight, inputs, gates, start, 4)
    for name in ("momentum", "anchor", "weight"):
        _, state = run(fast_weight, *head(inputs, gates, 5), start, 4)
        tail, _ = run(fast_weight, *rest(inputs, gates, 5), {**state, name: start[name]}, 4)
        assert (tail - want[:, :, 5:]).abs().max() > 1e-4, name


def test_rows_may_stand_at_different_positions():
    inputs, gates, weights, leaves = draw(9)
    start = fast_weight_state(weights, B)
    ahead = [run(fast_weight, *head(inputs, gates, n), start, 4)[1] for n in (3, 2)]
    mixed = concat([select(ahead[0], 0), select(ahead[1], 1)])
    want, want_state = run(fast_weight_reference, inputs, gates, mixed, 4)
    got, got_state = run(fast_weight, inputs, gates, mixed, 4)
    assert got_state["pos"].tolist() == [12, 11]
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    close(grads(got, got_state, leaves), grads(want, want_state, leaves))


def test_the_state_is_of_constant_size_and_untouched():
    inputs, gates, weights, _ = draw(9)
    start = fast_weight_state(weights, B)
    before = {n: x.clone() for n, x in flatten(start).items()}
    _, end = run(fast_weight, inputs, gates, start, 4)
    assert nbytes(end) == nbytes(start)
    close(flatten(start), before, 0)


def test_one_linear_layer_at_chunk_one_is_the_delta_rule():
    (q, k, v), gates, weights, _ = draw(8, layers=1, momentum=False)
    y, end = fast_weight(q, k, v, gates["step"], fast_weight_state(weights, B, momentum=False), chunk_size=1)
    W = weights[0].expand(B, -1, -1, -1)
    for t in range(8):
        error = torch.einsum("bhvk,bhk->bhv", W, k[:, :, t]) - v[:, :, t]
        W = W - gates["step"][:, :, t, None, None] * error[..., :, None] * k[:, :, t, None, :]
        close(y[:, :, t], torch.einsum("bhvk,bhk->bhv", W, q[:, :, t]))
    close(end["weight"]["0"], W)


def test_the_chunk_size_is_part_of_the_definition():
    inputs, gates, weights, _ = draw(9)
    start = fast_weight_state(weights, B)
    one, four = (run(fast_weight, inputs, gates, start, c)[0] for c in (1, 4))
    assert (one - four).abs().max() > 1e-3


def test_gradients_within_a_step_are_those_of_finite_differences():
    (_, k, v), _, weights, _ = draw(3, layers=3)
    anchor = [W.detach().expand(B, -1, -1, -1) for W in weights]

    def deltas(k, v, *anchor):
        return tuple(inner_gradient(k, v, list(anchor), True)[1])

    assert torch.autograd.gradcheck(deltas, (k, v, *(W.clone().requires_grad_() for W in anchor)))


def test_coefficients_survive_the_strongest_decays():
    strongest = torch.full((1, 1, 5), -60.0)
    c = momentum_coefficients(torch.ones(1, 1, 5), strongest, strongest)
    assert all(torch.isfinite(x).all() for x in c if isinstance(x, torch.Tensor))
    close(c.write[0, 0], torch.eye(5), 1e-12)


def test_half_precision_inputs_keep_a_float32_state():
    inputs, gates, weights, _ = draw(6)
    half = [x.detach().bfloat16() for x in inputs]
    low = {n: x.detach().bfloat16() for n, x in gates.items()}
    y, state = run(fast_weight, half, low, fast_weight_state([W.float() for W in weights], B), 4)
    assert y.dtype == torch.bfloat16
    assert {x.dtype for x in flatten(state).values()} == {torch.float32, torch.int64}


def test_misfits_are_named():
    (q, k, v), gates, weights, _ = draw(4)
    state = fast_weight_state(weights, B)
    with pytest.raises(ShapeError, match=r"step must be \[batch=2, heads=2, time=4\]"):
        fast_weight(q, k, v, gates["step"][:, :, :3], state, momentum_log=gates["momentum_log"])
    with pytest.raises(StateError, match="has momentum"):
        fast_weight(q, k, v, gates["step"], state)
    with pytest.raises(StateError, match="3 features, but values have 2"):
        fast_weight(q, k, v[..., :2], gates["step"], state, momentum_log=gates["momentum_log"])


RULES = {
    **{f"objective {name}": {"objective": each} for name, each in OBJECTIVES.items()},
    **{f"retention {name}": {"retention": each} for name, each in RETENTIONS.items()},
    **{f"retention {name}, bounded": {"retention": each, "bound": 0.5} for name, each in RETENTIONS.items()},
    "objective p-norm": {"objective": OBJECTIVES["p-norm"], "bound": 0.5},  # its slopes grow as the square of errors
    "dot, bounded": {"objective": OBJECTIVES["dot"], "bound": 0.5, "order": 2},
    "dot, bounded, in a window": {"objective": OBJECTIVES["dot"], "bound": 0.5, "window": 3, "gated": True},
    "retention smooth": {"retention": Elastic(0.01, smooth=True)},
    "retention l2": {"retention": Lq(2.0)},
    "retention softmax, stale": {"retention": RETENTIONS["softmax"], "read": "anchor"},
    "retention shrink, window": {"retention": Shrink(0.3), "window": 3, "read": "before", "order": 2},
    "retention shrink, no momentum": {"retention": Shrink(0.3), "order": 0, "read": "anchor"},
    "retention shrink, orthogonal": {"retention": Shrink(0.3), "orthogonal": 2},
    "retention kl": {"retention": Divergence(1.0, 2.0), "gated": True},
    "channels": {"channels": True, "bound": 0.5},
    "channels, mixed thresholds": {
        "channels": True,
        "objective": OBJECTIVES["huber-mixture"],
        "threshold": True,
        "window": 3,
        "order": 0,
    },
    "channels, coordinates": {
        "channels": True,
        "objective": OBJECTIVES["huber-coordinate"],
        "threshold": True,
        "norm": True,
        "bound": 0.5,
    },
    "channels, gated": {"channels": True, "gated": True, "window": 2, "read": "before", "order": 2},
    "channels, dot": {"channels": True, "objective": OBJECTIVES["dot"], "bound": 0.5},
    "channels, frozen": {"channels": True, "retention": RETENTIONS["lq"], "residual": True},
    "channels, linked": {"channels": True, "retention": RETENTIONS["softmax"], "order": 2},
    "channels, sequential": {"channels": True, "retention": RETENTIONS["shrink"], "window": 3},
    "channels, orthogonal": {"channels": True, "orthogonal": 2, "window": 2},
    "channels, orthogonal, sequential": {"channels": True, "orthogonal": 2, "retention": RETENTIONS["chi-squared"]},
    "toward": {"toward": True, "bound": 0.5, "order": 2},
    "toward, gated, before": {"toward": True, "gated": True, "read": "before", "channels": True},
    "toward, orthogonal, anchor": {"toward": True, "orthogonal": 2, "read": "anchor"},
    "toward, orthogonal, before": {"toward": True, "orthogonal": 2, "read": "before", "order": 0},
    "threshold": {"objective": OBJECTIVES["huber"], "threshold": True, "window": 3},
    "norm": {"norm": True, "residual": True, "bound": 0.5},
    "gated": {"gated": True, "residual": True, "bound": 0.5},
    "gated orthogonal": {"gated": True, "orthogonal": 3, "norm": True, "read": "before"},
    "window": {"window": 3, "bound": 0.5},
    "wide window": {"window": 7, "norm": True},
    "second order": {"order": 2, "window": 2, "bound": 0.5},
    "second order, nonlinear": {"order": 2, "retention": RETENTIONS["softmax"], "objective": OBJECTIVES["p-norm"]},
    "before": {"read": "before", "order": 2},
    "before, nonlinear": {"read": "before", "retention": RETENTIONS["lq-mirror"]},
    "anchor": {"read": "anchor"},
    "orthogonal": {"orthogonal": 5, "window": 3},
    "orthogonal without momentum": {"orthogonal": 2, "order": 0},
    "orthogonal and frozen": {"orthogonal": 2, "retention": RETENTIONS["lq"], "residual": True},
    "orthogonal and frozen, before": {"orthogonal": 2, "retention": RETENTIONS["lq"], "read": "before", "order": 0},
    "orthogonal and robust": {"orthogonal": 2, "retention": RETENTIONS["elastic"], "objective": OBJECTIVES["huber"]},
}


def ruled(rule, T=11, layers=2):
    """As `draw`, with what a rule asks for besides."""
    rule = dict(rule)
    order, gated = rule.pop("order", 1), rule.get("gated", False)
    inputs, gates, weights, leaves = draw(T, layers, order > 0)
    g = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    more = {}
    if order == 2:
        more["second_log"] = F.logsigmoid(normal(B, H, T))
    channels = [K] if rule.pop("channels", False) else []
    if rule.pop("threshold", False):
        more["threshold"] = 0.5 + normal(B, H, T, *channels).abs()
    if channels:
        more |= {"step": 0.2 * normal(B, H, T, K).sigmoid(), "retain_log": F.logsigmoid(normal(B, H, T, K) + 2)}
    if count := rule.pop("window", 0):
        more["window"] = normal(B, H, T, count).sigmoid()
    if not rule.get("norm"):
        rule.pop("norm", None)
    else:
        rule["norm"] = tuple(1 + 0.3 * normal(H, K).requires_grad_() for _ in range(2))
        leaves = leaves + [x.detach().requires_grad_() for x in rule["norm"]]
        rule["norm"] = tuple(leaves[-2:])
    if gated:
        weights = [(0.7 * normal(H, *s)).requires_grad_() for s in ((4, K), (4, K), (K, 4))]
        leaves = [*inputs, *gates.values(), *rule.get("norm", ()), *weights]
    leaves = [x for x in leaves if not any(x is gates[name] for name in more if name in gates)]
    leaves = leaves + [x.requires_grad_() for x in more.values()]
    if rule.get("toward"):
        rule["toward"] = [0.7 * normal(*W.shape) for W in weights]
        leaves = leaves + [W.requires_grad_() for W in rule["toward"]]
    state = fast_weight_state(
        weights,
        B,
        momentum=order,
        window=count or 1,
        thresholds="threshold" in more and max(1, *(channels or [1])),
        retention=rule.get("retention"),
    )
    return inputs, gates | more, leaves, state, rule


@pytest.mark.parametrize("cuts", [[], [3, 3, 6]])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_the_recurrence(name, cuts):
    inputs, gates, leaves, state, rule = ruled(RULES[name])
    want, want_state = run(fast_weight_reference, inputs, gates, state, 4, **rule)
    got, got_state = run(fast_weight, inputs, gates, state, 4, cuts, **rule)
    assert want.isfinite().all()
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    close(grads(got, got_state, leaves), grads(want, want_state, leaves))


@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(1, 13),
    cuts=st.lists(st.integers(0, 13), max_size=3).map(sorted),
    chunk_size=st.sampled_from([1, 3, 5, 64]),
    rule=st.fixed_dictionaries(
        {
            "order": st.integers(0, 2),
            "window": st.sampled_from([0, 2, 4]),
            "objective": st.sampled_from([OBJECTIVES[n] for n in ("squared", "dot", "huber-coordinate", "shifted")]),
            "retention": st.sampled_from([None, *(RETENTIONS[n] for n in ("lq", "softmax", "shrink", "hellinger"))]),
            "read": st.sampled_from(["after", "before", "anchor"]),
            "gated": st.booleans(),
            "norm": st.booleans(),
            "residual": st.booleans(),
        }
    ),
    remake=st.booleans(),
)
def test_any_mixture_of_rules_is_the_recurrence_at_any_cut(T, cuts, chunk_size, rule, remake):
    inputs, gates, leaves, state, rule = ruled(rule | {"bound": 0.5}, T)
    want, want_state = run(fast_weight_reference, inputs, gates, state, chunk_size, **rule)
    got, got_state = run(
        fast_weight, inputs, gates, state, chunk_size, [min(c, T) for c in cuts], remake=remake, **rule
    )
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    if want.abs().max() < 1e3:
        close(grads(got, got_state, leaves), grads(want, want_state, leaves), 1e-8)


@pytest.mark.parametrize("name", RETENTIONS)
def test_a_retention_moves_no_further_than_it_says(name):
    g, each, one = torch.Generator().manual_seed(6), RETENTIONS[name], torch.ones((), dtype=torch.float64)
    A = torch.randn(5, 4, 3, generator=g, dtype=torch.float64)
    if isinstance(each, Sequential):
        A = each.start(A)
        rows = [jacobian(lambda x, W=W: each.move(W, one, x, one), torch.zeros_like(W)) for W in A]
        J = torch.stack(rows).reshape(5, 12, 12)
    elif each.frozen:
        J = each.factor(A) * torch.eye(12)
    else:
        J = torch.func.vmap(torch.func.jacrev(each.link))(A).reshape(5, 12, 12)
    assert (torch.linalg.matrix_norm(J, 2) <= each.gain(A) * (1 + 1e-9)).all()


@pytest.mark.parametrize("each", [Lq(), Lq(2.0), Lq(2.5, "mirror"), Lq(4.0, "mirror"), Elastic()])
def test_a_retention_starts_where_it_is_told(each):
    W = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    close(each.link(each.start(W)), W, 1e-6)
