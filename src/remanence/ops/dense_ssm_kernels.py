"""`dense_ssm` and inverses of many small matrices, compiled for the CPU: each feature's system stays in the cache.

Axes: D features, n pieces of L tokens (a power of two), B batch, N state, M outputs. Rows of W are Ā^{L−1−j} B̄, what
token j of a piece leaves at its end; rows of R are C Ā^{i+1}, what token i reads of the state before the piece.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.chunk_kernels import add_scaled, combine, dot
from remanence.ops.compiled import gemm, jit, summing
from remanence.ops.step_kernels import at


@summing
def _product(v, A, out):
    for j in range(out.shape[0]):
        out[j] = 0
    combine(v, A, out)


@summing
def _map(A, x, out):
    """out = A x, four rows at a time."""
    n, zero = out.shape[0], x.dtype.type(0)
    for i in range(0, n - 3, 4):
        p, q, r, s = A[i], A[i + 1], A[i + 2], A[i + 3]
        a, b, c, d = zero, zero, zero, zero
        for j in range(x.shape[0]):
            a += p[j] * x[j]
            b += q[j] * x[j]
            c += r[j] * x[j]
            d += s[j] * x[j]
        out[i], out[i + 1], out[i + 2], out[i + 3] = a, b, c, d
    for i in range(n - n % 4, n):
        out[i] = dot(A[i], x)


@jit
def token(one, us, transitions, writes, reads, starts, ys, ends, B, D, M, N):
    """One token by addresses: u [B, D], start and h [B, D, N], y [B, D, M]."""
    u, y, A, b = at(one, us, (B, D)), at(one, ys, (B, D, M)), at(one, transitions, (D, N, N)), at(one, writes, (D, N))
    C, start, h = at(one, reads, (D, M, N)), at(one, starts, (B, D, N)), at(one, ends, (B, D, N))
    for d in range(D):
        for i in range(B):
            now = h[i, d]
            _map(A[d], start[i, d], now)
            add_scaled(b[d], u[i, d], now)
            _map(C[d], now, y[i, d])


@summing
def _add_outer(x, y, out):
    """out += x yᵀ, four rows at a time."""
    N = out.shape[0]
    for i in range(0, N - 3, 4):
        a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
        p, q, r, s = out[i], out[i + 1], out[i + 2], out[i + 3]
        for j in range(y.shape[0]):
            p[j] += a * y[j]
            q[j] += b * y[j]
            r[j] += c * y[j]
            s[j] += d * y[j]
    for i in range(N - N % 4, N):
        add_scaled(y, x[i], out[i])


@summing
def _turned(A, out):
    for i in range(A.shape[0]):
        for j in range(A.shape[1]):
            out[j, i] = A[i, j]


@summing
def _responses(C, W, toeplitz):
    """toeplitz [(m, i), j] = C_m Ā^{i−j} B̄, and zero for j > i."""
    L = W.shape[0]
    for m in range(C.shape[0]):
        for lag in range(L):
            response = dot(C[m], W[L - 1 - lag])
            for i in range(lag, L):
                toeplitz[m * L + i, i - lag] = response


@summing
def forward(first, last, rest, x, A, b, C, h, y, starts, W, R, powers, end):
    """x [D, n, B, L], its last piece with `rest` tokens and zeros; y [D, n, B, M·L]; starts [D, n, B, N]."""
    _, n, B, L = x.shape
    M, N = C.shape[1:]
    toeplitz, turned = np.zeros((M * L, L), x.dtype), np.empty((N, N), x.dtype)
    for d in range(first, last):
        Ad, Wd, Rd, S = A[d], W[d], R[d], starts[d]
        _turned(Ad, turned)
        for i in range(N):
            Wd[L - 1, i] = b[d, i]
        for j in range(L - 2, -1, -1):
            _product(Wd[j + 1], turned, Wd[j])
        for m in range(M):
            _product(C[d, m], Ad, Rd[m * L])
            for i in range(1, L):
                _product(Rd[m * L + i - 1], Ad, Rd[m * L + i])
        _responses(C[d], Wd, toeplitz)
        if n > 1:
            gemm(1, x[d, : n - 1].reshape(-1, L), False, Wd, False, 0, S[1:].reshape(-1, N))
            whole = Ad
            for k in range(powers.shape[1]):
                gemm(1, whole, False, whole, False, 0, powers[d, k])
                whole = powers[d, k]
            _turned(whole, turned)
        for i in range(B):
            for j in range(N):
                S[0, i, j] = h[d, i, j]
            for c in range(n - 1):
                combine(S[c, i], turned, S[c + 1, i])
        out = y[d].reshape(-1, M * L)
        gemm(1, x[d].reshape(-1, L), False, toeplitz, True, 0, out)
        gemm(1, S.reshape(-1, N), False, Rd, True, 1, out)
        _turned(Ad, turned)
        passed = np.empty((rest + 1, N), x.dtype)
        for i in range(B):
            _pass(S[n - 1, i], turned, b[d], x[d, n - 1, i], passed)
            for j in range(N):
                end[d, i, j] = passed[rest, j]


@summing
def _pass(h, turned, b, x, passed):
    """The states of the last piece, token by token: its length is no power of two."""
    for j in range(h.shape[0]):
        passed[0, j] = h[j]
    for t in range(passed.shape[0] - 1):
        _product(passed[t], turned, passed[t + 1])
        add_scaled(b, x[t], passed[t + 1])


@summing
def backward(first, last, rest, x, A, b, C, starts, W, R, powers, d_y, d_end, d_x, d_A, d_b, d_C, d_h):
    """d_y [D, n, B, M·L] has zeros after the last token. `d_h` is the gradient of the states before all."""
    _, n, B, L = x.shape
    M, N = C.shape[1:]
    toeplitz, turned = np.zeros((M * L, L), x.dtype), np.empty((N, N), x.dtype)
    d_S, d_W, d_R = np.empty((n, B, N), x.dtype), np.empty((L, N), x.dtype), np.empty((M * L, N), x.dtype)
    d_T, d_P, d_Q = np.empty((M * L, L), x.dtype), np.empty((N, N), x.dtype), np.empty((N, N), x.dtype)
    passed, back = np.empty((rest + 1, N), x.dtype), np.empty((rest + 1, N), x.dtype)
    for d in range(first, last):
        Ad, Wd, Rd, Cd, S, dA, db, dC = A[d], W[d], R[d], C[d], starts[d], d_A[d], d_b[d], d_C[d]
        dy, xs, dx = d_y[d].reshape(-1, M * L), x[d].reshape(-1, L), d_x[d].reshape(-1, L)
        _turned(Ad, turned)
        _responses(Cd, Wd, toeplitz)
        gemm(1, dy, False, toeplitz, False, 0, dx)
        gemm(1, dy, True, xs, False, 0, d_T)
        gemm(1, dy, False, Rd, False, 0, d_S.reshape(-1, N))
        gemm(1, dy, True, S.reshape(-1, N), False, 0, d_R)
        for i in range(N):
            db[i] = 0
        for i in range(B):  # the last piece
            _pass(S[n - 1, i], turned, b[d], x[d, n - 1, i], passed)
            for j in range(N):
                back[rest, j] = d_end[d, i, j]
            for t in range(rest - 1, -1, -1):
                d_x[d, n - 1, i, t] += dot(b[d], back[t + 1])
                add_scaled(back[t + 1], x[d, n - 1, i, t], db)
                _product(back[t + 1], Ad, back[t])
            add_scaled(back[0], 1, d_S[n - 1, i])
            gemm(1, back[1:], True, passed[:rest], False, 1 if i else 0, dA)
        if n > 1:
            whole = powers[d, powers.shape[1] - 1] if powers.shape[1] else Ad
            for i in range(B):
                for c in range(n - 2, -1, -1):
                    combine(d_S[c + 1, i], whole, d_S[c, i])
            after = d_S[1:].reshape(-1, N)
            gemm(1, after, False, Wd, True, 1, d_x[d, : n - 1].reshape(-1, L))
            gemm(1, x[d, : n - 1].reshape(-1, L), True, after, False, 0, d_W)
            gemm(1, after, True, S[: n - 1].reshape(-1, N), False, 0, d_P)
            for k in range(powers.shape[1] - 1, -1, -1):
                root = powers[d, k - 1] if k else Ad
                gemm(1, d_P, False, root, True, 0, d_Q)
                gemm(1, root, True, d_P, False, 1, d_Q)
                d_P, d_Q = d_Q, d_P
            for i in range(N):
                add_scaled(d_P[i], 1, dA[i])
        else:
            for j in range(L):
                for i in range(N):
                    d_W[j, i] = 0
        for i in range(B):
            for j in range(N):
                d_h[d, i, j] = d_S[0, i, j]
        for m in range(M):
            for j in range(N):
                dC[m, j] = 0
            for lag in range(L):
                total = d_T[0, 0] * 0
                for i in range(lag, L):
                    total += d_T[m * L + i, i - lag]
                add_scaled(Wd[L - 1 - lag], total, dC[m])
                add_scaled(Cd[m], total, d_W[L - 1 - lag])
            for i in range(L - 1, 0, -1):
                combine(d_R[m * L + i], turned, d_R[m * L + i - 1])
            combine(d_R[m * L], turned, dC[m])
            for i in range(N):
                add_scaled(d_R[m * L], Cd[m, i], dA[i])
            if L > 1:
                gemm(1, Rd[m * L : (m + 1) * L - 1], True, d_R[m * L + 1 : (m + 1) * L], False, 1, dA)
        for j in range(L - 1):
            combine(d_W[j], Ad, d_W[j + 1])
        if L > 1:
            gemm(1, d_W[: L - 1], True, Wd[1:], False, 1, dA)
        add_scaled(d_W[L - 1], 1, db)


@summing
def inverses(first, last, A):
    """Gauss and Jordan's elimination in place, with the largest pivot of each column. A [D, N, N]."""
    N = A.shape[1]
    swapped, below, row = np.empty(N, np.int64), np.empty(N, A.dtype), np.empty(N, A.dtype)
    for d in range(first, last):
        M = A[d]
        for k in range(N):
            best = k
            for i in range(k + 1, N):
                if abs(M[i, k]) > abs(M[best, k]):
                    best = i
            swapped[k] = best
            if best != k:
                for j in range(N):
                    M[k, j], M[best, j] = M[best, j], M[k, j]
            scale = 1 / M[k, k]
            M[k, k] = 1
            for j in range(N):
                M[k, j] *= scale
            for i in range(N):
                below[i] = -M[i, k] if i != k else 0
                if i != k:
                    M[i, k] = 0
            for j in range(N):
                row[j] = M[k, j]
            _add_outer(below, row, M)
        for k in range(N - 1, -1, -1):
            best = swapped[k]
            if best != k:
                for i in range(N):
                    M[i, k], M[i, best] = M[i, best], M[i, k]
