"""The loops of `selective_scan`, compiled by Numba for the CPU: each works on the features from `first` to `last`.

Features are the inner axis everywhere, at most `BLOCK` of them at a time, so that loops over them become vector
instructions and a block's state stays in the nearest cache. States are [N, features] here, and rates are log2.
An empty `A` stands for Longhorn's decay 1 − Δ B².
"""

from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, overload

from remanence.ops.decay import FLOOR

BLOCK = 256
_CONTRACT = {"contract"}
_ANY_ORDER = {"contract", "reassoc", "nsz"}  # for sums over features

_LOWEST, _LN2 = FLOOR / math.log(2), math.log(2)
# A float32 plus this is rounded to an integer, which then stands in its lowest bits.
_ROUND = np.float32(1.5 * 2**23)
# 2^r on |r| ≤ 1/2 to 2e-8, by Chebyshev interpolation
_P0, _P1, _P2, _P3, _P4, _P5, _P6 = (
    np.float32(c) for c in (1.0, 0.69314718, 0.24022651, 0.05550327, 0.009618057, 0.0013400428, 0.00015461445)
)


@intrinsic
def _bits(typing, x):
    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return numba.int32(numba.float32), build


@intrinsic
def _number(typing, x):
    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return numba.float32(numba.int32), build


def _exp2(z):
    raise TypeError("_exp2 exists in compiled code only.")


@overload(_exp2, jit_options={"fastmath": _CONTRACT})
def _exp2_by_type(z):
    """2^z for z ≤ 0, clamped at the floor."""
    if z == numba.float64:
        return lambda z: math.exp(max(z, _LOWEST) * _LN2)
    lowest = np.float32(_LOWEST)

    def exp2(z):  # a polynomial and a shift of the exponent vectorise, where libm's exp does not
        z = max(z, lowest)
        shifted = z + _ROUND
        r = z - (shifted - _ROUND)
        p = (((((_P6 * r + _P5) * r + _P4) * r + _P3) * r + _P2) * r + _P1) * r + _P0
        return _number(_bits(p) + (_bits(shifted) << np.int32(23)))  # type: ignore[call-arg]

    return exp2


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_CONTRACT)
def forward(first, last, x, delta, A, B, C, h, y, kept, size):
    """Writes y, the state before every `size`-th token to `kept` [B, chunks, N, D], and the last one to h [B, N, D]."""
    N = B.shape[2]
    u = np.empty(BLOCK, x.dtype)
    for i in range(x.shape[0]):
        for begin in range(0, x.shape[1], size):
            for n in range(N):
                state, copy = h[i, n, first:last], kept[i, begin // size, n, first:last]
                for d in range(last - first):
                    copy[d] = state[d]
            for left in range(first, last, BLOCK):
                right = min(left + BLOCK, last)
                for t in range(begin, min(begin + size, x.shape[1])):
                    out, step, now = y[i, t, left:right], delta[i, t, left:right], x[i, t, left:right]
                    for d in range(right - left):
                        u[d] = now[d] * step[d]
                        out[d] = 0
                    for n in range(N):
                        b, c = B[i, t, n], C[i, t, n]
                        s = h[i, n, left:right]
                        if A.shape[0] > 0:
                            rate = A[n, left:right]
                            for d in range(right - left):
                                new = _exp2(step[d] * rate[d]) * s[d] + b * u[d]
                                s[d] = new
                                out[d] += c * new
                        else:
                            bb = b * b
                            for d in range(right - left):
                                new = (1 - step[d] * bb) * s[d] + b * u[d]
                                s[d] = new
                                out[d] += c * new


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=_ANY_ORDER)
def backward(first, last, x, delta, A, B, C, kept, size, d_y, d_h, d_x, d_delta, d_A, d_B, d_C):
    """Gradients, with the states of a chunk computed once more from the one that was kept.

    d_h [B, N, D] holds the gradient of the last state and ends as that of the first; d_A [N, D], d_B and d_C [B, T, N]
    are added to.
    """
    T, N = x.shape[1], B.shape[2]
    u, d_u, d_rate = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    states = np.empty((size + 1, N, BLOCK), x.dtype)
    decays = np.empty((size, N, BLOCK), x.dtype)
    zero = np.zeros(1, x.dtype)[0]
    for i in range(x.shape[0]):
        for begin in range((T - 1) // size * size, -1, -size):
            length = min(size, T - begin)
            for left in range(first, last, BLOCK):
                width = min(BLOCK, last - left)
                for n in range(N):
                    old, new = kept[i, begin // size, n, left : left + width], states[0, n, :width]
                    for d in range(width):
                        new[d] = old[d]
                for j in range(length):
                    t = begin + j
                    step, now = delta[i, t, left : left + width], x[i, t, left : left + width]
                    for d in range(width):
                        u[d] = now[d] * step[d]
                    for n in range(N):
                        b = B[i, t, n]
                        a, old, new = decays[j, n, :width], states[j, n, :width], states[j + 1, n, :width]
                        if A.shape[0] > 0:
                            rate = A[n, left : left + width]
                            for d in range(width):
                                a[d] = _exp2(step[d] * rate[d])
                                new[d] = a[d] * old[d] + b * u[d]
                        else:
                            bb = b * b
                            for d in range(width):
                                a[d] = 1 - step[d] * bb
                                new[d] = a[d] * old[d] + b * u[d]
                for j in range(length - 1, -1, -1):
                    t = begin + j
                    step, now = delta[i, t, left : left + width], x[i, t, left : left + width]
                    given = d_y[i, t, left : left + width]
                    for d in range(width):
                        u[d] = now[d] * step[d]
                        d_u[d] = 0
                        d_rate[d] = 0
                    for n in range(N):
                        b, c = B[i, t, n], C[i, t, n]
                        a, old, new = decays[j, n, :width], states[j, n, :width], states[j + 1, n, :width]
                        carried = d_h[i, n, left : left + width]
                        d_b, d_c, d_bb = zero, zero, zero
                        if A.shape[0] > 0:
                            rate, d_a = A[n, left : left + width], d_A[n, left : left + width]
                            for d in range(width):
                                total = carried[d] + given[d] * c
                                d_c += given[d] * new[d]
                                d_b += total * u[d]
                                d_u[d] += total * b
                                carried[d] = total * a[d]
                                d_log = carried[d] * old[d]
                                d_rate[d] += d_log * rate[d]
                                d_a[d] += d_log * step[d]
                        else:
                            bb = b * b
                            for d in range(width):
                                total = carried[d] + given[d] * c
                                d_c += given[d] * new[d]
                                d_b += total * u[d]
                                d_u[d] += total * b
                                carried[d] = total * a[d]
                                lost = total * old[d]
                                d_rate[d] -= lost * bb
                                d_bb -= lost * step[d]
                        d_B[i, t, n] += d_b + 2 * b * d_bb
                        d_C[i, t, n] += d_c
                    scale = _LN2 if A.shape[0] > 0 else 1.0
                    for d in range(width):
                        d_x[i, t, left + d] = d_u[d] * step[d]
                        d_delta[i, t, left + d] = d_u[d] * now[d] + d_rate[d] * scale
