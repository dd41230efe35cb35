"""The loops of `complex_scan`, compiled by Numba for the CPU: each works on the features from `first` to `last`.

The coefficients are [B, T, D], or [1, 1, D] when they are the same for all tokens (`fixed`).
"""

from __future__ import annotations

import numpy as np

from remanence.ops.compiled import jit


@jit
def forward(first, last, fixed, a, b, start, h):
    for i in range(b.shape[0]):
        before = start[i, first:last]
        for t in range(b.shape[1]):
            keep = a[0, 0, first:last] if fixed else a[i, t, first:last]
            new, now = b[i, t, first:last], h[i, t, first:last]
            for d in range(last - first):
                now[d] = keep[d] * before[d] + new[d]
            before = now


@jit
def backward(first, last, fixed, a, start, h, d_h, d_a, d_b, d_start):
    """d_a comes filled with zeros, and d_start leaves as the gradient of `start`."""
    for i in range(h.shape[0]):
        carried = d_start[i, first:last]
        carried[:] = 0
        for t in range(h.shape[1] - 1, -1, -1):
            keep = a[0, 0, first:last] if fixed else a[i, t, first:last]
            d_keep = d_a[0, 0, first:last] if fixed else d_a[i, t, first:last]
            before = h[i, t - 1, first:last] if t > 0 else start[i, first:last]
            given, d_new = d_h[i, t, first:last], d_b[i, t, first:last]
            for d in range(last - first):
                total = given[d] + carried[d]
                d_new[d] = total
                d_keep[d] += total * np.conj(before[d])
                carried[d] = total * np.conj(keep[d])
