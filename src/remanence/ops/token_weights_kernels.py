"""The weights of every token, compiled for the CPU: each call takes the heads from `first` to `last`.

A head's network is L matrices W_l with GELU between them, or gated. Its weights lie in one flat array, layer by layer,
and so does its momentum S_l; the inputs x and slopes δ of the layers stand side by side in the rows of two matrices.
Token t sees c tokens, those of rows t … t + c − 1, with weights γ. Its step is orthogonal, by so many `steps` of an
iteration: S ← η S − Σ_j γ_j δ_j x_jᵀ, W ← a W + θ NS(S). With none it is S ← η S − θ Σ_j γ_j δ_j x_jᵀ, W ← a W + S.

The iteration runs on the smaller of S Sᵀ and Sᵀ S. With B_0 = S Sᵀ / ‖S‖² and P_i = aI + bB_i + cB_i² every B is a
polynomial of the first, so all commute: B_{i+1} = P_i B_i P_i, and NS(S) = P_{N−1} ⋯ P_0 S / ‖S‖. That takes four small
products a step in place of two wide ones and a small one. Of a gradient along a symmetric matrix the symmetric part is
kept, since it alone tells.
"""

from __future__ import annotations

import numpy as np

from remanence.ops.chunk_kernels import copy, copy_row, dot, fill, matrix, multiply
from remanence.ops.compiled import gemm, jit
from remanence.ops.gelu_kernels import ERF, gelu
from remanence.ops.newton_schulz import EPS, QUINTIC

_A, _B, _C = QUINTIC


@jit
def _plan(shapes, steps):
    """By layer: outputs, inputs, where its weights, outputs, inputs and its iteration begin; then their sizes."""
    L = shapes.shape[0]
    plan = np.zeros((L + 1, 6), np.int64)
    for l in range(L):
        out, into = shapes[l, 0], shapes[l, 1]
        plan[l, 0], plan[l, 1] = out, into
        plan[l + 1, 2] = plan[l, 2] + out * into
        plan[l + 1, 3] = plan[l, 3] + out
        plan[l + 1, 4] = plan[l, 4] + into
        plan[l + 1, 5] = plan[l, 5] + 3 * steps * min(out, into) ** 2
    return plan


@jit
def _layer(plan, l, x):
    """Layer l of a flat array of weights."""
    return matrix(x[plan[l, 2] :], plan[l, 0], plan[l, 1])


@jit
def _iteration(plan, l, steps, x):
    """B, P and Q of layer l, each [steps, n, n]."""
    n = min(plan[l, 0], plan[l, 1])
    return x[plan[l, 5] : plan[l, 5] + 3 * steps * n * n].reshape(3, steps, n, n)


@jit
def _push(gamma, eta, x, delta, rows, S):
    """S ← η S − Σ_j γ_j δ_j x_jᵀ."""
    for j in range(rows.shape[0]):
        from_, to, by = delta[j], rows[j], gamma[j]
        for d in range(to.shape[0]):
            to[d] = by * from_[d]
    gemm(-1.0, rows, True, x, False, eta, S)


@jit
def _orthogonal(S, chain, work):
    """The last Q with NS(S) = s Q S (or s S Q), by way of B, P and Q of every step; returns the norm of S."""
    B, P, Q = chain[0], chain[1], chain[2]
    steps, n = B.shape[0], B.shape[1]
    tall = S.shape[0] > S.shape[1]
    gemm(1.0, S, tall, S, not tall, 0.0, B[0])
    square = S.dtype.type(0)
    for d in range(n):
        square += B[0, d, d]
    norm = np.sqrt(square)
    scale = 1 / (norm + S.dtype.type(EPS))
    for i in range(n):
        row = B[0, i]
        for d in range(n):
            row[d] *= scale * scale
    T = matrix(work, n, n)
    for i in range(steps):
        copy(B[i], P[i])
        gemm(_C, B[i], False, B[i], False, _B, P[i])
        for d in range(n):
            P[i, d, d] += S.dtype.type(_A)
        if i:
            gemm(1.0, P[i], False, Q[i - 1], False, 0.0, Q[i])
        else:
            copy(P[0], Q[0])
        if i + 1 < steps:
            gemm(1.0, P[i], False, B[i], False, 0.0, T)
            gemm(1.0, T, False, P[i], False, 0.0, B[i + 1])
    return norm


@jit
def _symmetric(x, out):
    half = x.dtype.type(0.5)
    for i in range(x.shape[0]):
        for j in range(i + 1):
            out[i, j] = out[j, i] = half * (x[i, j] + x[j, i])


@jit
def _iteration_backward(chain, works):
    """From dQ of the last step, in the first of `works`, to dB of the first, in the second."""
    B, P, Q = chain[0], chain[1], chain[2]
    steps, n = B.shape[0], B.shape[1]
    d_Q, d_B, d_P = matrix(works[0], n, n), matrix(works[1], n, n), matrix(works[2], n, n)
    T, U = matrix(works[3], n, n), matrix(works[4], n, n)
    for i in range(steps - 1, -1, -1):
        later = i + 1 < steps
        if i:
            gemm(1.0, d_Q, False, Q[i - 1], False, 0.0, T)
        else:
            copy(d_Q, T)
        if later:
            gemm(1.0, P[i], False, B[i], False, 0.0, U)
            gemm(2.0, d_B, False, U, False, 1.0, T)
        _symmetric(T, d_P)
        gemm(2 * _C, d_P, False, B[i], False, 0.0, T)
        if later:
            gemm(1.0, P[i], False, d_B, False, 0.0, U)
            gemm(1.0, U, False, P[i], False, 1.0, T)
        _symmetric(T, d_B)
        for a in range(n):
            to, row = d_B[a], d_P[a]
            for d in range(n):
                to[d] += B.dtype.type(_B) * row[d]
        if i:
            gemm(1.0, P[i], False, d_Q, False, 0.0, U)
            copy(U, d_Q)


@jit
def _orthogonal_backward(theta, norm, S, chain, works, d_W, d_S):
    """Add to d_S what comes from d_W, of θ NS(S); returns dθ."""
    B, Q = chain[0, 0], chain[2, chain.shape[1] - 1]
    n, real = B.shape[0], S.dtype.type
    scale = 1 / (norm + real(EPS))
    tall, by = S.shape[0] > S.shape[1], theta * scale
    d_Q, d_B = matrix(works[0], n, n), matrix(works[1], n, n)
    if tall:
        gemm(1.0, S, True, d_W, False, 0.0, d_Q)
        gemm(by, d_W, False, Q, False, 1.0, d_S)
    else:
        gemm(1.0, d_W, False, S, True, 0.0, d_Q)
        gemm(by, Q, False, d_W, False, 1.0, d_S)
    along = real(0)
    for a in range(n):
        along += dot(d_Q[a], Q[a])
    _iteration_backward(chain, works)
    d_scale = theta * along
    for a in range(n):
        d_scale += 2 * theta * dot(d_B[a], B[a])
    if tall:
        gemm(2 * by * scale * scale, S, False, d_B, False, 1.0, d_S)
    else:
        gemm(2 * by * scale * scale, d_B, False, S, False, 1.0, d_S)
    if norm > 0:
        back, unit = scale * scale * d_scale, 1 / norm
        for a in range(S.shape[0]):
            to, row = d_S[a], S[a]
            for d in range(S.shape[1]):
                to[d] -= back * (unit * row[d])
    return scale * along


@jit
def _learn(plan, steps, t, gamma, eta, a, theta, X, D, rows, work, W, S, chains, norms):
    """One token's write to every layer."""
    c = gamma.shape[0]
    for l in range(plan.shape[0] - 1):
        w, s, chain = _layer(plan, l, W), _layer(plan, l, S), _iteration(plan, l, steps, chains)
        x, delta = X[t : t + c, plan[l, 4] : plan[l + 1, 4]], D[t : t + c, plan[l, 3] : plan[l + 1, 3]]
        _push(gamma, eta, x, delta, matrix(rows, c, plan[l, 0]), s)
        if steps == 0:
            continue
        norms[l] = _orthogonal(s, chain, work)
        Q, by = chain[2, steps - 1], theta / (norms[l] + S.dtype.type(EPS))
        if w.shape[0] > w.shape[1]:
            gemm(by, s, False, Q, False, a, w)
        else:
            gemm(by, Q, False, s, False, a, w)
    if steps == 0:
        for d in range(W.shape[0]):
            W[d] = a * W[d] + S[d]


@jit
def _learn_backward(
    plan, steps, t, gamma, eta, a, theta, X, D, rows, works, W, S, before, chains, norms, d_W, d_S, gates, d_gamma,
    d_X, d_D,
):  # fmt: skip
    """From d_W and d_S after a token to those before it; sets its three `gates`, dη, da and dθ; adds to the others."""
    c = gamma.shape[0]
    fill(gates, 0.0)
    for l in range(plan.shape[0] - 1):
        d_w, d_s = _layer(plan, l, d_W), _layer(plan, l, d_S)
        chain = _iteration(plan, l, steps, chains)
        gates[2] += _orthogonal_backward(theta, norms[l], _layer(plan, l, S), chain, works, d_w, d_s)
        x, delta = X[t : t + c, plan[l, 4] : plan[l + 1, 4]], D[t : t + c, plan[l, 3] : plan[l + 1, 3]]
        d_x, d_delta = d_X[t : t + c, plan[l, 4] : plan[l + 1, 4]], d_D[t : t + c, plan[l, 3] : plan[l + 1, 3]]
        back = matrix(rows, c, plan[l, 1])
        gemm(1.0, delta, False, d_s, False, 0.0, back)
        for j in range(c):
            from_, row, to, by = back[j], x[j], d_x[j], gamma[j]
            d_gamma[j] -= dot(from_, row)
            for d in range(to.shape[0]):
                to[d] -= by * from_[d]
        back = matrix(rows, c, plan[l, 0])
        gemm(1.0, x, False, d_s, True, 0.0, back)
        for j in range(c):
            from_, to, by = back[j], d_delta[j], gamma[j]
            for d in range(to.shape[0]):
                to[d] -= by * from_[d]
    gates[0], gates[1] = dot(d_S, before), dot(d_W, W)
    for d in range(d_W.shape[0]):
        d_W[d] *= a
        d_S[d] *= eta


@jit
def _read(plan, gated, W, z, h, slope, gate):
    """What the query, the inputs of the first layer, finds: the outputs h of every layer."""
    L = plan.shape[0] - 1
    for l in range(L):
        out, into, w = h[plan[l, 3] : plan[l + 1, 3]], z[plan[l, 4] : plan[l + 1, 4]], _layer(plan, l, W)
        for d in range(out.shape[0]):
            out[d] = dot(w[d], into)
        if l == L - 1:
            continue
        after, bend = z[plan[l + 1, 4] : plan[l + 2, 4]], slope[plan[l, 3] : plan[l + 1, 3]]
        if not gated:
            gelu(ERF, matrix(out, 1, out.shape[0]), matrix(after, 1, out.shape[0]), matrix(bend, 1, out.shape[0]))
        elif l == 0:
            gelu(ERF, matrix(out, 1, out.shape[0]), matrix(gate, 1, out.shape[0]), matrix(bend, 1, out.shape[0]))
            copy_row(into, after)
        else:
            for d in range(after.shape[0]):
                after[d] = gate[d] * out[d]


@jit
def _read_backward(plan, gated, W, z, h, slope, gate, d_h, d_z, d_W):
    """From d_h of the last layer to d_z of the first; adds to d_W."""
    L = plan.shape[0] - 1
    for l in range(L - 1, -1, -1):
        w, d_w = _layer(plan, l, W), _layer(plan, l, d_W)
        into, d_into, d_out = z[plan[l, 4] : plan[l + 1, 4]], d_z[plan[l, 4] : plan[l + 1, 4]], d_h[plan[l, 3] :]
        fill(d_into, 0.0)
        for o in range(w.shape[0]):
            row, d_row, up = w[o], d_w[o], d_out[o]
            for d in range(into.shape[0]):
                d_into[d] += up * row[d]
                d_row[d] += up * into[d]
        if gated and l == 2:
            up, open_ = h[plan[1, 3] :], slope[plan[0, 3] :]
            d_gate, d_up = d_h[plan[0, 3] :], d_h[plan[1, 3] :]
            for d in range(d_into.shape[0]):
                d_up[d] = d_into[d] * gate[d]
                d_gate[d] = d_into[d] * up[d] * open_[d]
        elif not gated and l:
            before, bend = d_h[plan[l - 1, 3] :], slope[plan[l - 1, 3] :]
            for d in range(d_into.shape[0]):
                before[d] = d_into[d] * bend[d]
    if gated:
        first, second = d_z[plan[0, 4] :], d_z[plan[1, 4] : plan[2, 4]]
        for d in range(second.shape[0]):
            first[d] += second[d]


@jit
def forward(first, last, steps, gated, early, shapes, q, theta, a, eta, band, X, D, W, S, y, end, pushed):
    plan, dtype, L, C = _plan(shapes, steps), W.dtype, shapes.shape[0], q.shape[1]
    c = X.shape[1] - C + 1
    chains, work = np.empty(plan[L, 5], dtype), np.empty(plan[L, 5], dtype)
    rows, norms = np.empty(c * plan[L, 3], dtype), np.empty(L, dtype)
    h, slope, gate = np.empty(plan[L, 3], dtype), np.empty(plan[L, 3], dtype), np.empty(plan[L, 3], dtype)
    z = np.empty(plan[L, 4], dtype)
    for r in range(first, last):
        copy_row(W[r], end[r])
        copy_row(S[r], pushed[r])
        for t in range(C):
            copy_row(q[r, t], z[: plan[0, 1]])
            if early:
                _read(plan, gated, end[r], z, h, slope, gate)
            _learn(
                plan, steps, t, band[r, t, t : t + c], eta[r, t], a[r, t], theta[r, t], X[r], D[r], rows, work, end[r],
                pushed[r], chains, norms,
            )  # fmt: skip
            if not early:
                _read(plan, gated, end[r], z, h, slope, gate)
            copy_row(h[plan[L - 1, 3] :], y[r, t])


@jit
def backward(
    first, last, steps, gated, early, shapes, q, theta, a, eta, band, X, D, W, S, d_y, d_q, d_theta, d_a, d_eta, d_band,
    d_X, d_D, d_W, d_S,
):  # fmt: skip
    plan, dtype, L, C = _plan(shapes, steps), W.dtype, shapes.shape[0], q.shape[1]
    c = X.shape[1] - C + 1
    # of every token of the chunk
    Ws, Ss = np.empty((C + 1, W.shape[1]), dtype), np.empty((C + 1, W.shape[1]), dtype)
    chains, norms = np.empty((C, plan[L, 5]), dtype), np.empty((C, L), dtype)
    most = 0
    for l in range(L):
        most = max(most, min(plan[l, 0], plan[l, 1]) ** 2)
    works, rows = np.empty((5, most), dtype), np.empty(c * max(plan[L, 3], plan[L, 4]), dtype)
    h, slope, gate = np.empty(plan[L, 3], dtype), np.empty(plan[L, 3], dtype), np.empty(plan[L, 3], dtype)
    z, d_h, d_z = np.empty(plan[L, 4], dtype), np.empty(plan[L, 3], dtype), np.empty(plan[L, 4], dtype)
    gates = np.empty(3, dtype)
    for r in range(first, last):
        copy_row(W[r], Ws[0])
        copy_row(S[r], Ss[0])
        for t in range(C):
            copy_row(Ws[t], Ws[t + 1])
            copy_row(Ss[t], Ss[t + 1])
            _learn(
                plan, steps, t, band[r, t, t : t + c], eta[r, t], a[r, t], theta[r, t], X[r], D[r], rows, works[0],
                Ws[t + 1], Ss[t + 1], chains[t], norms[t],
            )  # fmt: skip
        for t in range(C - 1, -1, -1):
            for late in range(2):
                if late == early:
                    seen = Ws[t] if early else Ws[t + 1]
                    copy_row(q[r, t], z[: plan[0, 1]])
                    _read(plan, gated, seen, z, h, slope, gate)
                    copy_row(d_y[r, t], d_h[plan[L - 1, 3] :])
                    _read_backward(plan, gated, seen, z, h, slope, gate, d_h, d_z, d_W[r])
                    copy_row(d_z, d_q[r, t])
                if late == 0:
                    _learn_backward(
                        plan, steps, t, band[r, t, t : t + c], eta[r, t], a[r, t], theta[r, t], X[r], D[r], rows, works,
                        Ws[t], Ss[t + 1], Ss[t], chains[t], norms[t], d_W[r], d_S[r], gates, d_band[r, t, t : t + c],
                        d_X[r], d_D[r],
                    )  # fmt: skip
            d_eta[r, t], d_a[r, t], d_theta[r, t] = gates[0], gates[1], gates[2]


@jit
def _inner(plan, gated, W, X, H, G, D, target):
    """The gradient of every token under the squared error: from the keys, X's first columns, to all of X and D."""
    L = plan.shape[0] - 1
    out = plan[L, 3]
    for l in range(L):
        x, h, slope = X[:, plan[l, 4] : plan[l + 1, 4]], H[:, plan[l, 3] : plan[l + 1, 3]], G[:, plan[l, 3] :]
        after = X[:, plan[l + 1, 4] :]
        gemm(1.0, x, False, _layer(plan, l, W), True, 0.0, h)
        if l == L - 1:
            continue
        if not gated:
            gelu(ERF, h, after, slope)
        elif l == 0:
            copy(x, X[:, plan[1, 4] : plan[2, 4]])
            gelu(ERF, h, D[:, plan[1, 3] : plan[2, 3]], slope)  # the open gate, which the slopes of layer 1 grow from
        else:
            multiply(D[:, plan[1, 3] : plan[2, 3]], h, after)
    last = plan[L - 1, 3]
    for i in range(X.shape[0]):
        to, row, wanted = D[i, last:out], H[i, last:out], target[i]
        for d in range(to.shape[0]):
            to[d] = row[d] - wanted[d]
    for l in range(L - 1, 0, -1):
        if gated and l == 1:
            continue
        delta, width = D[:, plan[l, 3] : plan[l + 1, 3]], plan[l, 1]
        if gated:
            gate, up = D[:, plan[0, 3] : plan[1, 3]], D[:, plan[1, 3] : plan[2, 3]]
            gemm(1.0, delta, False, _layer(plan, l, W), False, 0.0, gate)
            multiply(gate, up, up)
            multiply(gate, H[:, plan[1, 3] : plan[2, 3]], gate)
            multiply(gate, G[:, :width], gate)
        else:
            before = D[:, plan[l - 1, 3] : plan[l, 3]]
            gemm(1.0, delta, False, _layer(plan, l, W), False, 0.0, before)
            multiply(before, G[:, plan[l - 1, 3] : plan[l, 3]], before)


@jit
def _sizes(plan, X, D, size, along):
    """By token ‖u‖ and ⟨e, e⟩."""
    last = plan[plan.shape[0] - 2, 3]
    for i in range(X.shape[0]):
        square = X.dtype.type(1e-24)
        for l in range(plan.shape[0] - 1):
            x, delta = X[i, plan[l, 4] : plan[l + 1, 4]], D[i, plan[l, 3] : plan[l + 1, 3]]
            square += dot(x, x) * dot(delta, delta)
        size[i], along[i] = np.sqrt(square), dot(D[i, last:], D[i, last:])


@jit
def stream(
    first, last, steps, gated, early, shapes, heads, C, phase, bound, q, k, target, theta, a, eta, gamma, pos, anchor,
    W, S, y,
):  # fmt: skip
    """Tokens without gradients, of which `phase` of the first one's chunk were read before; moves anchor, W and S.

    Where `bound` is above 0, θ is at most (1 − η) `bound` Σ_j γ_j ⟨e_j, e_j⟩ / (Σ_j γ_j ‖u_j‖)².
    """
    plan, dtype, L, T, c = _plan(shapes, steps), W.dtype, shapes.shape[0], q.shape[1], gamma.shape[2]
    zero = W.dtype.type(0)
    most = min(C, T) + c - 1
    X, D = np.empty((most, plan[L, 4]), dtype), np.empty((most, plan[L, 3]), dtype)
    H, G = np.empty((most, plan[L, 3]), dtype), np.empty((most, plan[L, 3]), dtype)
    size, along, seen = np.empty(most, dtype), np.empty(most, dtype), np.empty(c, dtype)
    chains, work, norms = np.empty(plan[L, 5], dtype), np.empty(plan[L, 5], dtype), np.empty(L, dtype)
    rows, z = np.empty(c * plan[L, 3], dtype), np.empty(plan[L, 4], dtype)
    h, slope, gate = np.empty(plan[L, 3], dtype), np.empty(plan[L, 3], dtype), np.empty(plan[L, 3], dtype)
    for r in range(first, last):
        start, end = 0, min(C - phase, T)
        while start < T:
            n = end - start + c - 1
            copy(k[r, start : start + n], X[:n, : plan[0, 1]])
            _inner(plan, gated, anchor[r], X[:n], H[:n], G[:n], D[:n], target[r, start : start + n])
            if bound > 0:
                _sizes(plan, X[:n], D[:n], size, along)
            for t in range(start, end):
                wide, error, step = zero, zero, theta[r, t]
                for j in range(c):
                    by = gamma[r, t, c - 1 - j] if pos[r // heads] + t >= c - 1 - j else zero
                    seen[j] = by
                    if bound > 0:
                        wide += by * size[t - start + j]
                        error += by * along[t - start + j]
                if bound > 0:
                    step = min(step, (1 - eta[r, t]) * bound * error / (wide * wide + W.dtype.type(1e-12)))
                if steps == 0:
                    for j in range(c):
                        seen[j] *= step
                copy_row(q[r, t], z[: plan[0, 1]])
                if early:
                    _read(plan, gated, W[r], z, h, slope, gate)
                _learn(
                    plan, steps, t - start, seen, eta[r, t], a[r, t], step, X, D, rows, work, W[r], S[r], chains, norms
                )  # fmt: skip
                if not early:
                    _read(plan, gated, W[r], z, h, slope, gate)
                copy_row(h[plan[L - 1, 3] :], y[r, t])
            if end - start == C or (start == 0 and end == C - phase):
                copy_row(W[r], anchor[r])
            start, end = end, min(end + C, T)
