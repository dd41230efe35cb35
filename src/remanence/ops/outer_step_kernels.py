"""One token of the outer-product memories from what a layer projects to what it projects back, compiled for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.cell_step_kernels import tied
from remanence.ops.chunk_kernels import copy_row, fill
from remanence.ops.compiled import decay, jit
from remanence.ops.decay import FLOOR
from remanence.ops.dplr_kernels import read
from remanence.ops.step_kernels import (
    ELU,
    SIGMOID,
    SILU,
    SOFTMAX,
    activate,
    at,
    normalise,
    phases,
    softmax,
    softplus,
    turn,
    write_and_read,
)  # fmt: skip

ALL, FIXED, CHOSEN, TIED, RUNNING = 0, 1, 2, 3, 4
"""What is kept: all; a fixed share for each head; one that the token chooses for each key feature; the same, and what
is not kept is the key; what a running softmax of the keys leaves."""


@jit
def outer_token(
    one, mixes, vs, gs, tops, weights, gates, starts, ys, next_tops, ends, positions, rates,
    B, H, K, V, features, value_features, scale, key_scale, forget, temper, bound, mean, parts, kind, eps,
):  # fmt: skip
    """Queries, keys and, where there is no v, values side by side: [B, H·(2K + V)].

    Queries and keys pass `features` and a scale, and turn by `positions` times `rates` where there are any. g is [H]
    (FIXED), the logits [B, H, K] of 1/`temper` of a log sigmoid (CHOSEN; the keys where it is absent), or the least
    shares [H, K] (TIED, whose keys are logits), all `bound` where it is absent. `tops` are the logarithms of the
    running sums of exp keys [B, H, K] (RUNNING). With `mean` ≥ 0 the state has a column more, of the keys' sums, by
    whose answer + `mean` the others' are divided. What was read is normalised in so many `parts` (0: not at all) with a
    weight as wide as one, and gated.
    """
    D = 2 * H * K + (0 if vs else H * V)
    mixed, v, y = at(one, mixes, (B, D)), at(one, vs, (B, H, V)), at(one, ys, (B, H, V))
    g, logits, least = at(one, gs, (H,)), at(one, gs, (B, H, K)), at(one, gs, (H, K))
    top, next_top, columns = at(one, tops, (B, H, K)), at(one, next_tops, (B, H, K)), V + 1 if mean >= 0 else V
    start, S = at(one, starts, (B, H, K, columns)), at(one, ends, (B, H, K, columns))
    position, rate = at(np.int64(0), positions, (B,)), at(1.0, rates, (K // 2,))
    late, early, a, turned = np.empty(K, y.dtype), np.empty(K, y.dtype), np.empty(K, y.dtype), np.empty(K, y.dtype)
    new, found = np.empty(columns, y.dtype), np.empty(columns, y.dtype)
    cos, sin, low = np.empty(K // 2, y.dtype), np.empty(K // 2, y.dtype), np.empty(K, y.dtype)
    fill(a, 1.0)
    fill(new, 1.0)
    for b in range(B):
        row = mixed[b]
        if positions:
            phases(position[b], rate, cos, sin)
        for h in range(H):
            q, k = row[h * K : (h + 1) * K], row[(H + h) * K : (H + h + 1) * K]
            _features(q, features, scale, late)
            if forget == TIED:
                fill(low, bound)
                if gs:
                    copy_row(least[h], low)
                tied(k, low, a, early)
            elif forget == RUNNING:
                running(k, top[b, h], a, early, next_top[b, h])
            else:
                _features(k, features, key_scale, early)
            if forget == FIXED:
                fill(a, decay(g[h]))
            elif forget == CHOSEN:
                fading(logits[b, h] if gs else k, temper, a)
            if positions:
                copy_row(late, turned)
                turn(turned, cos, sin, late)
                copy_row(early, turned)
                turn(turned, cos, sin, early)
            if vs:
                copy_row(v[b, h], new[:V])
            else:
                copy_row(row[2 * H * K + h * V : 2 * H * K + (h + 1) * V], new[:V])
            if value_features == SILU:
                activate(new[:V])
            out = y[b, h]
            write_and_read(start[b, h], a, early, new, late, S[b, h], found)
            by = 1 / (found[V] + y.dtype.type(mean)) if mean >= 0 else one
            for d in range(V):
                out[d] = found[d] * by
    if parts:
        width = H * V // parts
        normalise(one, ys, weights, 0, gates, ys, B * parts, width, 1, False, kind, 1 / width, eps)


@jit
def _features(x, kind, scale, out):
    copy_row(x, out)
    if kind == ELU:
        for i in range(x.shape[0]):
            out[i] = x[i] + out.dtype.type(1) if x[i] > 0 else decay(x[i])
    elif kind == SILU:
        activate(out)
    elif kind == SOFTMAX:
        softmax(out)
    by = out.dtype.type(scale)
    for i in range(x.shape[0]):
        out[i] *= by


@jit
def fading(logits, temper, a):
    """a = σ(f)^{1/temper}."""
    by = a.dtype.type(-1 / temper)
    for i in range(a.shape[0]):
        a[i] = by * softplus(-logits[i])
    for i in range(a.shape[0]):
        a[i] = decay(a[i])


@jit
def running(x, top, a, early, next_top):
    """z' = log(eᶻ + eˣ), which keeps e^{z − z'} and writes e^{x − z'}."""
    for i in range(a.shape[0]):
        next_top[i] = max(top[i], x[i]) + softplus(-abs(top[i] - x[i]))
    for i in range(a.shape[0]):
        a[i] = decay(top[i] - next_top[i])
    for i in range(a.shape[0]):
        early[i] = decay(x[i] - next_top[i])


@jit
def exponential_token(
    one, mixes, gates, weights, offsets, opens, starts, ys, ends, counts, next_counts, tops, next_tops,
    B, H, K, V, D, cap, eps, norm_eps,
):  # fmt: skip
    """The matrix LSTM from what it projects, D features that begin with queries, keys and values.

    Gates are logits of writing and of forgetting [B, 2H], softly capped at `cap` unless it is 0. `counts` are n
    [B, H, K], `tops` m [B, H], both in float64. What was read passes a layer norm of each head, with weight and offset
    [H, V], and a sigmoid gate, `opens` [B, H·V].
    """
    mixed, gate, y = at(one, mixes, (B, D)), at(one, gates, (B, 2 * H)), at(one, ys, (B, H, V))
    start, C = at(one, starts, (B, H, K, V)), at(one, ends, (B, H, K, V))
    count, n = at(1.0, counts, (B, H, K)), at(1.0, next_counts, (B, H, K))
    top, m = at(1.0, tops, (B, H)), at(1.0, next_tops, (B, H))
    a, early, late = np.empty(K, y.dtype), np.empty(K, y.dtype), np.empty(K, y.dtype)
    scale = y.dtype.type(1 / math.sqrt(K))
    for b in range(B):
        for h in range(H):
            place = 2 * H * K + h * V
            q, k, v = (
                mixed[b, h * K : (h + 1) * K],
                mixed[b, (H + h) * K : (H + h + 1) * K],
                mixed[b, place : place + V],
            )
            into, keep = np.float64(gate[b, h]), np.float64(gate[b, H + h])
            if cap:
                into, keep = cap * math.tanh(into / cap), cap * math.tanh(keep / cap)
            keep = max(-softplus(-keep), FLOOR) + top[b, h]
            m[b, h] = max(keep, into)
            kept, written = math.exp(keep - m[b, h]), math.exp(into - m[b, h])
            fill(a, kept)
            seen, counted, before = 0.0, n[b, h], count[b, h]
            for i in range(K):
                late[i] = scale * q[i]
                early[i] = written * k[i]
                counted[i] = kept * before[i] + written * k[i]
                seen += counted[i] * q[i]
            seen *= 1 / math.sqrt(K)
            out = y[b, h]
            write_and_read(start[b, h], a, early, v, late, C[b, h], out)
            size = y.dtype.type(1 / (max(abs(seen), math.exp(-m[b, h])) + eps))
            for d in range(V):
                out[d] *= size
    normalise(one, ys, weights, offsets, opens, ys, B * H, V, H, True, SIGMOID, 1 / V, norm_eps)


@jit
def featured_token(
    one, qkvs, query_maps, key_maps, forgets, nears, sizes, starts, counts, ys, next_counts, ends, tops, next_tops,
    B, H, G, F, K,
):  # fmt: skip
    """Learnt features e^u, e^{−u} of queries and keys, u [F/2] by their maps [H, K, F/2], in a sum with what is near.

    Queries [B, H, K], keys and values [B, G, K] side by side. C [B, H, F, K] and n [B, H, F] are `starts` and `counts`
    before and `ends` and `next_counts` after, m [B, H] `tops` and `next_tops`, in float64. near [B, H, K] is an
    average over weights with log sum `sizes` [B, H].
    """
    qkv, y, near = at(one, qkvs, (B, (H + 2 * G) * K)), at(one, ys, (B, H, K)), at(one, nears, (B, H, K))
    query_map, key_map = at(one, query_maps, (H, K, F // 2)), at(one, key_maps, (H, K, F // 2))
    size, forget = at(one, sizes, (B, H)), at(one, forgets, (B, H))
    start, C = at(one, starts, (B, H, F, K)), at(one, ends, (B, H, F, K))
    before, n = at(one, counts, (B, H, F)), at(one, next_counts, (B, H, F))
    top, m = at(1.0, tops, (B, H)), at(1.0, next_tops, (B, H))
    a, late, early = np.empty(F, y.dtype), np.empty(F, y.dtype), np.empty(F, y.dtype)
    for b in range(B):
        row = qkv[b]
        for h in range(H):
            g = h // (H // G)
            k, v = row[(H + g) * K : (H + g + 1) * K], row[(H + G + g) * K : (H + G + g + 1) * K]
            late_size = _both_exponentials(row[h * K : (h + 1) * K], query_map[h], late)
            into = np.float64(_both_exponentials(k, key_map[h], early))
            keep = max(-softplus(-np.float64(forget[b, h])), FLOOR) + top[b, h]
            m[b, h] = max(keep, into)
            kept, written = y.dtype.type(math.exp(keep - m[b, h])), y.dtype.type(math.exp(into - m[b, h]))
            fill(a, kept)
            mass, out = y.dtype.type(0), y[b, h]
            for i in range(F):
                early[i] *= written
                n[b, h, i] = kept * before[b, h, i] + early[i]
                mass += n[b, h, i] * late[i]
            write_and_read(start[b, h], a, early, v, late, C[b, h], out)
            mass = max(mass, y.dtype.type(1e-37))
            far = y.dtype.type(1 / (1 + math.exp(size[b, h] - math.log(mass) - m[b, h] - late_size)))
            for d in range(K):
                out[d] = near[b, h, d] + far * (out[d] / mass - near[b, h, d])


@jit
def _both_exponentials(x, by, out):
    """[e^u, e^{−u}] over the largest of them, u = byᵀ x; returns its logarithm."""
    half = by.shape[1]
    u, down, most = out[:half], out[half:], x.dtype.type(0)
    read(x, by, u)
    for i in range(half):
        most = max(most, abs(u[i]))
    for i in range(half):
        down[i] = decay(-u[i] - most)
    for i in range(half):
        u[i] = decay(u[i] - most)
    return most
