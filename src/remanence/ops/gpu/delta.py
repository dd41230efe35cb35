"""The gated delta rule for the GPU: only the states between chunks are found one after another.

What token i writes is w_i = β_i k_i times its error f_i. With the products e^{G} of the decays and A_ij = (k_i·w_j)
e^{G_i − G_j} for j < i, errors are F = (I + A)⁻¹ (V − (K ⊙ e^G) S). So (I + A)⁻¹, (I + A)⁻¹ V and (I + A)⁻¹ (K ⊙ e^G)
come first, for all chunks at once; then the states; and what is read is linear attention from keys W to values F.
Keys are a second kind of readers, which do not see their own token; gradients treat them so.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from remanence.ops.decay import second_order
from remanence.ops.gpu.chunks import (
    NONE,
    OPTIONS,
    Sizes,
    between,
    blank,
    decay_gradient,
    dot,
    from_start,
    pairs,
    power,
    put,
    put_state,
    strided,
    take,
    take_state,
    to_end,
    whole,
)
from remanence.ops.gpu.linear_attention import grid, key_gradients, read, value_gradients

BLOCK = tl.constexpr(16)


@triton.jit
def _inverses(
    k, k_at, w, w_at, g, g_at, X, X_at, T, H, K, KIND: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """X = (I + A)⁻¹ of each chunk: [B, H, T, C].

    First the blocks of 16 on the diagonal, row by row and all at once. Then, twice as large each time, of two blocks
    and the part L of A between them: [[X₁, 0], [−X₂ L X₁, X₂]], which is X − X L X.
    """
    c, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    A = pairs(k, k_at, w, w_at, r, H, c * C, T, K, C, BK, WIDE, OPERAND)
    A *= between(g, g_at, r, H, c * C, T, True, KIND, C, WIDE)
    N: tl.constexpr = C // BLOCK
    same = tl.arange(0, N)[:, None, None, None] == tl.arange(0, N)[None, None, :, None]
    i, j = tl.arange(0, BLOCK)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    blocks = tl.sum(tl.where(same, tl.reshape(A, [N, BLOCK, N, BLOCK]), 0), 2)
    found = tl.where(i == j, 1, tl.zeros([N, BLOCK, BLOCK], WIDE))
    for n in range(1, BLOCK):
        row = tl.sum(tl.where(i == n, blocks, 0), 1)
        found -= tl.where(i == n, tl.sum(row[:, :, None] * found, 1)[:, None, :], 0)
    inverse = tl.reshape(tl.where(same, found[:, :, None, :], 0), [C, C])
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    for level in tl.static_range(LEVELS):
        late, early = i // (BLOCK * 2**level), j // (BLOCK * 2**level)
        joined = (late // 2 == early // 2) & (late > early)
        inverse -= dot(dot(inverse, tl.where(joined, A, 0), WIDE), inverse, WIDE)
    put(X, X_at, r, H, c * C, T, 0, C, inverse, C, C)


@triton.jit
def _products(
    X, X_at, x, x_at, g, g_at, y, y_at, T, H, width, TRANSPOSED: tl.constexpr, DECAYED: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Y = X x or Xᵀ x of each chunk; the rows of x are DECAYED since the chunk began."""
    c, d, r = tl.program_id(0), tl.program_id(1) * W, tl.program_id(2).to(tl.int64)
    X_c = take(X, X_at, r, H, c * C, T, 0, C, C, C, WIDE)
    rows = take(x, x_at, r, H, c * C, T, d, width, C, W, WIDE)
    if DECAYED:
        rows *= from_start(g, g_at, r, H, c * C, T, 0, 1, 1, C, W, WIDE)
    if TRANSPOSED:
        X_c = tl.trans(X_c)
    put(y, y_at, r, H, c * C, T, d, width, dot(X_c, rows, OPERAND), C, W)


@triton.jit
def _states(
    seen, seen_at, F, F_at, w, w_at, g, g_at, S, T, H, K, V, KIND: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Fill S [B·H, chunks + 1, K, V] from its first slot, and turn (I + A)⁻¹ V in F into the errors."""
    e, r = tl.program_id(0) * BV, tl.program_id(1).to(tl.int64)
    chunks = tl.cdiv(T, C)
    slots = r * (chunks + 1)
    state = take_state(S, slots, 0, e, K, V, BK, BV)
    for c in range(chunks):
        reads = dot(take(seen, seen_at, r, H, c * C, T, 0, K, C, BK, WIDE), state, OPERAND)
        errors = take(F, F_at, r, H, c * C, T, e, V, C, BV, WIDE) - reads
        put(F, F_at, r, H, c * C, T, e, V, errors, C, BV)
        ws = take(w, w_at, r, H, c * C, T, 0, K, C, BK, WIDE)
        if KIND != NONE:
            ws *= to_end(g, g_at, r, H, c * C, T, 0, K, KIND, C, BK, WIDE)
            state *= whole(g, g_at, r, H, c * C, T, 0, K, KIND, C, BK, WIDE)
        state += dot(tl.trans(ws), errors, OPERAND)
        put_state(S, slots + c + 1, 0, e, K, V, state, BK, BV)


@triton.jit
def _state_gradients(
    seen, seen_at, d_F, d_F_at, q, q_at, w, w_at, g, g_at, d_y, d_y_at, d_S, T, H, K, V, KIND: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Fill ∂S from its last slot, and add to ∂F what comes through later states."""
    e, r = tl.program_id(0) * BV, tl.program_id(1).to(tl.int64)
    chunks = tl.cdiv(T, C)
    slots = r * (chunks + 1)
    d_state = take_state(d_S, slots + chunks, 0, e, K, V, BK, BV)
    for i in range(chunks):
        c = chunks - 1 - i
        ws = take(w, w_at, r, H, c * C, T, 0, K, C, BK, WIDE)
        if KIND != NONE:
            ws *= to_end(g, g_at, r, H, c * C, T, 0, K, KIND, C, BK, WIDE)
        d_errors = take(d_F, d_F_at, r, H, c * C, T, e, V, C, BV, WIDE) + dot(ws, d_state, OPERAND)
        put(d_F, d_F_at, r, H, c * C, T, e, V, d_errors, C, BV)
        qs = take(q, q_at, r, H, c * C, T, 0, K, C, BK, WIDE)
        if KIND != NONE:
            qs *= from_start(g, g_at, r, H, c * C, T, 0, K, KIND, C, BK, WIDE)
            d_state *= whole(g, g_at, r, H, c * C, T, 0, K, KIND, C, BK, WIDE)
        d_state += dot(tl.trans(qs), take(d_y, d_y_at, r, H, c * C, T, e, V, C, BV, WIDE), OPERAND)
        d_state -= dot(tl.trans(take(seen, seen_at, r, H, c * C, T, 0, K, C, BK, WIDE)), d_errors, OPERAND)
        put_state(d_S, slots + c, 0, e, K, V, d_state, BK, BV)


def _longest(q: Tensor, k: Tensor, v: Tensor) -> int:
    """Tokens of whose keys, whole, the programs that walk over the chunks can hold several matrices."""
    narrow = q.dtype == k.dtype == v.dtype == torch.bfloat16
    return max(16, (2**13 if narrow else 2**12) // power(k.shape[3], 256))


def _multiply(n: Sizes, X: Tensor, x: Tensor, g: Tensor | None, transposed: bool = False) -> Tensor:
    """X x, with the rows of x decayed where g is given, or Xᵀ x: in float32 or wider."""
    y, W = blank(x, n.dtype), power(x.shape[3], n.largest)
    _products[grid(n, triton.cdiv(x.shape[3], W))](
        *strided(X, x), *strided(x, x), *strided(g, x), *strided(y, x), n.T, n.H, x.shape[3], transposed, g is not None,
        n.C, W, n.wide, n.operand, **OPTIONS,
    )  # fmt: skip
    return y


class GatedDeltaRule(torch.autograd.Function):
    """y [B, H, T, V] and the end state [B, H, K, V], K ≤ 256; inputs float64, float32, float16 or bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, start: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        n = Sizes.of(q, k, v, g, min(chunk_size, _longest(q, k, v)))
        w = (k * b[..., None]).to(k.dtype)
        X, S = k.new_empty(n.B, n.H, n.T, n.C, dtype=n.dtype), n.states(k)
        S[:, 0] = start.flatten(0, 1)
        y = blank(v, v.dtype)
        with torch.cuda.device_of(k):
            _inverses[n.chunks, n.heads](
                *strided(k, k), *strided(w, k), *strided(g, k), *strided(X, k), n.T, n.H, n.K, n.kind,
                n.C, (n.C // BLOCK.value).bit_length() - 1, n.BK, n.wide, n.operand, num_warps=8,
            )  # fmt: skip
            seen, F = _multiply(n, X, k, g), _multiply(n, X, v, None)
            BV = power(n.V, 16 if n.K > 64 else n.largest // 2)
            _states[triton.cdiv(n.V, BV), n.heads](
                *strided(seen, k), *strided(F, k), *strided(w, k), *strided(g, k), S, n.T, n.H, n.K, n.V, n.kind,
                n.C, power(n.K, 256), BV, n.wide, n.operand, **OPTIONS,
            )  # fmt: skip
            read(n, q, w, F, g, None, S, y)
        ctx.save_for_backward(q, k, v, b, g, start, X, seen, F, S)
        ctx.sizes = n
        return y, S[:, -1].clone().view_as(start)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, b, g, start, X, seen, F, S = ctx.saved_tensors
        n = ctx.sizes
        if torch.is_grad_enabled():  # a second derivative is wanted
            return *second_order(ctx.needs_input_grad[:6], _plain(n), (q, k, v, b, g, start), grads), None
        d_y, d_end = grads
        w = (k * b[..., None]).to(k.dtype)
        d_F, d_S = blank(v, n.dtype), n.states(k)
        d_S[:, -1] = d_end.flatten(0, 1)
        with torch.cuda.device_of(k):
            value_gradients(n, q, w, g, None, d_y, None, d_F)
            BV = power(n.V, 16 if n.K > 64 else n.largest // 2)
            _state_gradients[triton.cdiv(n.V, BV), n.heads](
                *strided(seen, k), *strided(d_F, k), *strided(q, k), *strided(w, k), *strided(g, k), *strided(d_y, k),
                d_S, n.T, n.H, n.K, n.V, n.kind, n.C, power(n.K, 256), BV, n.wide, n.operand, **OPTIONS,
            )  # fmt: skip
            d_v = _multiply(n, X, d_F, None, transposed=True)
            d_q, d_w, over = key_gradients(n, q, w, F, g, S, d_S, d_y)
            d_k, d_seen, _ = key_gradients(n, k, w, F, g, S, None, -d_v, strict=True)
        d_w += d_seen
        d_g = None if g is None else decay_gradient((q * d_q + k * d_k - w * d_w).sum(-1), over, g, n)
        d_k += b[..., None] * d_w
        d_b = (k * d_w).sum(-1)
        narrow = d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_b.to(b.dtype)
        return *narrow, d_g, d_S[:, 0].clone().view_as(start), None


def _plain(n: Sizes) -> Any:
    from remanence.ops.delta import _by_chunks

    def plain(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, start: Tensor) -> tuple[Tensor, Tensor]:
        g = None if g is None else g.to(n.dtype)
        y, S = _by_chunks(q.to(n.dtype), k.to(n.dtype), v.to(n.dtype), b.to(n.dtype), g, start, n.C)
        return y.to(v.dtype), S

    return plain
