"""`unit_solve` compiled for the CPU, in place: each call takes the systems from `first` to `last`."""

from __future__ import annotations

import numpy as np

from remanence.ops.compiled import jit
from remanence.ops.delta_kernels import solve, solve_transposed


@jit
def forward(first, last, A, X):
    n, columns = X.shape[1:]
    buffer, owed = np.empty(n * n, X.dtype), np.empty((n, columns), X.dtype)
    for r in range(first, last):
        solve(A[r], X[r], buffer, owed)


@jit
def backward(first, last, A, X):
    n, columns = X.shape[1:]
    buffer, owed = np.empty(n * n, X.dtype), np.empty((n, columns), X.dtype)
    for r in range(first, last):
        solve_transposed(A[r], X[r], buffer, owed)
