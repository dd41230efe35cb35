"""The loops of `complex_scan`, compiled by Numba for the CPU: each works on the features from `first` to `last`.

The coefficients are [B, T, D], or [1, 1, D] when they are the same for all tokens (`fixed`).
"""

from __future__ import annotations

import numpy as np

from remanence.ops.chunk_kernels import dot
from remanence.ops.compiled import jit, summing
from remanence.ops.gelu_kernels import normal
from remanence.ops.step_kernels import at


@jit
def forward(first, last, fixed, a, b, start, h):
    for i in range(b.shape[0]):
        before = start[i, first:last]
        for t in range(b.shape[1]):
            keep = a[0, 0, first:last] if fixed else a[i, t, first:last]
            new, now = b[i, t, first:last], h[i, t, first:last]
            for d in range(last - first):
                now[d] = keep[d] * before[d] + new[d]
            before = now


@jit
def backward(first, last, fixed, a, start, h, d_h, d_a, d_b, d_start):
    """d_a comes filled with zeros, and d_start leaves as the gradient of `start`."""
    for i in range(h.shape[0]):
        carried = d_start[i, first:last]
        carried[:] = 0
        for t in range(h.shape[1] - 1, -1, -1):
            keep = a[0, 0, first:last] if fixed else a[i, t, first:last]
            d_keep = d_a[0, 0, first:last] if fixed else d_a[i, t, first:last]
            before = h[i, t - 1, first:last] if t > 0 else start[i, first:last]
            given, d_new = d_h[i, t, first:last], d_b[i, t, first:last]
            for d in range(last - first):
                total = given[d] + carried[d]
                d_new[d] = total
                d_keep[d] += total * np.conj(before[d])
                carried[d] = total * np.conj(keep[d])


@jit
def diagonal_token(one, us, keeps, reads, skips, starts, ys, ends, B, D, N):
    """GELU of a token of `diagonal_ssm` and `skip` ⊙ u: u, y [B, D], start, h [B, D, 2N], a, read [D, 2N], as pairs."""
    u, y, skip = at(one, us, (B, D)), at(one, ys, (B, D)), at(one, skips, (D,))
    a, c = at(one, keeps, (D, 2 * N)), at(one, reads, (D, 2 * N))
    start, h = at(one, starts, (B, D, 2 * N)), at(one, ends, (B, D, 2 * N))
    for b in range(B):
        for d in range(D):
            x = u[b, d]
            y[b, d] = _turn_and_read(a[d], start[b, d], x, c[d], h[b, d]) + skip[d] * x
        out = y[b]
        for d in range(D):
            out[d] *= normal(out[d])[0]


@summing
def _turn_and_read(a, before, x, c, now):
    """Writes a h + x, and returns Re Σ c h of it."""
    read = x * 0
    for n in range(a.shape[0] // 2):
        i, j = 2 * n, 2 * n + 1
        real = a[i] * before[i] - a[j] * before[j] + x
        imaginary = a[i] * before[j] + a[j] * before[i]
        now[i], now[j] = real, imaginary
        read += c[i] * real - c[j] * imaginary
    return read


@jit
def shared_token(one, us, keeps, scales, ins, outs, skips, starts, rooms, ys, ends, B, D, N, rows, times):
    """One token of N modes that all features share, and `skip` ⊙ u: u, y [B, D].

    a and scale [rows, 2N] as pairs, of all rows of the batch or of each; in [2N, D], out [D, 2N], start, h [B, 2N].
    """
    u, y, skip, room = at(one, us, (B, D)), at(one, ys, (B, D)), at(one, skips, (D,)), at(one, rooms, (2 * N,))
    a, scale = at(one, keeps, (rows, 2 * N)), at(one, scales, (rows, 2 * N))
    into, out_of = at(one, ins, (2 * N, D)), at(one, outs, (D, 2 * N))
    start, h = at(one, starts, (B, 2 * N)), at(one, ends, (B, 2 * N))
    for b in range(B):
        keep, by, x = a[b % rows], scale[b % rows], u[b]
        before, now, out = start[b], h[b], y[b]
        for i in range(2 * N):
            room[i] = dot(into[i], x)
        for i in range(0, 2 * N, 2):
            j = i + 1
            now[i] = keep[i] * before[i] - keep[j] * before[j] + by[i] * room[i] - by[j] * room[j]
            now[j] = keep[i] * before[j] + keep[j] * before[i] + by[i] * room[j] + by[j] * room[i]
        for i in range(0, 2 * N, 2):
            room[i], room[i + 1] = times * now[i], -times * now[i + 1]
        for d in range(D):
            out[d] = dot(out_of[d], room) + skip[d] * x[d]


@jit
def chosen_token(one, steereds, codes, writtens, bases, starts, seens, ends, B, N, R, width):
    """One token of S7: a = 1 − 1/(Λ² + ½), h = a h + Σ_r code_r written_r + β, and seen [B, R, N] = code_r h.

    steered [B, width]: what Λ [N] moves by, then β; codes [B, 2R]: of writing, then of reading; written [B, R, N].
    """
    steered, code, written = at(one, steereds, (B, width)), at(one, codes, (B, 2 * R)), at(one, writtens, (B, R, N))
    base, start, h = at(one, bases, (N,)), at(one, starts, (B, N)), at(one, ends, (B, N))
    seen = at(one, seens, (B, R, N))
    for b in range(B):
        moved, new, before, now = steered[b, :N], steered[b, N : 2 * N], start[b], h[b]
        for n in range(N):
            rate = base[n] + moved[n]
            now[n] = (1 - 1 / (rate * rate + one / 2)) * before[n] + new[n]
        for r in range(R):
            share, row = code[b, r], written[b, r]
            for n in range(N):
                now[n] += share * row[n]
        for r in range(R):
            share, row = code[b, R + r], seen[b, r]
            for n in range(N):
                row[n] = share * now[n]
