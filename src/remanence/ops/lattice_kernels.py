"""The loops of `lattice`, compiled by Numba for the CPU: each works on the rows from `first` to `last`.

A state is kept as the slots' lengths n and directions F, since everything but the sum itself asks for those.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.compiled import summing


@summing
def _copy(x, y):
    # in a loop, here and below: assigning arrays as such takes the compiler seconds
    for j in range(x.shape[0]):
        y[j] = x[j]


@summing
def _clear(x):
    for j in range(x.shape[0]):
        x[j] = 0


@summing
def _dot(x, y):
    total = x[0] * 0
    for j in range(x.shape[0]):
        total += x[j] * y[j]
    return total


@summing
def _add(x, a, y):
    """y += a x."""
    for j in range(x.shape[0]):
        y[j] += a * x[j]


@summing
def _polar(x, F):
    """The length of x; its direction is put into F, which may not be x itself."""
    size = np.sqrt(_dot(x, x) + x.dtype.type(1e-30))
    scale = 1 / size
    for j in range(x.shape[0]):
        F[j] = x[j] * scale
    return size


@summing
def _error(correct, F, c, target, e):
    """e = target − Fᵀ c."""
    _copy(target, e)
    if correct:
        for i in range(F.shape[0]):
            _add(F[i], -c[i], e)


@summing
def _write(n, F, c, rate, e, renormalise, n_new, F_new, grown, slot):
    """The slots after a write; `grown` is their length before it was made one again, if it was."""
    for i in range(F.shape[0]):
        r = rate * c[i] / n[i]
        keep = n[i] - r * _dot(F[i], e)
        for j in range(F.shape[1]):
            slot[j] = keep * F[i, j] + r * e[j]
        grown[i] = _polar(slot, F_new[i])
        n_new[i] = 1 if renormalise else grown[i]


@summing
def forward(first, last, every, correct, renormalise, by_slot, q, c, v, r, start, y, end, kept):
    T, M, D = v.shape[1], c.shape[2], v.shape[2]
    F, F_new, e, slot = np.empty((M, D), v.dtype), np.empty((M, D), v.dtype), np.empty(D, v.dtype), np.empty(D, v.dtype)
    n, n_new, grown = np.empty(M, v.dtype), np.empty(M, v.dtype), np.empty(M, v.dtype)
    for row in range(first, last):
        for i in range(M):
            n[i] = _polar(start[row, i], F[i])
        for t in range(T):
            if t % every == 0:
                for i in range(M):
                    for j in range(D):
                        kept[row, t // every, i, j] = n[i] * F[i, j]
            _error(correct, F, c[row, t], v[row, t], e)
            _write(n, F, c[row, t], r[row, t], e, renormalise, n_new, F_new, grown, slot)
            n, n_new, F, F_new = n_new, n, F_new, F
            _clear(y[row, t])
            for i in range(M):
                if by_slot:
                    y[row, t, i] = _dot(F[i], q[row, t])
                else:
                    _add(F[i], q[row, t, i], y[row, t])
        for i in range(M):
            for j in range(D):
                end[row, i, j] = n[i] * F[i, j]


@summing
def backward(first, last, every, correct, renormalise, by_slot, q, c, v, r, kept, d_y, d_S, d_q, d_c, d_v, d_r):
    """The gradients; `d_S` is that of the last state and becomes that of the first."""
    T, M, D = v.shape[1], c.shape[2], v.shape[2]
    Fs, ns, grown = (
        np.empty((every + 1, M, D), v.dtype),
        np.empty((every + 1, M), v.dtype),
        np.empty((every, M), v.dtype),
    )
    es, slot, d_e = np.empty((every, D), v.dtype), np.empty(D, v.dtype), np.empty(D, v.dtype)
    d_p, along = np.empty(M, v.dtype), np.empty(M, v.dtype)
    for row in range(first, last):
        d = d_S[row]
        for block in range(kept.shape[1] - 1, -1, -1):
            t0, t1 = block * every, min((block + 1) * every, T)
            for i in range(M):
                ns[0, i] = _polar(kept[row, block, i], Fs[0, i])
            for t in range(t0, t1):
                m = t - t0
                _error(correct, Fs[m], c[row, t], v[row, t], es[m])
                _write(
                    ns[m], Fs[m], c[row, t], r[row, t], es[m], renormalise, ns[m + 1], Fs[m + 1], grown[m], slot
                )  # fmt: skip
            for t in range(t1 - 1, t0 - 1, -1):
                m = t - t0
                _unread(by_slot, Fs[m + 1], ns[m + 1], q[row, t], d_y[row, t], d, d_q[row, t], slot)
                if renormalise:
                    for i in range(M):
                        _across(Fs[m + 1, i], d[i], grown[m, i])
                d_r[row, t] = _unwrite(
                    correct, Fs[m], ns[m], es[m], c[row, t], r[row, t], d, d_c[row, t], d_e, d_p, along
                )  # fmt: skip
                _copy(d_e, d_v[row, t])


@summing
def _across(F, d, n):
    """Through a direction: d = (I − F Fᵀ) d / n."""
    along = _dot(F, d)
    for j in range(F.shape[0]):
        d[j] = (d[j] - along * F[j]) / n


@summing
def _unread(by_slot, F, n, q, d_y, d, d_q, d_F):
    """Gradients of the query, and, added to d, of the slots after the write."""
    _clear(d_q)
    for i in range(F.shape[0]):
        for j in range(F.shape[1]):
            d_F[j] = d_y[i] * q[j] if by_slot else q[i] * d_y[j]
        if by_slot:
            _add(F[i], d_y[i], d_q)
        else:
            d_q[i] = _dot(F[i], d_y)
        _across(F[i], d_F, n[i])
        _add(d_F, 1, d[i])


@summing
def _unwrite(correct, F, n, e, c, rate, d, d_c, d_e, d_p, along):
    """The gradient of the rate; those of the code and of the error; d becomes that of the slots before the write.

    With p = F e and r = rate c / n, a slot after the write is n F + r (e − p F).
    """
    M, D = F.shape
    d_rate = rate * 0
    _clear(d_e)
    for i in range(M):
        r = rate * c[i] / n[i]
        p, along[i] = _dot(F[i], e), _dot(F[i], d[i])
        d_r = _dot(d[i], e) - p * along[i]
        d_p[i] = -r * along[i]
        d_c[i] = d_r * rate / n[i]
        d_rate += d_r * c[i] / n[i]
        for j in range(D):
            d_e[j] += r * d[i, j] + d_p[i] * F[i, j]
    for i in range(M):
        r = rate * c[i] / n[i]
        p = _dot(F[i], e)
        d_n = -d_c[i] * c[i] / n[i]
        to_e = F[0, 0] * 0
        weight = F[0, 0] * 0
        if correct:
            to_e = _dot(F[i], d_e)
            weight = c[i]
            d_c[i] -= to_e
        turned = d_p[i] * p - r * p * along[i] - weight * to_e
        for j in range(D):
            d_F = d_p[i] * e[j] - r * p * d[i, j] - weight * d_e[j]
            d[i, j] += (d_F - turned * F[i, j]) / n[i] + d_n * F[i, j]
    return d_rate
