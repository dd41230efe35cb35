"""Normalisation compiled for the CPU: each call takes the parts from `first` to `last`, of `size` rows of [A, B, C].

Tensors [A, B, C, width] come as flat arrays with their strides.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import dot
from remanence.ops.compiled import borrowing, jit, sigmoid_and_silu


@borrowing
def _after(a, b, c, B, C):
    """The row after (a, b, c): counted, since three divisions take longer than a short row."""
    if c + 1 < C:
        return a, b, c + 1
    return (a, b + 1, 0) if b + 1 < B else (a + 1, 0, 0)


@borrowing
def _row(a, b, c, at):
    return a * at[0] + b * at[1] + c * at[2]


@borrowing
def forward(first, last, size, count, B, C, share, eps, x, x_at, weight, gated, gate, gate_at, y, y_at, inverse):
    width = weight.shape[0]
    a, b, c = first * size // (B * C), first * size // C % B, first * size % C
    for i in range(first * size, min(last * size, count)):
        here, there, other = _row(a, b, c, x_at), _row(a, b, c, y_at), _row(a, b, c, gate_at)
        row, out = x[here : here + width], y[there : there + width]
        inverse[i] = r = x.dtype.type(1 / math.sqrt(share * dot(row, row) + eps))
        for d in range(width):
            out[d] = row[d] * r * weight[d]
        if gated:
            g = gate[other : other + width]
            for d in range(width):
                out[d] *= sigmoid_and_silu(g[d])[1]
        a, b, c = _after(a, b, c, B, C)


@jit
def backward(
    first, last, size, count, B, C, share, x, x_at, weight, gated, gate, gate_at, inverse, d_y, d_y_at,
    d_x, d_x_at, d_gate, d_gate_at, d_weights,
):  # fmt: skip
    """`d_weights` has a row for each part, so that sums do not depend on the threads."""
    u = np.empty(weight.shape[0], x.dtype)
    for part in range(first, last):
        _backward(
            part * size, min(part * size + size, count), B, C, x.dtype.type(share), x, x_at, weight, gated, gate,
            gate_at, inverse, d_y, d_y_at, d_x, d_x_at, d_gate, d_gate_at, d_weights[part], u,
        )  # fmt: skip


@borrowing
def _backward(
    start, end, B, C, share, x, x_at, weight, gated, gate, gate_at, inverse, d_y, d_y_at, d_x, d_x_at, d_gate,
    d_gate_at, d_w, u,
):  # fmt: skip
    width = weight.shape[0]
    a, b, c = start // (B * C), start // C % B, start % C
    for i in range(start, end):
        here, there, other = _row(a, b, c, x_at), _row(a, b, c, d_y_at), _row(a, b, c, gate_at)
        to, to_gate = _row(a, b, c, d_x_at), _row(a, b, c, d_gate_at)
        row, given, r = x[here : here + width], d_y[there : there + width], inverse[i]
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
        along = share * dot(u, row) * r * r
        for d in range(width):
            out[d] = r * (u[d] - along * row[d])
        a, b, c = _after(a, b, c, B, C)
