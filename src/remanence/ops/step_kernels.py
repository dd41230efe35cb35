"""One token of each recurrence, compiled for the CPU. Axes: B batch, H heads, D features, K of keys, V of values.

Tensors are contiguous and keep their time axis of one. No array is altered but the outputs, which come last.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import copy_row, dot, fill
from remanence.ops.compiled import decay, jit, sigmoid_and_silu
from remanence.ops.dplr_kernels import read, write


@jit
def _sigmoid(x):
    return sigmoid_and_silu(x)[0]


@jit
def _add(x, scale, out):
    for d in range(out.shape[0]):
        out[d] += scale * x[d]


@jit
def conv(tail, x, weight, bias, biased, silu, y, after):
    """weight [D, width]."""
    D, width = weight.shape
    for b in range(x.shape[0]):
        new, out = x[b, 0], y[b, 0]
        for d in range(D):
            out[d] = weight[d, width - 1] * new[d] + (bias[d] if biased else 0)
        for j in range(width - 1):
            old = tail[b, j]
            for d in range(D):
                out[d] += weight[d, j] * old[d]
        if silu:
            for d in range(D):
                out[d] = sigmoid_and_silu(out[d])[1]
        for j in range(width - 2):
            copy_row(tail[b, j + 1], after[b, j])
        if width > 1:
            copy_row(new, after[b, width - 2])


@jit
def normalise(x, weight, weighted, gate, gated, share, eps, y):
    """Rows [n, width]."""
    for i in range(x.shape[0]):
        row, out = x[i], y[i]
        r = x.dtype.type(1 / math.sqrt(share * dot(row, row) + eps))
        for d in range(row.shape[0]):
            out[d] = row[d] * r
        if weighted:
            for d in range(row.shape[0]):
                out[d] *= weight[d]
        if gated:
            g = gate[i]
            for d in range(row.shape[0]):
                out[d] *= sigmoid_and_silu(g[d])[1]


@jit
def scan(g, b, start, h):
    """g, b [B, 1, D]; h [B, D]."""
    for i in range(b.shape[0]):
        a, new, before, now = g[i, 0], b[i, 0], start[i], h[i]
        for d in range(new.shape[0]):
            now[d] = decay(a[d]) * before[d] + new[d]


@jit
def min_gru(z, gates, start, h):
    """z [B, 1, (gates + 1)·D]: the logits of the gates, and the candidate."""
    D = h.shape[1]
    for i in range(h.shape[0]):
        row, before, now = z[i, 0], start[i], h[i]
        first, candidate = row[:D], row[gates * D :]
        for d in range(D):
            now[d] = _sigmoid(first[d])
        if gates == 2:  # the first forgets, the second writes
            second = row[D : 2 * D]
            for d in range(D):
                share = _sigmoid(second[d])
                now[d] = share / (share + now[d])
        for d in range(D):
            x = candidate[d]
            new = x + 0.5 if x >= 0 else _sigmoid(x)
            now[d] = before[d] + now[d] * (new - before[d])


@jit
def rg_lru(u, decay_logit, input_logit, rate, empty, start, h):
    """u and the logits [B, 1, D]; rate [D] ≥ 0: a = exp(−8 σ(decay) rate), and h = a h + √(1 − a²) σ(input) u."""
    for i in range(h.shape[0]):
        new, first, second, before, now = u[i, 0], decay_logit[i, 0], input_logit[i, 0], start[i], h[i]
        for d in range(new.shape[0]):
            now[d] = -8 * _sigmoid(first[d]) * rate[d]
        for d in range(new.shape[0]):
            scale = 1.0 if empty[i] else math.sqrt(-math.expm1(2 * now[d]))
            now[d] = decay(now[d]) * before[d] + scale * _sigmoid(second[d]) * new[d]


@jit
def _write(start, decays, k, new, S):
    """S = Diag(decays) start + k newᵀ."""
    for i in range(S.shape[0]):
        before, now, a, x = start[i], S[i], decays[i], k[i]
        for d in range(new.shape[0]):
            now[d] = a * before[d] + x * new[d]


@jit
def linear_attention(q, k, v, g, decays, start, y, S):
    """`decays`, and the last axis of g: none, one for the head, or one per key feature."""
    K = k.shape[3]
    a, seen = np.empty(K, v.dtype), np.empty(K, v.dtype)
    fill(a, 1.0)
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            late, early, new, out = q[b, h, 0], k[b, h, 0], v[b, h, 0], y[b, h, 0]
            if decays == 1:
                fill(a, decay(g[b, h, 0, 0]))
            elif decays > 1:
                rates = g[b, h, 0]
                for i in range(K):
                    a[i] = decay(rates[i])
            for i in range(K):
                seen[i] = late[i] * a[i]
            read(seen, start[b, h], out)
            _add(new, dot(late, early), out)
            _write(start[b, h], a, early, new, S[b, h])


@jit
def _delta(late, early, new, beta, a, start, error, decays, out, S):
    """One head: S = a (start − …) with the part of `new` that it did not foresee, read at `late`."""
    read(early, start, error)
    for d in range(new.shape[0]):
        error[d] = beta * (new[d] - a * error[d])
    read(late, start, out)
    same = dot(late, early)
    for d in range(new.shape[0]):
        out[d] = a * out[d] + same * error[d]
    fill(decays, a)
    _write(start, decays, early, error, S)


@jit
def gated_delta_rule(q, k, v, beta, g, decayed, start, y, S):
    """beta, g [B, H, 1]."""
    error, decays = np.empty(v.shape[3], v.dtype), np.empty(k.shape[3], v.dtype)
    for b in range(k.shape[0]):
        for h in range(k.shape[1]):
            a = decay(g[b, h, 0]) if decayed else v.dtype.type(1)
            late, early, new, out = q[b, h, 0], k[b, h, 0], v[b, h, 0], y[b, h, 0]
            _delta(late, early, new, beta[b, h, 0], a, start[b, h], error, decays, out, S[b, h])


@jit
def gated_delta_token(mixed, heads, beta, most, step, rate, bias, decayed, eps, start, y, S):
    """The same from what the layer projects: queries, keys and values side by side, logits of β and of the decay."""
    K, V = start.shape[2:]
    error, decays = np.empty(V, y.dtype), np.empty(K, y.dtype)
    late, early = np.empty(K, y.dtype), np.empty(K, y.dtype)
    share = start.shape[1] // heads
    for b in range(start.shape[0]):
        row = mixed[b, 0]
        for m in range(start.shape[1]):
            at = m // share * K
            q, k = row[at : at + K], row[heads * K + at : heads * K + at + K]
            new = row[2 * heads * K + m * V : 2 * heads * K + (m + 1) * V]
            if m % share == 0:
                by_q = y.dtype.type(1 / math.sqrt(K * (dot(q, q) + eps)))
                by_k = y.dtype.type(1 / math.sqrt(dot(k, k) + eps))
                for i in range(K):
                    late[i] = q[i] * by_q
                    early[i] = k[i] * by_k
            a = y.dtype.type(1)
            if decayed:
                z = step[b, 0, m] + bias[m]
                z = z if z > 20 else math.log1p(math.exp(z))
                a = decay(y.dtype.type(-math.exp(rate[m]) * z))
            strength = y.dtype.type(most / (1 + math.exp(-beta[b, 0, m])))
            _delta(late, early, new, strength, a, start[b, m], error, decays, y[b, m, 0], S[b, m])


@jit
def dplr(q, k, v, a, b, g, decayed, start, y, S):
    K = k.shape[3]
    found, decays, seen = np.empty(v.shape[3], v.dtype), np.empty(K, v.dtype), np.empty(K, v.dtype)
    fill(decays, 1.0)
    for n in range(k.shape[0]):
        for h in range(k.shape[1]):
            late, early, new, out, along = q[n, h, 0], k[n, h, 0], v[n, h, 0], y[n, h, 0], b[n, h, 0]
            if decayed:
                rates = g[n, h, 0]
                for i in range(K):
                    decays[i] = decay(rates[i])
            read(a[n, h, 0], start[n, h], found)
            for i in range(K):
                seen[i] = late[i] * decays[i]
            read(seen, start[n, h], out)
            _add(new, dot(late, early), out)
            _add(found, dot(late, along), out)
            write(start[n, h], S[n, h], found, early, new, along, decays)


@jit
def selective_scan(x, delta, A, squared, B, C, start, y, h):
    """x, delta [B, 1, D]; A [D, N], or none where the decay is 1 − Δ B² (`squared`); B, C [B, 1, N]; h [B, D, N]."""
    for b in range(x.shape[0]):
        into, out_of = B[b, 0], C[b, 0]
        for d in range(x.shape[2]):
            step, before, now = delta[b, 0, d], start[b, d], h[b, d]
            u = step * x[b, 0, d]
            if squared:
                for n in range(into.shape[0]):
                    now[n] = (1 - step * into[n] * into[n]) * before[n] + u * into[n]
            else:
                rate = A[d]
                for n in range(into.shape[0]):
                    now[n] = decay(step * rate[n]) * before[n] + u * into[n]
            y[b, 0, d] = dot(now, out_of)
