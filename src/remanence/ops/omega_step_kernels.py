"""One token of matrices that write a window of tokens, between a layer's projections, compiled for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.chunk_kernels import combine, copy_row, dot, fill
from remanence.ops.compiled import jit, summing
from remanence.ops.step_kernels import activate, at, convolve, keep_last, normalise, sigmoid, unit

LANES = 32


@jit
def _lift(x, factors, degrees, shares, roots, padded, out):
    """out_f = roots[degree_f] · share_f · Π x over the factors of f; x itself where nothing is to be lifted."""
    width = x.shape[0]
    if not factors.shape[0]:
        copy_row(x, out)
        return
    copy_row(x, padded[:width])
    padded[width] = 1
    for f in range(out.shape[0]):
        product = roots[degrees[f]] * shares[f]
        for i in range(factors.shape[1]):
            product *= padded[factors[f, i]]
        out[f] = product


@summing
def _errors(row, keys, errors):
    """errors −= what the row says at each key, of one look at it for eight."""
    count, zero = keys.shape[0], row.dtype.type(0)
    whole = count - count % 8
    for i in range(0, whole, 8):
        k0, k1, k2, k3 = keys[i], keys[i + 1], keys[i + 2], keys[i + 3]
        k4, k5, k6, k7 = keys[i + 4], keys[i + 5], keys[i + 6], keys[i + 7]
        s0, s1, s2, s3, s4, s5, s6, s7 = zero, zero, zero, zero, zero, zero, zero, zero
        for f in range(row.shape[0]):
            x = row[f]
            s0 += x * k0[f]
            s1 += x * k1[f]
            s2 += x * k2[f]
            s3 += x * k3[f]
            s4 += x * k4[f]
            s5 += x * k5[f]
            s6 += x * k6[f]
            s7 += x * k7[f]
        errors[i] -= s0
        errors[i + 1] -= s1
        errors[i + 2] -= s2
        errors[i + 3] -= s3
        errors[i + 4] -= s4
        errors[i + 5] -= s5
        errors[i + 6] -= s6
        errors[i + 7] -= s7
    for i in range(whole, count):
        errors[i] -= dot(row, keys[i])


@jit
def window_token(
    one, mixes, gates, taps, tails, shares, roots, weights, opens, starts, momenta, keys, values, ys, afters,
    next_momenta, next_keys, next_values, ends, factors, degrees,
    B, H, K, F, V, c, depth, width, decays, moves, squared, most, bound, small, kind, eps,
):  # fmt: skip
    """W' = a W + S', S' = η S + Σ_j θ γ_j (v_j − W k_j) k_jᵀ over the last c keys, y = W' q; `squared`, or without W k.

    Mixed [B, 2·H·K + H·V] passes a convolution and SiLU; queries and keys a norm to unit length, and features of
    `depth` factors each, where there are any. Gates [B, H · (decays + 1 + moves + c)] are logits, those of the window
    only for c > 1; θ is `most` of its share, and each θγ at most `bound`/(c‖k‖²), unless that is 0. Momenta may be
    absent. W [B, H, V, F]; the window's keys [B, H, c − 1, F] and values. What is read passes a norm and a gate.
    """
    D, own = 2 * H * K + H * V, decays + 1 + moves
    G = H * (own + (c if c > 1 else 0))
    mixed, gate, y = at(one, mixes, (B, D)), at(one, gates, (B, G)), at(one, ys, (B, H, V))
    tap, tail, after = at(one, taps, (D, width)), at(one, tails, (B, width - 1, D)), at(one, afters, (B, width - 1, D))
    start, W = at(one, starts, (B, H, V, F)), at(one, ends, (B, H, V, F))
    held, S = at(one, momenta, (B, H, V, F)), at(one, next_momenta, (B, H, V, F))
    old_k, old_v = at(one, keys, (B, H, c - 1, F)), at(one, values, (B, H, c - 1, V))
    new_k, new_v = at(one, next_keys, (B, H, c - 1, F)), at(one, next_values, (B, H, c - 1, V))
    lifted = F if factors else 0
    factor, degree = at(np.int64(0), factors, (lifted, depth)), at(np.int64(0), degrees, (lifted,))
    share, root = at(one, shares, (lifted,)), at(one, roots, (depth + 1,))
    wide = -(-F // LANES) * LANES  # whole vectors: a remainder number by number would take as long as all the rest
    row, padded = np.empty(D, y.dtype), np.empty(K + 1, y.dtype)
    rows = -(-c // 8) * 8 if c > 2 else c  # keys of zeros change nothing
    query, near, told = np.zeros(wide, y.dtype), np.zeros((rows, wide), y.dtype), np.empty((c, V), y.dtype)
    much, errors = np.empty(c, y.dtype), np.zeros(rows, y.dtype)
    old, made = np.zeros(wide, y.dtype), np.zeros(wide, y.dtype)
    for b in range(B):
        fill(row, 0)
        convolve(tap, tail[b], mixed[b], row, after[b])
        activate(row)
        logits = gate[b]
        for h in range(H):
            q, k, v = (
                row[h * K : (h + 1) * K],
                row[(H + h) * K : (H + h + 1) * K],
                row[2 * H * K + h * V : 2 * H * K + (h + 1) * V],
            )
            unit(q, 1, small)
            unit(k, 1, small)
            _lift(q, factor, degree, share, root, padded, query[:F])
            _lift(k, factor, degree, share, root, padded, near[c - 1, :F])
            for i in range(c - 1):
                copy_row(old_k[b, h, i], near[i, :F])
                copy_row(old_v[b, h, i], told[i])
            copy_row(v, told[c - 1])
            keep_last(old_k[b, h], near[c - 1, :F], new_k[b, h])
            keep_last(old_v[b, h], v, new_v[b, h])
            keep = sigmoid(logits[h]) if decays else one
            theta = y.dtype.type(most) * sigmoid(logits[decays * H + h])
            push = sigmoid(logits[(decays + 1) * H + h]) if moves else y.dtype.type(0)
            theta *= one - push
            for i in range(c):
                by = theta * sigmoid(logits[own * H + h * c + c - 1 - i]) if c > 1 else theta
                if bound:
                    by = min(by, (one - push) * y.dtype.type(bound / c) / (dot(near[i], near[i]) + y.dtype.type(1e-12)))
                much[i] = by
            out = y[b, h]
            for e in range(V):
                before, now = start[b, h, e], W[b, h, e]
                if wide > F:
                    copy_row(before, old[:F])
                    before, now = old, made
                for i in range(c):
                    errors[i] = told[i, e]
                if squared:
                    _errors(before, near, errors)
                for i in range(c):
                    errors[i] *= much[i]
                if moves:
                    past = held[b, h, e]
                    for f in range(F):
                        now[f] = push * past[f]
                    combine(errors, near, now)
                    copy_row(now[:F], S[b, h, e])
                    for f in range(F):
                        now[f] += keep * before[f]
                else:
                    for f in range(wide):
                        now[f] = keep * before[f]
                    combine(errors, near, now)
                out[e] = dot(now, query)
                if wide > F:
                    copy_row(now[:F], W[b, h, e])
    normalise(one, ys, weights, 0, opens, ys, B * H, V, 1, False, kind, 1 / V, eps)
