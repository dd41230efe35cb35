"""Whole chunks of the fast-weight memory compiled for the CPU: each call takes the heads from `first` to `last`.

A head's network is L matrices W_l with GELU between them. The momentum S_l is kept beside W_l in one matrix [W_l | S_l]
of R = 2 times as many columns (R = 1 without), so that what reads, writes or corrects both is one product:
[A z | F z] [W | S]ᵀ is what a query reads of what was there when its chunk began. A bias is one more column of W, whose
input is 1.

Per chunk of C tokens, with token i's gradient δ_i x_iᵀ at the anchor and its step θ_i:
p = [A z | F z] [W | S]ᵀ − (M ⊙ z xᵀ) δ with M_ti = K_ti θ_i, and [W | S]' = carried [W | S] − δᵀ [m x | s x], where m
is the last row of M, and s_i = E_ti θ_i that of the momentum. The rule's K and E have a column more, the first, for the
earlier momentum, and follow from a and η as W and S do: E_t = η_t E_{t−1} + 1_t, K_t = a_t K_{t−1} + E_t. An averaging
rule has K_ti = c_t instead. A, F, K, E and M have a row more too, the first, of before the chunk: who reads before a
token's write sees the row before its own. Queries that read the anchor meet the same weights as the keys, and are but
C more inputs of every layer: N = 2C, else N = C; what they and the keys met in the last is kept for the gradient.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.chunk_kernels import copy, copy_row, dot, fill, multiply, multiply_add, put, take, total
from remanence.ops.compiled import borrowing, jit, summing, within
from remanence.ops.gelu_kernels import gelu, gelu_bend
from remanence.ops.objective_kernels import DOT, HUBER, HUBER_MIXED, slope, slope_backward
from remanence.ops.product_kernels import gemm

EPS = 1e-6
"""Of the layer norm."""
BEFORE, AFTER, ANCHOR = 0, 1, 2
"""When queries read; the first two are also the row of M that the first query sees."""


@within
def _at(buffer, offset, rows, columns):
    """A contiguous matrix within a flat buffer."""
    return buffer[offset : offset + rows * columns].reshape(rows, columns)


@jit
def plan(widths, bias, R, N):
    """By layer: inputs, outputs, and where its weights, inputs, outputs begin in the flat buffers; then their sizes."""
    L = widths.shape[0] - 1
    P = np.zeros((L + 1, 5), np.int64)
    for l in range(L):
        P[l, 0], P[l, 1] = widths[l] + bias, widths[l + 1]
        P[l + 1, 2] = P[l, 2] + P[l, 1] * P[l, 0] * R
        P[l + 1, 3] = P[l, 3] + N * P[l, 0]
        P[l + 1, 4] = P[l, 4] + N * P[l, 1]
    return P


@borrowing
def _ones(P, X):
    """Fill the inputs of the biases, and with them all else, once."""
    fill(X[: P[P.shape[0] - 1, 3]], 1.0)


@borrowing
def _standardise(h, unit, inverse):
    """h with mean 0 and variance 1 by row, and one over its deviation."""
    n, width = h.shape
    real = h.dtype.type
    for i in range(n):
        row, to = h[i], unit[i]
        mean = total(row) / real(width)
        for d in range(width):
            to[d] = row[d] - mean
        inverse[i] = 1 / np.sqrt(dot(to, to) / width + EPS)
        by = inverse[i]
        for d in range(width):
            to[d] *= by


@borrowing
def _inner(P, C, N, kind, met, bent, loss, number, bends, norm, W, target, X, H, D, G, B, unit, inverse, error, slopes):
    """The gradient of every token: inputs X, hidden H, slopes G, what comes back before the slope B, gradients D.

    met: the last layer's H is known already. Of `bent` tokens the other layers' H turn into GELU's second derivatives.
    """
    L = P.shape[0] - 1
    for l in range(L):
        if l < L - 1 or not met:
            w = _at(W, P[l, 2], P[l, 1], (P[l + 1, 2] - P[l, 2]) // P[l, 1])
            x = _at(X, P[l, 3], N, P[l, 0])
            gemm(1.0, x, False, w[:, : P[l, 0]], True, 0.0, _at(H, P[l, 4], N, P[l, 1]))
        if l < L - 1:
            h = _at(H, P[l, 4], N, P[l, 1])
            x, rise = _at(X, P[l + 1, 3], N, P[l + 1, 0]), _at(G, P[l, 4], N, P[l, 1])
            gelu_bend(kind, h[:bent], x[:bent], rise[:bent])
            gelu(kind, h[bent:], x[bent:], rise[bent:])
    h, delta = _at(H, P[L - 1, 4], C, P[L - 1, 1]), _at(D, P[L - 1, 4], C, P[L - 1, 1])
    width, real = h.shape[1], h.dtype.type
    if norm.shape[0]:
        _standardise(h, unit, inverse)
    for i in range(C):
        u, e, v, to = unit[i], error[i], target[i], delta[i]
        if loss == DOT:
            fill(e, 0.0)
        elif norm.shape[0]:
            scale, shift = norm[0], norm[1]
            for d in range(width):
                e[d] = scale[d] * u[d] + shift[d]
        else:
            copy_row(h[i], e)
        for d in range(width):
            e[d] -= v[d]
        slope(loss, number, bends[i], e, slopes[i])
        copy_row(slopes[i], to)
        if norm.shape[0]:
            scale, by = norm[0], inverse[i]
            for d in range(width):
                to[d] *= scale[d]
            mean, along = total(to) / real(width), dot(to, u) / real(width)
            for d in range(width):
                to[d] = (to[d] - mean - u[d] * along) * by
    for l in range(L - 1, 0, -1):
        b, rise = _at(B, P[l - 1, 4], C, P[l - 1, 1]), _at(G, P[l - 1, 4], C, P[l - 1, 1])
        w = _at(W, P[l, 2], P[l, 1], (P[l + 1, 2] - P[l, 2]) // P[l, 1])
        gemm(1.0, _at(D, P[l, 4], C, P[l, 1]), False, w[:, : P[l - 1, 1]], False, 0.0, b)
        multiply(b, rise, _at(D, P[l - 1, 4], C, P[l - 1, 1]))


@borrowing
def _grown(P, C, X, D, i):
    """The layer whose ‖u‖ / √out is the greatest, and that."""
    layer, most = 0, D[0] * 0
    for l in range(P.shape[0] - 1):
        x, delta = _at(X, P[l, 3], C, P[l, 0])[i], _at(D, P[l, 4], C, P[l, 1])[i]
        grown = np.sqrt((dot(x, x) * dot(delta, delta) + 1e-24) / P[l, 1])
        if grown >= most:
            layer, most = l, D.dtype.type(grown)
    return layer, most


@borrowing
def _steps(P, C, X, D, loss, error, slopes, step, most, bounded, theta, square, along):
    """θ: what was asked for, at most `most` ⟨e, ∂ℓ/∂f⟩ / ‖u‖²; without an error to mend `most` over what grows most."""
    copy_row(step, theta[:C])
    if not bounded:
        return
    if loss == DOT:
        for i in range(C):
            square[i], along[i] = _grown(P, C, X, D, i)[1] + 1e-12, 1
    else:
        fill(square, 1e-12)
        for l in range(P.shape[0] - 1):
            x, delta = _at(X, P[l, 3], C, P[l, 0]), _at(D, P[l, 4], C, P[l, 1])
            for i in range(C):
                square[i] += dot(x[i], x[i]) * dot(delta[i], delta[i])
        for i in range(C):
            along[i] = dot(error[i], slopes[i])
    for i in range(C):
        theta[i] = min(theta[i], most[i] * along[i] / square[i])


@borrowing
def _rule(C, averages, given, momentum, A, E, K):
    """A, E and K of a chunk, from a_t and η_t, or from c_t; their first rows and what is above the diagonal stand."""
    for t in range(C):
        now, pushed, a, eta = K[t + 1], E[t + 1], given[t], momentum[t]
        if averages:
            fill(now[1 : t + 2], a)
            continue
        before, pushed_before = K[t], E[t]
        A[t + 1] = A[t] * a
        for i in range(t + 1):
            pushed[i] = eta * pushed_before[i]
            now[i] = a * before[i] + pushed[i]
        pushed[t + 1] = now[t + 1] = 1


@jit
def _rules(C, dtype):
    """θ, A, F, s, then what was asked for, by token; E and K; M; before the first token."""
    gates, rules, M = np.zeros((11, C + 1), dtype), np.zeros((2, C + 1, C + 1), dtype), np.zeros((C + 1, C), dtype)
    fill(gates[1], 1.0)
    rules[0, 0, 0] = 1
    return gates, rules, M


@borrowing
def _rule_backward(C, averages, given, momentum, A, E, K, d_A, d_E, d_K, d_given, d_momentum):
    """From d_A, d_K and d_E, of the last row of E alone, to those of a and η, or of c; uses up d_E and d_K."""
    d_last = d_A[0] * 0
    for t in range(C - 1, -1, -1):
        now, before, a, eta = d_K[t + 1], d_K[t], given[t], momentum[t]
        if averages:
            d_given[t] = total(now[1 : t + 2])
            continue
        d_last += d_A[t + 1]
        for i in range(t + 2):
            d_E[i] += now[i]
        d_given[t] = dot(now[: t + 2], K[t, : t + 2]) + d_last * A[t]
        d_momentum[t] = dot(d_E[: t + 2], E[t, : t + 2])
        for i in range(t + 2):
            before[i] += a * now[i]
            d_E[i] *= eta
        d_last *= a


@borrowing
def _write(C, K, theta, M, F):
    """M = K diag(θ) and F, without the other's column."""
    for t in range(1, C + 1):
        row, to = K[t, 1:], M[t]
        F[t] = K[t, 0]
        for i in range(t):
            to[i] = row[i] * theta[i]


@borrowing
def _scaled(R, x, first, second, out):
    """[first ∘ x | second ∘ x], or without the second."""
    n, width = x.shape
    for i in range(n):
        from_, a, to = x[i], first[i], out[i, :width]
        for d in range(width):
            to[d] = a * from_[d]
        if R == 2:
            a, to = second[i], out[i, width : 2 * width]
            for d in range(width):
                to[d] = a * from_[d]


@borrowing
def _read(P, C, R, kind, met, retain, push, W, X, D, M, Z, ZZ, Q, G, scores):
    """What the queries, the inputs of Z's first layer, find: the outputs Q of every layer. met: Q is known already."""
    L = P.shape[0] - 1
    for l in range(L):
        z, both = _at(Z, P[l, 3], C, P[l, 0]), _at(ZZ, R * P[l, 3], C, R * P[l, 0])
        _scaled(R, z, retain, push, both)
        if not met:
            q = _at(Q, P[l, 4], C, P[l, 1])
            gemm(1.0, both, False, _at(W, P[l, 2], P[l, 1], R * P[l, 0]), True, 0.0, q)
            gemm(1.0, z, False, _at(X, P[l, 3], C, P[l, 0]), True, 0.0, scores)
            multiply(scores, M, scores)
            gemm(-1.0, scores, False, _at(D, P[l, 4], C, P[l, 1]), False, 1.0, q)
        if l < L - 1:
            q = _at(Q, P[l, 4], C, P[l, 1])
            gelu(kind, q, _at(Z, P[l + 1, 3], C, P[l + 1, 0]), _at(G, P[l, 4], C, P[l, 1]))


@borrowing
def _carry(P, C, R, kept, last, tails, X, D, wide, W):
    """The weights and momentum after the chunk. kept: A and F of the last token, and the momentum's own."""
    a, f, keep = kept[0], kept[1], kept[2]
    for l in range(P.shape[0] - 1):
        x, w = _at(X, P[l, 3], C, P[l, 0]), _at(W, P[l, 2], P[l, 1], R * P[l, 0])
        width = x.shape[1]
        both = _at(wide, 0, C, R * width)
        _scaled(R, x, last, tails, both)
        for o in range(w.shape[0]):
            row = w[o, :width]
            if R == 2:
                momentum = w[o, width : 2 * width]
                for d in range(width):
                    row[d] = a * row[d] + f * momentum[d]
                    momentum[d] *= keep
            else:
                for d in range(width):
                    row[d] *= a
        gemm(-1.0, _at(D, P[l, 4], C, P[l, 1]), True, both, False, 1.0, w)


@borrowing
def _turned(turn, sign, rows):
    """Turn feature pairs (j, j + K/2) of token i by ± the angle whose cosine and sine are turn[i, :, j], if any."""
    sign = rows.dtype.type(sign)
    for i in range(turn.shape[0]):
        row, cos, sin = rows[i], turn[i, 0], turn[i, 1]
        half = cos.shape[0]
        for d in range(half):
            a, b = row[d], row[half + d]
            row[d] = a * cos[d] - sign * b * sin[d]
            row[half + d] = sign * a * sin[d] + b * cos[d]


@borrowing
def _take(x, at, b, h, first, width, turn, out):
    """`take` into the leading columns of out, and turn."""
    origin = b * at[0] + h * at[1] + first * at[2]
    for i in range(out.shape[0]):
        copy_row(x[origin + i * at[2] : origin + i * at[2] + width], out[i, :width])
    _turned(turn, 1, out)


@borrowing
def _finish(norm, residual, q, z, unit, inverse, y):
    """y = [q +] [the norm of] z."""
    for i in range(z.shape[0]):
        copy_row(z[i], y[i])
    if norm.shape[0]:
        _standardise(z, unit, inverse)
        scale, shift = norm[0], norm[1]
        for i in range(z.shape[0]):
            u, to = unit[i], y[i]
            for d in range(to.shape[0]):
                to[d] = scale[d] * u[d] + shift[d]
    if residual:
        for i in range(z.shape[0]):
            from_, to = q[i], y[i]
            for d in range(to.shape[0]):
                to[d] += from_[d]


@borrowing
def _tokens(x, at, b, h, first, out):
    """Copy tokens of a gate into out."""
    origin = b * at[0] + h * at[1] + first * at[2]
    for i in range(out.shape[0]):
        out[i] = x[origin + i * at[2]]


@borrowing
def _learn(
    P, C, N, R, kind, bounded, averages, loss, number, met, bent, norm, b, h, t, q, q_at, k, k_at, v, v_at, step,
    step_at, most, most_at, bend, bend_at, given, given_at, momentum, momentum_at, turn, residual, width, target, W, X,
    H, flat, rows, inverse, rules, gates, M, kept,
):  # fmt: skip
    """What the tokens of a chunk write, and all that makes it.

    `flat`: D, G, B of `_inner`; `rows`: its error, unit and slopes; `rules`, `gates`: see `_rules`; `kept`: A, F and
    the momentum's own decay at the last token.
    """
    theta, A, F, tails, asked, ceiling, square, along, decays, etas, bends = (
        gates[0], gates[1], gates[2], gates[3], gates[4], gates[5], gates[6], gates[7], gates[8], gates[9], gates[10],
    )  # fmt: skip
    x = _at(X, 0, N, P[0, 0])
    _take(k, k_at, b, h, t, width, turn, x[:C])
    if N > C:
        _take(q, q_at, b, h, t, width, turn, x[C:])
    take(target, v, v_at, b, h, t)
    if residual:
        for i in range(C):
            from_, to = x[i], target[i]
            for d in range(width):
                to[d] -= from_[d]
    _tokens(step, step_at, b, h, t, asked[:C])
    _tokens(given, given_at, b, h, t, decays[:C])
    if bounded:
        _tokens(most, most_at, b, h, t, ceiling[:C])
    if R == 2:
        _tokens(momentum, momentum_at, b, h, t, etas[:C])
    if HUBER <= loss <= HUBER_MIXED:
        _tokens(bend, bend_at, b, h, t, bends[:C])
    _inner(
        P, C, N, kind, met, bent, loss, number, bends, norm, W, target, X, H, flat[0], flat[1], flat[2], rows[1],
        inverse, rows[0], rows[2],
    )  # fmt: skip
    _steps(P, C, X, flat[0], loss, rows[0], rows[2], asked, ceiling, bounded, theta, square, along)
    _rule(C, averages, decays, etas, A, rules[0], rules[1])
    _write(C, rules[1], theta, M, F)
    last = rules[0, C]
    for i in range(C):
        tails[i] = last[1 + i] * theta[i]
    kept[0], kept[1], kept[2] = A[C], F[C], last[0]


@jit
def forward(
    first, last, H, chunks, C, widths, bias, R, kind, bounded, averages, loss, number, reads, residual, every, q, q_at,
    k, k_at, v, v_at, step, step_at, most, most_at, bend, bend_at, given, given_at, momentum, momentum_at, norm, turn,
    start, y, y_at, befores, seen, end,
):  # fmt: skip
    N = 2 * C if reads == ANCHOR else C
    P = plan(widths, bias, R, N)
    L, dtype = P.shape[0] - 1, start.dtype
    xs, ds, out = P[L, 3], P[L, 4], P[L - 1, 1]
    X, Z, ZZ, wide = np.empty(xs, dtype), np.empty(xs, dtype), np.empty(R * xs, dtype), np.empty(R * xs, dtype)
    flat, rows, target = np.empty((6, ds), dtype), np.empty((3, C, out), dtype), np.empty((C, out), dtype)
    D, hidden, Q, GQ = flat[0], flat[3], flat[4], flat[5]
    scores, inverse, kept, W = np.empty((C, C), dtype), np.empty(C, dtype), np.zeros(3, dtype), np.empty_like(start[0])
    gates, rules, M = _rules(C, dtype)
    A, F, tails = gates[1], gates[2], gates[3]
    _ones(P, X)
    _ones(P, Z)
    for r in range(first, last):
        b, h = r // H, r % H
        copy_row(start[r], W)
        for c in range(chunks):
            t = c * C
            if c % every == 0:
                copy_row(W, befores[r, c // every])
            _learn(
                P, C, N, R, kind, bounded, averages, loss, number, False, 0, norm[r], b, h, t, q, q_at, k, k_at, v,
                v_at, step, step_at, most, most_at, bend, bend_at, given, given_at, momentum, momentum_at, turn,
                residual, widths[0], target, W, X, hidden, flat, rows, inverse, rules, gates, M, kept,
            )  # fmt: skip
            if reads == ANCHOR:
                asked, found = _at(X, 0, N, P[0, 0])[C:], _at(hidden, P[L - 1, 4], N, out)[C:]
                copy_row(hidden[P[L - 1, 4] :], seen[r, c])
            else:
                asked, found = _at(Z, 0, C, P[0, 0]), _at(Q, P[L - 1, 4], C, out)
                _take(q, q_at, b, h, t, widths[0], turn, asked)
                _read(P, C, R, kind, False, A[reads:], F[reads:], W, X, D, M[reads:], Z, ZZ, Q, GQ, scores)
                copy_row(Q, seen[r, c])
            _finish(norm[r], residual, asked, found, rows[1], inverse, target)
            put(y, y_at, b, h, t, target)
            _carry(P, C, R, kept, M[C], tails, X, D, wide, W)
        copy_row(W, end[r])


@summing
def _kept_backward(a, f, keep, row, momentum, d_row, d_momentum):
    """A row of d_[W | S] from what is after the chunk to what is before, and the gradients of a, f and keep."""
    real = row.dtype.type
    of_a, of_f, of_keep = real(0), real(0), real(0)
    for d in range(row.shape[0]):
        x, y, d_x, d_y = row[d], momentum[d], d_row[d], d_momentum[d]
        of_a += x * d_x
        of_f += y * d_x
        of_keep += y * d_y
        d_momentum[d] = f * d_x + keep * d_y
        d_row[d] = a * d_x
    return of_a, of_f, of_keep


@borrowing
def _carry_backward(P, C, R, kept, last, tails, W, X, D, wide, d_W, d_X, d_D, d_last, d_tails, d_kept):
    """Set d_X, d_D; add to d_last, d_tails (of m and s) and d_kept; d_W from that after the chunk to that before."""
    a, f, keep = kept[0], kept[1], kept[2]
    for l in range(P.shape[0] - 1):
        x, delta = _at(X, P[l, 3], C, P[l, 0]), _at(D, P[l, 4], C, P[l, 1])
        width = x.shape[1]
        w, d_w = _at(W, P[l, 2], P[l, 1], R * width), _at(d_W, P[l, 2], P[l, 1], R * width)
        both = _at(wide, 0, C, R * width)
        _scaled(R, x, last, tails, both)
        gemm(-1.0, both, False, d_w, True, 0.0, _at(d_D, P[l, 4], C, P[l, 1]))
        gemm(-1.0, delta, False, d_w, False, 0.0, both)
        d_x = _at(d_X, P[l, 3], C, P[l, 0])
        for i in range(C):
            row, to, from_, by = x[i], d_x[i], both[i, :width], last[i]
            d_last[i] += dot(row, from_)
            for d in range(width):
                to[d] = by * from_[d]
            if R == 2:
                from_, by = both[i, width : 2 * width], tails[i]
                d_tails[i] += dot(row, from_)
                for d in range(width):
                    to[d] += by * from_[d]
        for o in range(w.shape[0]):
            if R == 2:
                row, momentum, d_row, d_momentum = w[o, :width], w[o, width:], d_w[o, :width], d_w[o, width:]
                of_a, of_f, of_keep = _kept_backward(a, f, keep, row, momentum, d_row, d_momentum)
                d_kept[0] += of_a
                d_kept[1] += of_f
                d_kept[2] += of_keep
                continue
            row, d_row = w[o], d_w[o]
            d_kept[0] += dot(row, d_row)
            for d in range(width):
                d_row[d] *= a


@borrowing
def _read_backward(
    P, C, R, retain, push, W, X, D, M, Z, ZZ, GQ, wide, scores, rates, d_W, d_X, d_D, d_M, d_Z, d_Q, d_retain, d_push
):  # fmt: skip
    """From d_Q of the last layer to d_Z of the first; adds to the others."""
    for l in range(P.shape[0] - 2, -1, -1):
        x, delta = _at(X, P[l, 3], C, P[l, 0]), _at(D, P[l, 4], C, P[l, 1])
        z, d_q = _at(Z, P[l, 3], C, P[l, 0]), _at(d_Q, P[l, 4], C, P[l, 1])
        width = x.shape[1]
        d_both, d_z = _at(wide, 0, C, R * width), _at(d_Z, P[l, 3], C, P[l, 0])
        gemm(1.0, d_q, False, _at(W, P[l, 2], P[l, 1], R * width), False, 0.0, d_both)
        gemm(1.0, d_q, True, _at(ZZ, R * P[l, 3], C, R * width), False, 1.0, _at(d_W, P[l, 2], P[l, 1], R * width))
        for i in range(C):
            row, to, from_, by = z[i], d_z[i], d_both[i, :width], retain[i]
            d_retain[i] += dot(row, from_)
            for d in range(width):
                to[d] = by * from_[d]
            if R == 2:
                from_, by = d_both[i, width : 2 * width], push[i]
                d_push[i] += dot(row, from_)
                for d in range(width):
                    to[d] += by * from_[d]
        gemm(1.0, z, False, x, True, 0.0, scores)
        gemm(1.0, d_q, False, delta, True, 0.0, rates)
        for t in range(C):
            s, r, by, to = scores[t], rates[t], M[t], d_M[t]
            for i in range(C):
                to[i] -= s[i] * r[i]
                s[i] *= by[i]
                r[i] *= by[i]
        gemm(-1.0, rates, False, x, False, 1.0, d_z)
        gemm(-1.0, rates, True, z, False, 1.0, _at(d_X, P[l, 3], C, width))
        gemm(-1.0, scores, True, d_q, False, 1.0, _at(d_D, P[l, 4], C, P[l, 1]))
        if l:
            multiply(d_z, _at(GQ, P[l - 1, 4], C, P[l - 1, 1]), _at(d_Q, P[l - 1, 4], C, P[l - 1, 1]))


@borrowing
def _finish_backward(norm, z, unit, inverse, d_y, d_z, d_norm):
    """Of the norm alone: from d_y to d_z, and, added, d_norm."""
    _standardise(z, unit, inverse)
    scale, d_scale, d_shift, width, real = norm[0], d_norm[0], d_norm[1], z.shape[1], z.dtype.type
    for i in range(z.shape[0]):
        u, from_, to, by = unit[i], d_y[i], d_z[i], inverse[i]
        for d in range(width):
            d_scale[d] += from_[d] * u[d]
            d_shift[d] += from_[d]
            to[d] = scale[d] * from_[d]
        mean, along = total(to) / real(width), dot(to, u) / real(width)
        for d in range(width):
            to[d] = (to[d] - mean - u[d] * along) * by


@borrowing
def _steps_backward(
    P, C, X, D, loss, step, most, theta, square, along, bounded, d_theta, d_step, d_most, d_X, d_D, d_along
):  # fmt: skip
    """From d_theta to d_step, or to d_most, d_along (of ⟨e, ∂ℓ/∂f⟩) and, added, d_X and d_D."""
    for i in range(C):
        d_step[i], d_most[i], d_along[i] = d_theta[i], 0, 0
        if not (bounded and theta[i] < step[i]):
            continue
        d_step[i], d_most[i] = 0, d_theta[i] * along[i] / square[i]
        per = d_theta[i] * most[i] / square[i]
        first, last = 0, P.shape[0] - 1
        if loss == DOT:
            first = _grown(P, C, X, D, i)[0]
            last = first + 1
            per /= -(square[i] * square[i]) * P[first, 1]
        else:
            d_along[i] = per
            per *= -2 * along[i] / square[i]
        per = X.dtype.type(per)
        for l in range(first, last):
            x, delta = _at(X, P[l, 3], C, P[l, 0])[i], _at(D, P[l, 4], C, P[l, 1])[i]
            d_x, d_delta = _at(d_X, P[l, 3], C, P[l, 0])[i], _at(d_D, P[l, 4], C, P[l, 1])[i]
            of_x, of_delta = per * dot(delta, delta), per * dot(x, x)
            for d in range(x.shape[0]):
                d_x[d] += of_x * x[d]
            for d in range(delta.shape[0]):
                d_delta[d] += of_delta * delta[d]


@borrowing
def _inner_backward(
    P, C, N, R, kind, loss, number, bends, norm, W, X, H, D, G, B, unit, inverse, error, slopes, d_W, d_X, d_D,
    d_H, d_E, d_along, d_bends, d_norm, d_target,
):  # fmt: skip
    """From d_X, d_D and d_along to d_X of the first layer, the keys' gradient, d_bends and d_target; adds to d_W and
    d_norm.

    Of queries that read the anchor, too: from their d_H of the last layer, in the rows after the keys'. H of the layers
    before holds GELU's second derivatives.
    """
    L = P.shape[0] - 1
    for l in range(L):
        for i in range(C, N):
            fill(_at(d_X, P[l, 3], N, P[l, 0])[i], 0.0)
    for l in range(1, L):
        wide = R * P[l, 0]
        w, d_w = _at(W, P[l, 2], P[l, 1], wide), _at(d_W, P[l, 2], P[l, 1], wide)
        curve = _at(H, P[l - 1, 4], C, P[l - 1, 1])
        back, rise = _at(B, P[l - 1, 4], C, P[l - 1, 1]), _at(G, P[l - 1, 4], C, P[l - 1, 1])
        d_delta, d_h = _at(d_D, P[l - 1, 4], C, P[l - 1, 1]), _at(d_H, P[l - 1, 4], C, P[l - 1, 1])
        for i in range(C):
            from_, by, curved, came, to = d_delta[i], rise[i], curve[i], back[i], d_h[i]
            for d in range(to.shape[0]):
                to[d] = from_[d] * came[d] * curved[d]
                from_[d] *= by[d]
        gemm(1.0, d_delta, False, w[:, : P[l - 1, 1]], True, 1.0, _at(d_D, P[l, 4], C, P[l, 1]))
        gemm(1.0, _at(D, P[l, 4], C, P[l, 1]), True, d_delta, False, 1.0, d_w[:, : P[l - 1, 1]])
    d_delta, d_h = _at(d_D, P[L - 1, 4], C, P[L - 1, 1]), _at(d_H, P[L - 1, 4], C, P[L - 1, 1])
    width, real = d_h.shape[1], d_h.dtype.type
    for i in range(C):
        up, to, d_e, d_v, e, s, u = d_delta[i], d_h[i], d_E[i], d_target[i], error[i], slopes[i], unit[i]
        per, d_s = d_along[i], d_target[i]
        if norm.shape[0]:
            scale, d_scale, by = norm[0], d_norm[0], inverse[i]
            # δ = inverse · r with r = ŝ − mean(ŝ) − u mean(ŝ u), ŝ = scale · s
            mean, along, d_inverse, d_mean, d_turn = _of_norm(scale, s, u, up, by)
            for d in range(width):
                d_scaled = by * up[d] - d_mean - u[d] * d_turn
                d_scale[d] += s[d] * d_scaled
                d_s[d] = scale[d] * d_scaled + per * e[d]
        else:
            for d in range(width):
                d_s[d] = up[d] + per * e[d]
        for d in range(width):
            d_e[d] = per * s[d]
        d_bends[i] = slope_backward(loss, number, bends[i], e, s, d_s, d_e)
        for d in range(width):
            d_v[d] = -d_e[d]
        if loss == DOT:
            fill(d_e, 0.0)
        if norm.shape[0]:
            scale, d_scale, d_shift, by = norm[0], d_norm[0], d_norm[1], inverse[i]
            for d in range(width):
                d_scale[d] += u[d] * d_e[d]
                d_shift[d] += d_e[d]
                to[d] = scale[d] * d_e[d] - scale[d] * s[d] * d_turn - by * up[d] * along
            mean, along = total(to) / real(width), (dot(to, u) + by * d_inverse) / real(width)
            for d in range(width):
                to[d] = by * (to[d] - mean - u[d] * along)
        else:
            copy_row(d_e, to)
    for l in range(L - 1, -1, -1):
        x, d_h = _at(X, P[l, 3], N, P[l, 0]), _at(d_H, P[l, 4], N, P[l, 1])
        w, d_w = _at(W, P[l, 2], P[l, 1], R * P[l, 0]), _at(d_W, P[l, 2], P[l, 1], R * P[l, 0])
        d_x = _at(d_X, P[l, 3], N, P[l, 0])
        gemm(1.0, d_h, True, x, False, 1.0, d_w[:, : P[l, 0]])
        gemm(1.0, d_h, False, w[:, : P[l, 0]], False, 1.0, d_x)
        if l:
            rise, d_below = _at(G, P[l - 1, 4], N, P[l - 1, 1]), _at(d_H, P[l - 1, 4], N, P[l - 1, 1])
            multiply_add(d_x, rise, d_below[:C])
            multiply(d_x[C:], rise[C:], d_below[C:])


@summing
def _of_norm(scale, e, u, up, by):
    """Means over a row that the gradient of a layer norm's gradient needs."""
    width, real = e.shape[0], e.dtype.type
    mean, along, d_inverse = real(0), real(0), real(0)
    for d in range(width):
        mean += scale[d] * e[d]
        along += scale[d] * e[d] * u[d]
    mean, along = mean / real(width), along / real(width)
    for d in range(width):
        d_inverse += up[d] * (scale[d] * e[d] - mean - u[d] * along)
    return mean, along, d_inverse, by * total(up) / real(width), by * dot(up, u) / real(width)


@jit
def backward(
    first, last, H, chunks, C, widths, bias, R, kind, bounded, averages, loss, number, reads, residual, every, q, q_at,
    k, k_at, v, v_at, step, step_at, most, most_at, bend, bend_at, given, given_at, momentum, momentum_at, norm, turn,
    befores, seen, d_y, d_y_at, d_q, d_q_at, d_k, d_k_at, d_v, d_v_at, d_step, d_step_at, d_most, d_most_at, d_bend,
    d_bend_at, d_given, d_given_at, d_momentum, d_momentum_at, d_norm, d_state,
):  # fmt: skip
    met = reads == ANCHOR
    N = 2 * C if met else C
    P = plan(widths, bias, R, N)
    L, dtype = P.shape[0] - 1, befores.dtype
    xs, ds, out = P[L, 3], P[L, 4], P[L - 1, 1]
    # of the chunks between two kept states
    Ws, Xs = np.empty((every, befores.shape[2]), dtype), np.empty((every, xs), dtype)
    flats, rows = np.empty((every, 4, ds), dtype), np.empty((every, 3, C, out), dtype)
    states = [_rules(C, dtype) for _ in range(every)]
    inverses, kepts = np.empty((every, C), dtype), np.zeros((every, 3), dtype)

    Z, ZZ, wide = np.empty(xs, dtype), np.empty(R * xs, dtype), np.empty(R * xs, dtype)
    d_X, d_Z, flat = np.empty(xs, dtype), np.empty(xs, dtype), np.empty((5, ds), dtype)
    GQ, d_D, d_H, d_Q, curve = flat[0], flat[1], flat[2], flat[3], flat[4]
    target, d_target, d_error = np.empty((C, out), dtype), np.empty((C, out), dtype), np.empty((C, out), dtype)
    d_read, q_unit, q_inverse = np.empty((C, out), dtype), np.empty((C, out), dtype), np.empty(C, dtype)
    scores, rates, d_M = np.empty((C, C), dtype), np.empty((C, C), dtype), np.zeros((C + 1, C), dtype)
    d_K, d_E = np.zeros((C + 1, C + 1), dtype), np.empty(C + 1, dtype)
    d_kept, d_gates = np.zeros(3, dtype), np.zeros((10, C + 1), dtype)
    d_theta, d_A, d_F, d_tails, d_asked, d_ceiling, d_decays, d_etas, d_along, d_bends = (
        d_gates[0], d_gates[1], d_gates[2], d_gates[3], d_gates[4], d_gates[5], d_gates[6], d_gates[7], d_gates[8],
        d_gates[9],
    )  # fmt: skip
    for g in range(every):
        _ones(P, Xs[g])
    _ones(P, Z)
    z, keys = _at(Z, 0, C, P[0, 0]), _at(d_X, 0, C, P[0, 0])
    if reads == ANCHOR:
        queries, d_found = _at(d_X, 0, N, P[0, 0])[C:], _at(d_H, P[L - 1, 4], N, out)[C:]
    else:
        queries, d_found = _at(d_Z, 0, C, P[0, 0]), _at(d_Q, P[L - 1, 4], C, out)
    for r in range(first, last):
        b, h = r // H, r % H
        d_W = d_state[r]
        for c in range(chunks - 1, -1, -1):
            if c % every == every - 1 or c == chunks - 1:
                copy_row(befores[r, c // every], Ws[0])
                for g in range(c % every + 1):
                    at = c // every * every + g
                    gates, rules, M = states[g]
                    hidden = flats[g, 3]
                    if met:
                        copy_row(seen[r, at], hidden[P[L - 1, 4] : P[L - 1, 4] + seen.shape[2]])
                    _learn(
                        P, C, N, R, kind, bounded, averages, loss, number, met, C, norm[r], b, h, at * C, q, q_at, k,
                        k_at, v, v_at, step, step_at, most, most_at, bend, bend_at, given, given_at, momentum,
                        momentum_at, turn, residual, widths[0], target, Ws[g], Xs[g], hidden, flats[g], rows[g],
                        inverses[g], rules, gates, M, kepts[g],
                    )  # fmt: skip
                    if g < c % every:
                        copy_row(Ws[g], Ws[g + 1])
                        _carry(P, C, R, kepts[g], M[C], gates[3], Xs[g], flats[g, 0], wide, Ws[g + 1])
            g, t = c % every, c * C
            W, X, error, unit, slopes, inverse = Ws[g], Xs[g], rows[g, 0], rows[g, 1], rows[g, 2], inverses[g]
            D, G, B, hidden = flats[g, 0], flats[g, 1], flats[g, 2], flats[g, 3]
            gates, rules, M = states[g]
            theta, A, F, tails, E, K = gates[0], gates[1], gates[2], gates[3], rules[0], rules[1]
            for i in range(4):
                fill(d_gates[i], 0.0)
            fill(d_kept, 0.0)
            for i in range(C + 1):
                fill(d_M[i], 0.0)
            _carry_backward(P, C, R, kepts[g], M[C], tails, W, X, D, wide, d_W, d_X, d_D, d_M[C], d_tails, d_kept)
            take(d_read, d_y, d_y_at, b, h, t)
            outputs = hidden
            if reads != ANCHOR:
                outputs = seen[r, c] if L > 1 else curve
                _take(q, q_at, b, h, t, widths[0], turn, z)
                _read(
                    P, C, R, kind, L > 1, A[reads:], F[reads:], W, X, D, M[reads:], Z, ZZ, outputs, GQ, scores
                )  # fmt: skip
            if norm.shape[1]:
                found = _at(outputs, P[L - 1, 4], N, out)[N - C :]
                _finish_backward(norm[r], found, q_unit, q_inverse, d_read, d_found, d_norm[r])
            else:
                copy(d_read, d_found)
            if reads != ANCHOR:
                _read_backward(
                    P, C, R, A[reads:], F[reads:], W, X, D, M[reads:], Z, ZZ, GQ, wide, scores, rates, d_W, d_X, d_D,
                    d_M[reads:], d_Z, d_Q, d_A[reads:], d_F[reads:],
                )  # fmt: skip
            d_A[C] += d_kept[0]
            d_F[C] += d_kept[1]

            d_E[0] = d_kept[2]
            for i in range(C):
                d_E[1 + i] = d_tails[i] * theta[i]
                d_theta[i] = d_tails[i] * E[C, 1 + i]
            for s in range(1, C + 1):
                row, d_row, to = K[s, 1:], d_M[s], d_K[s, 1:]
                d_K[s, 0] = d_F[s]
                for i in range(s):
                    d_theta[i] += d_row[i] * row[i]
                    to[i] = d_row[i] * theta[i]
                fill(to[s:], 0.0)
            _rule_backward(C, averages, gates[8], gates[9], A, E, K, d_A, d_E, d_K, d_decays, d_etas)
            _steps_backward(
                P, C, X, D, loss, gates[4], gates[5], theta, gates[6], gates[7], bounded, d_theta, d_asked, d_ceiling,
                d_X, d_D, d_along,
            )  # fmt: skip
            _put_tokens(d_step, d_step_at, b, h, t, d_asked[:C])
            _put_tokens(d_given, d_given_at, b, h, t, d_decays[:C])
            if bounded:
                _put_tokens(d_most, d_most_at, b, h, t, d_ceiling[:C])
            if R == 2:
                _put_tokens(d_momentum, d_momentum_at, b, h, t, d_etas[:C])
            _inner_backward(
                P, C, N, R, kind, loss, number, gates[10], norm[r], W, X, hidden, D, G, B, unit, inverse, error, slopes,
                d_W, d_X, d_D, d_H, d_error, d_along, d_bends, d_norm[r], d_target,
            )  # fmt: skip
            if HUBER <= loss <= HUBER_MIXED:
                _put_tokens(d_bend, d_bend_at, b, h, t, d_bends[:C])
            if residual:
                for i in range(C):
                    d_query, d_key, of_read, of_target = queries[i], keys[i], d_read[i], d_target[i]
                    for d in range(out):
                        d_query[d] += of_read[d]
                        d_key[d] -= of_target[d]
            _put(d_q, d_q_at, b, h, t, widths[0], turn, queries)
            _put(d_k, d_k_at, b, h, t, widths[0], turn, keys)
            put(d_v, d_v_at, b, h, t, d_target)


@borrowing
def _put(x, at, b, h, first, width, turn, rows):
    """`put` of the leading columns, turned back; alters them."""
    _turned(turn, -1, rows)
    origin = b * at[0] + h * at[1] + first * at[2]
    for i in range(rows.shape[0]):
        copy_row(rows[i, :width], x[origin + i * at[2] : origin + i * at[2] + width])


@borrowing
def _put_tokens(x, at, b, h, first, values):
    origin = b * at[0] + h * at[1] + first * at[2]
    for i in range(values.shape[0]):
        x[origin + i * at[2]] = values[i]
