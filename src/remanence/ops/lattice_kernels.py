"""The loops of `lattice`, compiled by Numba for the CPU: each works on the rows from `first` to `last`.

A state is kept as the slots' lengths n and directions F, since everything but the sum itself asks for those.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.chunk_kernels import combine, dot
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
def _dots(F, d, e):
    """F·e, F·d and d·e in one pass."""
    p = q = r = F[0] * 0
    for j in range(F.shape[0]):
        p += F[j] * e[j]
        q += F[j] * d[j]
        r += d[j] * e[j]
    return p, q, r


@summing
def _polar(x, F):
    """The length of x; its direction is put into F, which may not be x itself."""
    size = np.sqrt(dot(x, x) + x.dtype.type(1e-30))
    scale = 1 / size
    for j in range(x.shape[0]):
        F[j] = x[j] * scale
    return size


@summing
def _error(correct, F, c, target, e):
    """e = target − Fᵀ c."""
    if correct:
        _clear(e)
        combine(c, F, e)
        for j in range(e.shape[0]):
            e[j] = target[j] - e[j]
    else:
        _copy(target, e)


@summing
def _write(n, F, c, rate, e, renormalise, n_new, F_new, grown, slot):
    """The slots after a write; `grown` is their length before it was made one again, if it was."""
    for i in range(F.shape[0]):
        r, row = rate * c[i] / n[i], F[i]
        keep = n[i] - r * dot(row, e)
        for j in range(e.shape[0]):
            slot[j] = keep * row[j] + r * e[j]
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
            if by_slot:
                for i in range(M):
                    y[row, t, i] = dot(F[i], q[row, t])
            else:
                combine(q[row, t], F, y[row, t])
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
    d_p, along, known = np.empty(M, v.dtype), np.empty(M, v.dtype), np.empty(M, v.dtype)
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
                _unread(by_slot, Fs[m + 1], ns[m + 1], q[row, t], d_y[row, t], d, d_q[row, t])
                if renormalise:
                    for i in range(M):
                        _across(Fs[m + 1, i], d[i], grown[m, i])
                d_r[row, t] = _unwrite(
                    correct, Fs[m], ns[m], es[m], c[row, t], r[row, t], d, d_c[row, t], d_e, d_p, along, known
                )  # fmt: skip
                _copy(d_e, d_v[row, t])


@summing
def _across(F, d, n):
    """Through a direction: d = (I − F Fᵀ) d / n."""
    along = dot(F, d)
    for j in range(F.shape[0]):
        d[j] = (d[j] - along * F[j]) / n


@summing
def _unread(by_slot, F, n, q, d_y, d, d_q):
    """Gradients of the query, and, added to d, of the slots after the write: a direction's is (I − F Fᵀ) ∂ / n."""
    if by_slot:
        _clear(d_q)
        combine(d_y, F, d_q)
    for i in range(F.shape[0]):
        given = q if by_slot else d_y
        along = dot(F[i], given)
        if not by_slot:
            d_q[i] = along
        much = (d_y[i] if by_slot else q[i]) / n[i]
        to, row = d[i], F[i]
        for j in range(row.shape[0]):
            to[j] += much * (given[j] - along * row[j])


@summing
def _unwrite(correct, F, n, e, c, rate, d, d_c, d_e, d_p, along, known):
    """The gradient of the rate; those of the code and of the error; d becomes that of the slots before the write.

    With p = F e and r = rate c / n, a slot after the write is n F + r (e − p F).
    """
    M, D = F.shape
    d_rate = rate * 0
    _clear(d_e)
    for i in range(M):
        r = rate * c[i] / n[i]
        p, along[i], across = _dots(F[i], d[i], e)
        known[i] = p
        d_r = across - p * along[i]
        d_p[i] = -r * along[i]
        d_c[i] = d_r * rate / n[i]
        d_rate += d_r * c[i] / n[i]
        back, own, over = d_p[i], F[i], d[i]
        for j in range(D):
            d_e[j] += r * over[j] + back * own[j]
    for i in range(M):
        r = rate * c[i] / n[i]
        p = known[i]
        d_n = -d_c[i] * c[i] / n[i]
        to_e = F[0, 0] * 0
        weight = F[0, 0] * 0
        if correct:
            to_e = dot(F[i], d_e)
            weight = c[i]
            d_c[i] -= to_e
        back, over = d_p[i], r * p
        turned = back * p - over * along[i] - weight * to_e
        own, to, scale = F[i], d[i], 1 / n[i]
        for j in range(D):
            d_F = back * e[j] - over * to[j] - weight * d_e[j]
            to[j] += scale * (d_F - turned * own[j]) + d_n * own[j]
    return d_rate
