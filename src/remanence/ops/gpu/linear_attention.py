"""Linear attention for the GPU, with any decay: states between chunks one after another, all else in parallel.

With products of decays written as e^{G}: Y = P V + (Q ⊙ e^G) S and S' = Diag(e^{G_C}) S + (K ⊙ e^{G_C − G})ᵀ V, where
P_ij = Σ_d q_id k_jd e^{G_id − G_jd} for j ≤ i. Backwards, the gradients of the states obey the same recurrence with
Q for K and ∂Y for V. With a decay per key feature, pairs of tokens see each other from the border of a block of 16;
those within a block are taken one token at a time.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from remanence.ops.decay import second_order
from remanence.ops.gpu.chunks import (
    FLOOR,
    NONE,
    OPTIONS,
    PER_KEY,
    Sizes,
    between,
    blank,
    decay_gradient,
    dot,
    from_start,
    pairs,
    put,
    put_state,
    strided,
    take,
    take_state,
    to_end,
    whole,
)

BLOCK = 16


@triton.jit
def _states(
    k, k_at, v, v_at, g, g_at, S, T, H, K, V, REVERSE: tl.constexpr,
    KIND: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Fill S [B·H, chunks + 1, K, V], the state before each chunk and after the last, from its first slot.

    REVERSE, with queries for keys and gradients of outputs for values: the gradients of these, from the last slot.
    """
    d, e, r = tl.program_id(0) * BK, tl.program_id(1) * BV, tl.program_id(2).to(tl.int64)
    chunks = tl.cdiv(T, C)
    slots = r * (chunks + 1)
    state = take_state(S, slots + (chunks if REVERSE else 0), d, e, K, V, BK, BV)
    for i in range(chunks):
        c = chunks - 1 - i if REVERSE else i
        ks = take(k, k_at, r, H, c * C, T, d, K, C, BK, WIDE)
        vs = take(v, v_at, r, H, c * C, T, e, V, C, BV, WIDE)
        if KIND != NONE:
            if REVERSE:
                ks *= from_start(g, g_at, r, H, c * C, T, d, K, KIND, C, BK, WIDE)
            else:
                ks *= to_end(g, g_at, r, H, c * C, T, d, K, KIND, C, BK, WIDE)
            state *= whole(g, g_at, r, H, c * C, T, d, K, KIND, C, BK, WIDE)
        state += dot(tl.trans(ks), vs, OPERAND)
        put_state(S, slots + (c if REVERSE else c + 1), d, e, K, V, state, BK, BV)


@triton.jit
def _scores(
    q, q_at, k, k_at, g, g_at, P, P_at, r, H, first, T, K, KIND: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """P of a chunk, found beforehand where decays are per key feature: [C, C]."""
    if KIND == PER_KEY:
        return take(P, P_at, r, H, first, T, 0, C, C, C, WIDE)
    else:
        found = pairs(q, q_at, k, k_at, r, H, first, T, K, C, BK, WIDE, OPERAND)
        return found * between(g, g_at, r, H, first, T, False, KIND, C, WIDE)


@triton.jit
def _outputs(
    q, q_at, k, k_at, v, v_at, g, g_at, P, P_at, S, y, y_at, T, H, K, V,
    KIND: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    c, e, r = tl.program_id(0), tl.program_id(1) * BV, tl.program_id(2).to(tl.int64)
    P_c = _scores(q, q_at, k, k_at, g, g_at, P, P_at, r, H, c * C, T, K, KIND, C, BK, WIDE, OPERAND)
    out = dot(P_c, take(v, v_at, r, H, c * C, T, e, V, C, BV, WIDE), OPERAND)
    for d in range(0, K, BK):
        qs = take(q, q_at, r, H, c * C, T, d, K, C, BK, WIDE)
        if KIND != NONE:
            qs *= from_start(g, g_at, r, H, c * C, T, d, K, KIND, C, BK, WIDE)
        out += dot(qs, take_state(S, r * (tl.num_programs(0) + 1) + c, d, e, K, V, BK, BV), OPERAND)
    put(y, y_at, r, H, c * C, T, e, V, out, C, BV)


@triton.jit
def _value_gradients(
    q, q_at, k, k_at, g, g_at, P, P_at, d_y, d_y_at, d_S, d_v, d_v_at, T, H, K, V, THROUGH_STATE: tl.constexpr,
    KIND: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """∂V = Pᵀ ∂Y + (K ⊙ e^{G_C − G}) ∂S', the second part only THROUGH_STATE."""
    c, e, r = tl.program_id(0), tl.program_id(1) * BV, tl.program_id(2).to(tl.int64)
    P_c = _scores(q, q_at, k, k_at, g, g_at, P, P_at, r, H, c * C, T, K, KIND, C, BK, WIDE, OPERAND)
    out = dot(tl.trans(P_c), take(d_y, d_y_at, r, H, c * C, T, e, V, C, BV, WIDE), OPERAND)
    if THROUGH_STATE:
        for d in range(0, K, BK):
            ks = take(k, k_at, r, H, c * C, T, d, K, C, BK, WIDE)
            if KIND != NONE:
                ks *= to_end(g, g_at, r, H, c * C, T, d, K, KIND, C, BK, WIDE)
            out += dot(ks, take_state(d_S, r * (tl.num_programs(0) + 1) + c + 1, d, e, K, V, BK, BV), OPERAND)
    put(d_v, d_v_at, r, H, c * C, T, e, V, out, C, BV)


@triton.jit
def _key_gradients(
    q, q_at, k, k_at, v, v_at, g, g_at, S, d_S, d_y, d_y_at, d_q, d_q_at, d_k, d_k_at, over, T, H, K, V,
    STRICT: tl.constexpr, THROUGH_STATE: tl.constexpr,
    KIND: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """∂Q = ∂P K + (∂Y Sᵀ) ⊙ e^G and ∂K = ∂Pᵀ Q + (V ∂S'ᵀ) ⊙ e^{G_C − G}, the last part only THROUGH_STATE.

    With it comes `over` [B·H, chunks, K], the gradient of the log decay over the chunk. Readers that are STRICT do
    not see their own token. Where decays are per key feature, what goes through ∂P is left to `_pair_gradients`.
    """
    c, d, r = tl.program_id(0), tl.program_id(1) * BK, tl.program_id(2).to(tl.int64)
    slot = r * (tl.num_programs(0) + 1) + c
    d_P = tl.zeros([C, C], WIDE)
    out_q, out_k, out_over = tl.zeros([C, BK], WIDE), tl.zeros([C, BK], WIDE), tl.zeros([BK], WIDE)
    for e in range(0, V, BV):
        d_ys = take(d_y, d_y_at, r, H, c * C, T, e, V, C, BV, WIDE)
        vs = take(v, v_at, r, H, c * C, T, e, V, C, BV, WIDE)
        if KIND != PER_KEY:
            d_P += dot(d_ys, tl.trans(vs), OPERAND)
        out_q += dot(d_ys, tl.trans(take_state(S, slot, d, e, K, V, BK, BV)), OPERAND)
        if THROUGH_STATE:
            d_after = take_state(d_S, slot + 1, d, e, K, V, BK, BV)
            out_k += dot(vs, tl.trans(d_after), OPERAND)
            if KIND != NONE:
                out_over += tl.sum(take_state(S, slot + 1, d, e, K, V, BK, BV) * d_after, 1)
    if KIND != NONE:
        out_q *= from_start(g, g_at, r, H, c * C, T, d, K, KIND, C, BK, WIDE)
        if THROUGH_STATE:
            out_k *= to_end(g, g_at, r, H, c * C, T, d, K, KIND, C, BK, WIDE)
            i = d + tl.arange(0, BK)
            tl.store(over + (r * tl.num_programs(0) + c) * K + i, out_over, mask=i < K)
    if KIND != PER_KEY:
        d_P *= between(g, g_at, r, H, c * C, T, STRICT, KIND, C, WIDE)
        out_q += dot(d_P, take(k, k_at, r, H, c * C, T, d, K, C, BK, WIDE), OPERAND)
        out_k += dot(tl.trans(d_P), take(q, q_at, r, H, c * C, T, d, K, C, BK, WIDE), OPERAND)
    put(d_q, d_q_at, r, H, c * C, T, d, K, out_q, C, BK)
    put(d_k, d_k_at, r, H, c * C, T, d, K, out_k, C, BK)


@triton.jit
def _plain_pairs(
    x, x_at, y, y_at, P, P_at, T, H, width, C: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr
):
    """P_ij = x_i · y_j for the tokens of each chunk: [B, H, T, C]."""
    c, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    found = pairs(x, x_at, y, y_at, r, H, c * C, T, width, C, W, WIDE, OPERAND)
    put(P, P_at, r, H, c * C, T, 0, C, found, C, C)


@triton.jit
def _pairs_per_key(
    q, q_at, k, k_at, g, g_at, P, P_at, T, H, K,
    C: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """P_ij = Σ_d q_id k_jd e^{G_id − G_jd} for j ≤ i, else 0, N rows from a border on: [B, H, T, C]."""
    r = tl.program_id(1).to(tl.int64)
    b, h = r // H, r % H
    border = tl.program_id(0).to(tl.int64) * N
    first = border // C * C
    i, j = tl.arange(0, N)[:, None], tl.arange(0, C)[None, :]
    found = tl.zeros([N, C], WIDE)
    for d in range(0, K, BK):
        qs = take(q, q_at, r, H, border, T, d, K, N, BK, WIDE)
        ks = take(k, k_at, r, H, first, tl.minimum(border, T), d, K, C, BK, WIDE)
        late = from_start(g, g_at, r, H, border, T, d, K, PER_KEY, N, BK, WIDE)
        early = to_end(g, g_at, r, H, first, tl.minimum(border, T), d, K, PER_KEY, C, BK, WIDE)
        found += dot(qs * late, tl.trans(ks * early), OPERAND)
        passed = tl.zeros([N, BK], WIDE)
        e = d + tl.arange(0, BK)[None, :]
        k_r, g_r = k + b * k_at[0] + h * k_at[1] + e, g + b * g_at[0] + h * g_at[1] + e
        for n in range(N):
            own = N - 1 - n
            t = border + own
            key = tl.load(k_r + t * k_at[2], mask=e < tl.where(t < T, K, 0), other=0)
            a = tl.load(g_r + (t + 1) * g_at[2], mask=e < tl.where(t + 1 < T, K, 0), other=0).to(WIDE)
            passed = tl.where(i > own, passed + tl.maximum(a, FLOOR), 0)
            column = tl.sum(qs * key * tl.exp(passed), 1)[:, None]
            found += tl.where((i >= own) & (j == border - first + own), column, 0)
    put(P, P_at, r, H, border, T, 0, C, found, N, C)


@triton.jit
def _pair_gradients(
    q, q_at, k, k_at, g, g_at, d_P, d_P_at, d_q, d_q_at, d_k, d_k_at, T, H, K,
    C: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """Add to ∂Q and ∂K, at N tokens from a border on, what comes through ∂P with a decay per key feature."""
    d, r = tl.program_id(1) * BK, tl.program_id(2).to(tl.int64)
    b, h = r // H, r % H
    border = tl.program_id(0).to(tl.int64) * N
    first, after = border // C * C, border + N
    last = tl.minimum(first + C, T)
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    qs = take(q, q_at, r, H, border, T, d, K, N, BK, WIDE)

    early = to_end(g, g_at, r, H, first, tl.minimum(border, T), d, K, PER_KEY, C, BK, WIDE)
    ks = take(k, k_at, r, H, first, tl.minimum(border, T), d, K, C, BK, WIDE)
    rows = take(d_P, d_P_at, r, H, border, T, 0, border - first, N, C, WIDE)
    out_q = dot(rows, ks * early, OPERAND) * from_start(g, g_at, r, H, border, T, d, K, PER_KEY, N, BK, WIDE)

    late = from_start(g, g_at, r, H, after, last, d, K, PER_KEY, C, BK, WIDE)
    later = take(q, q_at, r, H, after, last, d, K, C, BK, WIDE)
    columns = take(d_P, d_P_at, r, H, after, last, border - first, C, C, N, WIDE)
    out_k = dot(tl.trans(columns), later * late, OPERAND) * to_end(g, g_at, r, H, border, T, d, K, PER_KEY, N, BK, WIDE)

    own_pairs = take(d_P, d_P_at, r, H, border, T, border - first, C, N, N, WIDE)
    passed = tl.zeros([N, BK], WIDE)
    e = d + tl.arange(0, BK)[None, :]
    k_r, g_r = k + b * k_at[0] + h * k_at[1] + e, g + b * g_at[0] + h * g_at[1] + e
    for n in range(N):
        own = N - 1 - n
        t = border + own
        key = tl.load(k_r + t * k_at[2], mask=e < tl.where(t < T, K, 0), other=0)
        a = tl.load(g_r + (t + 1) * g_at[2], mask=e < tl.where(t + 1 < T, K, 0), other=0).to(WIDE)
        passed = tl.where(i > own, passed + tl.maximum(a, FLOOR), 0)
        column = tl.sum(tl.where((j == own) & (i >= own), own_pairs, 0), 1)[:, None]
        seen = column * tl.exp(passed)
        out_q += seen * key
        out_k += tl.where(i == own, tl.sum(seen * qs, 0)[None, :], 0)
    put(d_q, d_q_at, r, H, border, T, d, K, out_q + take(d_q, d_q_at, r, H, border, T, d, K, N, BK, WIDE), N, BK)
    put(d_k, d_k_at, r, H, border, T, d, K, out_k + take(d_k, d_k_at, r, H, border, T, d, K, N, BK, WIDE), N, BK)


def grid(n: Sizes, *features: int) -> tuple[int, ...]:
    """Chunks, blocks of features, heads."""
    return n.chunks, *features, n.heads


def walk(n: Sizes, k: Tensor, v: Tensor, g: Tensor | None, border: Tensor, reverse: bool) -> Tensor:
    """The states [B·H, chunks + 1, K, V] from the first on or, in reverse, their gradients from the last."""
    S = n.states(k)
    S[:, -1 if reverse else 0] = border.flatten(0, 1)
    _states[triton.cdiv(n.K, n.BK), triton.cdiv(n.V, n.BV), n.heads](
        *strided(k, k), *strided(v, k), *strided(g, k), S, n.T, n.H, n.K, n.V, reverse,
        n.kind, n.C, n.BK, n.BV, n.wide, n.operand, **OPTIONS,
    )  # fmt: skip
    return S


def scores_per_key(n: Sizes, q: Tensor, k: Tensor, g: Tensor | None) -> Tensor | None:
    """P [B, H, T, C] where decays are per key feature; elsewhere kernels find it themselves."""
    if n.kind != PER_KEY.value:
        return None
    P = k.new_empty(n.B, n.H, n.T, n.C, dtype=n.dtype)
    _pairs_per_key[triton.cdiv(n.T, BLOCK), n.heads](
        *strided(q, k), *strided(k, k), *strided(g, k), *strided(P, k), n.T, n.H, n.K,
        n.C, BLOCK, n.BK, n.wide, n.operand, **OPTIONS,
    )  # fmt: skip
    return P


def read(n: Sizes, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, P: Tensor | None, S: Tensor, y: Tensor) -> None:
    """Write Y."""
    _outputs[grid(n, triton.cdiv(n.V, n.BV))](
        *strided(q, k), *strided(k, k), *strided(v, k), *strided(g, k), *strided(P, k), S, *strided(y, k),
        n.T, n.H, n.K, n.V, n.kind, n.C, n.BK, n.BV, n.wide, n.operand, **OPTIONS,
    )  # fmt: skip


def value_gradients(
    n: Sizes,
    q: Tensor,
    k: Tensor,
    g: Tensor | None,
    P: Tensor | None,
    d_y: Tensor,
    d_S: Tensor | None,
    d_v: Tensor,
) -> None:
    """Write ∂V, without what comes through later states where their gradients are not given."""
    _value_gradients[grid(n, triton.cdiv(n.V, n.BV))](
        *strided(q, k), *strided(k, k), *strided(g, k), *strided(P, k), *strided(d_y, k),
        k if d_S is None else d_S, *strided(d_v, k), n.T, n.H, n.K, n.V, d_S is not None,
        n.kind, n.C, n.BK, n.BV, n.wide, n.operand, **OPTIONS,
    )  # fmt: skip


def key_gradients(
    n: Sizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    S: Tensor,
    d_S: Tensor | None,
    d_y: Tensor,
    strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """∂Q, ∂K and that of the log decays over the chunks [B·H, chunks, K], in float32 or wider.

    Without gradients of later states: what `strict` readers do, who write nothing.
    """
    d_q, d_k = blank(q, n.dtype), blank(k, n.dtype)
    over = k.new_empty(n.heads, n.chunks, n.K, dtype=n.dtype)
    _key_gradients[grid(n, triton.cdiv(n.K, n.BK))](
        *strided(q, k), *strided(k, k), *strided(v, k), *strided(g, k), S, S if d_S is None else d_S,
        *strided(d_y, k), *strided(d_q, k), *strided(d_k, k), over, n.T, n.H, n.K, n.V, strict, d_S is not None,
        n.kind, n.C, n.BK, n.BV, n.wide, n.operand, **OPTIONS,
    )  # fmt: skip
    if n.kind == PER_KEY.value:
        d_P = k.new_empty(n.B, n.H, n.T, n.C, dtype=n.dtype)
        _plain_pairs[n.chunks, n.heads](
            *strided(d_y, k), *strided(v, k), *strided(d_P, k), n.T, n.H, n.V, n.C, n.BV, n.wide, n.operand, **OPTIONS,
        )  # fmt: skip
        _pair_gradients[triton.cdiv(n.T, BLOCK), triton.cdiv(n.K, n.BK), n.heads](
            *strided(q, k), *strided(k, k), *strided(g, k), *strided(d_P, k), *strided(d_q, k), *strided(d_k, k),
            n.T, n.H, n.K, n.C, BLOCK, n.BK, n.wide, n.operand, **OPTIONS,
        )  # fmt: skip
    return d_q, d_k, over


class LinearAttention(torch.autograd.Function):
    """y [B, H, T, V] and the end state [B, H, K, V]; inputs may be float64, float32, float16 or bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        n = Sizes.of(q, k, v, g, chunk_size)
        y = blank(v, v.dtype)
        with torch.cuda.device_of(k):
            S, P = walk(n, k, v, g, start, False), scores_per_key(n, q, k, g)
            read(n, q, k, v, g, P, S, y)
        ctx.save_for_backward(q, k, v, g, start, P, S)
        ctx.sizes = n
        return y, S[:, -1].clone().view_as(start)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, g, start, P, S = ctx.saved_tensors
        n = ctx.sizes
        if torch.is_grad_enabled():  # a second derivative is wanted
            return *second_order(ctx.needs_input_grad[:5], _plain(n), (q, k, v, g, start), grads), None
        d_y, d_end = grads
        d_v = blank(v, v.dtype)
        with torch.cuda.device_of(k):
            d_S = walk(n, q, d_y, g, d_end, True)
            value_gradients(n, q, k, g, P, d_y, d_S, d_v)
            d_q, d_k, over = key_gradients(n, q, k, v, g, S, d_S, d_y)
        d_g = None
        if g is not None:
            change = q * d_q - k * d_k
            d_g = decay_gradient(change if g.ndim == 4 else change.sum(-1), over, g, n)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v, d_g, d_S[:, 0].clone().view_as(start), None


def _plain(n: Sizes) -> Any:
    from remanence.ops.linear_attention import _by_chunks

    def plain(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor) -> tuple[Tensor, Tensor]:
        g = None if g is None else g.to(n.dtype)
        y, S = _by_chunks(q.to(n.dtype), k.to(n.dtype), v.to(n.dtype), g, start, n.C)
        return y.to(v.dtype), S

    return plain
