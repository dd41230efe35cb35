import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from remanence.errors import ShapeError, StateError
from remanence.ops import dispatch
from remanence.ops.delta import gated_delta_rule
from remanence.ops.fast_weight import fast_weight, fast_weight_state
from remanence.ops.newton_schulz import newton_schulz
from remanence.ops.omega import omega_delta, omega_delta_reference
from remanence.ops.unit_solve import unit_solve
from remanence.state import concat, flatten, nbytes, select

B, H, K, V = 2, 2, 3, 4
omega = sys.modules[omega_delta_reference.__module__]


def draw(T, momentum=True, window=3, seed=0):
    """Inputs, gates and first weights, all of which receive gradients."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = normal(B, H, T, K), F.normalize(normal(B, H, T, K), dim=-1), normal(B, H, T, V)
    gates = {
        "step": 0.4 * normal(B, H, T).sigmoid(),
        "gate": normal(B, H, T, window).sigmoid(),
        "retain_log": F.logsigmoid(normal(B, H, T) + 2),
    }
    if momentum:
        gates["momentum_log"] = F.logsigmoid(normal(B, H, T))
    W = 0.7 * normal(H, V, K)
    leaves = [x.requires_grad_() for x in (*inputs, *gates.values(), W)]
    return inputs, gates, W, leaves


def start(W, momentum=True, window=3):
    return fast_weight_state([W], B, momentum=momentum, window=window)


def run(fn, inputs, gates, state, cuts=(), **options):
    names, pieces = list(gates), []
    for part in zip(*(x.tensor_split(cuts, dim=2) for x in (*inputs, *gates.values())), strict=True):
        y, state = fn(*part[:3], state=state, **dict(zip(names, part[3:], strict=True)), **options)
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


@settings(max_examples=25, deadline=None)
@given(T=st.integers(0, 9), window=st.integers(1, 4), momentum=st.booleans(), data=st.data())
def test_any_cut_is_the_recurrence(T, window, momentum, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=4)))
    bound = data.draw(st.sampled_from([None, 0.5]))
    inputs, gates, W, leaves = draw(T, momentum, window)
    state = start(W, momentum, window)
    want, want_state = run(omega_delta_reference, inputs, gates, state, bound=bound)
    got, got_state = run(omega_delta, inputs, gates, state, cuts, bound=bound)
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    close(grads(got, got_state, leaves), grads(want, want_state, leaves))


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("compiled", [True, False])
def test_chunks_hand_on_their_gradients(window, compiled, monkeypatch):
    monkeypatch.setattr(dispatch, "compiled", lambda x: compiled)
    monkeypatch.setattr(omega, "PAIRS", 20)
    inputs, gates, W, leaves = draw(53, False, window)
    state = start(W, False, window)
    want, want_state = run(omega_delta_reference, inputs, gates, state, bound=0.5)
    got, got_state = run(omega_delta, inputs, gates, state, [21], bound=0.5)
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    close(grads(got, got_state, leaves), grads(want, want_state, leaves))


def test_it_can_be_differentiated_twice():
    *_, leaves = draw(4, False, 2)

    def both(*given):
        q, k, v, step, gate, retain, W = given
        y, state = omega_delta(q, k, v, step, gate, start(W, False, 2), retain_log=retain)
        return y, state["weight"]["0"]

    assert torch.autograd.gradgradcheck(both, leaves)


@pytest.mark.parametrize("n", [1, 5, 40])
def test_unit_systems_are_solved(n):
    g = torch.Generator().manual_seed(0)
    A = (0.3 * torch.randn(2, 3, n, n, generator=g, dtype=torch.float64)).requires_grad_()
    X = torch.randn(2, 3, n, 4, generator=g, dtype=torch.float64, requires_grad=True)
    full = A.tril(-1) + torch.eye(n)
    want = torch.linalg.solve(full, X)
    got = unit_solve(A, X)
    close(got, want)
    close(*(torch.autograd.grad(y.sin().sum(), (A, X)) for y in (got, want)))
    if n == 5:
        assert torch.autograd.gradgradcheck(unit_solve, (A[:1, :1, :3, :3], X[:1, :1, :3]))


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("momentum", [True, False])
def test_it_is_the_fast_weight_op_with_chunks_of_one_token(window, momentum):
    """Also over more tokens than one solve takes, and from one op to the other."""
    inputs, gates, W, _ = draw(140, momentum, window)
    state = start(W, momentum, window)
    other = dict(gates)
    gate = other.pop("gate") * (torch.arange(window) <= torch.arange(140)[:, None])
    other["window"] = gate if window > 1 else None
    other["step"] = other["step"] if window > 1 else other["step"] * gate[..., 0]
    other = {name: x for name, x in other.items() if x is not None}
    want, want_state = run(fast_weight, inputs, other, state, chunk_size=1)
    got, got_state = run(omega_delta, inputs, gates, state, [31])
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    _, half = run(fast_weight, *part(inputs, other, slice(50)), state, chunk_size=1)
    close(run(omega_delta, *part(inputs, gates, slice(50, None)), half)[0], want[:, :, 50:])


def test_a_window_of_one_is_the_delta_rule():
    (q, k, v), gates, W, _ = draw(20, momentum=False, window=1)
    beta = gates["step"]
    y, _ = omega_delta(q, k, v, beta, torch.ones_like(beta)[..., None], start(0 * W, False, 1))
    close(y, gated_delta_rule(q, k, v, beta)[0])


def test_a_lost_window_momentum_or_weight_is_noticed():
    inputs, gates, W, _ = draw(10)
    want, _ = run(omega_delta, inputs, gates, start(W))
    _, state = run(omega_delta, *part(inputs, gates, slice(5)), start(W))
    for name in ("momentum", "weight", "window"):
        tail, _ = run(omega_delta, *part(inputs, gates, slice(5, None)), {**state, name: start(W)[name]})
        assert (tail - want[:, :, 5:]).abs().max() > 1e-4, name


def test_rows_may_stand_at_different_positions_and_the_state_keeps_its_size():
    inputs, gates, W, _ = draw(9)
    ahead = [run(omega_delta, *part(inputs, gates, slice(n)), start(W))[1] for n in (3, 2)]
    mixed = concat([select(ahead[0], 0), select(ahead[1], 1)])
    want, want_state = run(omega_delta_reference, inputs, gates, mixed)
    got, got_state = run(omega_delta, inputs, gates, mixed)
    assert got_state["pos"].tolist() == [12, 11]
    assert nbytes(got_state) == nbytes(start(W))
    close(got, want)
    close(flatten(got_state), flatten(want_state))


def test_a_bound_keeps_a_repeated_token_from_diverging():
    (q, k, v), gates, W, _ = draw(1, window=4)
    q, k, v = (x.detach().repeat(1, 1, 300, 1) for x in (q, 3 * k, v))
    gates = {n: x.detach().repeat(1, 1, 300, *[1] * (x.ndim - 3)) for n, x in gates.items()}
    gates["retain_log"] = 0 * gates["retain_log"]
    bounded, _ = run(omega_delta, (k, k, v), gates, start(W.detach(), window=4), bound=1.0)
    free, _ = run(omega_delta, (k, k, v), gates, start(W.detach(), window=4))
    close(bounded[:, :, -1], v[:, :, -1], 1e-6)
    assert not free[:, :, -1].norm() < 1e3


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
    (q, k, v), gates, W, _ = draw(3, window=2)
    step, gate = gates["step"], gates["gate"]
    with pytest.raises(StateError, match="the state has momentum"):
        omega_delta(q, k, v, step, gate, start(W, window=2))
    with pytest.raises(StateError, match="the state is for a window of 3, the gate of 2"):
        omega_delta(q, k, v, step, gate, start(W, False))
    with pytest.raises(ShapeError, match=r"omega_delta: step must be \[batch=2, heads=2, time=3\]"):
        omega_delta(q, k, v, gate, gate, start(W, False, 2))
    with pytest.raises(ValueError, match="a matrix and at least one step are needed"):
        newton_schulz(torch.ones(3))
