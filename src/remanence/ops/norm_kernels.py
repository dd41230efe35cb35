"""Normalisation compiled for the CPU: each call takes the parts from `first` to `last`, of `size` rows of [A, B, C].

Tensors [A, B, C, width] come as flat arrays with their strides; weight and bias have a row for each of C, or one.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import dot, total
from remanence.ops.compiled import borrowing, jit, sigmoid_and_silu
from remanence.ops.step_kernels import PLAIN, SILU


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
def _unit(row, share, eps, centred, out):
    """row, or its deviations from its mean, over the root of `share` times its squares' sum; returns one over that."""
    mean = total(row) / row.dtype.type(row.shape[0]) if centred else row.dtype.type(0)
    for d in range(row.shape[0]):
        out[d] = row[d] - mean
    inverse = row.dtype.type(1 / math.sqrt(share * dot(out, out) + eps))
    for d in range(row.shape[0]):
        out[d] *= inverse
    return inverse


@borrowing
def _affine(unit, weight, bias, head, out):
    """unit ⊙ weight, and the head's bias if there are any."""
    for d in range(out.shape[0]):
        out[d] = unit[d] * weight[d]
    if bias.shape[0]:
        shift = bias[head]
        for d in range(out.shape[0]):
            out[d] += shift[d]


@jit
def forward(first, last, size, count, B, C, share, eps, centred, x, x_at, weight, bias, kind, gate, gate_at, y, y_at):
    unit = np.empty(weight.shape[1], x.dtype)
    _forward(
        first * size, min(last * size, count), B, C, x.dtype.type(share), eps, centred, x, x_at, weight, bias, kind,
        gate, gate_at, y, y_at, unit,
    )  # fmt: skip


@borrowing
def _forward(start, end, B, C, share, eps, centred, x, x_at, weight, bias, kind, gate, gate_at, y, y_at, unit):
    heads, width = weight.shape
    a, b, c = start // (B * C), start // C % B, start % C
    for _ in range(start, end):
        here, there, other = _row(a, b, c, x_at), _row(a, b, c, y_at), _row(a, b, c, gate_at)
        out, w = y[there : there + width], weight[c % heads]
        _unit(x[here : here + width], share, eps, centred, unit)
        _affine(unit, w, bias, c % heads, out)
        g = gate[other : other + width]
        if kind != PLAIN:
            for d in range(width):
                sigmoid, silu = sigmoid_and_silu(g[d])
                out[d] *= silu if kind == SILU else sigmoid
        a, b, c = _after(a, b, c, B, C)


@jit
def backward(
    first, last, size, count, B, C, share, eps, centred, x, x_at, weight, bias, kind, gate, gate_at, d_y, d_y_at,
    d_x, d_x_at, d_gate, d_gate_at, d_weights, d_biases,
):  # fmt: skip
    """`d_weights` and `d_biases` have a row for each part, so that sums do not depend on the threads."""
    unit, u = np.empty(weight.shape[1], x.dtype), np.empty(weight.shape[1], x.dtype)
    for part in range(first, last):
        _backward(
            part * size, min(part * size + size, count), B, C, x.dtype.type(share), eps, centred, x, x_at, weight, bias,
            kind, gate, gate_at, d_y, d_y_at, d_x, d_x_at, d_gate, d_gate_at, d_weights[part], d_biases[part], unit, u,
        )  # fmt: skip


@borrowing
def _backward(
    start, end, B, C, share, eps, centred, x, x_at, weight, bias, kind, gate, gate_at, d_y, d_y_at, d_x, d_x_at, d_gate,
    d_gate_at, d_weight, d_bias, unit, u,
):  # fmt: skip
    heads, width = weight.shape
    real, one = x.dtype.type, x.dtype.type(1)
    a, b, c = start // (B * C), start // C % B, start % C
    for _ in range(start, end):
        here, there, other = _row(a, b, c, x_at), _row(a, b, c, d_y_at), _row(a, b, c, gate_at)
        to, to_gate = _row(a, b, c, d_x_at), _row(a, b, c, d_gate_at)
        given, out, w, d_w = d_y[there : there + width], d_x[to : to + width], weight[c % heads], d_weight[c % heads]
        r = _unit(x[here : here + width], share, eps, centred, unit)
        g, d_g = gate[other : other + width], d_gate[to_gate : to_gate + width]
        if kind != PLAIN:
            _affine(unit, w, bias, c % heads, out)
            for d in range(width):
                s, silu = sigmoid_and_silu(g[d])
                slope = s + silu * (one - s) if kind == SILU else s * (one - s)
                d_g[d] = given[d] * out[d] * slope
                u[d] = given[d] * (silu if kind == SILU else s)
        else:
            for d in range(width):
                u[d] = given[d]
        if bias.shape[0]:
            d_b = d_bias[c % heads]
            for d in range(width):
                d_b[d] += u[d]
        for d in range(width):
            d_w[d] += u[d] * unit[d]
        for d in range(width):
            u[d] *= w[d]
        along, mean = share * dot(u, unit), total(u) / real(width) if centred else real(0)
        for d in range(width):
            out[d] = r * (u[d] - mean - along * unit[d])
        a, b, c = _after(a, b, c, B, C)
