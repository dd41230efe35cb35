"""One token of long convolutions, dilated or by few functions of the lag, compiled for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.chunk_kernels import copy_row
from remanence.ops.compiled import jit, summing
from remanence.ops.step_kernels import activate, add, at
from remanence.ops.vectors import expect_soon, fully, lanes, load, plus_product, put_totals, spread, store

ROWS = 8
"""Rows that are summed at once."""
AHEAD = 2**13
"""Numbers between what is summed and what is fetched meanwhile: sums so long keep the processor from looking ahead."""


@jit
def _filter(seen, step, functions, found):
    """found [≥ ROWS, width] = seenᵀ functions of the first ROWS columns of seen, whose rows are `step` apart.

    functions [L, width], of whole vectors.
    """
    L, width = functions.shape
    for j in range(0, width, lanes(found)):
        s0 = fully(found.dtype.type(0))
        s1, s2, s3, s4, s5, s6, s7 = s0, s0, s0, s0, s0, s0, s0
        for t in range(L):
            by, place = load(functions, t * width + j), t * step
            s0 = plus_product(s0, spread(seen, place), by)
            s1 = plus_product(s1, spread(seen, place + 1), by)
            s2 = plus_product(s2, spread(seen, place + 2), by)
            s3 = plus_product(s3, spread(seen, place + 3), by)
            s4 = plus_product(s4, spread(seen, place + 4), by)
            s5 = plus_product(s5, spread(seen, place + 5), by)
            s6 = plus_product(s6, spread(seen, place + 6), by)
            s7 = plus_product(s7, spread(seen, place + 7), by)
        store(found, j, s0)
        store(found, width + j, s1)
        store(found, 2 * width + j, s2)
        store(found, 3 * width + j, s3)
        store(found, 4 * width + j, s4)
        store(found, 5 * width + j, s5)
        store(found, 6 * width + j, s6)
        store(found, 7 * width + j, s7)


@jit
def _with_lengths(rows, first, count, x, along, square):
    """row · x, and row · row, of each row; of rows [·, N] `count` from `first` on, N whole vectors.

    x [·, N], `along` and `square` have room for a multiple of ROWS: after the last row it comes again.
    """
    N = rows.shape[1]
    last = (first + count - 1) * N
    for d in range(0, count, ROWS):
        r0, x0 = (first + d) * N, d * N
        r1, r2, r3, r4 = min(r0 + N, last), min(r0 + 2 * N, last), min(r0 + 3 * N, last), min(r0 + 4 * N, last)
        r5, r6, r7 = min(r0 + 5 * N, last), min(r0 + 6 * N, last), min(r0 + 7 * N, last)
        x1, x2, x3, x4, x5, x6, x7 = x0 + N, x0 + 2 * N, x0 + 3 * N, x0 + 4 * N, x0 + 5 * N, x0 + 6 * N, x0 + 7 * N
        a0 = fully(rows.dtype.type(0))
        a1, a2, a3, a4, a5, a6, a7 = a0, a0, a0, a0, a0, a0, a0
        b0, b1, b2, b3, b4, b5, b6, b7 = a0, a0, a0, a0, a0, a0, a0, a0
        for i in range(0, N, lanes(rows)):
            expect_soon(rows, r0 + i + AHEAD)
            w = load(rows, r0 + i)
            a0, b0 = plus_product(a0, w, load(x, x0 + i)), plus_product(b0, w, w)
            expect_soon(rows, r1 + i + AHEAD)
            w = load(rows, r1 + i)
            a1, b1 = plus_product(a1, w, load(x, x1 + i)), plus_product(b1, w, w)
            expect_soon(rows, r2 + i + AHEAD)
            w = load(rows, r2 + i)
            a2, b2 = plus_product(a2, w, load(x, x2 + i)), plus_product(b2, w, w)
            expect_soon(rows, r3 + i + AHEAD)
            w = load(rows, r3 + i)
            a3, b3 = plus_product(a3, w, load(x, x3 + i)), plus_product(b3, w, w)
            expect_soon(rows, r4 + i + AHEAD)
            w = load(rows, r4 + i)
            a4, b4 = plus_product(a4, w, load(x, x4 + i)), plus_product(b4, w, w)
            expect_soon(rows, r5 + i + AHEAD)
            w = load(rows, r5 + i)
            a5, b5 = plus_product(a5, w, load(x, x5 + i)), plus_product(b5, w, w)
            expect_soon(rows, r6 + i + AHEAD)
            w = load(rows, r6 + i)
            a6, b6 = plus_product(a6, w, load(x, x6 + i)), plus_product(b6, w, w)
            expect_soon(rows, r7 + i + AHEAD)
            w = load(rows, r7 + i)
            a7, b7 = plus_product(a7, w, load(x, x7 + i)), plus_product(b7, w, w)
        put_totals(along, d, a0, a1, a2, a3, a4, a5, a6, a7)
        put_totals(square, d, b0, b1, b2, b3, b4, b5, b6, b7)


@summing
def _with_lengths_one_by_one(rows, first, count, x, along, square):
    """The same for rows of any width."""
    for d in range(count):
        by, own = along.dtype.type(0), along.dtype.type(0)
        for i in range(rows.shape[1]):
            by += rows[first + d, i] * x[d, i]
            own += rows[first + d, i] * rows[first + d, i]
        along[d], square[d] = by, own


@summing
def _total(along, square, gain, offset, constant, least):
    """Σ (gain · along / √square + offset · constant)."""
    total = along.dtype.type(0)
    for d in range(gain.shape[0]):
        total += gain[d] * along[d] / max(np.sqrt(square[d]), least) + offset[d] * constant[d]
    return total


@jit
def basis_token(one, xs, tails, bases, weights, gains, offsets, biases, ys, afters, B, O, D, N, L):
    """y [B, O] = bias + Σ_d (gain · w/‖w‖ · found_d + offset · what a constant found), w [O, D, N] row by row.

    found_d are the functions [L, N + 1] of lag L − 1, …, 0, the constant last, summed over the tail [B, L − 1, D] and x
    [B, D]; gain and offset [O, D], bias [O].
    """
    x, tail, after = at(one, xs, (B, D)), at(one, tails, (B, L - 1, D)), at(one, afters, (B, L - 1, D))
    basis, y, weight = at(one, bases, (L, N + 1)), at(one, ys, (B, O)), at(one, weights, (O * D, N))
    gain, offset, bias = at(one, gains, (O, D)), at(one, offsets, (O, D)), at(one, biases, (O,))
    step, least = lanes(y), y.dtype.type(1e-12)
    wide, high = -(-N // step) * step, -(-D // ROWS) * ROWS
    functions, seen = np.zeros((L, wide), y.dtype), np.empty((L, max(step, ROWS)), y.dtype)
    for t in range(L):
        copy_row(basis[t, :N], functions[t, :N])
    found, constant = np.zeros((B, high, wide), y.dtype), np.zeros((B, D), y.dtype)
    for b in range(B):
        if L > 1:
            copy_row(tail[b, 1:].reshape(-1), after[b, : L - 2].reshape(-1))
            copy_row(x[b], after[b, L - 2])
        for t in range(L):
            add(tail[b, t] if t < L - 1 else x[b], basis[t, N], constant[b])
        for first in range(0, D, seen.shape[1]):
            count = min(seen.shape[1], D - first)
            for t in range(L):
                copy_row((tail[b, t] if t < L - 1 else x[b])[first : first + count], seen[t, :count])
            for d in range(0, count, ROWS):
                _filter(seen.reshape(-1)[d:], seen.shape[1], functions, found[b, first + d :])
        copy_row(bias, y[b])
    along, square = np.empty(high, y.dtype), np.empty(high, y.dtype)
    for o in range(O):
        for b in range(B):
            if wide == N:
                _with_lengths(weight, o * D, D, found[b], along, square)
            else:
                _with_lengths_one_by_one(weight, o * D, D, found[b], along, square)
            y[b, o] += _total(along, square, gain[o], offset[o], constant[b], least)


@jit
def dilated_residuals(one, xs, weights, ys, tails, afters, dilations, B, D, K):
    """y = x + SiLU(Σ_j w_j x_{t − j·dilation}), one after another: x, y [B, D], weights [layers, D, K].

    `tails` and `afters` are the addresses of what each has read and will have, [B, (K − 1)·dilation, D]. What comes
    after may lie one token behind what was: then only the new token is written.
    """
    x, y, weight = at(one, xs, (B, D)), at(one, ys, (B, D)), at(one, weights, (len(dilations), D, K))
    summed = np.empty(D, y.dtype)
    for b in range(B):
        out = y[b]
        copy_row(x[b], out)
        for i in range(len(dilations)):
            apart, w, reach = dilations[i], weight[i].reshape(-1), (K - 1) * dilations[i]
            tail, after = at(one, tails[i], (B, reach, D))[b], at(one, afters[i], (B, reach, D))[b]
            for d in range(D):
                summed[d] = w[d * K] * out[d]
            for j in range(1, K):
                seen = tail[reach - j * apart]
                for d in range(D):
                    summed[d] += w[d * K + j] * seen[d]
            if reach:
                if afters[i] != tails[i] + D * y.itemsize:
                    copy_row(tail[1:].reshape(-1), after[: reach - 1].reshape(-1))
                copy_row(out, after[reach - 1])
            activate(summed)
            add(summed, one, out)
