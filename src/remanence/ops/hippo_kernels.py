"""The cell that feeds on its own projection, compiled for the CPU: all rows of a piece, token by token.

Axes: B batch, n tokens, H features of the cell, C channels, N coefficients; J = H + C·N, what the cell reads.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.chunk_kernels import dot
from remanence.ops.compiled import decay, jit, sigmoid_and_silu


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
