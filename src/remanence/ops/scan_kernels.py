"""The loops of `scan`, compiled by Numba for the CPU: each works on the features from `first` to `last`."""

from __future__ import annotations

import math

import numba
import numpy as np

from remanence.ops.decay import FLOOR

_jit = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})

_FLOOR, _LOG2E, _ONE, _HALF = np.float32(FLOOR), np.float32(1 / math.log(2)), np.float32(1), np.float32(0.5)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
# exp r ≈ 1 + r + c₂r² + … + c₇r⁷ on |r| ≤ ln 2 / 2, to float32's last digit
_C2, _C3, _C4 = np.float32(5.0000001201e-1), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
_C5, _C6, _C7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)


@_jit
def _exp(g, out, bits):
    """exp of g, clamped at the floor. `bits` is the memory of `out`, so that exponents can be written as integers."""
    if out.itemsize == 8:
        for d in range(g.shape[0]):
            out[d] = math.exp(max(g[d], FLOOR))
        return
    # 2ⁿ · exp r with |r| ≤ ln 2 / 2: a polynomial vectorises, where libm's exp does not
    for d in range(g.shape[0]):
        n = np.floor(max(g[d], _FLOOR) * _LOG2E + _HALF)
        bits[d] = (np.int32(n) + np.int32(127)) << np.int32(23)
    for d in range(g.shape[0]):
        x = max(g[d], _FLOOR)
        n = np.floor(x * _LOG2E + _HALF)
        r = x - n * _LN2_HIGH - n * _LN2_LOW
        p = ((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _C2
        out[d] *= p * r * r + r + _ONE


@_jit
def forward(first, last, log_decay, b, start, h):
    a = np.empty(last - first, b.dtype)
    bits = a.view(np.int32)
    for i in range(b.shape[0]):
        before = start[i, first:last]
        for t in range(b.shape[1]):
            _exp(log_decay[i, t, first:last], a, bits)
            new, now = b[i, t, first:last], h[i, t, first:last]
            for d in range(last - first):
                now[d] = a[d] * before[d] + new[d]
            before = now


@_jit
def backward(first, last, log_decay, start, h, d_h, d_log_decay, d_b, d_start):
    a = np.empty(last - first, h.dtype)
    bits = a.view(np.int32)
    for i in range(h.shape[0]):
        carried = d_start[i, first:last]
        carried[:] = 0
        for t in range(h.shape[1] - 1, -1, -1):
            g = log_decay[i, t, first:last]
            _exp(g, a, bits)
            before = h[i, t - 1, first:last] if t > 0 else start[i, first:last]
            given, d_g, d_new = d_h[i, t, first:last], d_log_decay[i, t, first:last], d_b[i, t, first:last]
            for d in range(last - first):
                total = given[d] + carried[d]
                d_new[d] = total
                carried[d] = a[d] * total
                d_g[d] = carried[d] * before[d] if g[d] >= FLOOR else 0
