"""One token of softmax attention from what a layer projects to what it projects back, compiled for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import copy_row, dot, fill
from remanence.ops.compiled import jit
from remanence.ops.step_kernels import activate, add, at, keep_last, phases, sigmoid, softmax, turn


@jit
def attention_token(
    one, qkvs, keys, values, prefix_keys, prefix_values, next_keys, next_values, logsums, ys,
    positions, next_positions, rates, B, H, G, K, pairs, room, next_room, reach, stride, P,
):  # fmt: skip
    """Queries [B, H, K], keys and values [B, G, K] side by side; the first 2·`pairs` features of the first two turn.

    Held are the last `room` keys and values [B, G, room, K], latest last, of which `positions` have been written; the
    last `next_room` are kept. Seen are the token itself, and of those before it the `reach` nearest that lie a
    multiple of `stride` back; and P keys and values [H, P, K] always. `logsums` [B, H] may be absent.
    """
    qkv, y, logsum = at(one, qkvs, (B, (H + 2 * G) * K)), at(one, ys, (B, H, K)), at(one, logsums, (B, H))
    old_k, old_v = at(one, keys, (B, G, room, K)), at(one, values, (B, G, room, K))
    new_k, new_v = at(one, next_keys, (B, G, next_room, K)), at(one, next_values, (B, G, next_room, K))
    fixed_k, fixed_v = at(one, prefix_keys, (H, P, K)), at(one, prefix_values, (H, P, K))
    position, after = at(np.int64(0), positions, (B,)), at(np.int64(0), next_positions, (B,))
    rate, share, most = at(1.0, rates, (pairs,)), H // G, min(reach, room // stride)
    cos, sin, scale = np.empty(pairs, y.dtype), np.empty(pairs, y.dtype), y.dtype.type(1 / math.sqrt(K))
    q, k, weights = np.empty((share, K), y.dtype), np.empty(K, y.dtype), np.empty((share, P + most + 1), y.dtype)
    for b in range(B):
        phases(position[b], rate, cos, sin)
        after[b] = position[b] + 1
        n = min(most, position[b] // stride)  # how many of those before are seen
        for g in range(G):
            for s in range(share):
                place = (g * share + s) * K
                turn(qkv[b, place : place + K], cos, sin, q[s])
                for d in range(K):
                    q[s, d] *= scale
            turn(qkv[b, (H + g) * K : (H + g + 1) * K], cos, sin, k)
            v = qkv[b, (H + G + g) * K : (H + G + g + 1) * K]
            keep_last(old_k[b, g], k, new_k[b, g])
            for s in range(share):
                _scores(q[s], fixed_k[g * share + s], old_k[b, g], k, n, stride, weights[s])
                total = softmax(weights[s, : P + n + 1])
                if logsums:
                    logsum[b, g * share + s] = total
            keep_last(old_v[b, g], v, new_v[b, g])
            for s in range(share):
                _answer(weights[s], fixed_v[g * share + s], old_v[b, g], v, n, stride, y[b, g * share + s])


@jit
def _scores(q, fixed, held, k, n, stride, out):
    P, room = fixed.shape[0], held.shape[0]
    for j in range(P):
        out[j] = dot(q, fixed[j])
    for j in range(n):
        out[P + j] = dot(q, held[room - (j + 1) * stride])
    out[P + n] = dot(q, k)


@jit
def _answer(weights, fixed, held, v, n, stride, out):
    P, room = fixed.shape[0], held.shape[0]
    fill(out, 0)
    for j in range(P):
        add(fixed[j], weights[j], out)
    for j in range(n):
        add(held[room - (j + 1) * stride], weights[P + j], out)
    add(v, weights[P + n], out)


@jit
def chunk_token(
    one, mixes, news, scales, shifts, biases, keys, values, next_keys, next_values, ys, positions, next_positions,
    B, D, K, V, C,
):  # fmt: skip
    """Attention to the open chunk: mixed [B, D + K + V + D] are u, z, r and h; y [B, V] is gated by SiLU(r).

    Queries and keys are SiLU(z) by `scales` [2, K] and `shifts`, values SiLU(new) [B, V]; `biases` [C] go by distance.
    """
    mixed, new, y = at(one, mixes, (B, 2 * D + K + V)), at(one, news, (B, V)), at(one, ys, (B, V))
    scale, shift, bias = at(one, scales, (2, K)), at(one, shifts, (2, K)), at(one, biases, (C,))
    old_k, old_v = at(one, keys, (B, C, K)), at(one, values, (B, C, V))
    new_k, new_v = at(one, next_keys, (B, C, K)), at(one, next_values, (B, C, V))
    position, after = at(np.int64(0), positions, (B,)), at(np.int64(0), next_positions, (B,))
    z, q, k, v = np.empty(K, y.dtype), np.empty(K, y.dtype), np.empty(K, y.dtype), np.empty(V, y.dtype)
    gate, weights, by = np.empty(V, y.dtype), np.empty(C, y.dtype), y.dtype.type(1 / math.sqrt(K))
    for b in range(B):
        slot, out = position[b] % C, y[b]
        after[b] = position[b] + 1
        copy_row(mixed[b, D : D + K], z)
        copy_row(mixed[b, D + K : D + K + V], gate)
        copy_row(new[b], v)
        activate(z)
        activate(gate)
        activate(v)
        for i in range(K):
            q[i] = by * (scale[0, i] * z[i] + shift[0, i])
            k[i] = scale[1, i] * z[i] + shift[1, i]
        for j in range(slot):
            weights[j] = dot(q, old_k[b, j]) + bias[slot - j]
        weights[slot] = dot(q, k) + bias[0]
        softmax(weights[: slot + 1])
        fill(out, 0)
        for j in range(slot):
            add(old_v[b, j], weights[j], out)
        add(v, weights[slot], out)
        for i in range(V):
            out[i] *= gate[i]
        left = slot if slot < C - 1 else -1  # a full chunk is closed
        _append(old_k[b], k, left, new_k[b])
        _append(old_v[b], v, left, new_v[b])


@jit
def _append(old, new, count, kept):
    """The first `count` rows of `old`, then `new` unless `count` is below 0, then zeros."""
    if count >= 0:
        copy_row(old[:count].reshape(-1), kept[:count].reshape(-1))
        copy_row(new, kept[count])
    fill(kept[count + 1 :].reshape(-1), 0)


@jit
def update_token(one, xs, mixes, founds, ys, B, D, between):
    """y [B, D] = x + σ(u) ⊙ (SiLU(h + found) − x): u the first of `mixes` [B, D + between + D], h the last."""
    x, found, y, mixed = (
        at(one, xs, (B, D)),
        at(one, founds, (B, D)),
        at(one, ys, (B, D)),
        at(one, mixes, (B, 2 * D + between)),
    )
    for b in range(B):
        now, u, out = x[b], mixed[b, :D], y[b]
        for d in range(D):
            out[d] = mixed[b, D + between + d] + found[b, d]
        activate(out)
        for d in range(D):
            out[d] = now[d] + sigmoid(u[d]) * (out[d] - now[d])
