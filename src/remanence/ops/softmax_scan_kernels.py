"""The loops of `softmax_scan`, compiled for the CPU: each works on the bands of features from `first` to `last`.

a and b are the sums of e^{s−m} v and e^{s−m}. m is kept in float64: a slow decay changes it by less than float32 sees.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.compiled import decay, jit

BAND = 64
"""Features that are handled together: enough to fill vectors, few enough for a replayed chunk to stay in the cache."""
CHUNK = 32
"""Tokens between two states that are kept for the gradients."""
_S, _V, _R, _W, _KEEP, _A, _B, _D_Y, _D_S, _D_V, _ROWS = (np.uintp(n * BAND) for n in range(11))
"""Rows of BAND numbers that `backward` holds per token. One array with fixed distances: then loops vectorise, which
they do not where the compiler must first ask whether a dozen arrays overlap, or (hence unsigned) an index is < 0."""
_ALL = np.uintp(BAND)


@jit
def forward(first, last, score, value, log_decay, bonus, a, b, m, y, kept_a, kept_b, kept_m):
    """a, b and m are overwritten with the final state; every CHUNK tokens they are copied to `kept_…`."""
    D = score.shape[2]
    for band in range(first, last):
        lo, hi = band * BAND, min(band * BAND + BAND, D)
        read, write = np.empty(BAND, score.dtype), np.empty(BAND, score.dtype)
        g, u = log_decay[lo:hi], bonus[lo:hi]
        for i in range(score.shape[0]):
            p, num, den = m[i, lo:hi], a[i, lo:hi], b[i, lo:hi]
            for t in range(score.shape[1]):
                if t % CHUNK == 0:
                    kept_a[i, t // CHUNK, lo:hi] = num
                    kept_b[i, t // CHUNK, lo:hi] = den
                    kept_m[i, t // CHUNK, lo:hi] = p
                s, v, out = score[i, t, lo:hi], value[i, t, lo:hi], y[i, t, lo:hi]
                for d in range(hi - lo):
                    old = p[d] + g[d]
                    read[d] = p[d] - (s[d] + u[d])
                    write[d] = old - s[d]
                    p[d] = max(old, np.float64(s[d]))
                for d in range(hi - lo):
                    x = decay(-abs(read[d]))
                    past, now = (s.dtype.type(1), x) if read[d] >= 0 else (x, s.dtype.type(1))
                    out[d] = (past * num[d] + now * v[d]) / (past * den[d] + now)
                    x = decay(-abs(write[d]))
                    past, now = (s.dtype.type(1), x) if write[d] >= 0 else (x, s.dtype.type(1))
                    num[d] = past * num[d] + now * v[d]
                    den[d] = past * den[d] + now


@jit
def _fill(row, at, source):
    for d in range(np.uintp(source.shape[0])):
        row[at + d] = source[d]


@jit
def backward(
    first,
    last,
    score,
    value,
    log_decay,
    bonus,
    kept_a,
    kept_b,
    kept_m,
    d_y,
    d_a,
    d_b,
    d_score,
    d_value,
    d_decay,
    d_bonus,
):
    """d_a and d_b come as the gradients of the final state, and are overwritten with those of the first one."""
    T, D = score.shape[1:]
    one = score.dtype.type(1)
    rows = np.zeros(10 * CHUNK * BAND, score.dtype)
    a, b, sum_g, sum_u, back_a, back_b = _S, _V, _R, _W, _KEEP, _A
    now = np.zeros(6 * BAND, score.dtype)
    p, g, u = _S, _V, _R
    exponent = np.zeros(3 * BAND)
    for band in range(first, last):
        lo, hi = band * BAND, min(band * BAND + BAND, D)
        n = hi - lo
        _fill(exponent, g, log_decay[lo:hi])
        _fill(exponent, u, bonus[lo:hi])
        for i in range(score.shape[0]):
            _fill(now, back_a, d_a[i, lo:hi])
            _fill(now, back_b, d_b[i, lo:hi])
            for c in range((T + CHUNK - 1) // CHUNK - 1, -1, -1):
                start, stop = c * CHUNK, min(c * CHUNK + CHUNK, T)
                _fill(now, a, kept_a[i, c, lo:hi])
                _fill(now, b, kept_b[i, c, lo:hi])
                _fill(exponent, p, kept_m[i, c, lo:hi])
                now[2 * BAND : 4 * BAND] = 0
                for t in range(start, stop):
                    r = np.uintp(t - start) * _ROWS
                    _fill(rows, r + _S, score[i, t, lo:hi])
                    _fill(rows, r + _V, value[i, t, lo:hi])
                    _fill(rows, r + _D_Y, d_y[i, t, lo:hi])
                    for d in range(_ALL):
                        s = np.float64(rows[r + _S + d])
                        old = exponent[p + d] + exponent[g + d]
                        rows[r + _R + d] = exponent[p + d] - (s + exponent[u + d])
                        rows[r + _W + d] = old - s
                        exponent[p + d] = max(old, s)
                    for d in range(_ALL):
                        v, num, den = rows[r + _V + d], now[a + d], now[b + d]
                        x = decay(-abs(rows[r + _R + d]))
                        ahead = rows[r + _R + d] >= 0
                        past, present = one if ahead else x, x if ahead else one
                        size = one / (past * den + present)
                        y = (past * num + present * v) * size
                        share = rows[r + _D_Y + d] * size
                        to_bonus = present * share * (v - y)
                        now[sum_u + d] += to_bonus
                        rows[r + _D_S + d] = to_bonus
                        rows[r + _D_V + d] = present * share
                        rows[r + _R + d] = past * share  # from here on, what the read gives back to a
                        rows[r + _D_Y + d] = past * share * y  # and takes from b
                        x = decay(-abs(rows[r + _W + d]))
                        ahead = rows[r + _W + d] >= 0
                        past, present = one if ahead else x, x if ahead else one
                        rows[r + _KEEP + d] = past
                        rows[r + _W + d] = present
                        rows[r + _A + d] = num
                        rows[r + _B + d] = den
                        now[a + d] = past * num + present * v
                        now[b + d] = past * den + present
                for t in range(stop - 1, start - 1, -1):
                    r = np.uintp(t - start) * _ROWS
                    for d in range(_ALL):
                        past, present = rows[r + _KEEP + d], rows[r + _W + d]
                        num, den = now[back_a + d], now[back_b + d]
                        rows[r + _D_V + d] += present * num
                        rows[r + _D_S + d] += present * (num * rows[r + _V + d] + den)
                        now[sum_g + d] += past * (num * rows[r + _A + d] + den * rows[r + _B + d])
                        now[back_a + d] = past * num + rows[r + _R + d]
                        now[back_b + d] = past * den - rows[r + _D_Y + d]
                    d_s, d_v = d_score[i, t, lo:hi], d_value[i, t, lo:hi]
                    for d in range(np.uintp(n)):
                        d_s[d] = rows[r + _D_S + d]
                    for d in range(np.uintp(n)):
                        d_v[d] = rows[r + _D_V + d]
                for d in range(np.uintp(n)):
                    d_decay[i, np.uintp(lo) + d] += now[sum_g + d]
                    d_bonus[i, np.uintp(lo) + d] += now[sum_u + d]
            for d in range(np.uintp(n)):
                d_a[i, np.uintp(lo) + d] = now[back_a + d]
                d_b[i, np.uintp(lo) + d] = now[back_b + d]
