"""Exponential gating compiled for the CPU: each call takes the heads from `first` to `last`, stretch after stretch.

A stretch is as many tokens as linear attention keeps one state for. Its sums are those of `linear_attention_kernels`,
over a copy of the stretch that stays in the cache; what stands here are weights, n' and the quotient, and what is
between them. Tensors [B, H, T, …] come as flat arrays with their strides, gates as float64 [B·H, T].
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops import linear_attention_kernels as linear
from remanence.ops.chunk_kernels import PER_HEAD, add_scaled, copy, copy_row, dot, put
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
            _weigh(b, h, r, t, n, scale, q, q_at, k, k_at, v, v_at, keep, write, queries, keys, values, log_decays, ns)
            linear.forward(
                0, 1, 1, n, C, every, PER_HEAD, False, queries.reshape(-1), (0, 0, K), keys.reshape(-1), (0, 0, K),
                values.reshape(-1), (0, 0, V + 1), log_decays, (0, 0, 1), S, sums.reshape(-1), (0, 0, V + 1),
                befores[at : at + 1], S,
            )  # fmt: skip
            _divide(b, h, r, t, n, eps, queries, ns, sums, m, most[r], y, y_at, den)
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
    N = min(T, C * every)
    stretches = -(-T // N)
    queries, keys, values, log_decays, ns = _buffers(N, K, V, q)
    d_queries, d_keys, d_values, d_log_decays, _ = _buffers(N, K, V, q)
    d_sums, d_den, d_S = np.empty((N, V + 1), q.dtype), np.empty(N), np.empty((1, K, V + 1), q.dtype)
    row, u = np.empty(V, q.dtype), np.empty(K)
    for r in range(first, last):
        b, h = r // H, r % H
        for d in range(K):
            copy_row(d_C[r, d], d_S[0, d, :V])
            d_S[0, d, V] = 0
        for s in range(stretches - 1, -1, -1):
            t, n, at = s * N, min(N, T - s * N), r * (stretches + 1) + s
            copy_row(n_befores[r, s], ns[0])
            _weigh(b, h, r, t, n, scale, q, q_at, k, k_at, v, v_at, keep, write, queries, keys, values, log_decays, ns)
            _divide_backward(b, h, r, t, n, eps, m, most[r], y, y_at, den, d_y, d_y_at, d_sums, d_den, row)
            linear.backward(
                0, 1, 1, n, C, every, PER_HEAD, False, queries.reshape(-1), (0, 0, K), keys.reshape(-1), (0, 0, K),
                values.reshape(-1), (0, 0, V + 1), log_decays, (0, 0, 1), befores[at : at + 1], befores[at + 1],
                d_sums.reshape(-1), (0, 0, V + 1), d_queries.reshape(-1), (0, 0, K), d_keys.reshape(-1), (0, 0, K),
                d_values.reshape(-1), (0, 0, V + 1), d_log_decays, (0, 0, 1), d_S,
            )  # fmt: skip
            _weigh_backward(
                b, h, r, t, n, scale, k, k_at, keep, write, queries, ns, d_den, d_queries, d_keys, d_log_decays, d_n[r],
                d_q, d_q_at, d_k, d_k_at, d_keep, d_write, u,
            )  # fmt: skip
            put(d_v, d_v_at, b, h, t, d_values[:n, :V])
        for d in range(K):
            copy_row(d_S[0, d], d_C[r, d])
            d_n[r, d] += d_S[0, d, V]


@jit
def _buffers(N, K, V, like):
    """For a stretch: queries, keys, values with a last column of ones, log decays, n' before and after its tokens."""
    x = like.dtype
    return np.empty((N, K), x), np.empty((N, K), x), np.ones((N, V + 1), x), np.empty(N, x), np.empty((N + 1, K))


@borrowing
def _greatest(v, at, b, h, T, out):
    """The greatest size of each feature of a head's values."""
    out[:] = 0
    for t in range(T):
        start = b * at[0] + h * at[1] + t * at[2]
        row = v[start : start + out.shape[0]]
        for d in range(out.shape[0]):
            size = abs(row[d])
            out[d] = size if size > out[d] else out[d]


@borrowing
def _weigh(b, h, r, t, n, scale, q, q_at, k, k_at, v, v_at, keep, write, queries, keys, values, log_decays, ns):
    """A stretch as linear attention reads it, and, from n' before it, n' after each token."""
    K, V, real = queries.shape[1], values.shape[1] - 1, q.dtype.type
    for i in range(n):
        start = b * q_at[0] + h * q_at[1] + (t + i) * q_at[2]
        row, to, factor = q[start : start + K], queries[i], real(scale)
        for d in range(K):
            to[d] = factor * row[d]
        start = b * v_at[0] + h * v_at[1] + (t + i) * v_at[2]
        copy_row(v[start : start + V], values[i, :V])
        start = b * k_at[0] + h * k_at[1] + (t + i) * k_at[2]
        row, to, before, after = k[start : start + K], keys[i], ns[i], ns[i + 1]
        kept, weight = decay(keep[r, t + i]), math.exp(write[r, t + i])
        factor = real(weight)
        for d in range(K):
            to[d] = factor * row[d]
            after[d] = kept * before[d] + weight * row[d]
        log_decays[i] = keep[r, t + i]


@borrowing
def _weigh_backward(
    b, h, r, t, n, scale, k, k_at, keep, write, queries, ns, d_den, d_queries, d_keys, d_log_decays, d_n,
    d_q, d_q_at, d_k, d_k_at, d_keep, d_write, u,
):  # fmt: skip
    """`d_n` holds the gradient of n' after the stretch, and gets that before; what linear attention found is added."""
    K, real = queries.shape[1], queries.dtype.type
    factor = real(scale)
    for i in range(n - 1, -1, -1):
        kept, weight = decay(keep[r, t + i]), math.exp(write[r, t + i])
        add_scaled(queries[i], d_den[i], d_n)
        start = b * d_q_at[0] + h * d_q_at[1] + (t + i) * d_q_at[2]
        row, to, now, by = d_queries[i], d_q[start : start + K], ns[i + 1], d_den[i]
        for d in range(K):
            to[d] = factor * real(row[d] + by * now[d])
        start = b * d_k_at[0] + h * d_k_at[1] + (t + i) * d_k_at[2]
        row, to = d_keys[i], d_k[start : start + K]
        for d in range(K):
            u[d] = weight * (row[d] + d_n[d])
            to[d] = u[d]
        start = b * k_at[0] + h * k_at[1] + (t + i) * k_at[2]
        d_write[r, t + i] = dot(u, k[start : start + K])
        d_keep[r, t + i] = d_log_decays[i] + kept * dot(d_n, ns[i]) if keep[r, t + i] >= FLOOR else 0
        for d in range(K):
            d_n[d] *= kept


@borrowing
def _near(value, most, zero):
    """The value, no greater than `most`; zero where it is no number."""
    if value > most:
        return most
    return -most if value < -most else (value if value == value else zero)


@borrowing
def _divide(b, h, r, t, n, eps, queries, ns, sums, m, most, y, y_at, den):
    V, real, zero = most.shape[0], sums.dtype.type, sums.dtype.type(0)
    for i in range(n):
        exact, row = dot(ns[i + 1], queries[i]), sums[i]
        den[r, t + i] = exact
        size, rounded = real(max(abs(exact), math.exp(-m[r, t + i])) + eps), row[V]
        missing, start = real(exact - rounded), b * y_at[0] + h * y_at[1] + (t + i) * y_at[2]
        to = y[start : start + V]
        for d in range(V):
            to[d] = (row[d] + _near(row[d] / rounded, most[d], zero) * missing) / size


@borrowing
def _divide_backward(b, h, r, t, n, eps, m, most, y, y_at, den, d_y, d_y_at, d_sums, d_den, typical):
    """The gradients of C'ᵀq and of both n'·q. y is what `typical` was or near it, but for its size and its sign."""
    V, real, zero = most.shape[0], d_sums.dtype.type, d_sums.dtype.type(0)
    for i in range(n):
        exact, least = den[r, t + i], math.exp(-m[r, t + i])
        whole = max(abs(exact), least) + eps
        size, ratio, to = real(whole), real(whole / exact), d_sums[i, :V]
        start, other = (
            b * y_at[0] + h * y_at[1] + (t + i) * y_at[2],
            b * d_y_at[0] + h * d_y_at[1] + (t + i) * d_y_at[2],
        )
        out, given = y[start : start + V], d_y[other : other + V]
        for d in range(V):
            to[d] = given[d] / size
            typical[d] = _near(out[d] * ratio, most[d], zero)
        back, along = dot(typical, to), dot(out, to)
        d_sums[i, V] = -back
        share = 0.5 if abs(exact) == least else (1.0 if abs(exact) > least else 0.0)  # as of a maximum
        d_den[i] = back - share * along * (1.0 if exact > 0 else -1.0)
