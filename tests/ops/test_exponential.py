import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from remanence.errors import ShapeError, UnknownName
from remanence.ops.exponential import (
    deep_exponential,
    deep_exponential_reference,
    exponential_memory,
    exponential_reference,
    kernel,
)
from remanence.state import flatten

B, H, K, V, HIDDEN = 2, 2, 3, 4, 5


def draw(T, window=1, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(B, H, T, *shape, generator=g, dtype=torch.float64)

    q, k = (F.normalize(normal(K), dim=-1) for _ in range(2))
    inputs = [q, k, normal(V), normal(window).sigmoid() / window]
    return [x.requires_grad_() for x in inputs]


def empty(window=1):
    zero = torch.zeros(B, H, 0, K, dtype=torch.float64)
    recent = zero.new_zeros(B, H, window - 1, V)
    return {"keys": zero, "values": zero.new_zeros(B, H, 0, V), "recent": recent, "position": torch.zeros(B).long()}


def run(fn, inputs, state, cuts=(), **options):
    pieces = []
    for part in zip(*(x.tensor_split(cuts, dim=2) for x in inputs), strict=True):
        y, state = fn(*part, state, **options)
        pieces.append(y)
    return torch.cat(pieces, 2), state


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@settings(max_examples=15, deadline=None)
@given(T=st.integers(0, 9), window=st.integers(1, 4), objective=st.sampled_from(["squared", "dot"]), data=st.data())
def test_any_cut_is_the_recurrence(T, window, objective, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=3)))
    inputs = draw(T, window)
    want, want_state = run(exponential_reference, inputs, empty(window), objective=objective)
    got, got_state = run(exponential_memory, inputs, empty(window), cuts, objective=objective)
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    if T:
        sums = [y.sin().sum() + s["values"].cos().sum() for y, s in ((got, got_state), (want, want_state))]
        close(*(torch.autograd.grad(x, inputs, allow_unused=True, materialize_grads=True) for x in sums))


def test_more_tokens_than_one_solve_takes():
    inputs = draw(150, 3)
    close(run(exponential_memory, inputs, empty(3), [77])[0], run(exponential_reference, inputs, empty(3))[0])


def test_the_dot_objective_is_softmax_attention_before_its_division():
    q, k, v, _ = draw(20)
    gate = torch.ones(B, H, 20, 1, dtype=torch.float64)
    both = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state = {**empty(), "values": torch.zeros(B, H, 0, V + 1).double(), "recent": torch.zeros(B, H, 0, V + 1).double()}
    y, _ = exponential_memory(q, k, both, gate, state, objective="dot")
    close(y[..., :V] / y[..., V:], F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0))


def test_a_step_of_one_mends_an_error_exactly_and_overwrites():
    _, k, v, _ = draw(12)
    gate = torch.ones(B, H, 24, 1, dtype=torch.float64)
    keys, values = torch.cat([k, k], 2), torch.cat([v, -v], 2)
    y, _ = exponential_memory(keys, keys, values, gate, empty())
    close(y, values)
    added, _ = exponential_memory(keys, keys, values, gate, empty(), objective="dot")
    assert (added - values).abs().max() > 0.5


def deep(T, seed=1):
    q, k, v, _ = draw(T)
    g = torch.Generator().manual_seed(seed)
    retain = F.logsigmoid(torch.randn(B, H, T, generator=g, dtype=torch.float64) + 1)
    step = torch.rand(B, H, T, generator=g, dtype=torch.float64)
    W = torch.randn(H, V, HIDDEN, generator=g, dtype=torch.float64)
    leaves = [q, k, v, step.requires_grad_(), retain.requires_grad_(), W.requires_grad_()]
    zero = torch.zeros(B, H, 0, K, dtype=torch.float64)
    state = {"keys": zero, "values": zero.new_zeros(B, H, 0, HIDDEN), "logs": zero[..., :1]}
    moved = torch.zeros(B, H, V, HIDDEN, dtype=torch.float64)
    state |= {"weight": moved, "anchor": moved, "since": zero.new_zeros(B, H), "position": torch.zeros(B).long()}
    return leaves, state


def test_the_deep_form_neither_explodes_nor_dies():
    leaves, state = deep(1)
    q, k, v, step, retain, start = (x.detach() for x in leaves)
    q, k, v = (x.repeat(1, 1, 1500, 1) for x in (q, k, F.normalize(v, dim=-1)))
    retain = torch.full_like(q[..., 0], -0.05)
    step = 0.5 * -torch.expm1(retain)
    y, end = deep_exponential(q, k, v, step, retain, start, state)
    assert y[:, :, -1].norm() > 0.1 * y[:, :, 50].norm()
    assert end["weight"].norm() < start.norm() * B
    y, _ = deep_exponential(q, k, v, 20 * step, retain, start, state)
    assert not y.norm() < 1e6


@pytest.mark.parametrize("chunk_size", [1, 3, 64])
@pytest.mark.parametrize("cuts", [[], [5], [0, 1, 1, 7], list(range(1, 10))])
def test_the_deep_form_at_any_cut_is_the_recurrence(chunk_size, cuts):
    leaves, state = deep(10)
    want, _ = deep_exponential_reference(*leaves, state, chunk_size=chunk_size)
    _, whole = deep_exponential(*leaves, state, chunk_size=chunk_size)
    pieces = []
    for part in zip(*(x.tensor_split(cuts, dim=2) for x in leaves[:5]), strict=True):
        y, state = deep_exponential(*part, leaves[5], state, chunk_size=chunk_size)
        pieces.append(y)
    got = torch.cat(pieces, 2)
    close(got, want)
    close(flatten(state), flatten(whole))
    close(torch.autograd.grad(got.sin().sum(), leaves), torch.autograd.grad(want.sin().sum(), leaves))


def test_the_kernel():
    x, y = draw(4)[:2]
    close(kernel(x, y), (x @ y.mT).exp() / torch.e)


def test_what_does_not_fit_is_named():
    q, k, v, gate = draw(3)
    with pytest.raises(ShapeError, match=r"gate must be \[batch=2, heads=2, time=3, window=2\]"):
        exponential_memory(q, k, v, gate, empty(2))
    with pytest.raises(UnknownName, match="did you mean 'dot'"):
        exponential_memory(q, k, v, gate, empty(), objective="dott")
    with pytest.raises(ShapeError, match=r"deep_exponential: step must be \[batch=2, heads=2, time=3\]"):
        deep_exponential(q, k, v, gate, gate[..., 0], torch.zeros(H, V, HIDDEN), {})
