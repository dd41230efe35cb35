"""The short causal convolution compiled for the CPU: each call takes the features from `first` to `last`.

`x` is [B, T, D] as a flat array with its strides, `tail` [B, width − 1, D] what came before; `taps` [width, D] are the
weights by age, oldest first.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.compiled import borrowing, jit, sigmoid_and_silu, within


@within
def _row(b, t, tail, x, at, first, last):
    """The features of token t, which lies before x where t < 0."""
    if t < 0:
        return tail[b, tail.shape[1] + t, first:last]
    start = b * at[0] + t * at[1]
    return x[start + first : start + last]


@borrowing
def _sum(b, t, first, last, tail, x, at, taps, bias, z):
    """What the convolution gives at token t."""
    width, D = taps.shape[0], last - first
    for d in range(D):
        z[d] = bias[first + d]
    for j in range(0, width - 1, 2):  # two taps at a time, since z is fetched and stored for each pass
        t_old, t_new = t + j - width + 1, t + j - width + 2
        old, new = _row(b, t_old, tail, x, at, first, last), _row(b, t_new, tail, x, at, first, last)
        v, w = taps[j, first:last], taps[j + 1, first:last]
        for d in range(D):
            z[d] = (z[d] + v[d] * old[d]) + w[d] * new[d]
    if width % 2:
        seen, w = _row(b, t, tail, x, at, first, last), taps[width - 1, first:last]
        for d in range(D):
            z[d] += w[d] * seen[d]


@borrowing
def forward(first, last, tail, x, at, taps, bias, silu, y):
    for b in range(y.shape[0]):
        for t in range(y.shape[1]):
            out = y[b, t, first:last]
            _sum(b, t, first, last, tail, x, at, taps, bias, out)
            if silu:
                for d in range(last - first):
                    out[d] = sigmoid_and_silu(out[d])[1]


@jit
def backward(first, last, before, T, tail, x, at, taps, bias, silu, d_y, d_y_at, d_tail, d_x, d_x_at, d_taps, d_bias):
    """Gradients; all but d_x come as zeros. d_y is of the features from `before` on, of which it counts."""
    z, g = np.empty(last - first, tail.dtype), np.empty(last - first, tail.dtype)
    for b in range(tail.shape[0]):
        _backward(
            b, first + before, last + before, before, T, tail, x, at, taps, bias, silu, d_y, d_y_at, d_tail, d_x,
            d_x_at, d_taps, d_bias, z, g,
        )  # fmt: skip


@borrowing
def _backward(
    b, first, last, before, T, tail, x, at, taps, bias, silu, d_y, d_y_at, d_tail, d_x, d_x_at, d_taps, d_bias, z, g
):  # fmt: skip
    width, D, d_b = taps.shape[0], last - first, d_bias[first:last]
    for t in range(T):
        start = b * d_y_at[0] + t * d_y_at[1] - before
        given = d_y[start + first : start + last]
        if silu:
            _sum(b, t, first, last, tail, x, at, taps, bias, z)
            for d in range(D):
                s, gated = sigmoid_and_silu(z[d])
                g[d] = given[d] * (s + gated * (1 - s))
        else:
            for d in range(D):
                g[d] = given[d]
        for d in range(D):
            d_b[d] += g[d]
        for j in range(width - 1):
            i = t + j - width + 1
            seen, w = _row(b, i, tail, x, at, first, last), taps[j, first:last]
            d_seen, d_w = _row(b, i, d_tail, d_x, d_x_at, first, last), d_taps[j, first:last]
            for d in range(D):
                d_seen[d] += w[d] * g[d]
                d_w[d] += seen[d] * g[d]
        seen, w = _row(b, t, tail, x, at, first, last), taps[width - 1, first:last]
        d_seen, d_w = _row(b, t, d_tail, d_x, d_x_at, first, last), d_taps[width - 1, first:last]
        for d in range(D):
            d_seen[d] = w[d] * g[d]
            d_w[d] += seen[d] * g[d]
