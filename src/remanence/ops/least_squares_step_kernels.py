"""One token of decayed least squares from what a layer projects to what it projects back, compiled for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.chunk_kernels import dot, fill
from remanence.ops.compiled import jit
from remanence.ops.dplr_kernels import read
from remanence.ops.step_kernels import activate, add, at, convolve, move, normalise, sigmoid, softplus, unit


@jit
def least_squares_token(
    one, mixes, vs, gates, taps, tails, ridges, weights, opens, starts, told, ys, afters, ends, next_told,
    B, H, K, width, steps, least, small, rounding, kind, eps,
):  # fmt: skip
    """y = G'ᵀ (H' + diag λ)⁻¹ q by conjugate gradients, H' = γH + βkkᵀ and G' = γG + βkvᵀ, then a norm of each head.

    Queries and keys [B, 2·H·K] pass a convolution, SiLU and a norm to unit length (`small` is the eps); gates [B, 2H]
    are the logits of γ and β, λ = `least` + softplus(ridge [H, K]). A solution is found when its residual is
    `rounding` times the query. `starts` and `ends` are H, `told` and `next_told` G.
    """
    F, state = 2 * H * K, (B, H, K, K)
    mixed, v, y, gate = (
        at(one, mixes, (B, F)),
        at(one, vs, (B, H, K)),
        at(one, ys, (B, H, K)),
        at(one, gates, (B, 2 * H)),
    )
    tap, tail, after = at(one, taps, (F, width)), at(one, tails, (B, width - 1, F)), at(one, afters, (B, width - 1, F))
    start, S, old, new = at(one, starts, state), at(one, ends, state), at(one, told, state), at(one, next_told, state)
    ridge, row, diagonal, x = at(one, ridges, (H, K)), np.empty(F, y.dtype), np.empty(K, y.dtype), np.empty(K, y.dtype)
    r, p, image = np.empty(K, y.dtype), np.empty(K, y.dtype), np.empty(K, y.dtype)
    for b in range(B):
        fill(row, 0)
        convolve(tap, tail[b], mixed[b], row, after[b])
        activate(row)
        for h in range(H):
            q, k = row[h * K : (h + 1) * K], row[(H + h) * K : (H + h + 1) * K]
            unit(q, 1, small)
            unit(k, 1, small)
            for i in range(K):
                diagonal[i] = y.dtype.type(least) + softplus(ridge[h, i])
            keep, take = sigmoid(gate[b, h]), sigmoid(gate[b, H + h])
            for i in range(K):
                move(start[b, h, i], keep, take * k[i], k, S[b, h, i])
                move(old[b, h, i], keep, take * k[i], v[b, h], new[b, h, i])
                x[i] = q[i] / (S[b, h, i, i] + diagonal[i])
            _solve(S[b, h], diagonal, q, x, steps, rounding, r, p, image)
            read(x, new[b, h], y[b, h])
    normalise(one, ys, weights, 0, opens, ys, B * H, K, 1, False, kind, 1 / K, eps)


@jit
def _solve(S, diagonal, rhs, x, steps, rounding, r, p, image):
    """(S + diag) x = rhs from the x given, S symmetric."""
    K, enough = x.shape[0], rounding * rounding * dot(rhs, rhs)
    _product(S, diagonal, x, image)
    for i in range(K):
        r[i] = rhs[i] - image[i]
        p[i] = r[i]
    left = dot(r, r)
    for _ in range(steps):
        if not left > enough:
            break
        _product(S, diagonal, p, image)
        rate = left / dot(p, image)
        add(p, rate, x)
        add(image, -rate, r)
        now = dot(r, r)
        share = now / left
        for i in range(K):
            p[i] = r[i] + share * p[i]
        left = now


@jit
def _product(S, diagonal, x, out):
    read(x, S, out)
    for i in range(x.shape[0]):
        out[i] += diagonal[i] * x[i]
