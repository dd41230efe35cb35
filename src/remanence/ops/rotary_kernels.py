"""Rotary positions compiled for the CPU: each call takes the heads from `first` to `last`.

`wide` holds the heads of each token side by side, as a flat array with its strides; `x` [B, H, T, K] is a part of them,
which begins at the feature `offset`. `cos` and `sin` are [B or 1, T, K/2], or of fewer pairs, which are the first ones.
"""

from __future__ import annotations

from remanence.ops.compiled import jit


@jit
def out(first, last, wide, at, offset, cos, sin, x):
    """Write the turned heads of `wide` to x."""
    H, T, K = x.shape[1:]
    half = cos.shape[2]
    for part in range(first, last):
        b, h = part // H, part % H
        for t in range(T):
            start = b * at[0] + t * at[1] + offset + h * K
            row, to = wide[start : start + K], x[b, h, t]
            c, s = cos[b % cos.shape[0], t], sin[b % cos.shape[0], t]
            left, right, to_left, to_right = row[:half], row[half : 2 * half], to[:half], to[half : 2 * half]
            for d in range(half):
                to_left[d] = left[d] * c[d] - right[d] * s[d]
                to_right[d] = left[d] * s[d] + right[d] * c[d]
            for d in range(2 * half, K):
                to[d] = row[d]


@jit
def back(first, last, x, at, H, K, cos, sin, wide, offset):
    """Write heads x, which come as a flat array with its strides, turned back, to `wide` [B, T, features]."""
    half = cos.shape[2]
    for part in range(first, last):
        b, h = part // H, part % H
        for t in range(wide.shape[1]):
            start = b * at[0] + h * at[1] + t * at[2]
            row, to = x[start : start + K], wide[b, t, offset + h * K : offset + h * K + K]
            c, s = cos[b % cos.shape[0], t], sin[b % cos.shape[0], t]
            left, right, to_left, to_right = row[:half], row[half : 2 * half], to[:half], to[half : 2 * half]
            for d in range(half):
                to_left[d] = left[d] * c[d] + right[d] * s[d]
                to_right[d] = right[d] * c[d] - left[d] * s[d]
            for d in range(2 * half, K):
                to[d] = row[d]
