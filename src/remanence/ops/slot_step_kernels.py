"""One token of slot memories from what a layer projects to what it projects back, compiled for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.attention_step_kernels import softmax
from remanence.ops.chunk_kernels import copy_row, dot, fill
from remanence.ops.compiled import decay, jit
from remanence.ops.outer_step_kernels import running
from remanence.ops.step_kernels import activate, add, at, lost, normalise, softplus


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
                _move(old_k[b, g, i], a[i], w[i], k, new_k[b, g, i])
                for s in range(share):
                    place = (g * share + s) * K
                    found[s, i] = dot(new_k[b, g, i], row[place : place + K])
            for s in range(share):
                softmax(found[s])
                fill(y[b, g * share + s], 0)
            for i in range(M):
                _move(old_v[b, g, i], a[i], w[i], v, new_v[b, g, i])
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
def _move(old, keep, take, x, new):
    for d in range(new.shape[0]):
        new[d] = keep * old[d] + take * x[d]
