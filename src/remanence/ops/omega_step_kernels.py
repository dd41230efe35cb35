"""One token of matrices that write a window of tokens, between a layer's projections, compiled for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.chunk_kernels import copy_row, dot, fill
from remanence.ops.chunk_kernels import total as sum_of
from remanence.ops.compiled import jit
from remanence.ops.step_kernels import activate, at, convolve, keep_last, move, normalise, sigmoid, unit
from remanence.ops.vectors import expect_soon, fully, lanes, load, minus, plus_product, spread, store, times, total

ROWS = 8
"""Of a matrix, which are asked at once."""
LINE = 64
"""Bytes that the cache fetches at once."""


@jit
def _lift(x, factors, degrees, shares, roots, padded, out):
    """out_f = roots[degree_f] · share_f · Π x over the factors of f; x itself where nothing is to be lifted."""
    width = x.shape[0]
    if not factors.shape[0]:
        copy_row(x, out)
        return
    copy_row(x, padded[:width])
    padded[width] = 1
    for f in range(out.shape[0]):
        product = roots[np.uint64(degrees[f])] * out.dtype.type(shares[f])
        for i in range(factors.shape[1]):
            product *= padded[np.uint64(factors[f, i])]  # unsigned: none is counted from the end
        out[f] = product


@jit
def _correct(W, first, asked, columns, told, much, alike, errors, reads):
    """What so many rows of W [V, F] from `first` on get wrong, and what is read of it.

    errors [ROWS, width] = much ⊙ (told − W columns) of these rows, reads [ROWS] = errors alike: columns [F, width], of
    which the `asked` first count, told [V, width], much and alike [width]. A width is of whole vectors, which single
    numbers of W meet. Rows after the last are the last again.
    """
    F, width, last = W.shape[1], columns.shape[1], W.shape[0] - 1
    p0, p1, p2, p3 = first, min(first + 1, last), min(first + 2, last), min(first + 3, last)
    p4, p5, p6, p7 = min(first + 4, last), min(first + 5, last), min(first + 6, last), min(first + 7, last)
    r0, r1, r2, r3, r4, r5, r6, r7 = p0 * F, p1 * F, p2 * F, p3 * F, p4 * F, p5 * F, p6 * F, p7 * F
    fill(reads, 0)
    for j in range(0, width, lanes(W)):
        s0 = fully(W.dtype.type(0))
        s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
        for f in range(asked):
            column = load(columns, f * width + j)
            s0 = plus_product(s0, spread(W, r0 + f), column)
            s1 = plus_product(s1, spread(W, r1 + f), column)
            s2 = plus_product(s2, spread(W, r2 + f), column)
            s3 = plus_product(s3, spread(W, r3 + f), column)
            s4 = plus_product(s4, spread(W, r4 + f), column)
            s5 = plus_product(s5, spread(W, r5 + f), column)
            s6 = plus_product(s6, spread(W, r6 + f), column)
            s7 = plus_product(s7, spread(W, r7 + f), column)
        by, like = load(much, j), load(alike, j)
        s0 = times(by, minus(load(told, p0 * width + j), s0))
        s1 = times(by, minus(load(told, p1 * width + j), s1))
        s2 = times(by, minus(load(told, p2 * width + j), s2))
        s3 = times(by, minus(load(told, p3 * width + j), s3))
        s4 = times(by, minus(load(told, p4 * width + j), s4))
        s5 = times(by, minus(load(told, p5 * width + j), s5))
        s6 = times(by, minus(load(told, p6 * width + j), s6))
        s7 = times(by, minus(load(told, p7 * width + j), s7))
        store(errors, j, s0)
        store(errors, width + j, s1)
        store(errors, 2 * width + j, s2)
        store(errors, 3 * width + j, s3)
        store(errors, 4 * width + j, s4)
        store(errors, 5 * width + j, s5)
        store(errors, 6 * width + j, s6)
        store(errors, 7 * width + j, s7)
        reads[0] += total(times(s0, like))
        reads[1] += total(times(s1, like))
        reads[2] += total(times(s2, like))
        reads[3] += total(times(s3, like))
        reads[4] += total(times(s4, like))
        reads[5] += total(times(s5, like))
        reads[6] += total(times(s6, like))
        reads[7] += total(times(s7, like))


@jit
def _write(before, keep, errors, place, near, first, after):
    """Four rows of after [V, F] from `first` on = keep · before + errors [·, width] of `place` on times near [c, F].

    Rows after the last are the last again: they are written twice, the same. So are features where F is no multiple of
    two vectors.
    """
    (V, F), width, n = before.shape, errors.shape[1], 2 * lanes(before)
    if n > F:
        for r in range(first, min(first + 4, V)):
            for f in range(F):
                total = keep * before[r, f]
                for i in range(near.shape[0]):
                    total += errors[place + r - first, i] * near[i, f]
                after[r, f] = total
        return
    r1, r2, r3 = min(1, V - 1 - first), min(2, V - 1 - first), min(3, V - 1 - first)
    e0 = place * width
    e1, e2, e3 = e0 + r1 * width, e0 + r2 * width, e0 + r3 * width
    half, by = lanes(before), fully(keep)
    for start in range(0, F, n):
        a = first * F + min(start, F - n)
        b, c, d = a + r1 * F, a + r2 * F, a + r3 * F
        a0, a1 = times(by, load(before, a)), times(by, load(before, a + half))
        b0, b1 = times(by, load(before, b)), times(by, load(before, b + half))
        c0, c1 = times(by, load(before, c)), times(by, load(before, c + half))
        d0, d1 = times(by, load(before, d)), times(by, load(before, d + half))
        for i in range(near.shape[0]):
            at = i * F + min(start, F - n)
            left, right = load(near, at), load(near, at + half)
            error = spread(errors, e0 + i)
            a0, a1 = plus_product(a0, error, left), plus_product(a1, error, right)
            error = spread(errors, e1 + i)
            b0, b1 = plus_product(b0, error, left), plus_product(b1, error, right)
            error = spread(errors, e2 + i)
            c0, c1 = plus_product(c0, error, left), plus_product(c1, error, right)
            error = spread(errors, e3 + i)
            d0, d1 = plus_product(d0, error, left), plus_product(d1, error, right)
        store(after, a, a0)
        store(after, a + half, a1)
        store(after, b, b0)
        store(after, b + half, b1)
        store(after, c, c0)
        store(after, c + half, c1)
        store(after, d, d0)
        store(after, d + half, d1)


@jit
def _put_column(x, i, out):
    for j in range(x.shape[0]):
        out[j, i] = x[j]


@jit
def window_token(
    one, mixes, gates, taps, tails, roots, weights, opens, starts, momenta, keys, values, ys, afters,
    next_momenta, next_keys, next_values, ends, positions, next_positions, factors, degrees, shares,
    B, H, K, F, V, c, depth, width, decays, moves, squared, most, bound, small, kind, eps,
):  # fmt: skip
    """W' = a W + S', S' = η S + Σ_j θ γ_j (v_j − W k_j) k_jᵀ over the last c keys, y = W' q; `squared`, or without W k.

    Mixed [B, 2·H·K + H·V] passes a convolution and SiLU; queries and keys a norm to unit length, and features of
    `depth` factors each, where there are any. Gates [B, H · (decays + 1 + moves + c)] are logits, those of the window
    only for c > 1; θ is `most` of its share, and each θγ at most `bound`/(c‖k‖²), unless that is 0. Momenta may be
    absent. W [B, H, V, F]; the window's keys [B, H, c − 1, F] and values. What is read passes a norm and a gate, and
    its sum is returned, which is finite if all of it is.
    """
    D, own = 2 * H * K + H * V, decays + 1 + moves
    G = H * (own + (c if c > 1 else 0))
    mixed, gate, y = at(one, mixes, (B, D)), at(one, gates, (B, G)), at(one, ys, (B, H, V))
    tap, tail, tail_after = (
        at(one, taps, (D, width)),
        at(one, tails, (B, width - 1, D)),
        at(one, afters, (B, width - 1, D)),
    )
    start, W = at(one, starts, (B, H, V, F)), at(one, ends, (B, H, V, F))
    held, S = at(one, momenta, (B, H, V, F)), at(one, next_momenta, (B, H, V, F))
    old_k, old_v = at(one, keys, (B, H, c - 1, F)), at(one, values, (B, H, c - 1, V))
    new_k, new_v = at(one, next_keys, (B, H, c - 1, F)), at(one, next_values, (B, H, c - 1, V))
    lifted = F if factors else 0
    factor, degree = at(np.int64(0), factors, (lifted, depth)), at(np.int64(0), degrees, (lifted,))
    share, root = at(1.0, shares, (lifted,)), at(one, roots, (depth + 1,))
    row, padded = np.empty(D, y.dtype), np.empty(K + 1, y.dtype)
    query, near = np.empty(F, y.dtype), np.empty((c, F), y.dtype)
    wide = -(-(c + 1) // lanes(y)) * lanes(y)  # the window and the query
    columns, told, errors = np.zeros((F, wide), y.dtype), np.zeros((V, wide), y.dtype), np.empty((ROWS, wide), y.dtype)
    much, alike, reads = np.zeros(wide, y.dtype), np.zeros(wide, y.dtype), np.empty(ROWS, y.dtype)
    for b in range(B):
        fill(row, 0)
        convolve(tap, tail[b], mixed[b], row, tail_after[b])
        activate(row)
        logits = gate[b]
        for h in range(H):
            q, k, v = (
                row[h * K : (h + 1) * K],
                row[(H + h) * K : (H + h + 1) * K],
                row[2 * H * K + h * V : 2 * H * K + (h + 1) * V],
            )
            unit(q, 1, small)
            unit(k, 1, small)
            _lift(q, factor, degree, share, root, padded, query)
            _lift(k, factor, degree, share, root, padded, near[c - 1])
            for i in range(c - 1):
                copy_row(old_k[b, h, i], near[i])
                _put_column(old_v[b, h, i], i, told)
            _put_column(v, c - 1, told)
            keep_last(old_k[b, h], near[c - 1], new_k[b, h])
            keep_last(old_v[b, h], v, new_v[b, h])
            keep = sigmoid(logits[h]) if decays else one
            theta = y.dtype.type(most) * sigmoid(logits[decays * H + h])
            push = sigmoid(logits[(decays + 1) * H + h]) if moves else y.dtype.type(0)
            theta *= one - push
            for i in range(c):
                by = theta * sigmoid(logits[own * H + h * c + c - 1 - i]) if c > 1 else theta
                if bound:
                    by = min(by, (one - push) * y.dtype.type(bound / c) / (dot(near[i], near[i]) + y.dtype.type(1e-12)))
                much[i] = by
                alike[i] = dot(near[i], query)
            asked = 0
            if squared:
                asked, much[c], alike[c] = F, -keep, one  # so the query's answer is read with the errors
                for i in range(c):
                    _put_column(near[i], i, columns)
                _put_column(query, c, columns)
            out, W_old, W_new, S_old, S_new = y[b, h], start[b, h], W[b, h], held[b, h], S[b, h]
            for first in range(0, V, ROWS):
                for f in range((first + ROWS) * F, (first + 2 * ROWS) * F, LINE // y.itemsize):
                    expect_soon(W_old, f)
                    expect_soon(W_new, f)
                _correct(W_old, first, asked, columns, told, much, alike, errors, reads)
                count = min(ROWS, V - first)
                for r in range(count):
                    e = first + r
                    out[e] = reads[r] if squared else reads[r] + keep * dot(W_old[e], query)
                    if moves:
                        out[e] += push * dot(S_old[e], query)
                for r in range(0, count, 4):
                    if moves:
                        _write(S_old, push, errors, r, near, first + r, S_new)
                        for e in range(first + r, min(first + r + 4, V)):
                            move(W_old[e], keep, one, S_new[e], W_new[e])
                    else:
                        _write(W_old, keep, errors, r, near, first + r, W_new)
    normalise(one, ys, weights, 0, opens, ys, B * H, V, 1, False, kind, 1 / V, eps)
    position, after = at(np.int64(0), positions, (B,)), at(np.int64(0), next_positions, (B,))
    for b in range(B):
        after[b] = position[b] + 1
    return sum_of(y.reshape(-1))
