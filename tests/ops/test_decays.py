"""Every op that forgets, over 5,000 tokens whose decays run from exactly 1 down to a millionth."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from remanence import ops

T, K, V, H = 5000, 3, 2, 1
MANNERS = 3
"""Rows of a batch: nothing is ever forgotten; decays log-uniform from a millionth to 1; and 1 less such a number."""


def log_decays(*shape):
    """[MANNERS, *shape], one row for each manner."""
    source = torch.Generator().manual_seed(T)
    least = torch.rand(*shape, generator=source, dtype=torch.float64).mul(torch.tensor(1e-6).log())
    return narrow(torch.stack([torch.zeros_like(least), least, torch.log1p(-least.exp() * (1 - 1e-6))]))


def narrow(x):
    """The same numbers in float64 after a rounding to float32, so that both precisions are given the same ones."""
    return x.detach().float().double().requires_grad_()


def noise(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return narrow(torch.randn(*shape, generator=source, dtype=torch.float64))


def heads(*features):
    return [noise(MANNERS, H, T, n, seed=i) for i, n in enumerate(features)]


def delta(q, k, *rest):
    return q, F.normalize(k, dim=-1), *rest


# op(form)(*moving, *fixed) is the op, or its reference, on leaves of which the first few are cut along time.


def complex_scan(form):
    def run(a_re, a_im, re, im, state=None):
        y, after = form(torch.complex(a_re, a_im), torch.complex(re, im), state)
        return torch.view_as_real(y), after

    return run


def diagonal_ssm(form):
    def run(u, a_re, a_im, read, state=None):
        return form(u, torch.complex(a_re, a_im), torch.complex(read, read.flip(-1)), state)

    return run


def turned(size):
    """The two parts of complex numbers of these magnitudes, each rounded to float32."""
    a = torch.polar(size.detach().exp(), noise(*size.shape, seed=5).detach())
    return [narrow(a.real), narrow(a.imag)]


def rotated(size):
    """Symmetric matrices of these eigenvalues."""
    Q = torch.linalg.qr(noise(*size.shape, size.shape[-1], seed=5).detach()).Q
    return narrow(Q * size.detach().exp()[..., None, :] @ Q.mT)


def selective_scan(form):
    return lambda x, delta, B, C, A, state=None: form(x, -delta, -A.exp(), B, C, state)


def gated_delta_rule(form):
    return lambda q, k, v, beta, g, state=None: form(*delta(q, k), v, beta.sigmoid(), g, state)


def dplr(form):
    def run(q, k, v, a, rate, g, state=None):
        a = F.normalize(a, dim=-1)
        return form(q, k, v, a, -rate.sigmoid()[..., None] * a, g, state)

    return run


def slots(form):
    return lambda q, k, v, g, state=None: form(q, k, v, -torch.expm1(g - 1e-3), g, state)


def softmax_scan(form):
    return lambda s, v, g, u, state=None: form(s, v, g, u, state)


def least_squares(form):
    return lambda q, k, v, b, g, ridge, state=None: form(*delta(q, k), v, b.sigmoid(), ridge.exp(), g, state)


def plain(form):
    return form


Leaves = Callable[[], tuple[list[torch.Tensor], list[torch.Tensor]]]
CASES: dict[str, tuple[str, Callable, int, Leaves]] = {
    "scan": ("scan", plain, 1, lambda: ([log_decays(T, K), noise(MANNERS, T, K)], [])),
    "complex_scan": (
        "complex_scan",
        complex_scan,
        1,
        lambda: ([*turned(log_decays(T, K)), noise(MANNERS, T, K), noise(MANNERS, T, K, seed=1)], []),
    ),
    "diagonal_ssm": (
        "diagonal_ssm",
        diagonal_ssm,
        1,
        lambda: ([noise(2, T, MANNERS)], [*turned(log_decays(K)), noise(MANNERS, K, seed=1)]),
    ),
    "dense_ssm": (
        "dense_ssm",
        plain,
        1,
        lambda: (
            [noise(2, T, MANNERS)],
            [rotated(log_decays(K)), noise(MANNERS, K, seed=1), noise(MANNERS, 2, K, seed=2)],
        ),
    ),
    "selective_scan": (
        "selective_scan",
        selective_scan,
        1,
        lambda: (
            [noise(MANNERS, T, K), log_decays(T, K), *(noise(MANNERS, T, 2, seed=i) for i in (1, 2))],
            [narrow(-noise(K, 2, seed=3).abs())],
        ),
    ),
    "linear_attention per head": (
        "linear_attention",
        plain,
        2,
        lambda: ([*heads(K, K, V), log_decays(H, T)], []),
    ),
    "linear_attention per key": ("linear_attention", plain, 2, lambda: ([*heads(K, K, V), log_decays(H, T, K)], [])),
    "gated_delta_rule": (
        "gated_delta_rule",
        gated_delta_rule,
        2,
        lambda: ([*heads(K, K, V), noise(MANNERS, H, T, seed=9), log_decays(H, T)], []),
    ),
    "dplr": (
        "dplr",
        dplr,
        2,
        lambda: ([*heads(K, K, V, K), noise(MANNERS, H, T, seed=9), log_decays(H, T, K)], []),
    ),
    "least_squares": (
        "least_squares",
        least_squares,
        2,
        lambda: ([*heads(K, K, V), noise(MANNERS, H, T, seed=9), log_decays(H, T)], [noise(H, K, seed=8)]),
    ),
    "expgate": (
        "expgate",
        plain,
        2,
        lambda: ([*heads(K, K, V), log_decays(H, T), noise(MANNERS, H, T, seed=9)], []),
    ),
    "slots": ("slots", slots, 2, lambda: ([*heads(K, K, V), log_decays(H, T, 2)], [])),
    "softmax_scan": (
        "softmax_scan",
        softmax_scan,
        1,
        lambda: (
            [noise(2, T, 3 * MANNERS), noise(2, T, 3 * MANNERS, seed=1)],
            [narrow(log_decays(3).flatten()), noise(3 * MANNERS, seed=2)],
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_5000_tokens_are_the_loop_and_float32_follows(name, obeys, agrees_in_float32):
    op, bind, axis, leaves = CASES[name]
    run, loop = bind(getattr(ops, op)), bind(getattr(ops, f"{op}_reference"))
    moving, fixed = leaves()
    n = len(moving)

    def bound(form):
        return lambda *x, state=None: form(*x, *fixed, state=state)

    obeys(bound(run), bound(loop), moving, [1234], axis=axis, slopes=False)
    some = [x.detach().narrow(axis, 0, 400).requires_grad_() for x in moving]  # a loop is slow to differentiate
    obeys(bound(run), bound(loop), some, [123], others=fixed, axis=axis)
    agrees_in_float32(lambda *x: run(*x[:n], *x[n:]), [*moving, *fixed])
