"""GELU and its first two derivatives for compiled kernels, in the precision of what they are given."""

from __future__ import annotations

import math

import numba
import numpy as np
from numba.extending import overload

from remanence.ops.compiled import decay, jit

ERF, TANH = 0, 1
"""x Φ(x), and its approximation by a hyperbolic tangent."""

# Φ(−|x|) ≈ e^{−x²/2} Σ a_i t^i / 2 with t = 1 / (1 + p |x|), to 8e-8 (Abramowitz & Stegun 7.1.26)
_P = 0.3275911 / math.sqrt(2)
_A1, _A2, _A3, _A4, _A5 = 0.127414796, -0.142248368, 0.7107068705, -0.7265760135, 0.5307027145
_ROOT, _DENSITY = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)
_S, _CUBE = math.sqrt(2 / math.pi), 0.044715


def normal(x: float) -> tuple[float, float]:
    """(Φ(x), φ(x)), the normal distribution and its density."""
    raise TypeError("normal is for compiled code.")


@overload(normal, inline="always", jit_options={"fastmath": {"contract"}, "error_model": "numpy"})
def _normal(x):
    one, half, p, density = np.float32(1), np.float32(0.5), np.float32(_P), np.float32(_DENSITY)
    a1, a2, a3, a4, a5 = (np.float32(a) for a in (_A1, _A2, _A3, _A4, _A5))

    def wide(x):
        return 0.5 * (1 + math.erf(x * _ROOT)), math.exp(-0.5 * x * x) * _DENSITY

    def single(x):
        e = decay(-half * x * x)
        t = one / (one + p * abs(x))
        tail = ((((a5 * t + a4) * t + a3) * t + a2) * t + a1) * t * e
        return (one - tail if x >= 0 else tail), e * density

    return single if x == numba.types.float32 else wide


def _of_tanh(x: float) -> tuple[float, float, float]:
    """(tanh u, u′, x u″) of u = √(2/π) (x + 0.044715 x³)."""
    raise TypeError("_of_tanh is for compiled code.")


@overload(_of_tanh, inline="always", jit_options={"fastmath": {"contract"}, "error_model": "numpy"})
def _of_tanh_(x):
    real = np.float32 if x == numba.types.float32 else np.float64
    one, two, s, s3, s6 = real(1), real(2), real(_S), real(3 * _CUBE * _S), real(6 * _CUBE * _S)
    s1 = real(_CUBE * _S)

    def of(x):
        square = x * x
        u = x * (s + s1 * square)
        e = decay(-two * abs(u))
        t = (one - e) / (one + e)
        return (t if u >= 0 else -t), s + s3 * square, s6 * square

    return of


@jit
def gelu(kind, x, y, slope):
    """y = GELU(x) and `slope` its derivative there, of matrices; y may be wider than x."""
    half, one = x.dtype.type(0.5), x.dtype.type(1)
    for i in range(x.shape[0]):
        from_, to, by = x[i], y[i], slope[i]
        if kind == ERF:
            for d in range(from_.shape[0]):
                a = from_[d]
                cdf, density = normal(a)
                to[d] = a * cdf
                by[d] = cdf + a * density
        else:
            for d in range(from_.shape[0]):
                a = from_[d]
                t, rise, _ = _of_tanh(a)
                open_ = half * (one + t)
                to[d] = a * open_
                by[d] = open_ + half * a * (one - t * t) * rise


@jit
def gelu_bend(kind, x, y, slope):
    """`gelu` that also turns x into the second derivative."""
    half, one, two = x.dtype.type(0.5), x.dtype.type(1), x.dtype.type(2)
    for i in range(x.shape[0]):
        from_, to, by = x[i], y[i], slope[i]
        if kind == ERF:
            for d in range(from_.shape[0]):
                a = from_[d]
                cdf, density = normal(a)
                to[d] = a * cdf
                by[d] = cdf + a * density
                from_[d] = density * (two - a * a)
        else:
            for d in range(from_.shape[0]):
                a = from_[d]
                t, rise, swing = _of_tanh(a)
                open_, closed = half * (one + t), one - t * t
                to[d] = a * open_
                by[d] = open_ + half * a * closed * rise
                from_[d] = closed * (rise + half * swing - a * rise * rise * t)
