import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops.complex_scan import (
    by_doubling,
    complex_scan,
    complex_scan_carry,
    complex_scan_reference,
    diagonal_ssm,
    diagonal_ssm_reference,
)


def coefficients(draw, seed, *shape, turning=True):
    """Of magnitude below 1, with any phase or sign, as a function of leaves."""
    noise = draw(seed)
    magnitude, phase = noise(*shape), noise(*shape)
    a = magnitude.sigmoid() ** 0.3
    return [magnitude, phase], torch.polar(a, 3 * phase) if turning else a * phase.detach().sign()


def leaves_and_inputs(draw, T, turning, D=5, B=2):
    leaves, a = coefficients(draw, T, B, T, D, turning=turning)
    re, im = draw(T + 1)(B, T, D), draw(T + 2)(B, T, D)
    return [*leaves, re, im], a, torch.complex(re, im) if turning else re


def as_real(x):
    return torch.view_as_real(x) if x.is_complex() else x


def agree(got, want, leaves, tolerance=1e-9):
    """Values of (y, state), and gradients of a function of all of them."""
    found = []
    for y, state in (got, want):
        numbers = [as_real(y), state["h"]]
        loss = sum((x * torch.arange(1.0, x.numel() + 1).cos().view_as(x)).sum() for x in numbers)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, retain_graph=True, materialize_grads=True)
        found.append([*numbers, *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def in_pieces(op, cuts, moving, state):
    out = []
    for part in zip(*(x.tensor_split(cuts, 1) for x in moving), strict=True):
        y, state = op(*part, state)
        out.append(y)
    return torch.cat(out, 1), state


@pytest.mark.parametrize("turning", [True, False])
@settings(deadline=None, max_examples=15)
@given(T=st.integers(0, 70), cuts=st.lists(st.integers(0, 70), max_size=4), given_state=st.booleans())
def test_any_cuts_give_the_loop(draw, turning, T, cuts, given_state):
    leaves, a, b = leaves_and_inputs(draw, T, turning)
    h = draw(99)(2, 5, 2) if turning else draw(99)(2, 5)
    state = {"h": h} if given_state else None
    leaves += [h] if given_state else []
    cuts = sorted(min(c, T) for c in cuts)
    want = complex_scan_reference(a, b, state)
    if leaves and want[1]["h"].requires_grad:
        agree(in_pieces(complex_scan, cuts, [a, b], state), want, leaves)


@pytest.mark.parametrize("turning", [True, False])
def test_coefficients_that_do_not_change(draw, turning):
    leaves, a = coefficients(draw, 3, 5, turning=turning)
    more, _, b = leaves_and_inputs(draw, 41, turning)
    op = in_pieces(lambda b, state: complex_scan(a, b, state), [7, 7, 30], [b], None)
    agree(op, complex_scan_reference(a, b), [*leaves, *more[2 : 4 if turning else 3]])


def test_the_test_notices_a_missing_conjugate(draw):
    leaves, a, b = leaves_and_inputs(draw, 20, True)
    with pytest.raises(AssertionError):
        agree(complex_scan(a.conj(), b), complex_scan_reference(a, b), leaves)


@pytest.mark.parametrize("turning", [True, False])
def test_the_form_for_other_devices_is_the_same(draw, turning):
    leaves, a, b = leaves_and_inputs(draw, 37, turning)
    h = by_doubling(a, b, torch.zeros_like(b[:, 0]))
    agree((h, {"h": as_real(h[:, -1])}), complex_scan(a, b), leaves[: 4 if turning else 3])


def test_zeros_and_signs_are_no_trouble():
    a = torch.tensor([0.0, -1.0, 1.0, -0.5])
    h, state = complex_scan(a, torch.ones(1, 1001, 4))
    torch.testing.assert_close(h[0, -1], torch.tensor([1.0, 1.0, 1001.0, 2 / 3]))
    assert torch.equal(state["h"], h[:, -1])


def test_float32_follows_float64_over_a_long_way():
    source = torch.Generator().manual_seed(0)
    a = torch.polar(torch.tensor([0.5, 0.99, 0.9999]), torch.tensor([3.0, 0.1, 1e-3]))
    b = torch.randn(1, 4000, 3, generator=source, dtype=torch.complex64)
    got, _ = complex_scan(a, b)
    want, _ = complex_scan(a.to(torch.complex128), b.to(torch.complex128))
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_several_threads_give_what_one_gives(draw):
    leaves, a, b = leaves_and_inputs(draw, 60, True, D=600)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        h, _ = complex_scan(a, b)
        found.append([h, *torch.autograd.grad(h.real.sin().sum() + h.imag.cos().sum(), leaves, retain_graph=True)])
    torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("fixed", [True, False])
def test_carry(draw, fixed):
    _, a, b = leaves_and_inputs(draw, 33, True)
    a = a[0, 0] if fixed else a
    M, N = complex_scan_carry(a, b)
    start = draw(7)(2, 5, 2)
    want = complex_scan(a, b, {"h": start})[1]["h"]
    torch.testing.assert_close(torch.view_as_real(M * torch.view_as_complex(start) + N), want, rtol=1e-9, atol=1e-9)


def test_second_derivatives_are_those_of_the_loop(draw):
    (magnitude, phase, re, im), _, _ = leaves_and_inputs(draw, 5, True, D=2, B=1)

    def op(magnitude, phase, re, im):
        return torch.view_as_real(complex_scan(torch.polar(magnitude.sigmoid(), phase), torch.complex(re, im))[0])

    assert torch.autograd.gradgradcheck(op, (magnitude, phase, re, im))


def test_wrong_inputs_say_what_was_expected(draw):
    _, a, b = leaves_and_inputs(draw, 4, True)
    with pytest.raises(ShapeError, match="a must be"):
        complex_scan(a[:, :3], b)
    with pytest.raises(TypeError, match="one type"):
        complex_scan(a.real, b)


def modes(draw, D=3, N=4):
    leaves, a = coefficients(draw, 11, D, N)
    re, im = draw(12)(D, N), draw(13)(D, N)
    return [*leaves, re, im], a, torch.complex(re, im)


@settings(deadline=None, max_examples=20)
@given(
    T=st.integers(1, 70),
    cuts=st.lists(st.integers(0, 70), max_size=3),
    size=st.integers(1, 20),
    given_state=st.booleans(),
)
def test_diagonal_ssm_is_the_loop_for_any_cut_and_chunk(draw, T, cuts, size, given_state):
    leaves, a, read = modes(draw)
    u, h = draw(T)(2, T, 3), draw(98)(2, 3, 4, 2)
    state = {"h": h} if given_state else None
    cuts = sorted(min(c, T) for c in cuts)
    got = in_pieces(lambda u, state: diagonal_ssm(u, a, read, state, chunk_size=size), cuts, [u], state)
    agree(got, diagonal_ssm_reference(u, a, read, state), [*leaves, u, *([h] if given_state else [])])


def test_diagonal_ssm_is_a_convolution(draw):
    """Against the transform of the whole sequence, which has neither chunks nor a state."""
    _, a, read = modes(draw)
    u = draw(5)(2, 300, 3)
    lags = torch.arange(300, dtype=torch.float64)
    kernel = (read[..., None] * a[..., None] ** lags).sum(1).real
    spectrum = torch.fft.rfft(u.mT, n=600) * torch.fft.rfft(kernel, n=600)
    want = torch.fft.irfft(spectrum, n=600)[..., :300].mT
    torch.testing.assert_close(diagonal_ssm(u, a, read)[0], want, rtol=1e-11, atol=1e-11)


def test_diagonal_ssm_refuses_what_does_not_fit(draw):
    _, a, read = modes(draw)
    with pytest.raises(ShapeError, match="read must be"):
        diagonal_ssm(torch.zeros(1, 4, 3), a, read[:, :2])
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        diagonal_ssm(torch.zeros(1, 4, 3), a, read, chunk_size=-1)
