"""The cell that feeds on its own projection, compiled for the CPU: all rows of a piece, token by token.

Axes: B batch, n tokens, H features of the cell, C channels, N coefficients; J = H + C·N, what the cell reads.
"""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.chunk_kernels import dot
from remanence.ops.compiled import decay, jit, sigmoid_and_silu
from remanence.ops.step_kernels import at


@jit
def _tanh(x):
    e = decay(-2 * abs(x))
    y = (1 - e) / (1 + e)
    return y if x >= 0 else -y


@jit
def forward(x, read, write, bias, A, b, h, c, out, joints, gates):
    """x [B, n, 2H]; A [B, n, N, N], b [B, n, N]; h [B, H] and c [B, C, N] are carried; joints [n, B, J], gates as x."""
    B, H = h.shape
    C, N = c.shape[1:]
    z = np.empty((B, 2 * H), x.dtype)
    for t in range(x.shape[1]):
        joint = joints[t]
        for i in range(B):
            for d in range(H):
                joint[i, d] = h[i, d]
            for k in range(C):
                for m in range(N):
                    joint[i, H + k * N + m] = c[i, k, m]
        np.dot(joint, read.T, z)
        for i in range(B):
            given, raw, gate, now, y = x[i, t], z[i], gates[t, i], h[i], out[i, t]
            for d in range(H):
                gate[d] = sigmoid_and_silu(given[d] + raw[d])[0]
            for d in range(H):
                gate[H + d] = _tanh(given[H + d] + raw[H + d])
            for d in range(H):
                now[d] += gate[d] * (gate[H + d] - now[d])
            for d in range(H):
                y[d] = now[d]
            for k in range(C):
                f = dot(write[k], now) + bias[k]
                before = joint[i, H + k * N : H + (k + 1) * N]
                for m in range(N):
                    c[i, k, m] = dot(A[i, t, m], before) + f * b[i, t, m]


@jit
def backward(read, write, A, b, joints, gates, d_out, d_h, d_c, d_z, d_f):
    """d_h and d_c are carried; d_z [n, B, 2H] is the gradient of x, d_f [n, B, C] that of what is written."""
    B, H = d_h.shape
    C, N = d_c.shape[1:]
    d_joint = np.empty((B, H + C * N), read.dtype)
    for t in range(joints.shape[0] - 1, -1, -1):
        for i in range(B):
            total, given = d_h[i], d_out[i, t]
            for d in range(H):
                total[d] += given[d]
            for k in range(C):
                f = dot(d_c[i, k], b[i, t])
                d_f[t, i, k] = f
                row = write[k]
                for d in range(H):
                    total[d] += f * row[d]
            gate, before, d_gate = gates[t, i], joints[t, i], d_z[t, i]
            for d in range(H):
                g, new = gate[d], gate[H + d]
                d_gate[d] = total[d] * (new - before[d]) * g * (1 - g)
                d_gate[H + d] = total[d] * g * (1 - new * new)
        np.dot(d_z[t], read, d_joint)
        for i in range(B):
            for d in range(H):
                d_h[i, d] = d_h[i, d] * (1 - gates[t, i, d]) + d_joint[i, d]
            for k in range(C):
                back = d_joint[i, H + k * N : H + (k + 1) * N]
                for m in range(N):
                    x, row = d_c[i, k, m], A[i, t, m]
                    for e in range(N):
                        back[e] += x * row[e]
                for e in range(N):
                    d_c[i, k, e] = back[e]


@jit
def _stretched(c, position, f, nodes, shares, values, seen, P, Q, out):
    """out = A c + f b of LegS, the step after `position` tokens: c is read at the nodes, and fitted again to its share.

    nodes, shares and the matrix `values` are those of `hippo._nodes`; seen, P and Q are space for N numbers.
    """
    N = c.shape[0]
    ratio = position / (position + 1)
    for j in range(N):
        total = 0.0
        for n in range(N):
            total += values[j, n] * c[n]
        seen[j] = ratio * shares[j] * total
        P[j], Q[j] = 1.0, 0.0
    end = 2 * ratio - 1
    here, before = 1.0, -1.0  # the polynomial at the end of the old share, and the one before it
    for n in range(N):
        after = end if n == 0 else ((2 * n + 1) * end * here - n * before) / (n + 1)
        root = math.sqrt(2 * n + 1)
        whole = 1.0 if n == 0 else 0.0
        out[n] = root * dot(P, seen) + f * (whole - (after - before) / (2 * root))
        before, here = here, after
        for j in range(N):
            Q[j] = ((2 * n + 1) * (2 * ratio * nodes[j] - 1) * P[j] - n * Q[j]) / (n + 1)
        P, Q = Q, P


@jit
def token(
    one, xs, reads, writes, biases, hs, cs, next_hs, next_cs, positions, nodes, shares, values, As, bs, B, H, C, N
):
    """One token by addresses, as `forward`. The step is that of LegS after `positions` (int64 [B]), or A c + f b.

    Nodes, shares, values, A and b are in float64; A is absent for LegS."""
    J = H + C * N
    x, read, write = at(one, xs, (B, 2 * H)), at(one, reads, (2 * H, J)), at(one, writes, (C, H))
    bias, h, c = at(one, biases, (C,)), at(one, hs, (B, H)), at(one, cs, (B, C, N))
    new, after, position = at(one, next_hs, (B, H)), at(one, next_cs, (B, C, N)), at(np.int64(0), positions, (B,))
    node, share, value = at(1.0, nodes, (N,)), at(1.0, shares, (N,)), at(1.0, values, (N, N))
    A, b = at(1.0, As, (N, N)), at(1.0, bs, (N,))
    joint, z, work, wide = np.empty(J, x.dtype), np.empty(2 * H, x.dtype), np.empty((3, N)), np.empty(N)
    for i in range(B):
        before, now = h[i], new[i]
        joint[:H] = before
        joint[H:] = c[i].reshape(C * N)
        for d in range(2 * H):
            z[d] = x[i, d] + dot(read[d], joint)
        for d in range(H):
            now[d] = before[d] + sigmoid_and_silu(z[d])[0] * (_tanh(z[H + d]) - before[d])
        for k in range(C):
            f = np.float64(dot(write[k], now) + bias[k])
            if As:
                for m in range(N):
                    total = f * b[m]
                    for n in range(N):
                        total += A[m, n] * c[i, k, n]
                    wide[m] = total
            else:
                _stretched(c[i, k], position[i], f, node, share, value, work[0], work[1], work[2], wide)
            for m in range(N):
                after[i, k, m] = wide[m]
