"""One token of each recurrence, compiled for the CPU. Axes: B batch, H heads, D features, K of keys, V of values.

Tensors are given by their addresses, since making an array of one takes longer than most of these loops; one that is
absent has none (0). They are contiguous, of the precision of `one`, and have no time axis. No tensor is altered but
the outputs.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray, types
from numba.extending import intrinsic, overload

from remanence.ops.chunk_kernels import copy_row, dot, fill
from remanence.ops.compiled import decay, jit, sigmoid_and_silu, summing
from remanence.ops.decay import FLOOR
from remanence.ops.dplr_kernels import write

PLAIN, SILU, SIGMOID, ELU, SOFTMAX = 0, 1, 2, 3, 4
"""What a gate's logits, or features, go through (ELU: elu + 1); `PLAIN` stands for no gate."""


@intrinsic
def _pointer(typing, address, like):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), generate


@jit
def at(one, address, shape):
    """The array of this shape that lies at an address, of numbers such as `one`."""
    return carray(_pointer(address, one), shape)  # type: ignore[call-arg]


@jit
def sigmoid(x):
    return sigmoid_and_silu(x)[0]


def softplus(x: float) -> float:
    """log(1 + eˣ), in the precision of x: in float32 by a series, which vectorises where libm's log does not."""
    raise TypeError("softplus is for compiled code.")


@overload(softplus, inline="always", jit_options={"fastmath": {"contract"}, "error_model": "numpy"})
def _softplus(x):
    def wide(x):
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    zero, two = np.float32(0), np.float32(2)
    c3, c5, c7, c9, c11, c13 = (np.float32(2 / n) for n in range(3, 15, 2))

    def single(x):
        u = decay(-abs(x))
        s = u / (two + u)  # log(1 + u) = 2 artanh s, and s ≤ 1/3
        r = s * s
        return max(x, zero) + s * (two + r * (c3 + r * (c5 + r * (c7 + r * (c9 + r * (c11 + r * c13))))))

    return single if x == types.float32 else wide


@jit
def softmax(x):
    """In place; returns the logarithm of the sum of exponentials."""
    most = x[0]
    for j in range(x.shape[0]):
        most = max(most, x[j])
    for j in range(x.shape[0]):
        x[j] = decay(x[j] - most)
    total = x.dtype.type(0)
    for j in range(x.shape[0]):
        total += x[j]
    for j in range(x.shape[0]):
        x[j] /= total
    return most + math.log(total)


@jit
def lost(x, out):
    """1 − eˣ for x ≤ 0, by a series near 0, where 1 − eˣ loses its digits."""
    one, half = out.dtype.type(1), out.dtype.type(-0.5)
    fill(out, 1)
    for n in range(15, 1, -1):
        part = out.dtype.type(1 / n)
        for d in range(x.shape[0]):
            out[d] = one + part * x[d] * out[d]
    for d in range(x.shape[0]):
        near, far = -x[d] * out[d], one - decay(x[d])
        out[d] = near if x[d] > half else far


@jit
def add(x, scale, out):
    for d in range(out.shape[0]):
        out[d] += scale * x[d]


@jit
def move(old, keep, take, x, new):
    """new = keep · old + take · x, of rows."""
    for d in range(new.shape[0]):
        new[d] = keep * old[d] + take * x[d]


@jit
def activate(x):
    for d in range(x.shape[0]):
        x[d] = sigmoid_and_silu(x[d])[1]


@jit
def keep_last(old, new, kept):
    """The last rows of `old` and then `new`, after zeros where these are fewer."""
    room, last = old.shape[0], kept.shape[0] - 1
    carried = min(room, last)
    if last >= 0:
        fill(kept[: last - carried].reshape(-1), 0)
        copy_row(old[room - carried :].reshape(-1), kept[last - carried : last].reshape(-1))
        copy_row(new, kept[last])


@jit
def unit(x, scale, eps):
    """x to the length `scale`, in place; `eps` as in `ops.normalise`."""
    by = x.dtype.type(scale / math.sqrt(dot(x, x) + eps))
    for d in range(x.shape[0]):
        x[d] *= by


@summing
def read_both(a, b, S, u, w):
    """u = Sᵀ a and w = Sᵀ b, of one look at S, two key features at a time."""
    K, V = S.shape
    for j in range(V):
        u[j] = 0
        w[j] = 0
    even = K - K % 2
    for i in range(0, even, 2):
        first, second = S[i], S[i + 1]
        a0, a1, b0, b1 = a[i], a[i + 1], b[i], b[i + 1]
        for j in range(V):
            u[j] += a0 * first[j] + a1 * second[j]
            w[j] += b0 * first[j] + b1 * second[j]
    if even < K:
        add(S[even], a[even], u)
        add(S[even], b[even], w)


@jit
def _write(start, decays, k, new, S):
    """S = Diag(decays) start + k newᵀ."""
    for i in range(S.shape[0]):
        before, now, a, x = start[i], S[i], decays[i], k[i]
        for d in range(new.shape[0]):
            now[d] = a * before[d] + x * new[d]


@jit
def write_and_read(start, decays, k, new, q, S, out):
    """The same, and out = Sᵀ q, of one look at S."""
    fill(out, 0)
    for i in range(S.shape[0]):
        before, now, a, x, late = start[i], S[i], decays[i], k[i], q[i]
        for d in range(new.shape[0]):
            held = a * before[d] + x * new[d]
            now[d] = held
            out[d] += late * held


@jit
def _read_and_write(start, decays, k, new, q, S, out):
    """The same, but out = startᵀ q."""
    fill(out, 0)
    for i in range(S.shape[0]):
        before, now, a, x, late = start[i], S[i], decays[i], k[i], q[i]
        for d in range(new.shape[0]):
            held = before[d]
            now[d] = a * held + x * new[d]
            out[d] += late * held


@jit
def _four_taps(w, old, new, out):
    first, second, third = old[0], old[1], old[2]
    for d in range(new.shape[0]):
        i = 4 * d  # of a flat array, which the compiler vectorises as it does not one of rows
        out[d] += w[i] * first[d] + w[i + 1] * second[d] + w[i + 2] * third[d] + w[i + 3] * new[d]


@jit
def convolve(weight, tail, new, out, after):
    """out += Σ_j weight[:, j] ⊙ (tail, then new)[j], and the next tail: weight [D, width], tail [width − 1, D]."""
    D, width = weight.shape
    if width == 4:
        _four_taps(weight.reshape(-1), tail, new, out)
    else:
        for j in range(width):
            seen = tail[j] if j < width - 1 else new
            for d in range(D):
                out[d] += weight[d, j] * seen[d]
    for j in range(width - 2):
        copy_row(tail[j + 1], after[j])
    if width > 1:
        copy_row(new, after[width - 2])


@jit
def causal_conv(one, tails, xs, weights, biases, ys, afters, B, D, width, silu):
    """tail and after [B, width − 1, D], x and y [B, D], weight [D, width], bias [D] or absent."""
    tail, after = at(one, tails, (B, width - 1, D)), at(one, afters, (B, width - 1, D))
    x, y = at(one, xs, (B, D)), at(one, ys, (B, D))
    weight, bias = at(one, weights, (D, width)), at(one, biases, (D,))
    for b in range(B):
        new, out = x[b], y[b]
        if biases:
            copy_row(bias, out)
        else:
            fill(out, 0)
        convolve(weight, tail[b], new, out, after[b])
        if silu:
            activate(out)


@jit
def normalise(one, xs, weights, biases, gates, ys, rows, width, groups, centred, kind, share, eps):
    """Rows [rows, width], each by its own: weight and bias [groups, width] go round with the rows; y may be x."""
    x, y, gate = at(one, xs, (rows, width)), at(one, ys, (rows, width)), at(one, gates, (rows, width))
    weight, bias = at(one, weights, (groups, width)), at(one, biases, (groups, width))
    for i in range(rows):
        row, out = x[i], y[i]
        copy_row(row, out)
        if centred:
            mean = x.dtype.type(0)
            for d in range(width):
                mean += row[d]
            mean /= width
            for d in range(width):
                out[d] -= mean
        r = x.dtype.type(1 / math.sqrt(share * dot(out, out) + eps))
        for d in range(width):
            out[d] *= r
        if weights:
            scale = weight[i % groups]
            for d in range(width):
                out[d] *= scale[d]
        if biases:
            add(bias[i % groups], one, out)
        if kind == SILU:
            g = gate[i]
            for d in range(width):
                out[d] *= sigmoid_and_silu(g[d])[1]
        elif kind == SIGMOID:
            g = gate[i]
            for d in range(width):
                out[d] *= sigmoid(g[d])


@jit
def glu(one, xs, ys, rows, width):
    """y [rows, width] = the first half of x [rows, 2·width] ⊙ σ of the second."""
    x, y = at(one, xs, (rows, 2 * width)), at(one, ys, (rows, width))
    for i in range(rows):
        value, gate, out = x[i, :width], x[i, width:], y[i]
        for d in range(width):
            out[d] = value[d] * sigmoid(gate[d])


@jit
def phases(position, rates, cos, sin):
    """Of each pair of features its angle's cosine and sine at a position, in float64 until then."""
    for j in range(rates.shape[0]):
        angle = position * rates[j]
        cos[j], sin[j] = math.cos(angle), math.sin(angle)


@jit
def turn(x, cos, sin, y):
    """y = x with its feature pairs (j, j + P) turned, P angles; further features as they are. y must not be x."""
    half = cos.shape[0]
    first, second, left, right = x[:half], x[half : 2 * half], y[:half], y[half : 2 * half]
    for j in range(half):
        left[j] = first[j] * cos[j] - second[j] * sin[j]
    for j in range(half):
        right[j] = first[j] * sin[j] + second[j] * cos[j]
    copy_row(x[2 * half :], y[2 * half :])


@jit
def rotate(one, xs, ys, positions, rates, B, H, K):
    """x and y [B, H, K]; position int64 [B]; rate float64 [K / 2]."""
    x, y, half = at(one, xs, (B, H, K)), at(one, ys, (B, H, K)), K // 2
    position, rate = at(np.int64(0), positions, (B,)), at(1.0, rates, (half,))
    cos, sin = np.empty(half, x.dtype), np.empty(half, x.dtype)
    for b in range(B):
        phases(position[b], rate, cos, sin)
        for h in range(H):
            turn(x[b, h], cos, sin, y[b, h])


@jit
def scan(one, gs, bs, starts, hs, B, D):
    """All [B, D]."""
    g, b, start, h = at(one, gs, (B, D)), at(one, bs, (B, D)), at(one, starts, (B, D)), at(one, hs, (B, D))
    for i in range(B):
        a, new, before, now = g[i], b[i], start[i], h[i]
        for d in range(D):
            now[d] = decay(a[d]) * before[d] + new[d]


@jit
def linear_attention(one, qs, ks, vs, gs, starts, ys, ends, B, H, K, V, decays):
    """`decays`, and the last axis of g: none, one for the head, or one per key feature."""
    q, k, g = at(one, qs, (B, H, K)), at(one, ks, (B, H, K)), at(one, gs, (B, H, decays))
    v, y = at(one, vs, (B, H, V)), at(one, ys, (B, H, V))
    start, S = at(one, starts, (B, H, K, V)), at(one, ends, (B, H, K, V))
    a = np.empty(K, v.dtype)
    fill(a, 1.0)
    for b in range(B):
        for h in range(H):
            if decays == 1:
                fill(a, decay(g[b, h, 0]))
            elif decays > 1:
                rates = g[b, h]
                for i in range(K):
                    a[i] = decay(rates[i])
            write_and_read(start[b, h], a, k[b, h], v[b, h], q[b, h], S[b, h], y[b, h])


@jit
def read_before_write(one, qs, ks, vs, gs, bonuses, starts, ys, ends, B, H, K, V):
    """As `linear_attention` with a decay per key feature, but read at q before the write, which counts `bonus` times.

    bonus [H, K]."""
    q, k, g = at(one, qs, (B, H, K)), at(one, ks, (B, H, K)), at(one, gs, (B, H, K))
    v, y, bonus = at(one, vs, (B, H, V)), at(one, ys, (B, H, V)), at(one, bonuses, (H, K))
    start, S = at(one, starts, (B, H, K, V)), at(one, ends, (B, H, K, V))
    a = np.empty(K, v.dtype)
    for b in range(B):
        for h in range(H):
            late, early, out, own, rates, extra = q[b, h], k[b, h], y[b, h], v.dtype.type(0), g[b, h], bonus[h]
            for i in range(K):
                own += late[i] * extra[i] * early[i]
                a[i] = decay(rates[i])
            _read_and_write(start[b, h], a, early, v[b, h], late, S[b, h], out)
            add(v[b, h], own, out)


@jit
def state_space_token(one, mixes, zs, steps, biases, rates, skips, starts, ys, ends, B, H, G, K, V, least, most):
    """Mamba-2's recurrence from what it projects: values, keys and queries side by side, the last two of G groups.

    Steps [B, H] are logits, clipped after softplus to `least` … `most`; what is read is gated by SiLU(z) [B, H·V].
    """
    mixed, z = at(one, mixes, (B, H * V + 2 * G * K)), at(one, zs, (B, H * V))
    step, bias, rate, skip = at(one, steps, (B, H)), at(one, biases, (H,)), at(one, rates, (H,)), at(one, skips, (H,))
    start, S, y = at(one, starts, (B, H, K, V)), at(one, ends, (B, H, K, V)), at(one, ys, (B, H * V))
    new, a = np.empty(V, y.dtype), np.empty(K, y.dtype)
    for b in range(B):
        row, out = mixed[b], y[b]
        for h in range(H):
            place = H * V + h // (H // G) * K
            u, early, late = row[h * V : (h + 1) * V], row[place : place + K], row[place + G * K : place + (G + 1) * K]
            size = y.dtype.type(min(max(softplus(step[b, h] + bias[h]), least), most))
            fill(a, decay(y.dtype.type(-math.exp(rate[h]) * size)))
            for d in range(V):
                new[d] = size * u[d]
            read_out = out[h * V : (h + 1) * V]
            write_and_read(start[b, h], a, early, new, late, S[b, h], read_out)
            add(u, skip[h], read_out)
        logits = z[b]
        for d in range(H * V):
            out[d] *= sigmoid_and_silu(logits[d])[1]


@jit
def softmax_scan(one, scores, values, rates, bonuses, sums, sizes, ys, next_sums, next_sizes, tops, next_tops, B, D):
    """All [B, D] but the decay's rate and the bonus [D], which may be absent; `tops` are m, in float64."""
    score, v, y = at(one, scores, (B, D)), at(one, values, (B, D)), at(one, ys, (B, D))
    w, u = at(one, sums, (B, D)), at(one, sizes, (B, D))
    new_w, new_u = at(one, next_sums, (B, D)), at(one, next_sizes, (B, D))
    m, new_m = at(1.0, tops, (B, D)), at(1.0, next_tops, (B, D))
    rate, bonus = at(one, rates, (D,)), at(one, bonuses, (D,))
    past, present = np.empty(D, y.dtype), np.empty(D, y.dtype)
    for b in range(B):
        for d in range(D):  # what is read
            now = np.float64(score[b, d]) + (bonus[d] if bonuses else 0)
            top = max(m[b, d], now)
            past[d], present[d] = m[b, d] - top, now - top
        _decay_both(past, present)
        for d in range(D):
            y[b, d] = (past[d] * w[b, d] + present[d] * v[b, d]) / (past[d] * u[b, d] + present[d])
        for d in range(D):  # what is kept
            before = m[b, d] + (max(np.float64(rate[d]), FLOOR) if rates else 0)
            top = max(before, np.float64(score[b, d]))
            past[d], present[d] = before - top, score[b, d] - top
            new_m[b, d] = top
        _decay_both(past, present)
        for d in range(D):
            new_w[b, d] = past[d] * w[b, d] + present[d] * v[b, d]
        for d in range(D):
            new_u[b, d] = past[d] * u[b, d] + present[d]


@jit
def _decay_both(x, y):
    for d in range(x.shape[0]):
        x[d] = decay(x[d])
    for d in range(y.shape[0]):
        y[d] = decay(y[d])


@jit
def token_shift(one, xs, lasts, mixes, newests, ys, blends, B, D, per_row):
    """y [blends, B, D]: x + (last − x) ⊙ mix, mix [blends, D], or [blends, B, D] (`per_row`); newest copies x."""
    rows = B if per_row else 1
    x, last = at(one, xs, (B, D)), at(one, lasts, (B, D))
    mix, y = at(one, mixes, (blends, rows, D)), at(one, ys, (blends, B, D))
    newest = at(one, newests, (B, D))
    for b in range(B):
        copy_row(x[b], newest[b])
    for n in range(blends):
        for b in range(B):
            now, before, share, out = x[b], last[b], mix[n, b if per_row else 0], y[n, b]
            for d in range(D):
                out[d] = now[d] + (before[d] - now[d]) * share[d]


@jit
def _delta(late, early, new, beta, a, start, error, seen, found, out, S):
    """One head: S = Diag(a) start + the part of `new` that this did not foresee at `early`, read at `late`."""
    for i in range(a.shape[0]):
        seen[i] = a[i] * late[i]
        found[i] = a[i] * early[i]
    read_both(found, seen, start, error, out)
    for d in range(new.shape[0]):
        error[d] = beta * (new[d] - error[d])
    add(error, dot(late, early), out)
    _write(start, a, early, error, S)


@jit
def gated_delta_rule(one, qs, ks, vs, betas, gs, starts, ys, ends, B, H, K, V):
    """beta, g [B, H]."""
    q, k, beta, g = at(one, qs, (B, H, K)), at(one, ks, (B, H, K)), at(one, betas, (B, H)), at(one, gs, (B, H))
    v, y = at(one, vs, (B, H, V)), at(one, ys, (B, H, V))
    start, S = at(one, starts, (B, H, K, V)), at(one, ends, (B, H, K, V))
    error, a, seen, found = np.empty(V, v.dtype), np.empty(K, v.dtype), np.empty(K, v.dtype), np.empty(K, v.dtype)
    fill(a, 1)
    for b in range(B):
        for h in range(H):
            if gs:
                fill(a, decay(g[b, h]))
            _delta(q[b, h], k[b, h], v[b, h], beta[b, h], a, start[b, h], error, seen, found, y[b, h], S[b, h])


@jit
def dplr(one, qs, ks, vs, firsts, seconds, gs, starts, ys, ends, B, H, K, V):
    q, k, g = at(one, qs, (B, H, K)), at(one, ks, (B, H, K)), at(one, gs, (B, H, K))
    a, b = at(one, firsts, (B, H, K)), at(one, seconds, (B, H, K))
    v, y = at(one, vs, (B, H, V)), at(one, ys, (B, H, V))
    start, S = at(one, starts, (B, H, K, V)), at(one, ends, (B, H, K, V))
    found, decays, seen = np.empty(V, v.dtype), np.empty(K, v.dtype), np.empty(K, v.dtype)
    fill(decays, 1.0)
    for n in range(B):
        for h in range(H):
            late, early, new, out, along = q[n, h], k[n, h], v[n, h], y[n, h], b[n, h]
            if gs:
                rates = g[n, h]
                for i in range(K):
                    decays[i] = decay(rates[i])
            for i in range(K):
                seen[i] = late[i] * decays[i]
            read_both(a[n, h], seen, start[n, h], found, out)
            add(new, dot(late, early), out)
            add(found, dot(late, along), out)
            write(start[n, h], S[n, h], found, early, new, along, decays)


@jit
def replacement_token(
    one, qs, ks, vs, decay_logits, rate_logits, removals, replacements, bonuses, starts, ys, owns, ends, B, H, K, lowest
):
    """RWKV-7's recurrence from what it projects, all [B, H, K], and its parameters [H, K].

    The log decay is `lowest`·σ of its logits; `owns` is what the present token answers by itself.
    """
    q, k, v = at(one, qs, (B, H, K)), at(one, ks, (B, H, K)), at(one, vs, (B, H, K))
    slow, quick = at(one, decay_logits, (B, H, K)), at(one, rate_logits, (B, H, K))
    removal, replacement, bonus = at(one, removals, (H, K)), at(one, replacements, (H, K)), at(one, bonuses, (H, K))
    start, S = at(one, starts, (B, H, K, K)), at(one, ends, (B, H, K, K))
    y, own = at(one, ys, (B, H, K)), at(one, owns, (B, H, K))
    found, a, seen = np.empty(K, y.dtype), np.empty(K, y.dtype), np.empty(K, y.dtype)
    removed, early, along = np.empty(K, y.dtype), np.empty(K, y.dtype), np.empty(K, y.dtype)
    lowest = y.dtype.type(lowest)
    for b in range(B):
        for h in range(H):
            late, new, out, self_read = q[b, h], v[b, h], y[b, h], own[b, h]
            for i in range(K):
                a[i] = decay(lowest * sigmoid(slow[b, h, i]))
            for i in range(K):
                removed[i] = k[b, h, i] * removal[h, i]
            by = y.dtype.type(1 / math.sqrt(dot(removed, removed) + 1e-12))
            for i in range(K):
                rate = sigmoid(quick[b, h, i])
                removed[i] *= -by
                along[i] = -rate * removed[i]
                early[i] = k[b, h, i] * (one + (rate - one) * replacement[h, i])
                seen[i] = late[i] * a[i]
            present = y.dtype.type(0)
            for i in range(K):
                present += late[i] * early[i] * bonus[h, i]
            for d in range(K):
                self_read[d] = present * new[d]
            read_both(removed, seen, start[b, h], found, out)
            add(new, dot(late, early), out)
            add(found, dot(late, along), out)
            write(start[b, h], S[b, h], found, early, new, along, a)


@jit
def selective_scan(one, xs, deltas, rates, ins, outs, starts, ys, ends, B, D, N):
    """x, delta, y [B, D]; rates [D, N], or absent where the decay is 1 − Δ b²; what goes in and out [B, N]."""
    x, delta, y, rate = at(one, xs, (B, D)), at(one, deltas, (B, D)), at(one, ys, (B, D)), at(one, rates, (D, N))
    into, out_of = at(one, ins, (B, N)), at(one, outs, (B, N))
    start, h = at(one, starts, (B, D, N)), at(one, ends, (B, D, N))
    for b in range(B):
        new, late = into[b], out_of[b]
        for d in range(D):
            step, before, now = delta[b, d], start[b, d], h[b, d]
            u = step * x[b, d]
            if rates:
                fastest = rate[d]
                for n in range(N):
                    now[n] = decay(step * fastest[n]) * before[n] + u * new[n]
            else:
                for n in range(N):
                    now[n] = (1 - step * new[n] * new[n]) * before[n] + u * new[n]
            y[b, d] = dot(now, late)
