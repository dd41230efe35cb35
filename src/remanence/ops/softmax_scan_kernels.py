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
    D, T = score.shape[2], score.shape[1]
    kind = score.dtype
    one = kind.type(1)
    for band in range(first, last):
        lo, hi = band * BAND, min(band * BAND + BAND, D)
        g, u = log_decay[lo:hi], bonus[lo:hi]
        old_a, old_b = np.empty((CHUNK, BAND), kind), np.empty((CHUNK, BAND), kind)
        read, write = np.empty((CHUNK, BAND), kind), np.empty((CHUNK, BAND), kind)
        sum_g, sum_u = np.empty(BAND, kind), np.empty(BAND, kind)
        num, den, p = np.empty(BAND, kind), np.empty(BAND, kind), np.empty(BAND, np.float64)
        for i in range(score.shape[0]):
            carried_a, carried_b = d_a[i, lo:hi], d_b[i, lo:hi]
            for c in range((T + CHUNK - 1) // CHUNK - 1, -1, -1):
                start, stop = c * CHUNK, min(c * CHUNK + CHUNK, T)
                for d in range(hi - lo):
                    num[d], den[d], p[d] = kept_a[i, c, lo + d], kept_b[i, c, lo + d], kept_m[i, c, lo + d]
                    sum_g[d] = 0
                    sum_u[d] = 0
                for t in range(start, stop):
                    j = t - start
                    s, v = score[i, t, lo:hi], value[i, t, lo:hi]
                    r, w, before_a, before_b = read[j], write[j], old_a[j], old_b[j]
                    for d in range(hi - lo):
                        old = p[d] + g[d]
                        r[d] = p[d] - (s[d] + u[d])
                        w[d] = old - s[d]
                        p[d] = max(old, np.float64(s[d]))
                    for d in range(hi - lo):
                        before_a[d], before_b[d] = num[d], den[d]
                        x = decay(-abs(w[d]))
                        past, now = (one, x) if w[d] >= 0 else (x, one)
                        num[d] = past * num[d] + now * v[d]
                        den[d] = past * den[d] + now
                for t in range(stop - 1, start - 1, -1):
                    j = t - start
                    v, given, d_s, d_v = (
                        value[i, t, lo:hi],
                        d_y[i, t, lo:hi],
                        d_score[i, t, lo:hi],
                        d_value[i, t, lo:hi],
                    )
                    r, w, before_a, before_b = read[j], write[j], old_a[j], old_b[j]
                    for d in range(hi - lo):
                        x = decay(-abs(w[d]))
                        past, now = (one, x) if w[d] >= 0 else (x, one)
                        to_v = now * carried_a[d]
                        to_s = now * (carried_a[d] * v[d] + carried_b[d])
                        back_a, back_b = past * carried_a[d], past * carried_b[d]
                        sum_g[d] += back_a * before_a[d] + back_b * before_b[d]
                        x = decay(-abs(r[d]))
                        past, now = (one, x) if r[d] >= 0 else (x, one)
                        size = one / (past * before_b[d] + now)
                        y = (past * before_a[d] + now * v[d]) * size
                        share = given[d] * size
                        present = now * share * (v[d] - y)
                        sum_u[d] += present
                        d_v[d] = to_v + now * share
                        d_s[d] = to_s + present
                        carried_a[d] = back_a + past * share
                        carried_b[d] = back_b - past * share * y
                for d in range(hi - lo):
                    d_decay[i, lo + d] += sum_g[d]
                    d_bonus[i, lo + d] += sum_u[d]
