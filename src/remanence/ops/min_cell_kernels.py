"""The cells whose gates see only the input, compiled for the CPU: each call takes the features `first` to `last`."""

from __future__ import annotations

from remanence.ops.compiled import decay, jit


@jit
def _sigmoids(x):
    """σ(x) and σ(−x), each to its own last digit."""
    e = decay(-abs(x))
    low, high = e / (1 + e), 1 / (1 + e)
    return (high, low) if x >= 0 else (low, high)


@jit
def _shares(a, b, gates):
    """What is kept and what is written; with two gates, a forgets and b writes."""
    open_, shut = _sigmoids(a)
    if gates == 1:
        return shut, open_
    second = _sigmoids(b)[0]
    return open_ / (open_ + second), second / (open_ + second)


@jit
def forward(first, last, gates, z, start, h):
    D = h.shape[2]
    for i in range(h.shape[0]):
        before = start[i, first:last]
        for t in range(h.shape[1]):
            row, now = z[i, t], h[i, t, first:last]
            a, b = row[first:last], row[(gates - 1) * D + first : (gates - 1) * D + last]
            candidate = row[gates * D + first : gates * D + last]
            for d in range(last - first):
                keep, write = _shares(a[d], b[d], gates)
                x = candidate[d]
                new = x + type(x)(0.5) if x >= 0 else _sigmoids(x)[0]
                now[d] = keep * before[d] + write * new
            before = now


@jit
def backward(first, last, gates, z, start, h, d_h, d_z, d_start):
    D = h.shape[2]
    for i in range(h.shape[0]):
        carried = d_start[i, first:last]
        carried[:] = 0
        for t in range(h.shape[1] - 1, -1, -1):
            before = h[i, t - 1, first:last] if t > 0 else start[i, first:last]
            row, d_row, given = z[i, t], d_z[i, t], d_h[i, t, first:last]
            second = slice((gates - 1) * D + first, (gates - 1) * D + last)
            third = slice(gates * D + first, gates * D + last)
            a, b, candidate = row[first:last], row[second], row[third]
            d_a, d_b, d_candidate = d_row[first:last], d_row[second], d_row[third]
            for d in range(last - first):
                keep, write = _shares(a[d], b[d], gates)
                x = candidate[d]
                low, high = _sigmoids(x)
                new = x + type(x)(0.5) if x >= 0 else low
                total = given[d] + carried[d]
                carried[d] = total * keep
                d_candidate[d] = total * write * (type(x)(1) if x >= 0 else low * high)
                slope = total * (new - before[d]) * keep * write
                if gates == 1:
                    d_a[d] = slope
                else:
                    d_a[d] = -slope * _sigmoids(a[d])[1]
                    d_b[d] = slope * _sigmoids(b[d])[1]
