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
_S, _V, _R, _W, _KEEP, _A, _B, _D_Y, _D_S, _D_V, _ROW = (n * BAND for n in range(11))
"""Where `backward` holds what it knows of a token: one array with fixed distances, since loops vectorise only where the
compiler need not ask whether a dozen arrays overlap."""


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
    for d in range(source.shape[0]):
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
    rows = np.zeros((CHUNK, _ROW), score.dtype)
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
                    row = rows[t - start]
                    _fill(row, _S, score[i, t, lo:hi])
                    _fill(row, _V, value[i, t, lo:hi])
                    _fill(row, _D_Y, d_y[i, t, lo:hi])
                    for d in range(BAND):
                        s = np.float64(row[_S + d])
                        old = exponent[p + d] + exponent[g + d]
                        row[_R + d] = exponent[p + d] - (s + exponent[u + d])
                        row[_W + d] = old - s
                        exponent[p + d] = max(old, s)
                    for d in range(BAND):
                        v, num, den = row[_V + d], now[a + d], now[b + d]
                        x = decay(-abs(row[_R + d]))
                        ahead = row[_R + d] >= 0
                        past, present = one if ahead else x, x if ahead else one
                        size = one / (past * den + present)
                        y = (past * num + present * v) * size
                        share = row[_D_Y + d] * size
                        to_bonus = present * share * (v - y)
                        now[sum_u + d] += to_bonus
                        row[_D_S + d] = to_bonus
                        row[_D_V + d] = present * share
                        row[_R + d] = past * share  # from here on, what the read gives back to a
                        row[_D_Y + d] = past * share * y  # and takes from b
                        x = decay(-abs(row[_W + d]))
                        ahead = row[_W + d] >= 0
                        past, present = one if ahead else x, x if ahead else one
                        row[_KEEP + d] = past
                        row[_W + d] = present
                        row[_A + d] = num
                        row[_B + d] = den
                        now[a + d] = past * num + present * v
                        now[b + d] = past * den + present
                for t in range(stop - 1, start - 1, -1):
                    row = rows[t - start]
                    for d in range(BAND):
                        past, present = row[_KEEP + d], row[_W + d]
                        num, den = now[back_a + d], now[back_b + d]
                        row[_D_V + d] += present * num
                        row[_D_S + d] += present * (num * row[_V + d] + den)
                        now[sum_g + d] += past * (num * row[_A + d] + den * row[_B + d])
                        now[back_a + d] = past * num + row[_R + d]
                        now[back_b + d] = past * den - row[_D_Y + d]
                    d_s, d_v = d_score[i, t, lo:hi], d_value[i, t, lo:hi]
                    for d in range(n):
                        d_s[d] = row[_D_S + d]
                    for d in range(n):
                        d_v[d] = row[_D_V + d]
                for d in range(n):
                    d_decay[i, lo + d] += now[sum_g + d]
                    d_bonus[i, lo + d] += now[sum_u + d]
            for d in range(n):
                d_a[i, lo + d] = now[back_a + d]
                d_b[i, lo + d] = now[back_b + d]
