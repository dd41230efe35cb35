"""Window attention compiled for the CPU: each call takes the heads from `first` to `last`, block by block.

Query t sees rows t … t + window − 1 of `k` and `v` [R, window − 1 + T, …], the kept and the new ones, but for the
slots that were never filled, and all rows of the prefix.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import add, dot, matrix, product, put, take
from remanence.ops.compiled import decay, jit, summing


@jit
def _scores(queries, keys, buffer):
    s = matrix(buffer, queries.shape[0], keys.shape[0])
    product(queries, keys.T, s)
    return s


@summing
def _largest(row, most):
    for j in range(row.shape[0]):
        most = max(most, row[j])
    return most


@summing
def _weigh(row, shift):
    """e^{row − shift} in place, and its sum; nothing in `row` exceeds `shift`."""
    total = row.dtype.type(0)
    for j in range(row.shape[0]):
        row[j] = decay(row[j] - shift)
        total += row[j]
    return total


@jit
def _clear(s, window, lowest):
    """Zero what a row of the band may not see: rows are queries, columns the keys from `lowest` on."""
    for i in range(s.shape[0]):
        row = s[i]
        for j in range(min(max(i - lowest, 0), row.shape[0])):
            row[j] = 0
        for j in range(max(i + window - lowest, 0), row.shape[0]):
            row[j] = 0


@jit
def forward(first, last, H, T, size, window, scale, q, q_at, k, v, p_k, p_v, seen, y, y_at, logsumexp):
    K, V, P = k.shape[2], v.shape[2], p_k.shape[1]
    dtype = k.dtype
    queries, out, more = np.empty((size, K), dtype), np.empty((size, V), dtype), np.empty((size, V), dtype)
    band, past = np.empty(size * (size + window - 1), dtype), np.empty(size * P, dtype)
    for r in range(first, last):
        b, h = r // H, r % H
        for t in range(0, T, size):
            n = min(size, T - t)
            lowest = max(window - 1 - seen[b] - t, 0)  # keys before it were never read
            qs = queries[:n]
            take(qs, q, q_at, b, h, t)
            for i in range(n):
                for d in range(K):
                    qs[i, d] *= scale
            s = _scores(qs, k[r, t + lowest : t + n + window - 1], band)
            before = _scores(qs, p_k[r], past)
            for i in range(n):
                near, far = s[i, max(i - lowest, 0) : i + window - lowest], before[i]
                shift = _largest(far, _largest(near, -np.inf))
                total = _weigh(near, shift) + _weigh(far, shift)
                logsumexp[r, t + i] = shift + math.log(total)
                for j in range(near.shape[0]):
                    near[j] /= total
                for j in range(P):
                    far[j] /= total
            _clear(s, window, lowest)
            product(s, v[r, t + lowest : t + n + window - 1], out[:n])
            if P:
                product(before, p_v[r], more[:n])
                add(more, out[:n])
            put(y, y_at, b, h, t, out[:n])


@jit
def backward(
    first, last, H, T, size, window, scale, q, q_at, k, v, p_k, p_v, seen, y, y_at, logsumexp, d_y, d_y_at, d_logsumexp,
    d_q, d_q_at, d_k, d_v, d_p_k, d_p_v,
):  # fmt: skip
    """Gradients; those of keys, values and prefix come as zeros and are added to."""
    K, V, P = k.shape[2], v.shape[2], p_k.shape[1]
    dtype = k.dtype
    queries, d_queries, more = np.empty((size, K), dtype), np.empty((size, K), dtype), np.empty((size, K), dtype)
    outs, d_outs, rest = np.empty((size, V), dtype), np.empty((size, V), dtype), np.empty(size, dtype)
    band, d_band = np.empty(size * (size + window - 1), dtype), np.empty(size * (size + window - 1), dtype)
    past, d_past = np.empty(size * P, dtype), np.empty(size * P, dtype)
    rows = max(size + window - 1, P)
    wide_k, wide_v = np.empty((rows, K), dtype), np.empty((rows, V), dtype)
    for r in range(first, last):
        b, h = r // H, r % H
        for t in range(0, T, size):
            n = min(size, T - t)
            lowest = max(window - 1 - seen[b] - t, 0)
            qs, d_qs, d_ys = queries[:n], d_queries[:n], d_outs[:n]
            take(qs, q, q_at, b, h, t)
            take(outs[:n], y, y_at, b, h, t)
            take(d_ys, d_y, d_y_at, b, h, t)
            for i in range(n):
                rest[i] = dot(outs[i], d_ys[i]) - d_logsumexp[r, t + i]
                for d in range(K):
                    qs[i, d] *= scale
            near, near_v = k[r, t + lowest : t + n + window - 1], v[r, t + lowest : t + n + window - 1]
            s, d_s = _scores(qs, near, band), _scores(d_ys, near_v, d_band)
            for i in range(n):
                w, d_w = (
                    s[i, max(i - lowest, 0) : i + window - lowest],
                    d_s[i, max(i - lowest, 0) : i + window - lowest],
                )
                _weigh(w, logsumexp[r, t + i])
                for j in range(w.shape[0]):
                    d_w[j] = w[j] * (d_w[j] - rest[i])
            _clear(s, window, lowest)
            _clear(d_s, window, lowest)
            m = near.shape[0]
            product(d_s, near, d_qs)
            product(d_s.T, qs, wide_k[:m])
            add(wide_k, d_k[r, t + lowest : t + n + window - 1])
            product(s.T, d_ys, wide_v[:m])
            add(wide_v, d_v[r, t + lowest : t + n + window - 1])
            if P:
                s, d_s = _scores(qs, p_k[r], past), _scores(d_ys, p_v[r], d_past)
                for i in range(n):
                    w, d_w = s[i], d_s[i]
                    _weigh(w, logsumexp[r, t + i])
                    for j in range(P):
                        d_w[j] = w[j] * (d_w[j] - rest[i])
                product(d_s, p_k[r], more[:n])
                add(more, d_qs)
                product(d_s.T, qs, wide_k[:P])
                add(wide_k, d_p_k[r])
                product(s.T, d_ys, wide_v[:P])
                add(wide_v, d_p_v[r])
            for i in range(n):
                for d in range(K):
                    d_qs[i, d] *= scale
            put(d_q, d_q_at, b, h, t, d_qs)
