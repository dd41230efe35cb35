"""One token of each recurrence, compiled for the CPU. Axes: B batch, H heads, D features, K of keys, V of values.

Tensors are contiguous and keep their time axis of one. No array is altered but the outputs, which come last.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import copy_row, dot, fill
from remanence.ops.compiled import decay, jit


@jit
def _silu(x):
    return x / (1 + decay(-x)) if x > -60 else x * 0


@jit
def _add(x, scale, out):
    for d in range(out.shape[0]):
        out[d] += scale * x[d]


@jit
def conv(tail, x, weight, bias, biased, silu, y, after):
    """weight [D, width]."""
    D, width = weight.shape
    for b in range(x.shape[0]):
        new, out = x[b, 0], y[b, 0]
        for d in range(D):
            out[d] = weight[d, width - 1] * new[d] + (bias[d] if biased else 0)
        for j in range(width - 1):
            old = tail[b, j]
            for d in range(D):
                out[d] += weight[d, j] * old[d]
        if silu:
            for d in range(D):
                out[d] = _silu(out[d])
        for j in range(width - 2):
            copy_row(tail[b, j + 1], after[b, j])
        if width > 1:
            copy_row(new, after[b, width - 2])


@jit
def normalise(x, weight, weighted, gate, gated, share, eps, y):
    """Rows [n, width]."""
    for i in range(x.shape[0]):
        row, out = x[i], y[i]
        r = x.dtype.type(1 / math.sqrt(share * dot(row, row) + eps))
        for d in range(row.shape[0]):
            out[d] = row[d] * r
        if weighted:
            for d in range(row.shape[0]):
                out[d] *= weight[d]
        if gated:
            g = gate[i]
            for d in range(row.shape[0]):
                out[d] *= _silu(g[d])


@jit
def scan(g, b, start, h):
    """g, b [B, 1, D]; h [B, D]."""
    for i in range(b.shape[0]):
        a, new, before, now = g[i, 0], b[i, 0], start[i], h[i]
        for d in range(new.shape[0]):
            now[d] = decay(a[d]) * before[d] + new[d]


@jit
def linear_attention(q, k, v, g, decays, start, y, S):
    """`decays`, and the last axis of g: none, one for the head, or one per key feature."""
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            out, new = y[b, h, 0], v[b, h, 0]
            fill(out, 0.0)
            a = decay(g[b, h, 0, 0]) if decays == 1 else v.dtype.type(1)
            for i in range(k.shape[3]):
                before, now, ki, qi = start[b, h, i], S[b, h, i], k[b, h, 0, i], q[b, h, 0, i]
                if decays > 1:
                    a = decay(g[b, h, 0, i])
                for d in range(new.shape[0]):
                    now[d] = a * before[d] + ki * new[d]
                _add(now, qi, out)


@jit
def gated_delta_rule(q, k, v, beta, g, decays, start, y, S):
    """beta [B, H, 1]."""
    error = np.empty(v.shape[3], v.dtype)
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            out, new = y[b, h, 0], v[b, h, 0]
            a = decay(g[b, h, 0]) if decays else v.dtype.type(1)
            fill(error, 0.0)
            for i in range(k.shape[3]):
                _add(start[b, h, i], k[b, h, 0, i], error)
            for d in range(new.shape[0]):
                error[d] = beta[b, h, 0] * (new[d] - a * error[d])
            fill(out, 0.0)
            for i in range(k.shape[3]):
                before, now, ki = start[b, h, i], S[b, h, i], k[b, h, 0, i]
                for d in range(new.shape[0]):
                    now[d] = a * before[d] + ki * error[d]
                _add(now, q[b, h, 0, i], out)


@jit
def dplr(q, k, v, a, b, g, decays, start, y, S):
    read = np.empty(v.shape[3], v.dtype)
    for n in range(k.shape[0]):
        for h in range(k.shape[1]):
            out, new = y[n, h, 0], v[n, h, 0]
            fill(read, 0.0)
            for i in range(k.shape[3]):
                _add(start[n, h, i], a[n, h, 0, i], read)
            fill(out, 0.0)
            for i in range(k.shape[3]):
                before, now, ki, bi = start[n, h, i], S[n, h, i], k[n, h, 0, i], b[n, h, 0, i]
                kept = decay(g[n, h, 0, i]) if decays else v.dtype.type(1)
                for d in range(new.shape[0]):
                    now[d] = kept * before[d] + bi * read[d] + ki * new[d]
                _add(now, q[n, h, 0, i], out)


@jit
def selective_scan(x, delta, A, squared, B, C, start, y, h):
    """x, delta [B, 1, D]; A [D, N], or none where the decay is 1 − Δ B² (`squared`); B, C [B, 1, N]; h [B, D, N]."""
    for b in range(x.shape[0]):
        write, read = B[b, 0], C[b, 0]
        for d in range(x.shape[2]):
            step, before, now = delta[b, 0, d], start[b, d], h[b, d]
            u = step * x[b, 0, d]
            if squared:
                for n in range(write.shape[0]):
                    now[n] = (1 - step * write[n] * write[n]) * before[n] + u * write[n]
            else:
                rate = A[d]
                for n in range(write.shape[0]):
                    now[n] = decay(step * rate[n]) * before[n] + u * write[n]
            y[b, 0, d] = dot(now, read)
