"""One token of Mamba-2, of the RWKVs and of JRT between the projections of a layer, compiled for the CPU.

Tensors come as in `step_kernels`, whose recurrences these call; `rooms` is space to work in.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import copy_row, dot, fill
from remanence.ops.compiled import decay, jit
from remanence.ops.dplr_kernels import read
from remanence.ops.step_kernels import (
    SILU,
    activate,
    at,
    convolve,
    normalise,
    read_before_write,
    replacement_token,
    sigmoid,
    softmax_scan,
    state_space_token,
    write_and_read,
)


@jit
def _tanh(x):
    for i in range(x.shape[0]):
        x[i] = 2 * sigmoid(2 * x[i]) - 1


@jit
def _sigmoid(x):
    for i in range(x.shape[0]):
        x[i] = sigmoid(x[i])


@jit
def _map(weight, x, out):
    """out = weight x, weight [out, in]."""
    for i in range(out.shape[0]):
        out[i] = dot(weight[i], x)


@jit
def mamba2(
    one, projections, tails, taps, tap_biases, biases, rates, skips, scales, starts, rooms, ys, afters, ends,
    B, H, G, K, V, width, least, most, groups, eps,
):  # fmt: skip
    """`projections` [B, 2·H·V + 2·G·K + H]: z, what passes the convolution `taps`, and the steps' logits."""
    inner, D = H * V, H * V + 2 * G * K
    given, room = at(one, projections, (B, inner + D + H)), at(one, rooms, (D,))
    tail, after = at(one, tails, (B, width - 1, D)), at(one, afters, (B, width - 1, D))
    tap, tap_bias, size = at(one, taps, (D, width)), at(one, tap_biases, (D,)), room.itemsize
    for b in range(B):
        if tap_biases:
            copy_row(tap_bias, room)
        else:
            fill(room, 0)
        convolve(tap, tail[b], given[b, inner : inner + D], room, after[b])
        activate(room)
        row, held = projections + b * (inner + D + H) * size, b * inner * K * size
        state_space_token(
            one, rooms, row, row + (inner + D) * size, biases, rates, skips, starts + held, ys + b * inner * size,
            ends + held, 1, H, G, K, V, least, most,
        )  # fmt: skip
    normalise(one, ys, scales, 0, 0, ys, B * groups, inner // groups, groups, False, 0, groups / inner, eps)


@jit
def rwkv_blends(one, xs, lasts, mixes, newests, ys, n, B, D):
    """y [n, B, D] = x' + (x − x') ⊙ mix, mix [n, D], and x as the next last token x'."""
    x, last, newest = at(one, xs, (B, D)), at(one, lasts, (B, D)), at(one, newests, (B, D))
    mix, y = at(one, mixes, (n, D)), at(one, ys, (n, B, D))
    for b in range(B):
        now, before = x[b], last[b]
        copy_row(now, newest[b])
        for i in range(n):
            share, out = mix[i], y[i, b]
            for d in range(D):
                out[d] = before[d] + (now[d] - before[d]) * share[d]


@jit
def rwkv(one, ks, vs, rs, logs, bonuses, sums, sizes, rooms, ys, next_sums, next_sizes, tops, next_tops, B, D):
    """`softmax_scan` gated by σ(r) [B, D]; `logs` are those of the rates [D]."""
    r, y, log, rate = at(one, rs, (B, D)), at(one, ys, (B, D)), at(one, logs, (D,)), at(one, rooms, (D,))
    for d in range(D):
        rate[d] = -decay(log[d])
    softmax_scan(one, ks, vs, rooms, bonuses, sums, sizes, ys, next_sums, next_sizes, tops, next_tops, B, D)
    for b in range(B):
        out, gate = y[b], r[b]
        for d in range(D):
            out[d] *= sigmoid(gate[d])


@jit
def rwkv6_blends(one, xs, lasts, alls, downs, mixes, ups, newests, ys, n, R, B, D):
    """y [n, B, D] = x + (x' − x) ⊙ (mix + tanh((x + (x' − x) ⊙ all) down) up), and x as the next last token x'.

    all [D], down [D, n·R], mix [n, D], up [n, R, D]."""
    x, last, newest = at(one, xs, (B, D)), at(one, lasts, (B, D)), at(one, newests, (B, D))
    share, down, mix = at(one, alls, (D,)), at(one, downs, (D, n * R)), at(one, mixes, (n, D))
    up, y = at(one, ups, (n, R, D)), at(one, ys, (n, B, D))
    rough, chosen = np.empty(D, y.dtype), np.empty(n * R, y.dtype)
    for b in range(B):
        now, before = x[b], last[b]
        copy_row(now, newest[b])
        for d in range(D):
            rough[d] = now[d] + (before[d] - now[d]) * share[d]
        read(rough, down, chosen)
        _tanh(chosen)
        for i in range(n):
            out, base = y[i, b], mix[i]
            read(chosen[i * R : (i + 1) * R], up[i], out)
            for d in range(D):
                out[d] = now[d] + (before[d] - now[d]) * (base[d] + out[d])


@jit
def rwkv6(
    one, ws, downs, ups, bases, rs, ks, vs, gates, bonuses, weights, biases, starts, rooms, ys, ends, B, H, K, R, eps
):
    """`read_before_write` with log decays −exp(base + tanh(w down) up), normalised by head and gated by SiLU.

    w [B, H·K], down [H·K, R], up [R, H·K]."""
    D = H * K
    w, down, up, base = at(one, ws, (B, D)), at(one, downs, (D, R)), at(one, ups, (R, D)), at(one, bases, (D,))
    log_decay, inner = at(one, rooms, (B, D)), np.empty(R, base.dtype)
    for b in range(B):
        out = log_decay[b]
        read(w[b], down, inner)
        _tanh(inner)
        read(inner, up, out)
        for d in range(D):
            out[d] = -decay(base[d] + out[d])
    read_before_write(one, rs, ks, vs, rooms, bonuses, starts, ys, ends, B, H, K, K)
    normalise(one, ys, weights, biases, gates, ys, B * H, K, H, True, SILU, 1 / K, eps)


@jit
def rwkv7(
    one, ws, ins, gates, rs, ks, vs, decay_downs, decay_ups, decay_bases, rate_downs, rate_ups, rate_bases,
    gate_downs, gate_ups, removals, replacements, bonuses, weights, biases, starts, rooms, ys, ends,
    B, H, K, slow, quick, broad, lowest, eps,
):  # fmt: skip
    """`replacement_token` from the blends w, a and g and from r, k and v, all [B, H·K], normalised by head and gated.

    The logits of decay (rank `slow`), rate (`quick`) and gate (`broad`) are up · f(down · blend) + base, f being tanh,
    nothing and σ."""
    D = H * K
    w, a, g, y = at(one, ws, (B, D)), at(one, ins, (B, D)), at(one, gates, (B, D)), at(one, ys, (B, D))
    first_down, first_up, first = (
        at(one, decay_downs, (slow, D)), at(one, decay_ups, (D, slow)), at(one, decay_bases, (D,)),
    )  # fmt: skip
    second_down, second_up, second = (
        at(one, rate_downs, (quick, D)), at(one, rate_ups, (D, quick)), at(one, rate_bases, (D,)),
    )  # fmt: skip
    gate_down, gate_up, room = at(one, gate_downs, (broad, D)), at(one, gate_ups, (D, broad)), at(one, rooms, (3, B, D))
    inner, size = np.empty(max(slow, quick, broad), y.dtype), room.itemsize
    for b in range(B):
        logits, rate = room[0, b], room[1, b]
        _map(first_down, w[b], inner[:slow])
        _tanh(inner[:slow])
        _map(first_up, inner[:slow], logits)
        _map(second_down, a[b], inner[:quick])
        _map(second_up, inner[:quick], rate)
        for d in range(D):
            logits[d] += first[d]
            rate[d] += second[d]
    replacement_token(
        one, rs, ks, vs, rooms, rooms + B * D * size, removals, replacements, bonuses, starts, ys,
        rooms + 2 * B * D * size, ends, B, H, K, lowest,
    )  # fmt: skip
    normalise(one, ys, weights, biases, 0, ys, B * H, K, H, True, 0, 1 / K, eps)
    for b in range(B):
        out, own, gate = y[b], room[2, b], room[0, b]
        _map(gate_down, g[b], inner[:broad])
        _sigmoid(inner[:broad])
        _map(gate_up, inner[:broad], gate)
        for d in range(D):
            out[d] = (out[d] + own[d]) * gate[d]


@jit
def _taylor(x, out):
    """1, x, x²/√2 and the products of features ever further apart, of x over the fourth root of its width."""
    d, scale, half = x.shape[0], x.dtype.type(x.shape[0] ** -0.25), x.dtype.type(math.sqrt(0.5))
    out[0] = 1
    for i in range(d):
        out[1 + i] = scale * x[i]
    near, place = out[1 : d + 1], d + 1
    for apart in range(d):
        by, row = half if apart == 0 else x.dtype.type(1), out[place : place + d - apart]
        for i in range(d - apart):
            row[i] = by * near[i] * near[i + apart]
        place += d - apart


@jit
def taylor(one, qks, vs, starts, ys, ends, B, H, d, V, eps):
    """Linear attention over second-order features, each answer over that of a value of 1: qk [B, 2, H, d]."""
    F = 1 + d + d * (d + 1) // 2
    qk, v, y = at(one, qks, (B, 2, H, d)), at(one, vs, (B, H, V)), at(one, ys, (B, H, V))
    start, S = at(one, starts, (B, H, F, V + 1)), at(one, ends, (B, H, F, V + 1))
    late, early, a = np.empty(F, y.dtype), np.empty(F, y.dtype), np.ones(F, y.dtype)
    new, found = np.ones(V + 1, y.dtype), np.empty(V + 1, y.dtype)
    for b in range(B):
        for h in range(H):
            _taylor(qk[b, 0, h], late)
            _taylor(qk[b, 1, h], early)
            copy_row(v[b, h], new[:V])
            write_and_read(start[b, h], a, early, new, late, S[b, h], found)
            out, by = y[b, h], one / (found[V] + y.dtype.type(eps))
            for j in range(V):
                out[j] = found[j] * by
