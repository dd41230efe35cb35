from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from remanence.errors import ShapeError, StateError, UnknownName
from remanence.ops.fast_weight import fast_weight, fast_weight_state
from remanence.ops.linear_attention import linear_attention
from remanence.ops.newton_schulz import newton_schulz
from remanence.ops.omega import banded, omega, omega_reference, omega_state
from remanence.state import concat, flatten, nbytes, select

B, H, K = 2, 2, 3


def draw(T, layers=2, momentum=True, window=3, gated=False, V=K, seed=0):
    """Inputs, gates and first weights, all of which receive gradients."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = normal(B, H, T, K), F.normalize(normal(B, H, T, K), dim=-1), normal(B, H, T, V)
    gates = {
        "step": 0.2 * normal(B, H, T).sigmoid(),
        "gate": normal(B, H, T, window).sigmoid(),
        "retain_log": F.logsigmoid(normal(B, H, T) + 2),
    }
    if momentum:
        gates["momentum_log"] = F.logsigmoid(normal(B, H, T))
    widths = [K] + [4] * (layers - 1) + [V]
    shapes = [(4, K), (4, K), (V, 4)] if gated else [(o, i) for i, o in pairwise(widths)]
    weights = [0.7 * normal(H, *shape) for shape in shapes]
    leaves = [x.requires_grad_() for x in (*inputs, *gates.values(), *weights)]
    return inputs, gates, weights, leaves


def run(fn, inputs, gates, state, chunk_size, cuts=(), **options):
    names, pieces = list(gates), []
    for part in zip(*(x.tensor_split(cuts, dim=2) for x in (*inputs, *gates.values())), strict=True):
        named = dict(zip(names, part[3:], strict=True))
        y, state = fn(*part[:3], named.pop("step"), named.pop("gate"), state, **named, chunk_size=chunk_size, **options)
        pieces.append(y)
    return torch.cat(pieces, 2), state


def part(inputs, gates, tokens):
    return [x[:, :, tokens] for x in inputs], {name: x[:, :, tokens] for name, x in gates.items()}


def grads(y, state, leaves):
    """Gradients of a fixed random projection of the outputs and of the final state."""
    g = torch.Generator().manual_seed(9)
    ends = [x for x in (y, *flatten(state).values()) if x.is_floating_point()]
    total = sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in ends)
    return torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def compare(T, chunk_size, cuts=(), layers=2, momentum=True, window=3, V=K, gated=False, **options):
    inputs, gates, weights, leaves = draw(T, layers, momentum, window, gated, V)
    options["gated"] = gated
    state = omega_state(weights, B, window=window, momentum=momentum)
    want, want_state = run(omega_reference, inputs, gates, state, chunk_size, **options)
    got, got_state = run(omega, inputs, gates, state, chunk_size, cuts, **options)
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    close(grads(got, got_state, leaves), grads(want, want_state, leaves))


@pytest.mark.parametrize("objective", ["squared", "dot"])
@pytest.mark.parametrize("form", [{"layers": 1}, {"layers": 2}, {"layers": 3}, {"gated": True}])
@pytest.mark.parametrize("momentum", [True, False])
def test_chunked_is_the_recurrence(form, momentum, objective):
    compare(7, 4, momentum=momentum, objective=objective, residual=form.get("layers") != 2, V=3, **form)


@pytest.mark.parametrize("form", [{"layers": 1}, {"layers": 2}, {"gated": True}])
@pytest.mark.parametrize("momentum", [True, False])
def test_orthogonal_writes_are_the_recurrence(form, momentum):
    compare(7, 4, cuts=[3], momentum=momentum, orthogonal=True, **form)


def test_an_orthogonal_chunk_may_be_longer_than_what_is_made_at_once():
    compare(20, 64, orthogonal=True, layers=1, window=2)


@settings(max_examples=15, deadline=None)
@given(T=st.integers(1, 9), chunk_size=st.sampled_from([1, 3, 64]), window=st.integers(1, 4), data=st.data())
def test_any_cut_is_the_recurrence(T, chunk_size, window, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=4)))
    compare(
        T,
        chunk_size,
        cuts,
        layers=data.draw(st.sampled_from([1, 2])),
        momentum=data.draw(st.booleans()),
        window=window,
        objective=data.draw(st.sampled_from(["squared", "dot"])),
        bound=data.draw(st.sampled_from([None, 0.3])),
        residual=data.draw(st.booleans()),
    )


@pytest.mark.parametrize("T", [70, 129])
def test_the_exact_matrix_form_over_many_solves(T):
    inputs, gates, weights, _ = draw(T, layers=1, window=5, V=4)
    state = omega_state(weights, B, window=5)
    want, want_state = run(omega_reference, inputs, gates, state, 1)
    got, got_state = run(omega, inputs, gates, state, 1, [31])
    close(got, want)
    close(flatten(got_state), flatten(want_state))


@pytest.mark.parametrize("momentum", [True, False])
def test_a_window_of_one_is_titans(momentum):
    inputs, gates, weights, _ = draw(9, window=1, momentum=momentum)
    gate = gates.pop("gate")
    step = gates.pop("step")
    y, _ = omega(*inputs, step, torch.ones_like(gate), omega_state(weights, B, momentum=momentum), **gates)
    want, _ = fast_weight(*inputs, step, fast_weight_state(weights, B, momentum=momentum), **gates, chunk_size=16)
    close(y, want, 1e-12)


def test_a_matrix_under_the_dot_objective_is_windowed_linear_attention():
    (q, k, v), gates, weights, _ = draw(11, layers=1, momentum=False, window=2)
    state = omega_state([0 * W for W in weights], B, window=2, momentum=False)
    one = torch.ones_like(gates["step"])
    for chunk_size in (1, 4, 64):
        y, _ = omega(
            q, k, v, one, gates["gate"], state, retain_log=gates["retain_log"], objective="dot", chunk_size=chunk_size
        )
        before = [F.pad(x, (0, 0, 1, -1)) for x in (k, v)]
        want = sum(
            linear_attention(q, key, gates["gate"][..., j, None] * value, gates["retain_log"])[0]
            for j, (key, value) in enumerate(((k, v), before))
        )
        close(y, want)


def test_a_lost_window_momentum_or_anchor_is_noticed():
    inputs, gates, weights, _ = draw(10)
    start = omega_state(weights, B, window=3)
    want, _ = run(omega, inputs, gates, start, 4)
    _, state = run(omega, *part(inputs, gates, slice(5)), start, 4)
    for name in ("momentum", "anchor", "weight", "window"):
        tail, _ = run(omega, *part(inputs, gates, slice(5, None)), {**state, name: start[name]}, 4)
        assert (tail - want[:, :, 5:]).abs().max() > 1e-4, name


def test_rows_may_stand_at_different_positions_and_the_state_keeps_its_size():
    inputs, gates, weights, leaves = draw(9)
    start = omega_state(weights, B, window=3)
    ahead = [
        run(omega, [x[:, :, :n] for x in inputs], {m: x[:, :, :n] for m, x in gates.items()}, start, 4)[1]
        for n in (3, 2)
    ]
    mixed = concat([select(ahead[0], 0), select(ahead[1], 1)])
    want, want_state = run(omega_reference, inputs, gates, mixed, 4)
    got, got_state = run(omega, inputs, gates, mixed, 4)
    assert got_state["pos"].tolist() == [12, 11]
    assert nbytes(got_state) == nbytes(start)
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    close(grads(got, got_state, leaves), grads(want, want_state, leaves))


def test_orthogonal_weights_are_not_kept_for_the_gradient():
    """What autograd holds between the passes does not contain a matrix per token."""
    inputs, gates, weights, _ = draw(24, window=2)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
        run(omega, inputs, gates, omega_state(weights, B, window=2), 8, orthogonal=True)
    assert max(held) <= B * H * 25 * 4


@pytest.mark.parametrize(("objective", "layers"), [("squared", 1), ("squared", 2), ("dot", 2)])
def test_a_bound_keeps_a_loud_repeated_token_finite(objective, layers):
    (q, k, v), gates, weights, _ = draw(1, layers=layers, window=4)
    q, k, v = (x.detach().repeat(1, 1, 400, 1) for x in (q, k, 5 * v))
    gates = {n: x.detach().repeat(1, 1, 400, *[1] * (x.ndim - 3)) for n, x in gates.items()}
    gates["step"] = torch.full_like(gates["step"], 2.0)
    state = omega_state([3 * W.detach() for W in weights], B, window=4)
    bounded, _ = run(omega, (q, k, v), gates, state, 16, objective=objective, bound=0.5)
    free, _ = run(omega, (q, k, v), gates, state, 16, objective=objective)
    assert bounded.abs().max() < 1e3
    assert not free[:, :, -1].norm() < 1e3


def test_the_band():
    gate = torch.arange(1.0, 7).reshape(1, 1, 3, 2)
    want = torch.tensor([[2.0, 1, 0, 0], [0, 4, 3, 0], [0, 0, 6, 5]])
    assert torch.equal(banded(gate)[0, 0], want)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_newton_schulz_keeps_directions_and_levels_singular_values(shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, *shape, generator=g, dtype=torch.float64)
    y = newton_schulz(x)
    assert y.shape == x.shape
    s = torch.linalg.svdvals(y)
    assert s.max() < 1.25
    assert s.min() > 0.05
    U, _, Vh = torch.linalg.svd(x, full_matrices=False)
    inner = U.mT @ y @ Vh.mT
    close(inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), torch.zeros_like(inner))
    close(newton_schulz(x * 1e3), y, 1e-6)
    assert not newton_schulz(torch.zeros(3, 3)).any()


def test_what_does_not_fit_is_named():
    (q, k, v), gates, weights, _ = draw(3, window=2)
    step, gate = gates["step"], gates["gate"]
    with pytest.raises(StateError, match="the state has momentum"):
        omega(q, k, v, step, gate, omega_state(weights, B, window=2))
    state = omega_state(weights, B, window=3, momentum=False)
    with pytest.raises(ShapeError, match=r"omega: gate must be \[batch=2, heads=2, time=3, window=3\]"):
        omega(q, k, v, step, gate, state)
    state = omega_state(weights, B, window=2, momentum=False)
    with pytest.raises(UnknownName, match="did you mean 'squared'"):
        omega(q, k, v, step, gate, state, objective="square")
    with pytest.raises(ValueError, match="a gated network is of three matrices, got 2"):
        omega(q, k, v, step, gate, state, gated=True)
    with pytest.raises(ValueError, match="a matrix and at least one step are needed"):
        newton_schulz(torch.ones(3))
