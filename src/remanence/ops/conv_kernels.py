"""The short causal convolution compiled for the CPU: each call takes the features from `first` to `last`.

`seen` is [B, width − 1 + T, D], the tail and the inputs; `taps` [width, D] are the weights by age, oldest first.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.compiled import jit, sigmoid_and_silu


@jit
def forward(first, last, seen, taps, bias, silu, y):
    width = taps.shape[0]
    for b in range(y.shape[0]):
        for t in range(y.shape[1]):
            out = y[b, t, first:last]
            for d in range(last - first):
                out[d] = bias[first + d]
            for j in range(width):
                x, w = seen[b, t + j, first:last], taps[j, first:last]
                for d in range(last - first):
                    out[d] += w[d] * x[d]
            if silu:
                for d in range(last - first):
                    out[d] = sigmoid_and_silu(out[d])[1]


@jit
def backward(first, last, seen, taps, bias, silu, d_y, d_seen, d_taps, d_bias):
    """Gradients; `d_seen`, `d_taps` and `d_bias` come as zeros."""
    width, D = taps.shape[0], last - first
    z, g = np.empty(D, seen.dtype), np.empty(D, seen.dtype)
    d_b = d_bias[first:last]
    for b in range(d_y.shape[0]):
        for t in range(d_y.shape[1]):
            given = d_y[b, t, first:last]
            for d in range(D):
                g[d] = given[d]
            if silu:
                for d in range(D):
                    z[d] = bias[first + d]
                for j in range(width):
                    x, w = seen[b, t + j, first:last], taps[j, first:last]
                    for d in range(D):
                        z[d] += w[d] * x[d]
                for d in range(D):
                    s, gated = sigmoid_and_silu(z[d])
                    g[d] *= s + gated * (1 - s)
            for d in range(D):
                d_b[d] += g[d]
            for j in range(width):
                x, w = seen[b, t + j, first:last], taps[j, first:last]
                d_x, d_w = d_seen[b, t + j, first:last], d_taps[j, first:last]
                for d in range(D):
                    d_x[d] += w[d] * g[d]
                    d_w[d] += x[d] * g[d]
