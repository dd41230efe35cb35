"""One token of the cells whose state is a vector, from what a layer projects to what it projects back, for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import copy_row, fill
from remanence.ops.compiled import decay, jit, sigmoid_and_silu
from remanence.ops.dplr_kernels import read
from remanence.ops.step_kernels import SILU, add, at, convolve, lost, normalise, sigmoid, softplus


@jit
def tied(logits, least, a, early):
    """Keeps γ + (1 − γ) σ(f) and writes the rest, (1 − γ) σ(−f), which has its digits also where it is little."""
    one = a.dtype.type(1)
    for i in range(a.shape[0]):
        early[i] = (one - least[i]) * sigmoid(-logits[i])
    for i in range(a.shape[0]):
        a[i] = least[i] + (one - least[i]) * sigmoid(logits[i])


@jit
def tied_token(one, forgets, candidates, lowest, weights, gates, starts, hs, ys, B, D, bound, eps):
    """h = a h + (1 − a) SiLU(candidate), read through RMS norm and SiLU of a gate. All [B, D] but `lowest` and weight.

    What is kept, a, is at least `lowest` [D], or `bound` where that is absent.
    """
    forget, candidate, start = at(one, forgets, (B, D)), at(one, candidates, (B, D)), at(one, starts, (B, D))
    h = at(one, hs, (B, D))
    least, a, write = np.empty(D, h.dtype), np.empty(D, h.dtype), np.empty(D, h.dtype)
    fill(least, bound)
    if lowest:
        copy_row(at(one, lowest, (D,)), least)
    for b in range(B):
        before, now, new = start[b], h[b], candidate[b]
        tied(forget[b], least, a, write)
        for d in range(D):
            now[d] = a[d] * before[d] + write[d] * sigmoid_and_silu(new[d])[1]
    normalise(one, hs, weights, 0, gates, ys, B, D, 1, False, SILU, 1 / D, eps)


@jit
def min_gru(one, zs, starts, hs, B, D, gates):
    """z [B, (gates + 1)·D]: the logits of the gates, and the candidate; h [B, D]."""
    z, start, h = at(one, zs, (B, (gates + 1) * D)), at(one, starts, (B, D)), at(one, hs, (B, D))
    half = one / (one + one)
    for i in range(B):
        row, before, now = z[i], start[i], h[i]
        first, candidate = row[:D], row[gates * D :]
        for d in range(D):
            now[d] = sigmoid(first[d])
        if gates == 2:  # the first forgets, the second writes
            second = row[D : 2 * D]
            for d in range(D):
                share = sigmoid(second[d])
                now[d] = share / (share + now[d])
        for d in range(D):
            x = candidate[d]
            low = sigmoid(x)
            new = x + half if x >= 0 else low
            now[d] = before[d] + now[d] * (new - before[d])


@jit
def _blocks(x, weight, bias, y):
    """y [blocks, size] = x of a block times its matrix, weight [blocks, in, out], plus bias."""
    for n in range(x.shape[0]):
        read(x[n], weight[n], y[n])
        add(bias[n], bias.dtype.type(1), y[n])


@jit
def rg_lru_token(
    one, mixes, taps, offsets, tails, decay_maps, decay_biases, input_maps, input_biases, bases, starts,
    afters, ys, hs, empties, B, blocks, size, width,
):  # fmt: skip
    """a = exp(−8 σ(decay) softplus(base)), h = a h + √(1 − a²) σ(input) u, both logits linear in u, block by block.

    mixed [B, 2·D]: what h is gated by, after GeLU, and u before its convolution of so many taps. y and h [B, D], base
    [D], maps [blocks, in, out]; empty [B], a byte each.
    """
    D, maps = blocks * size, (blocks, size, size)
    mixed, start, h, y = at(one, mixes, (B, 2 * D)), at(one, starts, (B, D)), at(one, hs, (B, D)), at(one, ys, (B, D))
    tap, offset, base = at(one, taps, (D, width)), at(one, offsets, (D,)), at(one, bases, (D,))
    tail, after = at(one, tails, (B, width - 1, D)), at(one, afters, (B, width - 1, D))
    slow, slow_bias = at(one, decay_maps, maps), at(one, decay_biases, (blocks, size))
    take, take_bias = at(one, input_maps, maps), at(one, input_biases, (blocks, size))
    first, second, parts = (
        np.empty((blocks, size), h.dtype),
        np.empty((blocks, size), h.dtype),
        np.empty(maps[:2], h.dtype),
    )
    double, variance, empty = np.empty(D, h.dtype), np.empty(D, h.dtype), at(np.uint8(0), empties, (B,))
    new, forget, into = parts.reshape(D), first.reshape(D), second.reshape(D)
    for i in range(B):
        before, now, out, branch = start[i], h[i], y[i], mixed[i, :D]
        fill(new, 0)
        if offsets:
            copy_row(offset, new)
        convolve(tap, tail[i], mixed[i, D:], new, after[i])
        _blocks(parts, slow, slow_bias, first)
        _blocks(parts, take, take_bias, second)
        for d in range(D):
            now[d] = h.dtype.type(-8) * sigmoid(forget[d]) * softplus(base[d])
        for d in range(D):
            double[d] = now[d] + now[d]
        lost(double, variance)
        for d in range(D):
            scale = one if empty[i] else np.sqrt(variance[d])
            now[d] = decay(now[d]) * before[d] + scale * sigmoid(into[d]) * new[d]
        _gelu(branch, out)
        for d in range(D):
            out[d] *= now[d]


@jit
def _gelu(x, out):
    """Its tanh approximation: x σ(2√(2/π) (x + 0.044715 x³))."""
    a, b = out.dtype.type(math.sqrt(8 / math.pi)), out.dtype.type(math.sqrt(8 / math.pi) * 0.044715)
    for d in range(x.shape[0]):
        out[d] = x[d] * sigmoid(x[d] * (a + b * x[d] * x[d]))


@jit
def one_query_token(one, keys, values, queries, starts, sums, ys, next_sums, ws, tops, next_tops, B, H, K):
    """A running softmax of queries [H, K] that never change: key, value, y and w [B, H, K], u [B, H], m float64 [B, H].

    `starts` and `sums` are w and u before, `ws` and `next_sums` after, `tops` and `next_tops` m.
    """
    key, value, query = at(one, keys, (B, H, K)), at(one, values, (B, H, K)), at(one, queries, (H, K))
    w, new_w, y = at(one, starts, (B, H, K)), at(one, ws, (B, H, K)), at(one, ys, (B, H, K))
    u, new_u, m, new_m = (
        at(one, sums, (B, H)),
        at(one, next_sums, (B, H)),
        at(1.0, tops, (B, H)),
        at(1.0, next_tops, (B, H)),
    )
    for b in range(B):
        for h in range(H):
            score = 0.0
            for i in range(K):
                score += key[b, h, i] * query[h, i]
            score /= math.sqrt(K)
            new_m[b, h] = max(m[b, h], score)
            past, present = one * decay(m[b, h] - new_m[b, h]), one * decay(score - new_m[b, h])
            past, present = y.dtype.type(past), y.dtype.type(present)
            new_u[b, h] = past * u[b, h] + present
            by = one / new_u[b, h]
            before, now, seen, out = w[b, h], new_w[b, h], value[b, h], y[b, h]
            for i in range(K):
                now[i] = past * before[i] + present * seen[i]
            for i in range(K):
                out[i] = by * now[i]


@jit
def turning_token(one, mixes, transitions, gates, starts, ys, ends, B, D):
    """h = a h + k v, y = q Re(h) SiLU(gate), of complex a = σ(|w|) w / |w|.

    Queries, keys and values side by side [B, 3·D]; w [B, 2·D], its real parts first; gate and y [B, D], h [B, D, 2].
    """
    mixed, transition = at(one, mixes, (B, 3 * D)), at(one, transitions, (B, 2 * D))
    gate, y = at(one, gates, (B, D)), at(one, ys, (B, D))
    start, h = at(one, starts, (B, D, 2)), at(one, ends, (B, D, 2))
    tiny, re, im = y.dtype.type(1e-12), np.empty(D, y.dtype), np.empty(D, y.dtype)
    for b in range(B):
        w, row, out, open_ = transition[b], mixed[b], y[b], gate[b]
        for d in range(D):
            square = w[d] * w[d] + w[D + d] * w[D + d]
            size = np.sqrt(square)
            share = sigmoid(np.sqrt(square + tiny)) / (size if size > 0 else one)
            re[d], im[d] = share * (w[d] if size > 0 else one), share * w[D + d]
        for d in range(D):
            x, z = start[b, d, 0], start[b, d, 1]
            h[b, d, 0] = re[d] * x - im[d] * z + row[D + d] * row[2 * D + d]
            h[b, d, 1] = im[d] * x + re[d] * z
            out[d] = row[d] * h[b, d, 0]
        for d in range(D):
            out[d] *= sigmoid_and_silu(open_[d])[1]
