"""Softmax attention compiled for the CPU: blocks of queries meet blocks of keys, and no weights are kept.

Tokens have times: the new ones 0 … T − 1, those kept from before −1, −2, …; a query sees the keys of its own time and
before, as far back as `window` reaches, but none from before −`seen` (slots that were never filled). A prefix is of an
early time that every query sees. Tensors [B, H, T, …] come as flat arrays with their strides, and `share` heads of
queries have one of keys and values. Each call takes the parts from `first` to `last`: a part is one of `stripes` of a
head's blocks, so that few heads are work for several threads.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import as_strided

from remanence.ops.chunk_kernels import dot, fill, matrix
from remanence.ops.compiled import decay, gemm, jit, summing

BLOCK, WIDE, SMALL = 64, 192, 10**6
"""Rows and at most columns of the scores that are held at once: products of no more than SMALL multiplications, of
matrices that are not turned, are what BLAS does without packing, and a quarter faster."""
ALWAYS, FOREVER = -(2**40), 2**60
"""The time of a prefix, and a window that reaches it."""


@jit
def _rows(x, at, b, h, first, n, width):
    """Rows `first`, `first` + 1, … of head h as a matrix [n, width] on the same memory."""
    size = x.itemsize
    return as_strided(x[b * at[0] + h * at[1] + first * at[2] :], (n, width), (at[2] * size, size))


@jit
def _columns(K, V):
    """How many columns of scores are held at once."""
    return max(min(WIDE, SMALL // (BLOCK * max(K, V)) // 16 * 16), 16)


@jit
def _turn(x, wide, out):
    """Each `wide` rows of x [n, K] as a matrix [K, wide], one after the other in the flat array `out`."""
    n, K = x.shape
    for i in range(n):
        row, to = x[i], i // wide * wide * K + i % wide
        for d in range(K):
            out[to + d * wide] = row[d]


@jit
def _turned(turned, wide, K, first, m):
    """Rows `first` to `first` + m of the x that `_turn` had, of one tile, as columns."""
    tile = first // wide * wide
    return matrix(turned[tile * K :], K, wide)[:, first - tile : first - tile + m]


@jit
def _greater(a, b):
    return a if a > b else b


@jit
def _largest(row, most):
    """In eight chains, since the compiler keeps the order of comparisons."""
    a, b, c, d, e, f, g, h = most, most, most, most, most, most, most, most
    n = row.shape[0]
    for j in range(0, n - 7, 8):
        a, b = _greater(row[j], a), _greater(row[j + 1], b)
        c, d = _greater(row[j + 2], c), _greater(row[j + 3], d)
        e, f = _greater(row[j + 4], e), _greater(row[j + 5], f)
        g, h = _greater(row[j + 6], g), _greater(row[j + 7], h)
    for j in range(n - n % 8, n):
        a = _greater(row[j], a)
    return _greater(_greater(_greater(a, b), _greater(c, d)), _greater(_greater(e, f), _greater(g, h)))


@summing
def _weigh(row, shift):
    """e^{row − shift} in place, and its sum; nothing in `row` exceeds `shift`."""
    total = row.dtype.type(0)
    for j in range(row.shape[0]):
        row[j] = decay(row[j] - shift)
        total += row[j]
    return total


@jit
def _scale(row, factor):
    for j in range(row.shape[0]):
        row[j] *= factor


@jit
def _weigh_both(s, d_s, logsumexp, rest):
    """Scores and the gradients of weights, in place: the weights, and the gradients of scores."""
    for i in range(s.shape[0]):
        w = decay(s[i] - logsumexp[i])
        s[i] = w
        d_s[i] = w * (d_s[i] - rest[i])


@jit
def _meet(Q, KT, V, t, at, window, low, scale, out, top, total, buffer, fresh):
    """Add what queries of the times `t`, … read from keys of the times `at`, … to the sums of earlier keys, if any."""
    n, m = Q.shape[0], V.shape[0]
    s = matrix(buffer, n, m)
    gemm(scale, Q, False, KT, False, 0.0, s)
    for i in range(n):
        begin = min(max(max(t + i - window + 1, low) - at, 0), m)
        end = max(min(t + i + 1 - at, m), begin)
        row = s[i]
        fill(row[:begin], 0)
        fill(row[end:], 0)
        if begin == end:
            continue
        seen = row[begin:end]
        most = _largest(seen, top[i])
        if most > top[i]:
            if not fresh:
                factor = decay(top[i] - most)
                total[i] *= factor
                _scale(out[i], factor)
            top[i] = most
        total[i] += _weigh(seen, most)
    gemm(1.0, s, False, V, False, 0.0 if fresh else 1.0, out)


@jit
def forward(
    first, last, stripes, H, share, T, past, window, scale, q, q_at, k, k_at, v, v_at, p_k, p_v, seen,
    y, y_at, logsumexp,
):  # fmt: skip
    P, K, V, R = p_k.shape[1], p_k.shape[2], p_v.shape[2], past + T
    wide = _columns(K, V)
    buffer, top, total = np.empty(BLOCK * wide, q.dtype), np.empty(BLOCK, q.dtype), np.empty(BLOCK, q.dtype)
    keys, prefix = np.empty((R + wide) * K, q.dtype), np.empty((P + wide) * K, q.dtype)
    for part in range(first, last):
        r = part // stripes
        b, h = r // H, r % H
        g = r // share
        low, values = -seen[b], _rows(v, v_at, b, h // share, 0, R, V)
        _turn(_rows(k, k_at, b, h // share, 0, R, K), wide, keys)
        _turn(p_k[g], wide, prefix)
        for t in range(part % stripes * BLOCK, T, stripes * BLOCK):
            n = min(BLOCK, T - t)
            Q, out = _rows(q, q_at, b, h, t, n, K), _rows(y, y_at, b, h, t, n, V)
            fill(top, -np.inf)
            fill(total, 0)
            fresh = True
            for c in range(0, P, wide):
                m = min(wide, P - c)
                KT = _turned(prefix, wide, K, c, m)
                _meet(Q, KT, p_v[g, c : c + m], t, ALWAYS, FOREVER, -FOREVER, scale, out, top, total, buffer, fresh)
                fresh = False
            c = past + max(t - window + 1, low, -past)
            while c < past + t + n:
                m = min(wide - c % wide, past + t + n - c)
                KT = _turned(keys, wide, K, c, m)
                _meet(Q, KT, values[c : c + m], t, c - past, window, low, scale, out, top, total, buffer, fresh)
                fresh = False
                c += m
            for i in range(n):
                _scale(out[i], 1 / total[i])
                logsumexp[r, t + i] = top[i] + math.log(total[i])


@jit
def _meet_backward(
    K, V, d_K, d_V, at, window, low, scale, Q, QT, d_Y, d_YT, d_Q, logsumexp, rest, buffer, d_buffer, wide
):
    """Add what all queries, of the times 0, …, owe to keys of the times `at`, …, and what they owe to these."""
    n, t = K.shape[0], max(at, 0)
    stop = min(at + n - 1 + window, Q.shape[0])
    while t < stop:
        m = min(wide - t % wide, stop - t)
        s, d_s = matrix(buffer, n, m), matrix(d_buffer, n, m)
        gemm(scale, K, False, _turned(QT, wide, K.shape[1], t, m), False, 0.0, s)
        gemm(1.0, V, False, _turned(d_YT, wide, V.shape[1], t, m), False, 0.0, d_s)
        for j in range(n):
            begin = min(max(at + j - t, 0), m)
            end = max(min(at + j + window - t, m), begin) if at + j >= low else begin
            row, d_row = s[j], d_s[j]
            _weigh_both(row[begin:end], d_row[begin:end], logsumexp[t + begin : t + end], rest[t + begin : t + end])
            fill(row[:begin], 0)
            fill(row[end:], 0)
            fill(d_row[:begin], 0)
            fill(d_row[end:], 0)
        gemm(1.0, s, False, d_Y[t : t + m], False, 1.0, d_V)
        gemm(scale, d_s, False, Q[t : t + m], False, 1.0, d_K)
        gemm(scale, d_s, True, K, False, 1.0, d_Q[t : t + m])
        t += m


@jit
def backward(
    first, last, stripes, H, share, T, past, window, scale, q, q_at, k, k_at, v, v_at, p_k, p_v, seen,
    y, y_at, logsumexp, d_y, d_y_at, d_logsumexp, d_q, d_k, d_v, d_p_k, d_p_v,
):  # fmt: skip
    """Gradients, which come as zeros and are added to: d_q [stripes, B·H, T, K] has a part for each stripe.

    A part is a head of keys here, with all the queries that share it: only they add to its gradients.
    """
    P, K, V, heads = p_k.shape[1], p_k.shape[2], p_v.shape[2], H // share
    wide = _columns(K, V)
    buffer, d_buffer, rest = np.empty(BLOCK * wide, q.dtype), np.empty(BLOCK * wide, q.dtype), np.empty(T, q.dtype)
    QT, d_YT = np.empty((T + wide) * K, q.dtype), np.empty((T + wide) * V, q.dtype)
    for part in range(first, last):
        g, stripe = part // stripes, part % stripes
        b, low = g // heads, -seen[g // heads]
        ks, vs = _rows(k, k_at, b, g % heads, 0, past + T, K), _rows(v, v_at, b, g % heads, 0, past + T, V)
        for r in range(g * share, (g + 1) * share):
            h = r % H
            Q, d_Y, Y = _rows(q, q_at, b, h, 0, T, K), _rows(d_y, d_y_at, b, h, 0, T, V), _rows(y, y_at, b, h, 0, T, V)
            _turn(Q, wide, QT)
            _turn(d_Y, wide, d_YT)
            for t in range(T):
                rest[t] = dot(Y[t], d_Y[t]) - d_logsumexp[r, t]
            for c in range(stripe * BLOCK, P, stripes * BLOCK):
                e = min(c + BLOCK, P)
                _meet_backward(
                    p_k[g, c:e], p_v[g, c:e], d_p_k[g, c:e], d_p_v[g, c:e], ALWAYS, FOREVER, -FOREVER, scale,
                    Q, QT, d_Y, d_YT, d_q[stripe, r], logsumexp[r], rest, buffer, d_buffer, wide,
                )  # fmt: skip
            for c in range(stripe * BLOCK, past + T, stripes * BLOCK):
                e = min(c + BLOCK, past + T)
                if e - past > low:
                    _meet_backward(
                        ks[c:e], vs[c:e], d_k[g, c:e], d_v[g, c:e], c - past, window, low, scale,
                        Q, QT, d_Y, d_YT, d_q[stripe, r], logsumexp[r], rest, buffer, d_buffer, wide,
                    )  # fmt: skip
