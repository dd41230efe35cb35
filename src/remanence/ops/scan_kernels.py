"""The loops of `scan`, compiled for the CPU: each works on the features from `first` to `last`."""

from __future__ import annotations

from remanence.ops.compiled import decay, jit
from remanence.ops.decay import FLOOR


@jit
def forward(first, last, log_decay, b, start, h):
    for i in range(b.shape[0]):
        before = start[i, first:last]
        for t in range(b.shape[1]):
            g, new, now = log_decay[i, t, first:last], b[i, t, first:last], h[i, t, first:last]
            for d in range(last - first):
                now[d] = decay(g[d]) * before[d] + new[d]
            before = now


@jit
def backward(first, last, log_decay, start, h, d_h, d_log_decay, d_b, d_start):
    for i in range(h.shape[0]):
        carried = d_start[i, first:last]
        carried[:] = 0
        for t in range(h.shape[1] - 1, -1, -1):
            g = log_decay[i, t, first:last]
            before = h[i, t - 1, first:last] if t > 0 else start[i, first:last]
            given, d_g, d_new = d_h[i, t, first:last], d_log_decay[i, t, first:last], d_b[i, t, first:last]
            for d in range(last - first):
                total = given[d] + carried[d]
                d_new[d] = total
                carried[d] = decay(g[d]) * total
                d_g[d] = carried[d] * before[d] if g[d] >= FLOOR else 0
