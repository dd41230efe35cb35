"""The real gated linear recurrence compiled for the CPU: each call takes the features from `first` to `last`."""

from __future__ import annotations

import math

import numpy as np

from remanence.ops.compiled import decay, jit


@jit
def _sigmoid(x):
    e = decay(-abs(x))
    return 1 / (1 + e) if x >= 0 else e / (1 + e)


@jit
def _lost(a_log, lost):
    """1 − a², by the series of (eˣ − 1)/x near 0, where the difference loses its digits."""
    for d in range(lost.shape[0]):
        lost[d] = 1
    for n in range(15, 1, -1):
        part = lost.dtype.type(2 / n)
        for d in range(lost.shape[0]):
            lost[d] = lost.dtype.type(1) + part * a_log[d] * lost[d]
    for d in range(lost.shape[0]):
        double = 2 * a_log[d]
        lost[d] = -double * lost[d] if double > -0.5 else lost.dtype.type(1) - decay(double)


@jit
def forward(first, last, u, slow, into, rate, empty, start, h):
    n = last - first
    a_log, lost, speed = np.empty(n, h.dtype), np.empty(n, h.dtype), rate[first:last]
    for i in range(h.shape[0]):
        before = start[i, first:last]
        for t in range(h.shape[1]):
            now, new = h[i, t, first:last], u[i, t, first:last]
            forget, open_ = slow[i, t, first:last], into[i, t, first:last]
            for d in range(n):
                a_log[d] = -8 * _sigmoid(forget[d]) * speed[d]
            _lost(a_log, lost)
            if empty[i] and t == 0:
                lost[:] = 1
            for d in range(n):
                scale = math.sqrt(lost[d])
                now[d] = decay(a_log[d]) * before[d] + scale * _sigmoid(open_[d]) * new[d]
            before = now


@jit
def backward(first, last, u, slow, into, rate, empty, start, h, d_h, d_u, d_slow, d_into, d_rate, d_start):
    """Gradients; d_rate comes as zeros and is added to. The slope of the root is held to 1000."""
    n = last - first
    a_log, lost, speed, d_speed = np.empty(n, h.dtype), np.empty(n, h.dtype), rate[first:last], d_rate[first:last]
    for i in range(h.shape[0]):
        carried = d_start[i, first:last]
        carried[:] = 0
        for t in range(h.shape[1] - 1, -1, -1):
            before = h[i, t - 1, first:last] if t > 0 else start[i, first:last]
            new, forget, open_ = u[i, t, first:last], slow[i, t, first:last], into[i, t, first:last]
            d_new, d_forget, d_open = d_u[i, t, first:last], d_slow[i, t, first:last], d_into[i, t, first:last]
            given = d_h[i, t, first:last]
            for d in range(n):
                a_log[d] = -8 * _sigmoid(forget[d]) * speed[d]
            _lost(a_log, lost)
            begun = not (empty[i] and t == 0)
            if not begun:
                lost[:] = 1
            for d in range(n):
                a, r, share = decay(a_log[d]), _sigmoid(forget[d]), _sigmoid(open_[d])
                total, scale = given[d] + carried[d], math.sqrt(lost[d])
                carried[d] = total * a
                d_new[d] = total * scale * share
                d_share = total * scale * new[d]
                d_open[d] = d_share * share * (1 - share)
                d_scale = total * share * new[d]
                slope = -2 * a * a / math.sqrt(max(4 * lost[d], lost.dtype.type(1e-6)))
                d_log = carried[d] * before[d] + (d_scale * slope if begun else lost.dtype.type(0))
                d_speed[d] += -8 * r * d_log
                d_forget[d] = -8 * speed[d] * r * (1 - r) * d_log
