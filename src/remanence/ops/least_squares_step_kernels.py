"""One token of decayed least squares from what a layer projects to what it projects back, compiled for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import copy_row, dot, fill
from remanence.ops.compiled import jit
from remanence.ops.dplr_kernels import read
from remanence.ops.product_kernels import BYTES, tiles, turn
from remanence.ops.step_kernels import (
    activate,
    add,
    at,
    convolve,
    keep_last,
    move,
    normalise,
    sigmoid,
    softmax,
    softplus,
    unit,
)


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


CONSTANT, LINEAR, AFFINE = 0, 1, 2


@jit
def regression_token(
    one, mixes, news, taps, tails, bandwidths, ridges, weights, opens, keys, values, ys, afters, next_keys, next_values,
    positions, next_positions, B, H, K, width, window, order, small, kind, eps,
):  # fmt: skip
    """`local_regression` read at one query, of the last pairs and the token's own, then a norm of each head.

    Queries and keys [B, 2·H·K] pass a convolution, SiLU and a norm to unit length (`small` is the eps). Bandwidths and
    ridges [H] are logarithms, or absent; of keys and values [B, H, window − 1, K] each row's `positions` last are
    its own. All else is in float64, as in `regress`, but with a system of pairs in place of features.
    """
    F, held = 2 * H * K, (B, H, window - 1, K)
    mixed, new, y = at(one, mixes, (B, F)), at(one, news, (B, H, K)), at(one, ys, (B, H, K))
    tap, tail, after = at(one, taps, (F, width)), at(one, tails, (B, width - 1, F)), at(one, afters, (B, width - 1, F))
    old_k, old_v, new_k, new_v = (
        at(one, keys, held), at(one, values, held), at(one, next_keys, held), at(one, next_values, held),
    )  # fmt: skip
    bandwidth, ridge = at(one, bandwidths, (H,)), at(one, ridges, (H,))
    position, position_after = at(np.int64(0), positions, (B,)), at(np.int64(0), next_positions, (B,))
    lanes = 2 * BYTES // 8
    room = -(-window // lanes) * lanes
    row, rows, columns, products = (
        np.empty(F, y.dtype),
        np.zeros((room, K)),
        np.empty((K, room)),
        np.empty((room, room)),
    )
    share, root, told = np.empty(window), np.empty(window), np.empty(window)
    query, mean, found = np.empty(K), np.empty(K), np.empty(K)
    for b in range(B):
        fill(row, 0)
        convolve(tap, tail[b], mixed[b], row, after[b])
        activate(row)
        position_after[b] = position[b] + 1
        n = min(window, position[b] + 1)
        first = window - n
        for h in range(H):
            q, k, v, out = row[h * K : (h + 1) * K], row[(H + h) * K : (H + h + 1) * K], new[b, h], y[b, h]
            unit(q, 1, small)
            unit(k, 1, small)
            copy_row(q, query)
            for i in range(n):
                copy_row(old_k[b, h, first + i] if i < n - 1 else k, rows[i])
                share[i] = dot(query, rows[i]) / math.exp(bandwidth[h]) if bandwidths else 0.0
            softmax(share[:n])
            if order != CONSTANT:
                most = 1.0
                if order == LINEAR:  # what counts most counts once, and nothing by itself
                    most = 1 / share[:n].max()
                fill(mean, 0)
                if order == AFFINE:
                    for i in range(n):
                        add(rows[i], share[i], mean)
                    add(mean, -1.0, query)
                size = 0.0
                for i in range(n):
                    key = rows[i]
                    root[i] = math.sqrt(most * share[i])
                    for d in range(K):
                        key[d] = root[i] * (key[d] - mean[d])
                    told[i] = dot(key, query)
                    size += dot(key, key)
                scale = (size + 1e-3 * dot(mean, mean)) / K if order == AFFINE else 1.0
                _pairs(rows, n, math.exp(ridge[h]) * scale, columns, products)
                _factor(products, n)
                _solve_factor(products, told[:n])
                for i in range(n):
                    share[i] = (share[i] if order == AFFINE else 0.0) + root[i] * told[i]
            fill(found, 0)
            for i in range(n):
                add(old_v[b, h, first + i] if i < n - 1 else v, share[i], found)
            copy_row(found, out)
            keep_last(old_k[b, h], k, new_k[b, h])
            keep_last(old_v[b, h], v, new_v[b, h])
    normalise(one, ys, weights, 0, opens, ys, B * H, K, 1, False, kind, 1 / K, eps)


@jit
def _pairs(rows, n, ridge, columns, products):
    """The upper half of the products of n rows with each other, and a ridge."""
    K, room = columns.shape
    lanes = 2 * BYTES // 8
    whole = -(-n // lanes) * lanes
    for i in range(n, whole):
        fill(rows[i], 0)
    turn(rows, 0, columns)
    flat, out = columns.reshape(-1), products.reshape(-1)
    for j in range(0, whole, lanes):
        tiles(flat, 1, room, flat, j, room, out, j, room, j + lanes, K, 1.0, 0.0)
    for i in range(n):
        products[i, i] += ridge


@jit
def _factor(A, n):
    """The upper half becomes U with UᵀU = A: four rows at a time, which all rows below then lose together."""
    for top in range(0, n, 4):
        end = min(top + 4, n)
        for i in range(top, end):
            now = A[i]
            for j in range(top, i):
                above, by = A[j], A[j, i]
                for d in range(i, n):
                    now[d] -= by * above[d]
            by = 1 / math.sqrt(now[i])
            for d in range(i, n):
                now[d] *= by
        if end - top == 4:
            first, second, third, fourth = A[top], A[top + 1], A[top + 2], A[top + 3]
            for i in range(end, n):
                now, a, b, c, e = A[i], first[i], second[i], third[i], fourth[i]
                for d in range(i, n):
                    now[d] -= a * first[d] + b * second[d] + c * third[d] + e * fourth[d]


@jit
def _solve_factor(U, x):
    """x becomes (UᵀU)⁻¹ x."""
    n = x.shape[0]
    for i in range(n):
        x[i] /= U[i, i]
        later, by = U[i], x[i]
        for d in range(i + 1, n):
            x[d] -= by * later[d]
    for i in range(n - 1, -1, -1):
        x[i] = (x[i] - dot(U[i, i + 1 : n], x[i + 1 :])) / U[i, i]
