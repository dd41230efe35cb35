"""One token of the memories over exponential features, between a layer's projections, compiled for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.chunk_kernels import copy_row, fill
from remanence.ops.compiled import decay, jit, summing
from remanence.ops.step_kernels import activate, add, at, convolve, keep_last, normalise, sigmoid, unit


@summing
def _alike(x, y):
    """exp(−½‖x − y‖²)."""
    far = x.dtype.type(0)
    for i in range(x.shape[0]):
        far += (x[i] - y[i]) * (x[i] - y[i])
    return decay(x.dtype.type(-0.5) * far)


@jit
def coefficients_token(
    one, mixes, taps, tails, lengths, gates, weights, opens, keys, coefficients, recents, ys, afters, nexts, next_keys,
    next_coefficients, positions, next_positions, B, H, K, width, c, room, room_after, squared, small, kind, eps,
):  # fmt: skip
    """Queries, keys and values, mixed [B, 3·H·K], pass a convolution and SiLU, the first two a norm to `lengths` [H].

    gates [B, H, c] are logits; of old keys and coefficients [B, H, room, K] each row's `positions` last are its own;
    recents [B, H, c − 1, K] are the values before. What is read passes a norm of each head and a gate.
    """
    F, before, after = 3 * H * K, (B, H, room, K), (B, H, room_after, K)
    mixed, gate, length, y = (
        at(one, mixes, (B, F)),
        at(one, gates, (B, H, c)),
        at(one, lengths, (H,)),
        at(one, ys, (B, H, K)),
    )
    tap, tail, tail_after = (
        at(one, taps, (F, width)),
        at(one, tails, (B, width - 1, F)),
        at(one, afters, (B, width - 1, F)),
    )
    old_k, old_w, new_k, new_w = (
        at(one, keys, before), at(one, coefficients, before),
        at(one, next_keys, after), at(one, next_coefficients, after),
    )  # fmt: skip
    recent, recent_after = at(one, recents, (B, H, c - 1, K)), at(one, nexts, (B, H, c - 1, K))
    position, position_after = at(np.int64(0), positions, (B,)), at(np.int64(0), next_positions, (B,))
    row, sought, found = np.empty(F, y.dtype), np.empty((c + 1, K), y.dtype), np.empty((c + 1, K), y.dtype)
    change, share = np.empty(K, y.dtype), y.dtype.type(1 / c)
    for b in range(B):
        fill(row, 0)
        convolve(tap, tail[b], mixed[b], row, tail_after[b])
        activate(row)
        held = position[b]
        position_after[b] = held + 1
        written = min(c, held + 1)
        for h in range(H):
            q, k, v = (
                row[h * K : h * K + K],
                row[(H + h) * K : (H + h + 1) * K],
                row[(2 * H + h) * K : (2 * H + h + 1) * K],
            )
            unit(q, length[h], small)
            unit(k, length[h], small)
            now_k, now_w = new_k[b, h], new_w[b, h]
            fill(change, 0)
            keep_last(old_k[b, h], k, now_k)
            keep_last(old_w[b, h], change, now_w)
            copy_row(q, sought[0])
            for j in range(written):
                copy_row(now_k[room_after - 1 - j], sought[1 + j])
            for s in range(1 + written):
                fill(found[s], 0)
            for i in range(room_after - 1 - held, room_after - 1):
                for s in range(1 + written if squared else 1):
                    add(now_w[i], _alike(sought[s], now_k[i]), found[s])
            out = y[b, h]
            copy_row(found[0], out)
            for j in range(written):
                value, known, by = recent[b, h, c - 1 - j] if j else v, found[1 + j], share * sigmoid(gate[b, h, j])
                for d in range(K):
                    change[d] = by * (value[d] - known[d])
                add(change, one, now_w[room_after - 1 - j])
                add(change, _alike(sought[0], sought[1 + j]), out)
            for j in range(c - 2):
                copy_row(recent[b, h, j + 1], recent_after[b, h, j])
            if c > 1:
                copy_row(v, recent_after[b, h, c - 2])
    normalise(one, ys, weights, 0, opens, ys, B * H, K, 1, False, kind, 1 / K, eps)
