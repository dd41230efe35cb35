"""One token of softmax attention from what a layer projects to what it projects back, compiled for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import copy_row, dot, fill
from remanence.ops.compiled import jit
from remanence.ops.step_kernels import add, at, phases, softmax, turn


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
            _keep(old_k[b, g], k, new_k[b, g])
            for s in range(share):
                _scores(q[s], fixed_k[g * share + s], old_k[b, g], k, n, stride, weights[s])
                total = softmax(weights[s, : P + n + 1])
                if logsums:
                    logsum[b, g * share + s] = total
            _keep(old_v[b, g], v, new_v[b, g])
            for s in range(share):
                _answer(weights[s], fixed_v[g * share + s], old_v[b, g], v, n, stride, y[b, g * share + s])


@jit
def _keep(old, new, kept):
    """The last rows of `old` and then `new`, after zeros where these are fewer."""
    room, last = old.shape[0], kept.shape[0] - 1
    carried = min(room, last)
    for j in range(last - carried):
        fill(kept[j], 0)
    for j in range(carried):
        copy_row(old[room - carried + j], kept[last - carried + j])
    if last >= 0:
        copy_row(new, kept[last])


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
