"""Linear attention compiled for the CPU: each call takes the heads from `first` to `last`, chunk after chunk.

With a_t the decays, and products of them written as e^{G}: Y = P V + (Q ⊙ e^G) S and S' = Diag(e^{G_C}) S +
(K ⊙ e^{G_C − G})ᵀ V, where P_ij = Σ_d q_id k_jd e^{G_id − G_jd} for j ≤ i. P V + (Q ⊙ e^G) S is one product
of matrices side by side. Tensors [B, H, T, …] come as flat arrays with their strides. With `silu`, Q, K and V are SiLU
of what is given.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.chunk_kernels import (
    NONE,
    PER_KEY,
    add,
    carry,
    copy,
    dot,
    fill,
    matrix,
    multiply,
    multiply_add,
    multiply_into,
    multiply_subtract,
    product,
    put,
    put_decay_gradient,
    scores_per_key,
    scores_per_key_backward,
    take,
    take_decays,
)
from remanence.ops.compiled import jit, sigmoid_and_silu
from remanence.ops.step_kernels import activate


@jit
def _take(out, x, at, b, h, first, silu):
    take(out, x, at, b, h, first)
    if silu:
        for i in range(out.shape[0]):
            activate(out[i])


@jit
def _put(d_x, d_at, b, h, first, rows, silu, x, at):
    """The gradient of what was taken."""
    if silu:
        one, start = d_x.dtype.type(1), b * at[0] + h * at[1] + first * at[2]
        for i in range(rows.shape[0]):
            row, given = rows[i], x[start + i * at[2] : start + i * at[2] + rows.shape[1]]
            for d in range(row.shape[0]):
                sigmoid, value = sigmoid_and_silu(given[d])
                row[d] *= sigmoid + value * (one - sigmoid)
    put(d_x, d_at, b, h, first, rows)


@jit
def forward(
    first, last, H, T, C, every, kind, silu, q, q_at, k, k_at, v, v_at, g, g_at, start, y, y_at, befores, end
):  # fmt: skip
    K, V = start.shape[1:]
    dtype = q.dtype
    single, from_start, to_end = np.empty((C, K), dtype), np.empty((C, K), dtype), np.empty((C, K), dtype)
    between, scores, wide = np.empty((C, C), dtype), np.empty(C * C, dtype), np.empty(C * (C + K), dtype)
    queries, keys, out = np.empty((C, K), dtype), np.empty((C, K), dtype), np.empty((C, V), dtype)
    new, ones = np.empty((K, V), dtype), np.ones((C, C), dtype)
    below = np.empty((C + K, V), dtype)  # values, and under them the state
    S = below[C:]
    known = 0
    for r in range(first, last):
        b, h = r // H, r % H
        copy(start[r], S)
        for c in range(-(-T // C)):
            if c % every == 0:
                copy(S, befores[r, c // every])
            t, n = c * C, min(C, T - c * C)
            qs, ks, vs, P = queries[:n], keys[:n], below[C - n : C], matrix(scores, n, n)
            beside = matrix(wide, n, n + K)
            _take(qs, q, q_at, b, h, t, silu)
            _take(ks, k, k_at, b, h, t, silu)
            _take(vs, v, v_at, b, h, t, silu)
            if kind != NONE or n != known:
                take_decays(kind, n, g, g_at, b, h, t, single, from_start, to_end, between)
                known = n
            if kind == PER_KEY:
                scores_per_key(qs, ks, single, P, False)
                multiply_into(P, ones, wide, 0, n + K)
            else:
                product(qs, ks.T, P)
                multiply_into(P, between, wide, 0, n + K)
            multiply_into(qs, from_start, wide, n, n + K)
            product(beside, below[C - n :], out[:n])
            put(y, y_at, b, h, t, out[:n])
            multiply(ks, to_end, ks)
            product(ks.T, vs, new)
            carry(S, from_start[n - 1], new)
        copy(S, end[r])


@jit
def backward(
    first, last, H, T, C, every, kind, silu, q, q_at, k, k_at, v, v_at, g, g_at, befores, end, d_y, d_y_at,
    d_q, d_q_at, d_k, d_k_at, d_v, d_v_at, d_g, d_g_at, d_start,
):  # fmt: skip
    K, V = end.shape[1:]
    dtype = q.dtype
    single, from_start, to_end = np.empty((C, K), dtype), np.empty((C, K), dtype), np.empty((C, K), dtype)
    between, scores = np.empty((C, C), dtype), np.empty(C * C, dtype)
    queries, keys, values = np.empty((C, K), dtype), np.empty((C, K), dtype), np.empty((C, V), dtype)
    d_queries, d_keys, d_values = np.empty((C, K), dtype), np.empty((C, K), dtype), np.empty((C, V), dtype)
    other, more, d_over = np.empty((C, K), dtype), np.empty((C, V), dtype), np.empty(K, dtype)
    d_outs, d_S, new = np.empty((C, V), dtype), np.empty((K, V), dtype), np.empty((K, V), dtype)
    states = np.empty((every + 1, K, V), dtype)  # before each of the chunks that share a state, and after the last
    known, chunks = 0, -(-T // C)
    for r in range(first, last):
        b, h = r // H, r % H
        copy(d_start[r], d_S)
        copy(end[r], states[(chunks - 1) % every + 1])
        for c in range(chunks - 1, -1, -1):
            if c == chunks - 1 or c % every == every - 1:
                if c < chunks - 1:
                    copy(states[0], states[every])
                copy(befores[r, c // every], states[0])
                for e in range(c // every * every, c):
                    ks, vs, here = keys[:C], values[:C], states[e % every + 1]
                    _take(ks, k, k_at, b, h, e * C, silu)
                    _take(vs, v, v_at, b, h, e * C, silu)
                    if kind != NONE or known != C:
                        take_decays(kind, C, g, g_at, b, h, e * C, single, from_start, to_end, between)
                        known = C
                    multiply(ks, to_end, ks)
                    product(ks.T, vs, new)
                    copy(states[e % every], here)
                    carry(here, from_start[C - 1], new)
            t, n = c * C, min(C, T - c * C)
            qs, ks, vs, d_ys, P = queries[:n], keys[:n], values[:n], d_outs[:n], matrix(scores, n, n)
            d_qs, d_ks, d_vs = d_queries[:n], d_keys[:n], d_values[:n]
            S, after = states[c % every], states[c % every + 1]
            _take(qs, q, q_at, b, h, t, silu)
            _take(ks, k, k_at, b, h, t, silu)
            _take(vs, v, v_at, b, h, t, silu)
            take(d_ys, d_y, d_y_at, b, h, t)
            if kind != NONE or n != known:
                take_decays(kind, n, g, g_at, b, h, t, single, from_start, to_end, between)
                known = n
            if kind == PER_KEY:
                scores_per_key(qs, ks, single, P, False)
            else:
                product(qs, ks.T, P)
                multiply(P, between, P)
            product(P.T, d_ys, d_vs)
            multiply(ks, to_end, other[:n])
            product(other[:n], d_S, more[:n])
            add(more, d_vs)
            _put(d_v, d_v_at, b, h, t, d_vs, silu, v, v_at)

            product(d_ys, vs.T, P)
            if kind == PER_KEY:
                for i in range(n):
                    fill(d_qs[i], 0.0)
                    fill(d_ks[i], 0.0)
                scores_per_key_backward(P, qs, ks, single, d_qs, d_ks, False)
            else:
                multiply(P, between, P)
                product(P, ks, d_qs)
                product(P.T, qs, d_ks)
            product(d_ys, S.T, other[:n])
            multiply_add(other, from_start, d_qs)
            product(vs, d_S.T, other[:n])
            multiply_add(other, to_end, d_ks)
            if kind != NONE:
                for d in range(K):
                    d_over[d] = dot(after[d], d_S[d])
                multiply(qs, d_qs, other[:n])
                multiply_subtract(ks, d_ks, other[:n])
                put_decay_gradient(kind, d_g, d_g_at, g, g_at, b, h, t, other[:n], d_over)
            _put(d_q, d_q_at, b, h, t, d_qs, silu, q, q_at)
            _put(d_k, d_k_at, b, h, t, d_ks, silu, k, k_at)
            multiply(qs, from_start, qs)
            product(qs.T, d_ys, new)
            carry(d_S, from_start[n - 1], new)
        copy(d_S, d_start[r])
