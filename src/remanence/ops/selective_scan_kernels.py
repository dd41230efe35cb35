"""The loops of `selective_scan`, compiled by Numba for the CPU: each works on the features from `first` to `last`.

Features are the inner axis everywhere, at most `BLOCK` of them at a time, so that loops over them become vector
instructions and a block's state stays in the nearest cache. States are [N, features] here. An empty `A` stands for
Longhorn's decay 1 − Δ B².
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import copy_row, dot, fill
from remanence.ops.compiled import BAND, decay, jit, sigmoid_and_silu, summing
from remanence.ops.step_kernels import activate, at, convolve, sigmoid, softplus

BLOCK = 256


@jit
def forward(first, last, x, delta, A, B, C, h, y, kept, size):
    """Writes y, the state before every `size`-th token to `kept` [B, chunks, N, D], and the last one to h [B, N, D]."""
    N = B.shape[2]
    u = np.empty(BLOCK, x.dtype)
    for i in range(x.shape[0]):
        for begin in range(0, x.shape[1], size):
            for n in range(N):
                state, copy = h[i, n, first:last], kept[i, begin // size, n, first:last]
                for d in range(last - first):
                    copy[d] = state[d]
            for left in range(first, last, BLOCK):
                right = min(left + BLOCK, last)
                for t in range(begin, min(begin + size, x.shape[1])):
                    out, step, now = y[i, t, left:right], delta[i, t, left:right], x[i, t, left:right]
                    for d in range(right - left):
                        u[d] = now[d] * step[d]
                        out[d] = 0
                    for n in range(N):
                        b, c = B[i, t, n], C[i, t, n]
                        s = h[i, n, left:right]
                        if A.shape[0] > 0:
                            rate = A[n, left:right]
                            for d in range(right - left):
                                new = decay(step[d] * rate[d]) * s[d] + b * u[d]
                                s[d] = new
                                out[d] += c * new
                        else:
                            bb = b * b
                            for d in range(right - left):
                                new = (1 - step[d] * bb) * s[d] + b * u[d]
                                s[d] = new
                                out[d] += c * new


@summing
def backward(first, last, x, delta, A, B, C, kept, size, d_y, d_h, d_x, d_delta, d_A, d_B, d_C):
    """Gradients, with the states of a chunk computed once more from the one that was kept.

    d_h [B, N, D] holds the gradient of the last state and ends as that of the first; d_A [N, D] is added to, and so are
    d_B and d_C [bands, B, T, N], which all features share, at the band of `first`.
    """
    T, N = x.shape[1], B.shape[2]
    u, d_u, d_rate = np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype), np.empty(BLOCK, x.dtype)
    states = np.empty((size + 1, N, BLOCK), x.dtype)
    decays = np.empty((size, N, BLOCK), x.dtype)
    zero = np.zeros(1, x.dtype)[0]
    for i in range(x.shape[0]):
        for begin in range((T - 1) // size * size, -1, -size):
            length = min(size, T - begin)
            for left in range(first, last, BLOCK):
                width = min(BLOCK, last - left)
                for n in range(N):
                    old, new = kept[i, begin // size, n, left : left + width], states[0, n, :width]
                    for d in range(width):
                        new[d] = old[d]
                for j in range(length):
                    t = begin + j
                    step, now = delta[i, t, left : left + width], x[i, t, left : left + width]
                    for d in range(width):
                        u[d] = now[d] * step[d]
                    for n in range(N):
                        b = B[i, t, n]
                        a, old, new = decays[j, n, :width], states[j, n, :width], states[j + 1, n, :width]
                        if A.shape[0] > 0:
                            rate = A[n, left : left + width]
                            for d in range(width):
                                a[d] = decay(step[d] * rate[d])
                                new[d] = a[d] * old[d] + b * u[d]
                        else:
                            bb = b * b
                            for d in range(width):
                                a[d] = 1 - step[d] * bb
                                new[d] = a[d] * old[d] + b * u[d]
                for j in range(length - 1, -1, -1):
                    t = begin + j
                    step, now = delta[i, t, left : left + width], x[i, t, left : left + width]
                    given = d_y[i, t, left : left + width]
                    for d in range(width):
                        u[d] = now[d] * step[d]
                        d_u[d] = 0
                        d_rate[d] = 0
                    for n in range(N):
                        b, c = B[i, t, n], C[i, t, n]
                        a, old, new = decays[j, n, :width], states[j, n, :width], states[j + 1, n, :width]
                        carried = d_h[i, n, left : left + width]
                        d_b, d_c, d_bb = zero, zero, zero
                        if A.shape[0] > 0:
                            rate, d_a = A[n, left : left + width], d_A[n, left : left + width]
                            for d in range(width):
                                total = carried[d] + given[d] * c
                                d_c += given[d] * new[d]
                                d_b += total * u[d]
                                d_u[d] += total * b
                                carried[d] = total * a[d]
                                d_log = carried[d] * old[d]
                                d_rate[d] += d_log * rate[d]
                                d_a[d] += d_log * step[d]
                        else:
                            bb = b * b
                            for d in range(width):
                                total = carried[d] + given[d] * c
                                d_c += given[d] * new[d]
                                d_b += total * u[d]
                                d_u[d] += total * b
                                carried[d] = total * a[d]
                                lost = total * old[d]
                                d_rate[d] -= lost * bb
                                d_bb -= lost * step[d]
                        d_B[first // BAND, i, t, n] += d_b + 2 * b * d_bb
                        d_C[first // BAND, i, t, n] += d_c
                    for d in range(width):
                        d_x[i, t, left + d] = d_u[d] * step[d]
                        d_delta[i, t, left + d] = d_u[d] * now[d] + d_rate[d]


@jit
def _unit(x, eps):
    by = x.dtype.type(1 / math.sqrt(dot(x, x) / x.shape[0] + eps))
    for d in range(x.shape[0]):
        x[d] *= by


@jit
def token(
    one, mixes, tails, taps, tap_biases, choices, step_maps, step_biases, logarithms, skips, starts, ys, afters, ends,
    B, D, N, R, width, normed, eps,
):  # fmt: skip
    """Mamba's block from what it projects to what it projects back, by addresses: x and z [B, 2D] to y [B, D].

    x passes the convolution `taps` [D, width] and SiLU; `choices` [R + 2N, D] are the maps to δ, B and C, `step_maps`
    [D, R] that of δ to the logits of Δ. Without the rates' logarithms [D, N] it is Longhorn's.
    """
    mixed, y = at(one, mixes, (B, 2 * D)), at(one, ys, (B, D))
    tail, after = at(one, tails, (B, width - 1, D)), at(one, afters, (B, width - 1, D))
    tap, tap_bias = at(one, taps, (D, width)), at(one, tap_biases, (D,))
    choice, step_map = at(one, choices, (R + 2 * N, D)), at(one, step_maps, (D, R))
    step_bias, logs, skip = at(one, step_biases, (D,)), at(one, logarithms, (D, N)), at(one, skips, (D,))
    start, h = at(one, starts, (B, D, N)), at(one, ends, (B, D, N))
    x, delta, chosen = np.empty(D, y.dtype), np.empty(D, y.dtype), np.empty(R + 2 * N, y.dtype)
    rank, new, late = chosen[:R], chosen[R : R + N], chosen[R + N :]
    for b in range(B):
        out, z = y[b], mixed[b, D:]
        if tap_biases:
            copy_row(tap_bias, x)
        else:
            fill(x, 0)
        convolve(tap, tail[b], mixed[b, :D], x, after[b])
        activate(x)
        for i in range(R + 2 * N):
            chosen[i] = dot(choice[i], x)
        if normed:
            _unit(rank, eps)
            _unit(new, eps)
            _unit(late, eps)
        for d in range(D):
            delta[d] = dot(step_map[d], rank) + step_bias[d]
        if logarithms:
            for d in range(D):
                delta[d] = softplus(delta[d])
        else:
            square = dot(new, new)
            for d in range(D):
                beta = sigmoid(delta[d])
                delta[d] = beta / (1 + beta * square)
        for d in range(D):
            step, before, held = delta[d], start[b, d], h[b, d]
            u = step * x[d]
            if logarithms:
                log = logs[d]
                for n in range(N):
                    held[n] = decay(-step * decay(log[n])) * before[n] + u * new[n]
            else:
                for n in range(N):
                    held[n] = (1 - step * new[n] * new[n]) * before[n] + u * new[n]
            out[d] = dot(held, late)
        for d in range(D):
            out[d] = (out[d] + skip[d] * x[d]) * sigmoid_and_silu(z[d])[1]
