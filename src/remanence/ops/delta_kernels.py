"""The gated delta rule compiled for the CPU: each call takes the heads from `first` to `last`, chunk after chunk.

What token i writes is w_i = β_i k_i times its error f_i = v_i − (prediction). With the products e^{G} of the decays,
A_ij = (k_i·w_j) e^{G_i − G_j} for j < i and P_ij = (q_i·w_j) e^{G_i − G_j} for j ≤ i:
(I + A) F = V − (K ⊙ e^G) S,  Y = P F + (Q ⊙ e^G) S,  S' = e^{G_C} S + (W ⊙ e^{G_C − G})ᵀ F.
So it is linear attention from keys W to values F with two kinds of readers, Q and K, which are stacked. With `unit`
both are first brought to unit length, and the queries multiplied by `scale`.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import (
    EVERY,
    NONE,
    add,
    carry,
    copy,
    copy_row,
    dot,
    matrix,
    multiply,
    multiply_add,
    multiply_subtract,
    product,
    put,
    put_decay_gradient,
    take,
    take_decays,
)
from remanence.ops.compiled import jit

EPS = 1e-6
"""Under the root of a length, which keeps the gradient at zero finite."""
BLOCK = 16
"""Rows of a triangular system that are solved one by one; what they owe to earlier blocks is a matrix product."""


@jit
def _left_of(A, first, last, buffer):
    """A[first:last, :first] as a contiguous matrix."""
    left = matrix(buffer, last - first, first)
    for i in range(first, last):
        copy_row(A[i, :first], left[i - first])
    return left


@jit
def solve(A, X, buffer, owed):
    """X ← (I + A)⁻¹ X for a strictly lower triangular A."""
    n, V = X.shape
    for first in range(0, n, BLOCK):
        last = min(first + BLOCK, n)
        if first:
            product(_left_of(A, first, last, buffer), X[:first], owed[: last - first])
            for i in range(first, last):
                row, less = X[i], owed[i - first]
                for e in range(V):
                    row[e] -= less[e]
        for i in range(first, last):
            row = X[i]
            for j in range(first, i):
                earlier, a = X[j], A[i, j]
                for e in range(V):
                    row[e] -= a * earlier[e]


@jit
def solve_transposed(A, X, buffer, owed):
    """X ← (I + A)⁻ᵀ X for a strictly lower triangular A."""
    n, V = X.shape
    for first in range((n - 1) // BLOCK * BLOCK, -1, -BLOCK):
        last = min(first + BLOCK, n)
        for i in range(last - 1, first - 1, -1):
            row = X[i]
            for j in range(first, i):
                earlier, a = X[j], A[i, j]
                for e in range(V):
                    earlier[e] -= a * row[e]
        if first:
            product(_left_of(A, first, last, buffer).T, X[first:last], owed[:first])
            for j in range(first):
                row, less = X[j], owed[j]
                for e in range(V):
                    row[e] -= less[e]


@jit
def _strengthen(keys, ws, b, h, t, beta, beta_at):
    """w = β k."""
    origin = b * beta_at[0] + h * beta_at[1] + t * beta_at[2]
    for i in range(ws.shape[0]):
        row, key, strength = ws[i], keys[i], beta[origin + i * beta_at[2]]
        for d in range(row.shape[0]):
            row[d] = strength * key[d]


@jit
def _unit(rows, scale, inverse):
    """Rows to vectors of length `scale`; `inverse` holds what each was multiplied by."""
    for i in range(rows.shape[0]):
        row = rows[i]
        inverse[i] = row.dtype.type(scale / math.sqrt(dot(row, row) + EPS))
        for d in range(row.shape[0]):
            row[d] *= inverse[i]


@jit
def _unit_backward(d_rows, rows, scale, inverse):
    """Gradients of what `_unit` gave to those of what it was given."""
    share = rows.dtype.type(1 / (scale * scale))
    for i in range(rows.shape[0]):
        row, d_row = rows[i], d_rows[i]
        along = share * dot(row, d_row)
        for d in range(row.shape[0]):
            d_row[d] = inverse[i] * (d_row[d] - along * row[d])


@jit
def _readers(n, b, h, t, unit, scale, q, q_at, k, k_at, beta, beta_at, both, written, scores, between, inverse):
    """Fill `both` with queries over keys, `written` with β k, and `scores` with P over A."""
    readers, ws = both[: 2 * n], written[:n]
    take(readers[:n], q, q_at, b, h, t)
    take(readers[n:], k, k_at, b, h, t)
    if unit:
        _unit(readers[:n], scale, inverse)
        _unit(readers[n:], 1.0, inverse[n:])
    _strengthen(readers[n:], ws, b, h, t, beta, beta_at)
    M = matrix(scores, 2 * n, n)
    product(readers, ws.T, M)
    multiply_scores(M, between)


@jit
def multiply_scores(M, between):
    """P over A, times the decays between their tokens; A without its diagonal."""
    n = M.shape[1]
    multiply(M, between, M[:n])
    multiply(M[n:], between, M[n:])
    for i in range(n):
        M[n + i, i] = 0


@jit
def forward(
    first, last, H, T, C, kind, unit, scale, q, q_at, k, k_at, v, v_at, beta, beta_at, g, g_at, start, y, y_at,
    errors, befores, end,
):  # fmt: skip
    K, V = start.shape[1:]
    dtype = q.dtype
    single, from_start, to_end = np.empty((C, K), dtype), np.empty((C, K), dtype), np.empty((C, K), dtype)
    between, scores = np.empty((C, C), dtype), np.empty(2 * C * C, dtype)
    both, written, reads = np.empty((2 * C, K), dtype), np.empty((C, K), dtype), np.empty((2 * C, V), dtype)
    out, new = np.empty((C, V), dtype), np.empty((K, V), dtype)
    buffer, owed, inverse = np.empty(C * C, dtype), np.empty((C, V), dtype), np.empty(2 * C, dtype)
    S = np.empty((K, V), dtype)
    known = 0
    for r in range(first, last):
        b, h = r // H, r % H
        copy(start[r], S)
        for c in range(-(-T // C)):
            if c % EVERY == 0:
                copy(S, befores[r, c // EVERY])
            t, n = c * C, min(C, T - c * C)
            if kind != NONE or n != known:
                take_decays(kind, n, g, g_at, b, h, t, single, from_start, to_end, between)
                known = n
            _readers(n, b, h, t, unit, scale, q, q_at, k, k_at, beta, beta_at, both, written, scores, between, inverse)
            readers, ws, M, F = both[: 2 * n], written[:n], matrix(scores, 2 * n, n), errors[r, t : t + n]
            multiply(readers, from_start, readers[:n])
            multiply(readers[n:], from_start, readers[n:])
            product(readers, S, reads[: 2 * n])
            take(F, v, v_at, b, h, t)
            for i in range(n):
                row, known_of_it = F[i], reads[n + i]
                for e in range(V):
                    row[e] -= known_of_it[e]
            solve(M[n:], F, buffer, owed)
            product(M[:n], F, out[:n])
            add(reads, out[:n])
            put(y, y_at, b, h, t, out[:n])
            multiply(ws, to_end, ws)
            product(ws.T, F, new)
            carry(S, from_start[n - 1], new)
        copy(S, end[r])


@jit
def backward(
    first, last, H, T, C, kind, unit, scale, q, q_at, k, k_at, beta, beta_at, g, g_at, errors, befores, end,
    d_y, d_y_at, d_q, d_q_at, d_k, d_k_at, d_v, d_v_at, d_beta, d_beta_at, d_g, d_g_at, d_start,
):  # fmt: skip
    K, V = end.shape[1:]
    dtype = q.dtype
    single, from_start, to_end = np.empty((C, K), dtype), np.empty((C, K), dtype), np.empty((C, K), dtype)
    between, scores, d_scores = np.empty((C, C), dtype), np.empty(2 * C * C, dtype), np.empty(2 * C * C, dtype)
    both, d_both, other = np.empty((2 * C, K), dtype), np.empty((2 * C, K), dtype), np.empty((2 * C, K), dtype)
    written, d_written, d_reads = np.empty((C, K), dtype), np.empty((C, K), dtype), np.empty((2 * C, V), dtype)
    d_errors, more, d_over = np.empty((C, V), dtype), np.empty((C, V), dtype), np.empty(K, dtype)
    d_S, new = np.empty((K, V), dtype), np.empty((K, V), dtype)
    buffer, owed, inverse = np.empty(C * C, dtype), np.empty((C, V), dtype), np.empty(2 * C, dtype)
    states = np.empty((EVERY + 1, K, V), dtype)  # before each of the chunks that share a state, and after the last
    known, chunks = 0, -(-T // C)
    for r in range(first, last):
        b, h = r // H, r % H
        copy(d_start[r], d_S)
        copy(end[r], states[(chunks - 1) % EVERY + 1])
        for c in range(chunks - 1, -1, -1):
            if c == chunks - 1 or c % EVERY == EVERY - 1:
                if c < chunks - 1:
                    copy(states[0], states[EVERY])
                copy(befores[r, c // EVERY], states[0])
                for e in range(c // EVERY * EVERY, c):
                    ws, here = written[:C], states[e % EVERY + 1]
                    if kind != NONE or known != C:
                        take_decays(kind, C, g, g_at, b, h, e * C, single, from_start, to_end, between)
                        known = C
                    take(ws, k, k_at, b, h, e * C)
                    if unit:
                        _unit(ws, 1.0, inverse)
                    _strengthen(ws, ws, b, h, e * C, beta, beta_at)
                    multiply(ws, to_end, ws)
                    product(ws.T, errors[r, e * C : (e + 1) * C], new)
                    copy(states[e % EVERY], here)
                    carry(here, from_start[C - 1], new)
            t, n = c * C, min(C, T - c * C)
            if kind != NONE or n != known:
                take_decays(kind, n, g, g_at, b, h, t, single, from_start, to_end, between)
                known = n
            _readers(n, b, h, t, unit, scale, q, q_at, k, k_at, beta, beta_at, both, written, scores, between, inverse)
            readers, ws, M, F = both[: 2 * n], written[:n], matrix(scores, 2 * n, n), errors[r, t : t + n]
            S, after = states[c % EVERY], states[c % EVERY + 1]
            d_readers, d_ws, dF, dM, Z = (
                d_both[: 2 * n],
                d_written[:n],
                d_errors[:n],
                matrix(d_scores, 2 * n, n),
                d_reads[: 2 * n],
            )

            take(Z[:n], d_y, d_y_at, b, h, t)
            product(M[:n].T, Z[:n], dF)
            multiply(ws, to_end, other[:n])
            product(other[:n], d_S, more[:n])
            add(more, dF)
            solve_transposed(M[n:], dF, buffer, owed)
            put(d_v, d_v_at, b, h, t, dF)
            for i in range(n):
                to, row = Z[n + i], dF[i]
                for e in range(V):
                    to[e] = -row[e]

            product(Z, F.T, dM)
            multiply_scores(dM, between)
            product(dM, ws, d_readers)
            product(Z, S.T, other[: 2 * n])
            multiply_add(other, from_start, d_readers[:n])
            multiply_add(other[n:], from_start, d_readers[n:])
            product(dM.T, readers, d_ws)
            product(F, d_S.T, other[:n])
            multiply_add(other, to_end, d_ws)

            if kind != NONE:
                for d in range(K):
                    d_over[d] = dot(after[d], d_S[d])
                change = other[:n]
                multiply(readers, d_readers, change)
                multiply_add(readers[n:], d_readers[n:], change)
                multiply_subtract(ws, d_ws, change)
                put_decay_gradient(kind, d_g, d_g_at, g, g_at, b, h, t, change, d_over)
            origin = b * beta_at[0] + h * beta_at[1] + t * beta_at[2]
            d_origin = b * d_beta_at[0] + h * d_beta_at[1] + t * d_beta_at[2]
            for i in range(n):
                strength, row, to = beta[origin + i * beta_at[2]], d_ws[i], d_readers[n + i]
                d_beta[d_origin + i * d_beta_at[2]] = dot(readers[n + i], row)
                for d in range(K):
                    to[d] += strength * row[d]
            if unit:
                _unit_backward(d_readers[:n], readers[:n], scale, inverse)
                _unit_backward(d_readers[n:], readers[n:], 1.0, inverse[n:])
            put(d_q, d_q_at, b, h, t, d_readers[:n])
            put(d_k, d_k_at, b, h, t, d_readers[n:])

            multiply(readers, from_start, readers[:n])
            multiply(readers[n:], from_start, readers[n:])
            product(readers.T, Z, new)
            carry(d_S, from_start[n - 1], new)
        copy(d_S, d_start[r])
