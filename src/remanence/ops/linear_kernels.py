"""A projection and what it sends back, compiled for the CPU: each call takes the parts from `first` to `last`.

A part is `rows` rows of the left matrix, which stay in the cache while two vectors' columns at a time of the right one,
a panel, are copied side by side and multiplied.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.compiled import jit
from remanence.ops.product_kernels import BYTES, tiles, turn

DEPTH = 512
"""Terms of a sum that are taken at once: of so many a panel stays in the nearest caches."""
SPAN = 128
"""Tokens that are turned at once."""


@jit
def multiply(first, last, rows, x, y, y_turned, out):
    """out = x y, or x yᵀ; out has a whole number of panels of columns."""
    count, inner = x.shape
    size, real, width = x.itemsize, x.dtype.type, 2 * BYTES // x.itemsize
    x_row, y_row, out_row = x.strides[0] // size, y.strides[0] // size, out.strides[0] // size
    panel = np.empty((min(inner, DEPTH), width), x.dtype)
    for part in range(first, last):
        start, end = part * rows, min((part + 1) * rows, count)
        for j in range(0, out.shape[1], width):
            for i in range(0, inner, DEPTH):
                depth = min(DEPTH, inner - i)
                if y_turned:
                    turn(y[:, i : i + depth], j, panel[:depth])
                    right, at, step = panel, 0, width
                else:
                    right, at, step = y[i:], j, y_row
                tiles(
                    x[start:, i:], x_row, 1, right, at, step, out[start:], j, out_row, end - start, depth, real(1),
                    real(i > 0),
                )  # fmt: skip


@jit
def slopes(first, last, high, wide, x, y, out):
    """out = xᵀ y, `high` columns of x and `wide` columns of y a part; out has a whole number of panels of columns."""
    tokens, rows = x.shape
    size, real, width, across = x.itemsize, x.dtype.type, 2 * BYTES // x.itemsize, -(-out.shape[1] // wide)
    turned = np.empty((min(high, rows), min(tokens, SPAN)), x.dtype)
    step, y_row, out_row = turned.strides[0] // size, y.strides[0] // size, out.strides[0] // size
    for part in range(first, last):
        top, left = part // across * high, part % across * wide
        bottom, right = min(top + high, rows), min(left + wide, out.shape[1])
        for t in range(0, tokens, SPAN):
            depth = min(SPAN, tokens - t)
            turn(x[:, top:bottom], t, turned[: bottom - top, :depth])
            for j in range(left, right, width):
                tiles(
                    turned, step, 1, y[t:], j, y_row, out[top:], j, out_row, bottom - top, depth, real(1), real(t > 0)
                )
