"""The slopes of `ops.objectives` and their derivatives, for compiled kernels: one token's error e at a time."""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import dot
from remanence.ops.compiled import jit

SQUARED, DOT, POWER, LOG_COSH, HUBER, HUBER_EACH, HUBER_MIXED, SHIFTED = range(8)
"""`number` is p for POWER, the sharpness for LOG_COSH, the shift for SHIFTED; Huber's kinds have a threshold.

The e of DOT is −value, whatever was predicted; its slope, like that of the squared error, is e.
"""
LEAST = 1e-12
"""The length below which an error has no direction."""


@jit
def _power(x, half):
    """x to the power of half / 2."""
    if half == 1:
        return np.sqrt(x)
    if half == -1:
        return 1 / np.sqrt(x)
    return x ** (half / 2)


@jit
def slope(kind, number, threshold, e, out):
    """out: the loss's gradient at the prediction."""
    width, size, zero = e.shape[0], max(np.sqrt(dot(e, e)), LEAST), e.dtype.type(0)
    number, threshold = e.dtype.type(number), e.dtype.type(threshold)
    if kind == POWER:
        for d in range(width):
            out[d] = number * e[d] * _power(e[d] * e[d] + 1e-6, number - 2)
    elif kind == LOG_COSH:
        for d in range(width):
            out[d] = math.tanh(number * e[d])
    elif kind == HUBER_EACH:
        for d in range(width):
            out[d] = min(max(e[d], -threshold), threshold)
    elif kind == HUBER_MIXED and size > threshold:
        for d in range(width):
            out[d] = threshold if e[d] > zero else -threshold if e[d] < zero else zero
    else:
        times = e.dtype.type(1)
        if kind == HUBER and size > threshold:
            times = threshold / size
        elif kind == SHIFTED:
            times += number / size
        for d in range(width):
            out[d] = times * e[d]


@jit
def slope_backward(kind, number, threshold, e, s, d_s, d_e):
    """Add to d_e what the slope s has for its error; returns the threshold's gradient."""
    width, size, zero = e.shape[0], max(np.sqrt(dot(e, e)), LEAST), e.dtype.type(0)
    number, threshold, found = e.dtype.type(number), e.dtype.type(threshold), e.dtype.type(0)
    if kind == POWER:
        for d in range(width):
            square = e[d] * e[d]
            most = square + 1e-6
            d_e[d] += d_s[d] * number * _power(most, number - 2) * (1 + (number - 2) * square / most)
    elif kind == LOG_COSH:
        for d in range(width):
            d_e[d] += d_s[d] * number * (1 - s[d] * s[d])
    elif kind == HUBER_EACH or (kind == HUBER_MIXED and size > threshold):
        for d in range(width):
            if kind == HUBER_EACH and abs(e[d]) <= threshold:
                d_e[d] += d_s[d]
            elif e[d] > zero:
                found += d_s[d]
            elif e[d] < zero:
                found -= d_s[d]
    else:
        times, along = e.dtype.type(1), zero
        if kind == HUBER and size > threshold:
            found = dot(e, d_s) / size
            times = threshold / size
            along = -times * found / size
        elif kind == SHIFTED:
            times += number / size
            along = -number * dot(e, d_s) / (size * size * size)
        for d in range(width):
            d_e[d] += times * d_s[d] + along * e[d]
    return found
