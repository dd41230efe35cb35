"""One token of the delta rules from what a layer projects to what it projects back, compiled for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import copy_row, dot, fill
from remanence.ops.compiled import decay, jit
from remanence.ops.dplr_kernels import read
from remanence.ops.step_kernels import activate, add, at, convolve, normalise, read_both, sigmoid, softplus


@jit
def _decays(step, bias, rate, bound, a):
    """a = exp of −exp(rate)·softplus(step + bias), or of bound·σ(exp(rate)·(step + bias)): one, or one per feature."""
    speed, limit = a.dtype.type(math.exp(rate)), a.dtype.type(bound)
    n = step.shape[0]
    if bound == 0:
        for i in range(n):
            a[i] = -speed * softplus(step[i] + bias[i])
    else:
        for i in range(n):
            a[i] = limit * sigmoid(speed * (step[i] + bias[i]))
    for i in range(n):
        a[i] = decay(a[i])
    if n == 1:
        fill(a, a[0])


@jit
def _strengths(k, logits, most, exact, eps, early, betas):
    """Keys, and how much of its error each write corrects: a σ of the logit, or with any keys the exact step."""
    for j in range(k.shape[0]):
        key, out = k[j], early[j]
        square = dot(key, key)
        beta = most / (1 + math.exp(-logits[j]))
        by = k.dtype.type(1)
        if exact:
            square = max(square, k.dtype.type(1e-12))  # as the key vanishes, the exact strength becomes β
            beta = -math.expm1(-beta * square) / square
        else:
            by = k.dtype.type(1 / math.sqrt(square + eps))
        betas[j] = beta
        for i in range(key.shape[0]):
            out[i] = key[i] * by


@jit
def _see(start, a, sought, seen, found):
    """found [n, V] = what `start`, decayed by a, holds at each of `sought` [n, K]."""
    n, K = sought.shape
    for j in range(n):
        now, wanted = seen[j], sought[j]
        for i in range(K):
            now[i] = a[i] * wanted[i]
    for j in range(0, n - 1, 2):
        read_both(seen[j], seen[j + 1], start, found[j], found[j + 1])
    if n % 2:
        read(seen[n - 1], start, found[n - 1])


@jit
def _write_all(start, a, early, errors, S):
    """S = Diag(a) start + Σ_j early_j error_jᵀ, of one look at S."""
    for i in range(S.shape[0]):
        before, now, first, keep, x = start[i], S[i], errors[0], a[i], early[0, i]
        for d in range(now.shape[0]):
            now[d] = keep * before[d] + x * first[d]
        for j in range(1, early.shape[0]):
            add(errors[j], early[j, i], now)


@jit
def delta_token(
    one, qs, kvs, taps, tails, betas, steps, rates, biases, weights, gates, starts, ys, afters, ends,
    B, heads, M, K, V, width, writes, decays, bound, most, exact, small, parts, kind, eps,
):  # fmt: skip
    """q [B, heads·K] and kv [B, n·(heads·K + M·V)] pass a convolution and SiLU; n = `writes`.

    beta [B, n·M] and step [B, M, decays] are logits, rate [M] and bias [M, decays] the decay's parameters. `small` is
    the eps of the L2 norm, `eps` that of the norm of what was read, where it has
    `parts`, whose weight [V] and gate [B, M·V] may be absent.
    """
    keys = heads * K
    D = keys + writes * (keys + M * V)
    q, kv, beta = at(one, qs, (B, keys)), at(one, kvs, (B, D - keys)), at(one, betas, (B, writes, M))
    tap, tail, after = at(one, taps, (D, width)), at(one, tails, (B, width - 1, D)), at(one, afters, (B, width - 1, D))
    step, rate, bias = at(one, steps, (B, M, decays)), at(one, rates, (M,)), at(one, biases, (M, decays))
    start, S, y = at(one, starts, (B, M, K, V)), at(one, ends, (B, M, K, V)), at(one, ys, (B, M, V))
    new, mixed, a = np.empty(D, y.dtype), np.empty(D, y.dtype), np.empty(K, y.dtype)
    sought, seen = np.empty((writes + 1, K), y.dtype), np.empty((writes + 1, K), y.dtype)
    found, errors = np.empty((writes + 1, V), y.dtype), np.empty((writes, V), y.dtype)
    strengths, logits, each = np.empty(writes, y.dtype), np.empty(writes, y.dtype), np.empty((writes, K), y.dtype)
    share = M // heads
    early, late = sought[:writes], sought[writes]
    fill(a, 1)
    for b in range(B):
        copy_row(q[b], new[:keys])
        copy_row(kv[b], new[keys:])
        fill(mixed, 0)
        convolve(tap, tail[b], new, mixed, after[b])
        activate(mixed)
        for m in range(M):
            place, values = m // share * K, keys * (1 + writes) + m * V
            if m % share == 0:
                query = mixed[place : place + K]
                by = y.dtype.type(1 / math.sqrt(K * (dot(query, query) + small)))
                for i in range(K):
                    late[i] = query[i] * by
            for j in range(writes):
                copy_row(mixed[(1 + j) * keys + place : (1 + j) * keys + place + K], each[j])
                logits[j] = beta[b, j, m]
            _strengths(each, logits, most, exact, small, early, strengths)
            if decays:
                _decays(step[b, m], bias[m], rate[m], bound, a)
            _see(start[b, m], a, sought, seen, found)
            out = y[b, m]
            copy_row(found[writes], out)
            for j in range(writes):
                value, error, known = mixed[values + j * M * V : values + j * M * V + V], errors[j], found[j]
                for i in range(j):  # what this token has written so far
                    add(errors[i], dot(early[i], early[j]), known)
                for d in range(V):
                    error[d] = strengths[j] * (value[d] - known[d])
                add(error, dot(late, early[j]), out)
            _write_all(start[b, m], a, early, errors, S[b, m])
    if parts:
        normalise(one, ys, weights, 0, gates, ys, B * M, V, 1, False, kind, 1 / V, eps)
