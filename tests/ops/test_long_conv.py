import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remanence.errors import ShapeError
from remanence.ops import dispatch
from remanence.ops.dense_ssm import dense_ssm, dense_ssm_carry, dense_ssm_reference, inverses, krylov, squarings
from remanence.ops.long_conv import _fast_size, basis_conv, dilated_conv, long_conv, long_conv_reference

CUTS = st.lists(st.integers(0, 150), max_size=3)
LENGTHS = st.sampled_from([0, 1, 2, 5, 31, 64, 65, 150])


def within(cuts, T):
    return sorted(min(c, T) for c in cuts)


@settings(deadline=None, max_examples=25)
@given(T=LENGTHS, L=st.sampled_from([1, 2, 17, 90]), cuts=CUTS, mixing=st.booleans(), given_state=st.booleans())
def test_long_conv_with_any_cuts_is_the_loop(obeys, draw, T, L, cuts, mixing, given_state):
    noise = draw(T)
    kernel = noise(2, 3, L) if mixing else noise(3, L)
    obeys(
        lambda x, state: long_conv(x, kernel, state),
        lambda x, state: long_conv_reference(x, kernel, state),
        [noise(2, T, 3)],
        within(cuts, T),
        {"tail": noise(2, L - 1, 3)} if given_state else None,
        others=[kernel],
        axis=1,
    )


@settings(deadline=None, max_examples=25)
@given(T=st.sampled_from([0, 1, 2, 63, 64, 65, 513, 1100]), L=st.sampled_from([1, 2, 17, 90]), data=st.data())
def test_a_kernel_of_few_functions_is_never_formed(obeys, draw, T, L, data):
    noise = draw(T)
    basis, weight = noise(3, L), noise(5, 2, 3)
    given_state = data.draw(st.booleans())
    obeys(
        lambda x, state: basis_conv(x, basis, weight, state),
        lambda x, state: long_conv(x, weight @ basis, state),
        [noise(2, T, 2)],
        sorted(data.draw(st.lists(st.integers(0, T), max_size=2))),
        {"tail": noise(2, L - 1, 2)} if given_state else None,
        others=[basis, weight],
        axis=1,
    )


def test_a_kernel_of_few_functions_can_be_differentiated_twice(draw):
    noise = draw(0)
    assert torch.autograd.gradgradcheck(lambda *x: basis_conv(*x)[0], [noise(1, 4, 2), noise(2, 3), noise(3, 2, 2)])


def test_many_blocks_are_a_depthwise_convolution(draw):
    x, kernel = draw(0)(2, 3000, 3), draw(1)(3, 40)
    want = F.conv1d(F.pad(x.mT, (39, 0)), kernel.flip(-1)[:, None], groups=3).mT
    torch.testing.assert_close(long_conv(x, kernel)[0], want, rtol=0, atol=1e-12)


def test_the_law_notices_a_lost_state(obeys, draw):
    kernel = draw(1)(3, 9)
    with pytest.raises(AssertionError):
        obeys(
            lambda x, state: long_conv(x, kernel),
            lambda x, state: long_conv_reference(x, kernel, state),
            [draw(2)(2, 40, 3)],
            [20],
            others=[kernel],
            axis=1,
        )


def test_float32(agrees_in_float32, draw):
    agrees_in_float32(long_conv, [draw(0)(2, 500, 3), draw(1)(3, 300)])


def test_bfloat16_keeps_a_float32_tail(draw):
    for T in (1, 30):
        y, state = long_conv(draw(0)(2, T, 3).bfloat16(), draw(1)(3, 12))
        assert y.dtype == torch.bfloat16
        assert state["tail"].dtype == torch.float32


def test_impossible_kernels_are_refused_in_words(draw):
    with pytest.raises(ShapeError, match="features=3"):
        long_conv(draw(0)(2, 9, 5), draw(1)(3, 4))
    with pytest.raises(ShapeError, match="of length at least 1"):
        long_conv(draw(0)(2, 9, 3), draw(1)(3, 0))


def test_fast_sizes_hold_what_is_asked_and_little_more():
    for n in range(1, 3000):
        assert n <= _fast_size(n) <= max(1.5 * n, 2)


@settings(deadline=None, max_examples=20)
@given(T=LENGTHS, K=st.sampled_from([1, 2, 4]), dilation=st.sampled_from([1, 3, 16]), cuts=CUTS)
def test_dilated_taps_are_a_kernel_with_zeros_between(obeys, draw, T, K, dilation, cuts):
    noise = draw(T)
    weight = noise(3, K)

    def sparse(x, state):
        kernel = torch.zeros(3, K, dilation, dtype=x.dtype)
        kernel[..., 0] = weight
        return long_conv_reference(x, kernel.flatten(1)[:, : (K - 1) * dilation + 1], state)

    obeys(
        lambda x, state: dilated_conv(x, weight, dilation, state),
        sparse,
        [noise(2, T, 3)],
        within(cuts, T),
        {"tail": noise(2, (K - 1) * dilation, 3)},
        others=[weight],
        axis=1,
    )


def system(draw, D=2, N=4, M=3):
    noise = draw(9)
    return 0.4 * noise(D, N, N), noise(D, N), noise(D, M, N)


@pytest.fixture(params=["compiled", "tensors"])
def form(request, monkeypatch):
    monkeypatch.setattr(dispatch, "compiled", lambda x: request.param == "compiled")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(T=LENGTHS, N=st.integers(1, 6), cuts=CUTS, given_state=st.booleans())
def test_a_dense_system_with_any_cuts_is_the_loop(form, obeys, draw, T, N, cuts, given_state):
    parts = [p.detach().requires_grad_() for p in system(draw, N=N)]
    obeys(
        lambda u, state: dense_ssm(u, *parts, state),
        lambda u, state: dense_ssm_reference(u, *parts, state),
        [draw(T)(2, T, 2)],
        within(cuts, T),
        {"h": draw(1)(2, 2, N)} if given_state else None,
        others=parts,
        axis=1,
    )


def test_a_dense_system_is_the_convolution_with_its_kernel(draw):
    A, B, C = system(draw)
    u = draw(3)(2, 200, 2)
    kernel = C @ krylov(squarings(A, 200), B[..., None], 200)[:, :, 0]
    want = torch.stack([long_conv(u, kernel[:, m])[0] for m in range(3)], -1)
    torch.testing.assert_close(dense_ssm(u, A, B, C)[0], want, rtol=0, atol=1e-10)


def test_the_carry_gives_the_end_from_any_start(draw):
    A, B, C = system(draw)
    u, start = draw(3)(2, 77, 2), draw(4)(2, 2, 4)
    M, N = dense_ssm_carry(u, A, B)
    want = dense_ssm_reference(u, A, B, C, {"h": start})[1]["h"]
    torch.testing.assert_close((M @ start[..., None])[..., 0] + N, want, rtol=0, atol=1e-10)


def test_a_dense_system_can_be_differentiated_twice(draw):
    inputs = [draw(0)(1, 5, 2), *(p.detach().requires_grad_() for p in system(draw, N=3, M=1)), draw(1)(1, 2, 3)]

    def run(u, A, B, C, h):
        y, state = dense_ssm(u, A, B, C, {"h": h})
        return y, state["h"]

    assert torch.autograd.gradgradcheck(run, inputs)


def test_inverses_take_the_largest_pivots(draw):
    A = draw(0)(3, 7, 7)
    with torch.no_grad():
        A[0] = torch.eye(7)[[3, 0, 6, 1, 5, 2, 4]]  # none without a change of rows
    torch.testing.assert_close(inverses(A), torch.linalg.inv(A), rtol=1e-9, atol=1e-9)
    (got,), (want,) = (torch.autograd.grad(f(A).sin().sum(), A) for f in (inverses, torch.linalg.inv))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradgradcheck(inverses, A)


def test_a_dense_system_in_float32(agrees_in_float32, draw):
    agrees_in_float32(dense_ssm, [draw(0)(2, 200, 2), *system(draw)])


def test_a_system_of_another_width_is_refused(draw):
    A, B, C = system(draw)
    with pytest.raises(ShapeError, match="transition must be"):
        dense_ssm(draw(0)(1, 5, 2), A[:1], B, C)
