"""Normalisation compiled for the CPU: each call takes the parts from `first` to `last`, of `size` rows of [A, B, C].

Tensors [A, B, C, width] come as flat arrays with their strides.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import dot
from remanence.ops.compiled import jit, sigmoid_and_silu


@jit
def _row(i, at, B, C):
    return i // (B * C) * at[0] + i // C % B * at[1] + i % C * at[2]


@jit
def forward(first, last, size, count, B, C, share, eps, x, x_at, weight, gated, gate, gate_at, y, y_at, inverse):
    width = weight.shape[0]
    for i in range(first * size, min(last * size, count)):
        here, there, other = _row(i, x_at, B, C), _row(i, y_at, B, C), _row(i, gate_at, B, C)
        row, out = x[here : here + width], y[there : there + width]
        inverse[i] = r = x.dtype.type(1 / math.sqrt(share * dot(row, row) + eps))
        for d in range(width):
            out[d] = row[d] * r * weight[d]
        if gated:
            g = gate[other : other + width]
            for d in range(width):
                out[d] *= sigmoid_and_silu(g[d])[1]


@jit
def backward(
    first, last, size, count, B, C, share, x, x_at, weight, gated, gate, gate_at, inverse, d_y, d_y_at,
    d_x, d_x_at, d_gate, d_gate_at, d_weights,
):  # fmt: skip
    """`d_weights` has a row for each part, so that sums do not depend on the threads."""
    width = weight.shape[0]
    u = np.empty(width, x.dtype)
    for i in range(first * size, min(last * size, count)):
        here, there, other = _row(i, x_at, B, C), _row(i, d_y_at, B, C), _row(i, gate_at, B, C)
        to, to_gate = _row(i, d_x_at, B, C), _row(i, d_gate_at, B, C)
        row, given, d_w, r = x[here : here + width], d_y[there : there + width], d_weights[i // size], inverse[i]
        out = d_x[to : to + width]
        if gated:
            g, d_g = gate[other : other + width], d_gate[to_gate : to_gate + width]
            for d in range(width):
                s, open_ = sigmoid_and_silu(g[d])
                normal = row[d] * r
                d_g[d] = given[d] * normal * weight[d] * (s + open_ * (1 - s))
                u[d] = given[d] * open_
                d_w[d] += u[d] * normal
                u[d] *= weight[d]
        else:
            for d in range(width):
                d_w[d] += given[d] * row[d] * r
                u[d] = given[d] * weight[d]
        along = x.dtype.type(share) * dot(u, row) * r * r
        for d in range(width):
            out[d] = r * (u[d] - along * row[d])
