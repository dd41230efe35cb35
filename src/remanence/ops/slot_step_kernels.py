"""One token of slot memories from what a layer projects to what it projects back, compiled for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import copy_row, dot, fill
from remanence.ops.compiled import decay, jit
from remanence.ops.outer_step_kernels import running
from remanence.ops.step_kernels import (
    activate,
    add,
    at,
    convolve,
    lost,
    move,
    normalise,
    sigmoid,
    softmax,
    softplus,
    unit,
)


@jit
def slots_token(
    one, mixes, scores, tops, weights, key_starts, value_starts, ys, next_tops, key_ends, value_ends,
    B, H, G, M, K, temper, eps,
):  # fmt: skip
    """Queries [B, H, K], keys and values [B, G, K] side by side, which pass SiLU; slots [B, G, M, K] of both.

    A slot keeps the 1/`temper` of a log sigmoid of its score [B, G, M] and takes the rest; or, with `tops` [B, G, M],
    the logarithms of the running sums of exp scores, its share of these. What was read passes SiLU and an RMS norm of
    all heads.
    """
    mixed, score, y = at(one, mixes, (B, (H + 2 * G) * K)), at(one, scores, (B, G, M)), at(one, ys, (B, H, K))
    top, next_top, shape = at(one, tops, (B, G, M)), at(one, next_tops, (B, G, M)), (B, G, M, K)
    old_k, old_v, new_k, new_v = (
        at(one, key_starts, shape), at(one, value_starts, shape), at(one, key_ends, shape), at(one, value_ends, shape),
    )  # fmt: skip
    share, a, w, found = H // G, np.empty(M, y.dtype), np.empty(M, y.dtype), np.empty((H // G, M), y.dtype)
    row = np.empty((H + 2 * G) * K, y.dtype)
    for b in range(B):
        copy_row(mixed[b], row)
        activate(row)
        for g in range(G):
            if tops:
                running(score[b, g], top[b, g], a, w, next_top[b, g])
            else:
                _chosen(score[b, g], temper, a, w)
            k, v = row[(H + g) * K : (H + g + 1) * K], row[(H + G + g) * K : (H + G + g + 1) * K]
            for i in range(M):
                move(old_k[b, g, i], a[i], w[i], k, new_k[b, g, i])
                for s in range(share):
                    place = (g * share + s) * K
                    found[s, i] = dot(new_k[b, g, i], row[place : place + K])
            for s in range(share):
                softmax(found[s])
                fill(y[b, g * share + s], 0)
            for i in range(M):
                move(old_v[b, g, i], a[i], w[i], v, new_v[b, g, i])
                for s in range(share):
                    add(new_v[b, g, i], found[s, i], y[b, g * share + s])
        for h in range(H):
            activate(y[b, h])
    normalise(one, ys, weights, 0, 0, ys, B, H * K, 1, False, 0, 1 / (H * K), eps)


@jit
def _chosen(logits, temper, a, rest):
    """Keeps σ(f)^{1/temper}, and what is not kept."""
    by = a.dtype.type(-1 / temper)
    for i in range(a.shape[0]):
        a[i] = by * softplus(-logits[i])
    lost(a, rest)
    for i in range(a.shape[0]):
        a[i] = decay(a[i])


@jit
def lattice_token(
    one, mixes, taps, tails, rates, weights, gates, starts, ys, afters, ends,
    B, H, M, D, width, correct, renormalise, by_slot, small, kind, eps,
):  # fmt: skip
    """Slots [B, H, M, D] that a write moves at right angles to what they hold, read by a norm of each head and a gate.

    Queries, keys and values side by side pass a convolution and SiLU, queries and keys are brought to unit length
    (`small` is the eps); rates [B, H] are logits. Keys are as many as slots, or values are (`by_slot`).
    """
    K, V = (D, M) if by_slot else (M, D)
    F = H * (2 * K + V)
    mixed, tap, rate, y = (
        at(one, mixes, (B, F)),
        at(one, taps, (F, width)),
        at(one, rates, (B, H)),
        at(one, ys, (B, H, V)),
    )
    tail, after = at(one, tails, (B, width - 1, F)), at(one, afters, (B, width - 1, F))
    start, S = at(one, starts, (B, H, M, D)), at(one, ends, (B, H, M, D))
    row, error, sizes = np.empty(F, y.dtype), np.empty(D, y.dtype), np.empty(M, y.dtype)
    for b in range(B):
        fill(row, 0)
        convolve(tap, tail[b], mixed[b], row, after[b])
        activate(row)
        for h in range(H):
            q, k = row[h * K : (h + 1) * K], row[(H + h) * K : (H + h + 1) * K]
            v, old, new, out = row[2 * H * K + h * V : 2 * H * K + (h + 1) * V], start[b, h], S[b, h], y[b, h]
            unit(q, 1, small)
            unit(k, 1, small)
            code, target, step = (v, k, sigmoid(rate[b, h])) if by_slot else (k, v, sigmoid(rate[b, h]))
            copy_row(target, error)
            for i in range(M):
                sizes[i] = _size(old[i])
                if correct:
                    add(old[i], -code[i] / sizes[i], error)
            fill(out, 0)
            for i in range(M):
                by = step * code[i] / sizes[i]
                keep = one - by * dot(old[i], error) / (sizes[i] * sizes[i])
                now = new[i]
                for d in range(D):
                    now[d] = keep * old[i, d] + by * error[d]
                scale = one / _size(now)
                if by_slot:
                    out[i] = scale * dot(now, q)
                else:
                    add(now, scale * q[i], out)
                if renormalise:
                    for d in range(D):
                        now[d] *= scale
    normalise(one, ys, weights, 0, gates, ys, B * H, V, 1, False, kind, 1 / V, eps)


@jit
def _size(x):
    return x.dtype.type(math.sqrt(dot(x, x) + x.dtype.type(1e-30)))
