"""Exponential gating compiled for the CPU: each call takes the heads from `first` to `last`, stretch after stretch.

A stretch is as many tokens as linear attention keeps one state for. It is copied into the cache first, in loops that do
nothing else, since rows of a head lie far apart and would be waited for one by one. Its sums are those of
`linear_attention_kernels`; what stands here are weights, n' and the quotient. Tensors [B, H, T, …] come as flat arrays
with their strides, gates as float64 [B·H, T].
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops import linear_attention_kernels as linear
from remanence.ops.chunk_kernels import PER_HEAD, copy, copy_row, dot
from remanence.ops.compiled import borrowing, decay, jit
from remanence.ops.decay import FLOOR


@jit
def forward(
    first, last, H, T, C, every, scale, eps, q, q_at, k, k_at, v, v_at, keep, write, m, C_start, n_start,
    y, y_at, den, most, befores, n_befores, C_end, n_end,
):  # fmt: skip
    """`befores` [B·H·(stretches + 1), 1, K, V + 1] gets C' and n' before each stretch and after the last."""
    K, V = C_start.shape[1:]
    N = min(T, C * every)
    stretches = -(-T // N)
    queries, keys, values, log_decays, ns = _buffers(N, K, V, q)
    sums, S = np.empty((N, V + 1), q.dtype), np.empty((1, K, V + 1), q.dtype)
    for r in range(first, last):
        b, h = r // H, r % H
        _greatest(v, v_at, b, h, T, most[r])
        copy_row(n_start[r], ns[0])
        for d in range(K):
            copy_row(C_start[r, d], S[0, d, :V])
            S[0, d, V] = n_start[r, d]
        for s in range(stretches):
            t, n, at = s * N, min(N, T - s * N), r * (stretches + 1) + s
            copy_row(ns[0], n_befores[r, s])
            _take(q, q_at, b, h, t, n, K, queries)
            _take(k, k_at, b, h, t, n, K, keys)
            _take(v, v_at, b, h, t, n, V, values)
            _weigh(n, q.dtype.type(scale), keep[r, t:], write[r, t:], queries, keys, log_decays, ns)
            linear.forward(
                0, 1, 1, n, C, every, PER_HEAD, False, queries.reshape(-1), (0, 0, K), keys.reshape(-1), (0, 0, K),
                values.reshape(-1), (0, 0, V + 1), log_decays, (0, 0, 1), S, sums.reshape(-1), (0, 0, V + 1),
                befores[at : at + 1], S,
            )  # fmt: skip
            _divide(n, eps, m[r, t:], most[r], queries, ns, sums, den[r, t:])
            _put(y, y_at, b, h, t, n, V, sums)
            copy_row(ns[n], ns[0])
        copy(S[0], befores[r * (stretches + 1) + stretches, 0])
        copy(S[0], C_end[r])
        copy_row(ns[0], n_end[r])


@jit
def backward(
    first, last, H, T, C, every, scale, eps, q, q_at, k, k_at, v, v_at, keep, write, m, y, y_at, den, most, befores,
    n_befores, d_y, d_y_at, d_q, d_q_at, d_k, d_k_at, d_v, d_v_at, d_keep, d_write, d_C, d_n,
):  # fmt: skip
    """`d_C` and `d_n` hold the gradients of the states after all tokens, and get those of the states before."""
    K, V = d_C.shape[1:]
    N, factor = min(T, C * every), q.dtype.type(scale)
    stretches = -(-T // N)
    queries, keys, values, log_decays, ns = _buffers(N, K, V, q)
    d_queries, d_keys, d_values, d_log_decays, _ = _buffers(N, K, V, q)
    d_sums, d_den, d_S = np.empty((N, V + 1), q.dtype), np.empty(N), np.empty((1, K, V + 1), q.dtype)
    out, row, u = np.empty((N, V), q.dtype), np.empty(V, q.dtype), np.empty(K)
    for r in range(first, last):
        b, h = r // H, r % H
        for d in range(K):
            copy_row(d_C[r, d], d_S[0, d, :V])
            d_S[0, d, V] = 0
        for s in range(stretches - 1, -1, -1):
            t, n, at = s * N, min(N, T - s * N), r * (stretches + 1) + s
            copy_row(n_befores[r, s], ns[0])
            _take(q, q_at, b, h, t, n, K, queries)
            _take(k, k_at, b, h, t, n, K, keys)
            _take(v, v_at, b, h, t, n, V, values)
            _take(y, y_at, b, h, t, n, V, out)
            _take(d_y, d_y_at, b, h, t, n, V, d_sums)
            _weigh(n, factor, keep[r, t:], write[r, t:], queries, keys, log_decays, ns)
            _divide_backward(n, eps, m[r, t:], most[r], out, den[r, t:], d_sums, d_den, row)
            linear.backward(
                0, 1, 1, n, C, every, PER_HEAD, False, queries.reshape(-1), (0, 0, K), keys.reshape(-1), (0, 0, K),
                values.reshape(-1), (0, 0, V + 1), log_decays, (0, 0, 1), befores[at : at + 1], befores[at + 1],
                d_sums.reshape(-1), (0, 0, V + 1), d_queries.reshape(-1), (0, 0, K), d_keys.reshape(-1), (0, 0, K),
                d_values.reshape(-1), (0, 0, V + 1), d_log_decays, (0, 0, 1), d_S,
            )  # fmt: skip
            _weigh_backward(
                n, factor, keep[r, t:], write[r, t:], queries, keys, ns, d_den, d_queries, d_keys, d_log_decays, d_n[r],
                d_keep[r, t:], d_write[r, t:], u,
            )  # fmt: skip
            _put(d_q, d_q_at, b, h, t, n, K, d_queries)
            _put(d_k, d_k_at, b, h, t, n, K, d_keys)
            _put(d_v, d_v_at, b, h, t, n, V, d_values)
        for d in range(K):
            copy_row(d_S[0, d], d_C[r, d])
            d_n[r, d] += d_S[0, d, V]


@jit
def _buffers(N, K, V, like):
    """For a stretch: queries, keys, values with a last column of ones, log decays, n' before and after its tokens."""
    x = like.dtype
    return np.empty((N, K), x), np.empty((N, K), x), np.ones((N, V + 1), x), np.empty(N, x), np.empty((N + 1, K))


@borrowing
def _take(x, at, b, h, t, n, width, out):
    """Copy n rows of a head from token t on to the first columns of out."""
    start = b * at[0] + h * at[1] + t * at[2]
    for i in range(n):
        row, to = x[start + i * at[2] : start + i * at[2] + width], out[i]
        for d in range(width):
            to[d] = row[d]


@borrowing
def _put(x, at, b, h, t, n, width, rows):
    """The inverse of `_take`."""
    start = b * at[0] + h * at[1] + t * at[2]
    for i in range(n):
        to, row = x[start + i * at[2] : start + i * at[2] + width], rows[i]
        for d in range(width):
            to[d] = row[d]


@borrowing
def _greatest(v, at, b, h, T, out):
    """The greatest size of each feature of a head's values."""
    out[:] = 0
    start = b * at[0] + h * at[1]
    for t in range(T):
        row = v[start + t * at[2] : start + t * at[2] + out.shape[0]]
        for d in range(out.shape[0]):
            size = abs(row[d])
            out[d] = size if size > out[d] else out[d]


@borrowing
def _weigh(n, factor, keep, write, queries, keys, log_decays, ns):
    """Queries times their factor and keys times their weights; from n' before the stretch, n' after each token."""
    K, real = queries.shape[1], queries.dtype.type
    for i in range(n):
        row, before, after, query = keys[i], ns[i], ns[i + 1], queries[i]
        kept, weight = decay(keep[i]), math.exp(write[i])
        for d in range(K):
            after[d] = kept * before[d] + weight * row[d]
        weight = real(weight)
        for d in range(K):
            row[d] *= weight
            query[d] *= factor
        log_decays[i] = keep[i]


@borrowing
def _weigh_backward(
    n, factor, keep, write, queries, keys, ns, d_den, d_queries, d_keys, d_log_decays, d_n, d_keep, d_write, u
):  # fmt: skip
    """`d_n` holds the gradient of n' after the stretch, and gets that before; what linear attention found is added."""
    K = queries.shape[1]
    for i in range(n - 1, -1, -1):
        kept, weight, by = decay(keep[i]), math.exp(write[i]), d_den[i]
        row, after, query = d_queries[i], ns[i + 1], queries[i]
        for d in range(K):
            row[d] = factor * (row[d] + by * after[d])
        for d in range(K):
            d_n[d] += by * query[d]
        row = d_keys[i]
        for d in range(K):
            u[d] = row[d] + d_n[d]
        for d in range(K):
            row[d] = weight * u[d]
        d_write[i] = dot(u, keys[i])
        d_keep[i] = d_log_decays[i] + kept * dot(d_n, ns[i]) if keep[i] >= FLOOR else 0
        for d in range(K):
            d_n[d] *= kept


@borrowing
def _near(value, most, zero):
    """The value, no greater than `most`; zero where it is no number."""
    if value > most:
        return most
    return -most if value < -most else (value if value == value else zero)


@borrowing
def _divide(n, eps, m, most, queries, ns, sums, den):
    """The quotient, in place of C'ᵀq, which the row's last number, the rounded n'·q, comes after."""
    V, real, zero = most.shape[0], sums.dtype.type, sums.dtype.type(0)
    for i in range(n):
        exact, row = dot(ns[i + 1], queries[i]), sums[i]
        den[i] = exact
        size, rounded = real(max(abs(exact), math.exp(-m[i])) + eps), row[V]
        missing = real(exact - rounded)
        for d in range(V):
            row[d] = (row[d] + _near(row[d] / rounded, most[d], zero) * missing) / size


@borrowing
def _divide_backward(n, eps, m, most, y, den, d_sums, d_den, typical):
    """From d_y the gradients of C'ᵀq, in place, and of n'·q, rounded in the last column, exact in `d_den`.

    What is typical is made of y, which is near it but for the size and the sign of the denominator.
    """
    V, real, zero = most.shape[0], d_sums.dtype.type, d_sums.dtype.type(0)
    for i in range(n):
        exact, least = den[i], math.exp(-m[i])
        whole = max(abs(exact), least) + eps
        size, ratio, out, row = real(whole), real(whole / exact), y[i], d_sums[i]
        for d in range(V):
            row[d] /= size
            typical[d] = _near(out[d] * ratio, most[d], zero)
        back, along = dot(typical, row), dot(out, row)
        row[V] = -back
        share = 0.5 if abs(exact) == least else (1.0 if abs(exact) > least else 0.0)  # as of a maximum
        d_den[i] = back - share * along * np.sign(exact)
