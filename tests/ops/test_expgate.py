import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops import dispatch
from remanence.ops.expgate import expgate, expgate_carry, expgate_reference, merge

B, H, K, V = 2, 2, 4, 3


def inputs(draw, T, hardness=1.0):
    noise = draw(T)
    with torch.no_grad():
        forget = torch.nn.functional.logsigmoid(hardness * noise(B, H, T))
        write = hardness * noise(B, H, T)
    return [noise(B, H, T, K), noise(B, H, T, K), noise(B, H, T, V), forget.requires_grad_(), write.requires_grad_()]


@settings(deadline=None, max_examples=30)
@given(
    T=st.integers(0, 150),
    cuts=st.lists(st.integers(0, 150), max_size=4),
    hardness=st.sampled_from([1.0, 10.0]),
    given_state=st.booleans(),
    eps=st.sampled_from([0.0, 1e-3]),
    compiled=st.booleans(),
)
def test_any_cuts_give_the_loop(obeys, draw, T, cuts, hardness, given_state, eps, compiled):
    noise = draw(99)
    state = None
    if given_state:
        state = {"C": noise(B, H, K, V), "n": noise(B, H, K), "m": (20 * noise(B, H)).detach().requires_grad_()}
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(dispatch, "COMPILED_FROM", 0 if compiled else math.inf)
        obeys(
            lambda *x, state=None: expgate(*x, state=state, scale=0.7, eps=eps, chunk_size=16),
            lambda q, *x, state=None: expgate_reference(0.7 * q, *x, state=state, eps=eps),
            inputs(draw, T, hardness),
            sorted(min(c, T) for c in cuts),
            state,
            tolerance=1e-9 if hardness == 1 else 1e-8,  # where n · q cancels, its last digits are many of y's
        )


def test_the_law_notices_a_lost_state(obeys, draw):
    with pytest.raises(AssertionError):
        obeys(lambda *x, state=None: expgate(*x), expgate_reference, inputs(draw, 20), [10])


@pytest.mark.parametrize("eps", [0.0, 1e-3])
@pytest.mark.parametrize("given_state", [False, True])
def test_second_gradients_of_the_compiled_form_are_the_loops(draw, eps, given_state):
    T, noise = 21, draw(98)
    held = [noise(B, H, K, V), noise(B, H, K)] if given_state else []
    m = noise(B, H).detach()

    def second(op):
        x = inputs(draw, T)
        y, after = op(*x, state=dict(zip("Cnm", [*held, m], strict=True)) if held else None, eps=eps)
        total = (y.square().sum() + after["C"].square().sum() + after["n"].square().sum()) / 2
        first = torch.autograd.grad(total, [*x, *held], create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [*x, *held])]

    for got, want in zip(second(partial(expgate, chunk_size=4)), second(expgate_reference), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_heads_within_a_projection_are_read_and_their_output_lies_so(draw):
    """As layers have them: q, k and v are columns of one tensor, and the heads of y are to be joined again."""
    noise, heads = draw(3), [(H, K), (H, K), (H, V)]
    mixed, (_, _, _, f, i) = noise(B, 300, H * (K + K + V) + 5), inputs(draw, 300)
    parts = mixed[..., :-5].split([h * width for h, width in heads], -1)
    views = [part.unflatten(-1, shape).transpose(1, 2) for part, shape in zip(parts, heads, strict=True)]
    y, _ = expgate(*views, f, i)
    assert y.transpose(1, 2).is_contiguous()
    weights = torch.randn_like(y)
    found = torch.autograd.grad((y * weights).sum(), [mixed, f, i])
    want, _ = expgate_reference(*views, f, i)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    for got, slope in zip(found, torch.autograd.grad((want * weights).sum(), [mixed, f, i]), strict=True):
        torch.testing.assert_close(got, slope, rtol=1e-9, atol=1e-9)


def test_a_denominator_that_is_as_large_as_its_bound_has_half_of_the_gradient():
    one = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    shut, opened = torch.full((1, 1, 2), -60.0, dtype=torch.float64), torch.zeros(1, 1, 2, dtype=torch.float64)

    def slopes(op):
        x = [one.clone().requires_grad_(), one.clone().requires_grad_(), 3 * one, shut, opened]
        return torch.autograd.grad(op(*x)[0].sum(), x[:2])

    got = slopes(expgate)
    torch.testing.assert_close(got, slopes(expgate_reference))
    assert got[0].flatten()[0] == 1.5  # of 3: half of what a quotient by n · q would take away


def test_it_is_the_quotient_of_the_papers_sums(draw):
    """Without a stabiliser, from the closed form: y = Σ_j D_ij (q_i·k_j) v_j / max(|Σ_j D_ij (q_i·k_j)|, 1)."""
    q, k, v, f, i = inputs(draw, 40)
    F = f.cumsum(2)
    D = (F[..., :, None] - F[..., None, :] + i[..., None, :]).exp().tril()
    scores = (q @ k.mT) * D
    want = (scores @ v) / scores.sum(-1, keepdim=True).abs().clamp(min=1)
    y, state = expgate(q, k, v, f, i)
    torch.testing.assert_close(y, want)
    C = torch.einsum("bhj,bhjk,bhjv->bhkv", D[:, :, -1], k, v)
    torch.testing.assert_close(state["C"] * state["m"].exp()[..., None, None], C)


def test_the_stabiliser_cancels(draw):
    x = inputs(draw, 30)
    y, _ = expgate(*x)
    zero = torch.zeros(B, H, K, V, dtype=torch.float64)
    for m in (-1e30, -5.0, 30.0):
        state = {"C": zero, "n": zero[..., 0], "m": torch.full((B, H), m, dtype=torch.float64)}
        torch.testing.assert_close(expgate(*x, state=state)[0], y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [40.0, 1000.0])
def test_extreme_gates_stay_finite_in_float32(draw, size):
    q, k, v, f, i = (x.detach().float().requires_grad_() for x in inputs(draw, 500))
    i = (size * i.detach()).requires_grad_()
    y, state = expgate(q, k, v, (size * f.detach()).requires_grad_(), i)
    (y.sum() + state["C"].sum()).backward()
    assert all(x.isfinite().all() for x in (y, *state.values(), q.grad, k.grad, v.grad, i.grad))


def test_float32_follows_float64(agrees_in_float32, draw):
    agrees_in_float32(expgate, inputs(draw, 200))


def run_all(x, cuts=()):
    """(Outputs and the last state, gradients) of a run in pieces."""
    x, state, out = [part.detach().requires_grad_() for part in x], None, []
    for piece in zip(*(part.tensor_split(cuts, 2) for part in x), strict=True):
        y, state = expgate(*piece, state=state)
        out.append(y)
    y = torch.cat(out, 2)
    weights = torch.arange(1.0, y.numel() + 1, dtype=torch.float64).cos().view_as(y)
    return [y, *state.values()], torch.autograd.grad((y.double() * weights).sum(), x)


def distance(got, want):
    return max(((x.double() - y).abs().max() / y.abs().max()).item() for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("decay", [1.0, 0.999, 0.5, 1e-3, 1e-6])
@pytest.mark.parametrize("centre", [-10.0, 0.0, 5.0, 20.0])
def test_5000_tokens_in_float32_at_any_decay_with_any_cuts(decay, centre):
    """To 1e-4, gradients too unless the quotient itself is less certain: by the last digits of its inputs."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5000, 8, generator=g)
    write = centre + torch.randn(1, 2, 5000, generator=g)
    x = [q, k, v, torch.full_like(write, math.log(decay)), write]
    wide = [part.double() for part in x]
    want, slopes = run_all(wide)
    got, got_slopes = run_all(x, (1, 700, 701, 3000))
    assert distance(got, want) < 1e-4
    digits = [part * (1 + 2**-24 * torch.randn(part.shape, dtype=torch.float64, generator=g)) for part in wide]
    _, uncertain = run_all(digits)
    assert distance(got_slopes, slopes) < max(1e-4, 2 * distance(uncertain, slopes))


@pytest.mark.parametrize("decay", [1.0, 1e-6])
def test_equal_values_are_read_as_they_are_in_float32(draw, decay):
    q, k, _, f, i = (x.detach().float() for x in inputs(draw, 2000))
    y, _ = expgate(q, k, torch.ones(B, H, 2000, V), torch.full_like(f, math.log(decay)), 20 + i)
    torch.testing.assert_close(y.abs(), torch.ones_like(y), rtol=1e-4, atol=0)


def test_a_closed_input_gate_leaves_the_memory_to_decay(draw):
    q, k, v, f, i = (x.detach() for x in inputs(draw, 6))
    _, before = expgate(q, k, v, f, i)
    _, after = expgate(q, k, v, f, torch.full_like(i, -math.inf), before)
    kept = (after["m"] - before["m"]).exp()[..., None, None] * after["C"]
    torch.testing.assert_close(kept, before["C"] * f.sum(2).exp()[..., None, None])
    _, same = expgate(q, k, v, torch.zeros_like(f), torch.full_like(i, -math.inf), before)
    for name, x in before.items():
        torch.testing.assert_close(same[name], x)


def test_pieces_merge_by_maxima(draw):
    q, k, v, f, i = inputs(draw, 50, 5.0)
    _, whole = expgate(q, k, v, f, i)
    _, first = expgate(*(x[:, :, :20] for x in (q, k, v, f, i)))
    joined = merge(first, *expgate_carry(*(x[:, :, 20:] for x in (k, v, f, i))))
    for name, x in whole.items():
        torch.testing.assert_close(joined[name], x)


def test_long_runs_and_single_steps_agree_in_float32(draw):
    q, k, v, f, i = (x.detach().float() for x in inputs(draw, 60, 8.0))
    y, end = expgate(q, k, v, f, 10 * i)
    state, out = None, []
    for t in range(60):
        token, state = expgate(*(x[:, :, t : t + 1] for x in (q, k, v, f, 10 * i)), state=state)
        out.append(token)
    torch.testing.assert_close(torch.cat(out, 2), y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state["m"], end["m"])


def test_wrong_shapes_say_what_was_expected(draw):
    q, k, v, f, i = inputs(draw, 4)
    with pytest.raises(ShapeError, match="log_input must be"):
        expgate(q, k, v, f, i[:, :, :2])
