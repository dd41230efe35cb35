"""The compiled parts that the matrix memories share: one chunk of one head, in the cache.

Axes: n ≤ C tokens of a chunk, K key features, V value features. Within a chunk a token's decay a_t = e^{g_t} is
exponentiated once; every other decay is a running product of these, which never exceeds 1 and cancels nothing.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.compiled import decay, jit, summing
from remanence.ops.decay import FLOOR

NONE, PER_HEAD, PER_KEY = 0, 1, 2
"""How many decays a token has: none, one for its head, one for each key feature."""
LEAST = 8
"""Tokens below which halving a chunk stops and its pairs are taken one by one."""


EVERY = 4
"""Chunks for which one state is kept: the others are made again."""


@jit
def take(out, x, at, b, h, first):
    """Copy rows `first`, `first` + 1, … of head h of x into out [n, width]."""
    n, width = out.shape
    origin = b * at[0] + h * at[1] + first * at[2]
    for i in range(n):
        row, to = x[origin + i * at[2] : origin + i * at[2] + width], out[i]
        for d in range(width):
            to[d] = row[d]


@jit
def put(x, at, b, h, first, rows):
    """The inverse of `take`."""
    n, width = rows.shape
    origin = b * at[0] + h * at[1] + first * at[2]
    for i in range(n):
        to, row = x[origin + i * at[2] : origin + i * at[2] + width], rows[i]
        for d in range(width):
            to[d] = row[d]


@jit
def matrix(buffer, rows, columns):
    """The first numbers of a flat buffer as a contiguous matrix."""
    return buffer[: rows * columns].reshape(rows, columns)


@jit
def fill(x, value):
    for d in range(x.shape[0]):
        x[d] = value


@jit
def copy_row(x, out):
    for d in range(out.shape[0]):
        out[d] = x[d]


@jit
def copy(x, out):
    for i in range(out.shape[0]):
        copy_row(x[i], out[i])


@jit
def since(first, last, single, out):
    """Row i − first of out: the product of the decays of tokens first … i, for each i before `last`."""
    for i in range(first, last):
        own, now = single[i], out[i - first]
        if i == first:
            for d in range(own.shape[0]):
                now[d] = own[d]
        else:
            before = out[i - first - 1]
            for d in range(own.shape[0]):
                now[d] = before[d] * own[d]


@jit
def until(first, last, single, out):
    """Row j − first of out: the product of the decays of tokens j + 1 … last − 1, for each j from `first`."""
    fill(out[last - first - 1], 1.0)
    for j in range(last - 2, first - 1, -1):
        later, own, now = out[j + 1 - first], single[j + 1], out[j - first]
        for d in range(own.shape[0]):
            now[d] = later[d] * own[d]


@jit
def take_decays(kind, n, g, at, b, h, first, single, from_start, to_end, between):
    """A chunk's decays.

    `single` [C, K]: each token's own; `from_start`, `to_end` [C, K]: the products up to and with a token, and after
    it to the chunk's end; `between` [C, C]: those after j up to i, for j ≤ i, else 0 (not where PER_KEY).
    """
    K = single.shape[1]
    origin = b * at[0] + h * at[1] + first * at[2]
    for i in range(n):
        if kind == PER_KEY:
            row, own = g[origin + i * at[2] : origin + i * at[2] + K], single[i]
            for d in range(K):
                own[d] = decay(row[d])
        else:
            fill(single[i], decay(g[origin + i * at[2]]) if kind == PER_HEAD else 1.0)
    since(0, n, single, from_start)
    until(0, n, single, to_end)
    if kind == PER_KEY:
        return
    for i in range(n):
        now, last, a = between[i], between[max(i, 1) - 1], single[i, 0]
        for j in range(i):
            now[j] = last[j] * a
        now[i] = 1
        for j in range(i + 1, n):
            now[j] = 0


@jit
def product(x, y, out):
    """out = x y. By itself, since what NumPy's product compiles to is long, and kernels call it often."""
    np.dot(x, y, out)


@jit
def multiply(x, y, out):
    """out = x ⊙ y, of matrices whose leading rows are meant."""
    n, width = out.shape
    for i in range(n):
        a, b, c = x[i], y[i], out[i]
        for d in range(width):
            c[d] = a[d] * b[d]


@jit
def multiply_into(x, y, buffer, first, step):
    """Write x ⊙ y row by row to buffer[first], buffer[first + step], …: columns of a wider matrix."""
    n, width = x.shape
    for i in range(n):
        a, b, c = x[i], y[i], buffer[first + i * step : first + i * step + width]
        for d in range(width):
            c[d] = a[d] * b[d]


@jit
def add(x, out):
    """out += x."""
    n, width = out.shape
    for i in range(n):
        a, c = x[i], out[i]
        for d in range(width):
            c[d] += a[d]


@jit
def multiply_add(x, y, out):
    """out += x ⊙ y."""
    n, width = out.shape
    for i in range(n):
        a, b, c = x[i], y[i], out[i]
        for d in range(width):
            c[d] += a[d] * b[d]


@jit
def multiply_subtract(x, y, out):
    """out −= x ⊙ y."""
    n, width = out.shape
    for i in range(n):
        a, b, c = x[i], y[i], out[i]
        for d in range(width):
            c[d] -= a[d] * b[d]


@jit
def carry(S, over, new):
    """S ← Diag(over) S + new."""
    for d in range(S.shape[0]):
        row, added, a = S[d], new[d], over[d]
        for e in range(S.shape[1]):
            row[e] = a * row[e] + added[e]


@summing
def dot(x, y):
    total = x.dtype.type(0)
    for d in range(x.shape[0]):
        total += x[d] * y[d]
    return total


@summing
def total(x):
    sum = x.dtype.type(0)
    for d in range(x.shape[0]):
        sum += x[d]
    return sum


@summing
def add_scaled(x, a, out):
    """out += a x, of rows."""
    for d in range(out.shape[0]):
        out[d] += a * x[d]


@summing
def combine(weights, rows, out):
    """out += Σ_i weights_i rows_i, four rows at a time: so a sum is fetched and stored once for four products."""
    n = rows.shape[0]
    for i in range(0, n - 3, 4):
        a, b, c, d = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
        w, x, y, z = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        for j in range(out.shape[0]):
            out[j] += a * w[j] + b * x[j] + c * y[j] + d * z[j]
    for i in range(n - n % 4, n):
        add_scaled(rows[i], weights[i], out)


@summing
def _least_pairs(first, last, q, k, single, P):
    """P_ij for the pairs i > j of a short stretch."""
    K = q.shape[1]
    run = np.empty(K, q.dtype)
    for j in range(first, last):
        copy_row(k[j], run)
        for i in range(j + 1, last):
            a, late = single[i], q[i]
            total = q.dtype.type(0)
            for d in range(K):
                run[d] *= a[d]
                total += run[d] * late[d]
            P[i, j] = total


@jit
def _least_pairs_backward(first, last, d_P, q, k, single, d_q, d_k):
    K = q.shape[1]
    run = np.empty(K, q.dtype)
    for j in range(first, last):
        fill(run, 1.0)
        early, d_early = k[j], d_k[j]
        for i in range(j + 1, last):
            a, late, d_late, w = single[i], q[i], d_q[i], d_P[i, j]
            for d in range(K):
                run[d] *= a[d]
                d_late[d] += w * run[d] * early[d]
                d_early[d] += w * run[d] * late[d]


@jit
def scores_per_key(q, k, single, P, strict):
    """P_ij = Σ_d q_id k_jd Π_{j<t≤i} a_td for j ≤ i (j < i where `strict`), else 0. Shapes: q, k [n, K], P [n, n].

    By halves: the pairs of a late and an early half see each other from the border between them.
    """
    n, K = q.shape
    for i in range(n):
        fill(P[i], 0.0)
        if not strict:
            P[i, i] = dot(q[i], k[i])
    for first in range(0, n, LEAST):
        _least_pairs(first, min(first + LEAST, n), q, k, single, P)
    late, early, block = np.empty((n, K), q.dtype), np.empty((n, K), q.dtype), np.empty(n * n, q.dtype)
    half = LEAST
    while half < n:
        for first in range(0, n - half, 2 * half):
            middle, last = first + half, min(first + 2 * half, n)
            since(middle, last, single, late)
            until(first, middle, single, early)
            multiply(late, q[middle:last], late[: last - middle])
            multiply(early, k[first:middle], early[:half])
            pairs = matrix(block, last - middle, half)
            product(late[: last - middle], early[:half].T, pairs)
            for i in range(middle, last):
                copy_row(pairs[i - middle], P[i, first:middle])
        half *= 2


@jit
def scores_per_key_backward(d_P, q, k, single, d_q, d_k, strict):
    """Add to d_q and d_k what comes from d_P, of which only the entries that `scores_per_key` fills are read."""
    n, K = q.shape
    if not strict:
        for i in range(n):
            w, q_i, k_i, d_q_i, d_k_i = d_P[i, i], q[i], k[i], d_q[i], d_k[i]
            for d in range(K):
                d_q_i[d] += w * k_i[d]
                d_k_i[d] += w * q_i[d]
    for first in range(0, n, LEAST):
        _least_pairs_backward(first, min(first + LEAST, n), d_P, q, k, single, d_q, d_k)
    late, early, seen = np.empty((n, K), q.dtype), np.empty((n, K), q.dtype), np.empty((n, K), q.dtype)
    block, found = np.empty(n * n, q.dtype), np.empty((n, K), q.dtype)
    half = LEAST
    while half < n:
        for first in range(0, n - half, 2 * half):
            middle, last = first + half, min(first + 2 * half, n)
            since(middle, last, single, late)
            until(first, middle, single, early)
            pairs = matrix(block, last - middle, half)
            for i in range(middle, last):
                copy_row(d_P[i, first:middle], pairs[i - middle])
            multiply(early, k[first:middle], seen[:half])
            product(pairs, seen[:half], found[: last - middle])
            multiply_add(found, late, d_q[middle:last])
            multiply(late, q[middle:last], seen[: last - middle])
            product(pairs.T, seen[: last - middle], found[:half])
            multiply_add(found, early, d_k[first:middle])
        half *= 2


@jit
def put_decay_gradient(kind, d_g, d_at, g, at, b, h, first, change, d_over):
    """Write the gradient of the log decays of a chunk.

    `change` [n, K] is that of the sums up to each token, which enter only as e^{G} q and e^{−G} k, and so is
    q ⊙ ∂q − k ⊙ ∂k; `d_over` [K] is that of the decay over the whole chunk. A token's decay is in its own sum and
    in all later ones. Below the floor, where decays are clamped, the gradient is 0.
    """
    n, K = change.shape
    origin, d_origin = b * at[0] + h * at[1] + first * at[2], b * d_at[0] + h * d_at[1] + first * d_at[2]
    for i in range(n - 1, -1, -1):
        here, there = origin + i * at[2], d_origin + i * d_at[2]
        row = change[i]
        for d in range(K):
            d_over[d] += row[d]
        if kind == PER_HEAD:
            d_g[there] = total(d_over) if g[here] >= FLOOR else 0
        else:
            to, given = d_g[there : there + K], g[here : here + K]
            for d in range(K):
                to[d] = d_over[d] if given[d] >= FLOOR else 0
