"""`omega_delta` without momentum, compiled for the CPU: each call takes the heads from `first` to `last`.

Within a chunk of n tokens W_t = A_t W_0 + D_tᵀ K, where row l of D [L, V] is what was written at the l-th of its
L = n + c − 1 keys, and A_t the product of the decays. So predictions need D, G = K Kᵀ and K W_0ᵀ, but never W_t.
Axes: T tokens, c places of a window, K and V features; keys and values have the c − 1 tokens before the first as well.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.chunk_kernels import add_scaled, dot
from remanence.ops.compiled import gemm, summing


@summing
def _combine(sign, weights, D, count, out):
    """out += sign · Σ_{l < count} weights_l D_l, four rows at a time."""
    for l in range(0, count - 3, 4):
        a, b, c, d = sign * weights[l], sign * weights[l + 1], sign * weights[l + 2], sign * weights[l + 3]
        w, x, y, z = D[l], D[l + 1], D[l + 2], D[l + 3]
        for e in range(out.shape[0]):
            out[e] += a * w[e] + b * x[e] + c * y[e] + d * z[e]
    for l in range(count - count % 4, count):
        add_scaled(D[l], sign * weights[l], out)


@summing
def _spread(sign, weights, x, count, D):
    """D_l += sign · weights_l x for l < count."""
    for l in range(count):
        a, row = sign * weights[l], D[l]
        for e in range(x.shape[0]):
            row[e] += a * x[e]


@summing
def _chunk(q, k, v, pair, a, W, alike, scores, said, read, products, D, found):
    """D before each token and after the last [n + 1, L, V], and the corrections f [n, c, V] of all pairs."""
    (n, c), V = pair.shape, v.shape[1]
    gemm(1, k, False, k, True, 0, alike)
    gemm(1, q, False, k, True, 0, scores)
    gemm(1, k, False, W, True, 0, said)
    gemm(1, q, False, W, True, 0, read)
    products[0] = 1
    for l in range(n + c - 1):
        for e in range(V):
            D[0, l, e] = 0
    for t in range(n):
        products[t + 1] = products[t] * a[t]
        for l in range(n + c - 1):
            before, now = D[t, l], D[t + 1, l]
            for e in range(V):
                now[e] = a[t] * before[e]
        for j in range(c):
            i = t + c - 1 - j
            f, target, old = found[t, j], v[i], said[i]
            for e in range(V):
                f[e] = target[e] - products[t] * old[e]
            _combine(-1, alike[i], D[t], t + c - 1, f)
            add_scaled(f, pair[t, j], D[t + 1, i])


@summing
def forward(first, last, C, q, k, v, pair, a, start, y, befores, end):
    """q [R, T, K], k and v [R, c − 1 + T, ...], pair [R, T, c], a [R, T], start [R, V, K]; befores: W at each chunk."""
    T, c = pair.shape[1:]
    V, K = start.shape[1:]
    L = C + c - 1
    alike, scores, said = np.empty((L, L), q.dtype), np.empty((C, L), q.dtype), np.empty((L, V), q.dtype)
    read, products = np.empty((C, V), q.dtype), np.empty(C + 1, q.dtype)
    D, found = np.empty((C + 1, L, V), q.dtype), np.empty((C, c, V), q.dtype)
    for r in range(first, last):
        W = end[r]
        for i in range(V):
            for d in range(K):
                W[i, d] = start[r, i, d]
        for g in range(befores.shape[1]):
            t0, n = g * C, min(C, T - g * C)
            l = n + c - 1
            for i in range(V):
                for d in range(K):
                    befores[r, g, i, d] = W[i, d]
            _chunk(
                q[r, t0 : t0 + n], k[r, t0 : t0 + l], v[r, t0 : t0 + l], pair[r, t0 : t0 + n], a[r, t0 : t0 + n], W,
                alike[:l, :l], scores[:n, :l], said[:l], read[:n], products, D[:, :l], found,
            )  # fmt: skip
            for t in range(n):
                out = y[r, t0 + t]
                for e in range(V):
                    out[e] = products[t + 1] * read[t, e]
                _combine(1, scores[t], D[t + 1], t + c, out)
            gemm(1, D[n, :l], True, k[r, t0 : t0 + l], False, products[n], W)


@summing
def backward(first, last, C, q, k, v, pair, a, befores, d_y, d_q, d_k, d_v, d_pair, d_a, d_W):
    """`d_k` and `d_v` start as zeros, since windows share tokens; `d_W` is that of the end, and becomes the start's."""
    T, c = pair.shape[1:]
    V, K = d_W.shape[1:]
    L = C + c - 1
    alike, scores, said = np.empty((L, L), q.dtype), np.empty((C, L), q.dtype), np.empty((L, V), q.dtype)
    read, products, d_products = np.empty((C, V), q.dtype), np.empty(C + 1, q.dtype), np.empty(C + 1, q.dtype)
    D, found = np.empty((C + 1, L, V), q.dtype), np.empty((C, c, V), q.dtype)
    d_alike, d_scores, d_said = np.empty((L, L), q.dtype), np.empty((C, L), q.dtype), np.empty((L, V), q.dtype)
    d_read, d_D, given = np.empty((C, V), q.dtype), np.empty((L, V), q.dtype), np.empty((c, V), q.dtype)
    for r in range(first, last):
        dW = d_W[r]
        for g in range(befores.shape[1] - 1, -1, -1):
            t0, n = g * C, min(C, T - g * C)
            l, W = n + c - 1, befores[r, g]
            Q, Kw = q[r, t0 : t0 + n], k[r, t0 : t0 + l]
            _chunk(
                Q, Kw, v[r, t0 : t0 + l], pair[r, t0 : t0 + n], a[r, t0 : t0 + n], W,
                alike[:l, :l], scores[:n, :l], said[:l], read[:n], products, D[:, :l], found,
            )  # fmt: skip
            dK, dV, dD = d_k[r, t0 : t0 + l], d_v[r, t0 : t0 + l], d_D[:l]
            gemm(1, Kw, False, dW, True, 0, dD)
            gemm(1, D[n, :l], False, dW, False, 1, dK)
            over = products[0] * 0
            for i in range(V):
                over += dot(dW[i], W[i])
            for t in range(n + 1):
                d_products[t] = 0
            d_products[n] = over
            for i in range(l):
                for e in range(V):
                    d_said[i, e] = 0
                for j in range(l):
                    d_alike[i, j] = 0
            for t in range(n - 1, -1, -1):
                dy, count = d_y[r, t0 + t], t + c - 1
                for e in range(V):
                    d_read[t, e] = products[t + 1] * dy[e]
                d_products[t + 1] += dot(dy, read[t])
                for i in range(l):
                    d_scores[t, i] = dot(dy, D[t + 1, i]) if i < t + c else 0
                _spread(1, scores[t], dy, t + c, dD)
                total = products[0] * 0
                for i in range(count):
                    total += dot(dD[i], D[t, i])
                now = a[r, t0 + t]
                d_a[r, t0 + t] = total + d_products[t + 1] * products[t]
                d_products[t] += d_products[t + 1] * now
                for j in range(c):
                    i, strength = t + c - 1 - j, pair[r, t0 + t, j]
                    d_pair[r, t0 + t, j] = dot(dD[i], found[t, j])
                    for e in range(V):
                        given[j, e] = strength * dD[i, e]
                for i in range(t + c):
                    for e in range(V):
                        dD[i, e] *= now
                for j in range(c):
                    i = t + c - 1 - j
                    df = given[j]
                    add_scaled(df, 1, dV[i])
                    d_products[t] -= dot(df, said[i])
                    add_scaled(df, -products[t], d_said[i])
                    for m in range(count):
                        d_alike[i, m] -= dot(df, D[t, m])
                    _spread(-1, alike[i], df, count, dD)
            for i in range(V):
                for d in range(K):
                    dW[i, d] *= products[n]
            gemm(1, d_said[:l], True, Kw, False, 1, dW)
            gemm(1, d_read[:n], True, Q, False, 1, dW)
            gemm(1, d_said[:l], False, W, False, 1, dK)
            gemm(1, d_alike[:l, :l], False, Kw, False, 1, dK)
            gemm(1, d_alike[:l, :l], True, Kw, False, 1, dK)
            gemm(1, d_scores[:n, :l], True, Q, False, 1, dK)
            gemm(1, d_read[:n], False, W, False, 0, d_q[r, t0 : t0 + n])
            gemm(1, d_scores[:n, :l], False, Kw, False, 1, d_q[r, t0 : t0 + n])
