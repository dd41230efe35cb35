"""One token of a long convolution whose kernel is few functions of the lag, compiled for the CPU.

Tensors come as in `step_kernels`.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.compiled import jit, summing
from remanence.ops.step_kernels import at


@summing
def _with_lengths(rows, x, along, square):
    """row · x, and row · row, of each row; rows [D, N], x [D, ≥ N]."""
    for d in range(rows.shape[0]):
        by, own = along.dtype.type(0), along.dtype.type(0)
        for i in range(rows.shape[1]):
            by += rows[d, i] * x[d, i]
            own += rows[d, i] * rows[d, i]
        along[d], square[d] = by, own


@summing
def _total(along, square, gain, offset, constant, least):
    """Σ (gain · along / √square + offset · constant)."""
    total = along.dtype.type(0)
    for d in range(along.shape[0]):
        total += gain[d] * along[d] / max(np.sqrt(square[d]), least) + offset[d] * constant[d]
    return total


@jit
def normed_mix(one, founds, weights, gains, offsets, biases, ys, B, O, D, N):
    """y [B, O] = bias + Σ_d (gain · found_d · w / ‖w‖ + offset · what a constant 1 found), w [O, D, N] row by row.

    found [B, D, N + 1], the constant's last; gain and offset [O, D], bias [O].
    """
    found, y, weight = at(one, founds, (B, D, N + 1)), at(one, ys, (B, O)), at(one, weights, (O, D, N))
    gain, offset, bias = at(one, gains, (O, D)), at(one, offsets, (O, D)), at(one, biases, (O,))
    along, square, least = np.empty(D, y.dtype), np.empty(D, y.dtype), y.dtype.type(1e-12)
    for o in range(O):
        for b in range(B):
            _with_lengths(weight[o], found[b], along, square)
            y[b, o] = bias[o] + _total(along, square, gain[o], offset[o], found[b, :, N], least)
