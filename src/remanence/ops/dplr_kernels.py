"""The loops of `dplr`, compiled by Numba for the CPU: each works on the rows from `first` to `last`.

Inner loops are kept to few arrays each: beyond eight pairs that might overlap, the compiler gives up vectorising.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.compiled import summing


@summing
def _copy(x, y):
    # in loops, here and below: assigning arrays as such takes the compiler seconds
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[i, j] = x[i, j]


@summing
def _turn(x, y):
    """y = xᵀ."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            y[j, i] = x[i, j]


@summing
def read(a, S, u):
    """u = Sᵀ a, four key features at a time: the sum is then fetched and put back once for four."""
    K, V = S.shape
    for j in range(V):
        u[j] = 0
    whole = K - K % 4
    for i in range(0, whole, 4):
        S0, S1, S2, S3 = S[i], S[i + 1], S[i + 2], S[i + 3]
        a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
        for j in range(V):
            u[j] += a0 * S0[j] + a1 * S1[j] + a2 * S2[j] + a3 * S3[j]
    for i in range(whole, K):
        row, x = S[i], a[i]
        for j in range(V):
            u[j] += x * row[j]


@summing
def write(S, new, u, k, v, b, decay):
    """new = Diag(decay) S + b uᵀ + k vᵀ."""
    for i in range(S.shape[0]):
        d, bi, ki = decay[i], b[i], k[i]
        for j in range(S.shape[1]):
            new[i, j] = d * S[i, j] + bi * u[j] + ki * v[j]


@summing
def forward(first, last, every, q, k, v, a, b, decay, start, y, end, u, kept):
    """y, the last state, what `a` read, and one state in `every`, turned to [V, K]."""
    T, K, V = k.shape[1], k.shape[2], v.shape[2]
    S, new = np.empty((K, V), v.dtype), np.empty((K, V), v.dtype)
    for r in range(first, last):
        _copy(start[r], S)
        for t in range(T):
            if t % every == 0:
                _turn(S, kept[r, t // every])
            read(a[r, t], S, u[r, t])
            write(S, new, u[r, t], k[r, t], v[r, t], b[r, t], decay[r, t])
            S, new = new, S
            read(q[r, t], S, y[r, t])
        _copy(S, end[r])


@summing
def backward(first, last, every, q, k, v, a, b, decay, u, kept, d_y, d_S, d_q, d_k, d_v, d_a, d_b, d_g):
    """The gradients, with states and their gradients turned to [V, K]; `d_S` becomes that of the first state."""
    T, K, V = k.shape[1], k.shape[2], v.shape[2]
    states, d_u, carried = np.empty((every + 1, V, K), v.dtype), np.empty(V, v.dtype), np.empty(K, v.dtype)
    D = np.empty((V, K), v.dtype)
    for r in range(first, last):
        _turn(d_S[r], D)
        for block in range(kept.shape[1] - 1, -1, -1):
            t0, t1 = block * every, min((block + 1) * every, T)
            _copy(kept[r, block], states[0])
            for t in range(t0, t1):
                _write_turned(states[t - t0], states[t - t0 + 1], u[r, t], k[r, t], v[r, t], b[r, t], decay[r, t])
            _diagonal(states[t1 - t0], D, carried)
            for t in range(t1 - 1, t0 - 1, -1):
                before, after = states[t - t0], states[t - t0 + 1]
                _unread(D, d_y[r, t], q[r, t], k[r, t], b[r, t], d_v[r, t], d_u)
                read(v[r, t], D, d_k[r, t])
                read(u[r, t], D, d_b[r, t])
                read(d_y[r, t], after, d_q[r, t])
                read(d_u, before, d_a[r, t])
                _unwrite(D, d_u, a[r, t], decay[r, t])
                _carry(carried, q[r, t], d_q[r, t], k[r, t], d_k[r, t], b[r, t], d_b[r, t])
                for i in range(K):
                    d_g[r, t, i] = carried[i]
                    carried[i] += a[r, t, i] * d_a[r, t, i]
        _turn(D, d_S[r])


@summing
def _write_turned(S, new, u, k, v, b, decay):
    """`_write` for states [V, K]."""
    for j in range(S.shape[0]):
        uj, vj = u[j], v[j]
        for i in range(S.shape[1]):
            new[j, i] = decay[i] * S[j, i] + uj * b[i] + vj * k[i]


@summing
def _unread(D, d_y, q, k, b, d_v, d_u):
    """D += d_y qᵀ, the gradient of the state after the step;  d_v = D k;  d_u = D b."""
    for j in range(D.shape[0]):
        x = d_y[j]
        to_v = to_u = x * 0
        for i in range(D.shape[1]):
            d = D[j, i] + x * q[i]
            D[j, i] = d
            to_v += d * k[i]
            to_u += d * b[i]
        d_v[j], d_u[j] = to_v, to_u


@summing
def _unwrite(D, d_u, a, decay):
    """D = D Diag(decay) + d_u aᵀ, the gradient of the state before the step."""
    for j in range(D.shape[0]):
        x = d_u[j]
        for i in range(D.shape[1]):
            D[j, i] = decay[i] * D[j, i] + x * a[i]


@summing
def _diagonal(S, D, carried):
    """Per key feature, the product of state and gradient: what a decay just after them would have as gradient."""
    for i in range(carried.shape[0]):
        carried[i] = 0
    for j in range(S.shape[0]):
        for i in range(S.shape[1]):
            carried[i] += S[j, i] * D[j, i]


@summing
def _carry(carried, q, d_q, k, d_k, b, d_b):
    """A log decay scales whatever is read after it and was written before it: so its gradient follows from theirs."""
    for i in range(carried.shape[0]):
        carried[i] += q[i] * d_q[i] - k[i] * d_k[i] - b[i] * d_b[i]
