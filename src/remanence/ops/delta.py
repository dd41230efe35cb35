"""The gated delta rule. Axes: B batch, H heads, T time, K key features, V value features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remanence.errors import expect
from remanence.ops.chunks import ChunkDecay, pieces
from remanence.ops.decay import floored, recurrent_dtype, second_order
from remanence.state import State


def gated_delta_rule_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """The definition: S ← exp(g_t) S;  S ← S + β_t k_t (v_t − Sᵀk_t)ᵀ;  y_t = Sᵀ q_t."""
    dtype = recurrent_dtype(value)
    query, key, v, beta = (x.to(dtype) for x in (query, key, value, beta))
    S = v.new_zeros(*key.shape[:2], key.shape[3], v.shape[3]) if state is None else state["S"]
    y = []
    for t in range(key.shape[2]):
        if log_decay is not None:
            S = floored(log_decay[:, :, t].to(dtype)).exp()[..., None, None] * S
        k = key[:, :, t]
        error = v[:, :, t] - torch.einsum("bhk,bhkv->bhv", k, S)
        S = S + (beta[:, :, t, None] * k)[..., None] * error[..., None, :]
        y.append(torch.einsum("bhk,bhkv->bhv", query[:, :, t], S))
    return (torch.stack(y, 2).to(value.dtype) if y else value), {"S": S}


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, State]:
    """S ← exp(g_t) S;  S ← S + β_t k_t (v_t − Sᵀk_t)ᵀ;  y_t = Sᵀ q_t, `chunk_size` tokens at a time.

    `chunk_size` changes speed, never the result. Keys are used as given: the rule is stable while
    0 ≤ β‖k‖² ≤ 2. The query is not scaled.

    Shapes: `query`, `key` [B, H, T, K], `value` and y [B, H, T, V], `beta` [B, H, T], `log_decay` (≤ 0,
    clamped at −60) None or [B, H, T], any T ≥ 0; state {"S": [B, H, K, V]}, float32 or wider.
    Raises: `ShapeError`.
    Source: Yang et al., Gated Delta Networks, arXiv:2412.06464 (2024); chunked by the WY form of
    arXiv:2406.06484 (2024).
    """
    _check(query, key, value, beta, log_decay)
    if key.shape[2] <= 1:
        return gated_delta_rule_reference(query, key, value, beta, log_decay, state)
    dtype = recurrent_dtype(value)
    q, k, v, b = (x.to(dtype) for x in (query, key, value, beta))
    start = v.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state["S"].to(dtype)
    g = None if log_decay is None else floored(log_decay.to(dtype))
    y, S = _Chunked.apply(q, k, v, b, g, start, min(chunk_size, k.shape[2]))
    return y.to(value.dtype), {"S": S}


class _Chunked(torch.autograd.Function):
    """The chunked form with its gradients by hand, a few chunks at a time so that they stay in the cache.

    What token i writes is w_i = β_i k_i times its error f_i = v_i − (prediction). With the sums G of the log
    decays since the chunk began, A_ij = (k_i·w_j) e^{G_i − G_j} for j < i and P_ij = (q_i·w_j) e^{G_i − G_j} for
    j ≤ i: F = (I + A)^{−1} (V − (K ⊙ e^G) S),  Y = P F + (Q ⊙ e^G) S,  S' = e^{G_C} S + (W ⊙ e^{G_C − G})ᵀ F.
    So it is linear attention from keys W to values F, with two kinds of readers, Q and K: they are stacked.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, start: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(v)
        S = start.flatten(0, 1)
        saved = []
        for piece in pieces(k, size):
            qs, ks, vs = piece.cut(q), piece.cut(k), piece.cut(v)
            ws = ks * piece.cut(b)[..., None]
            decay = ChunkDecay(None if g is None else piece.cut(g), qs)
            inverse = unit_lower_inverse(decay.scores(ks, ws))
            unread, reads = inverse @ vs, inverse @ decay.from_start(ks)
            written = decay.to_end(ws).mT
            before = S.new_empty(S.shape[0], ks.shape[1], *S.shape[1:])
            errors = torch.empty_like(vs)
            for c in range(before.shape[1]):
                before[:, c] = S
                errors[:, c] = torch.baddbmm(unread[:, c], reads[:, c], S, alpha=-1)
                S = decay.over(c, S, written[:, c] @ errors[:, c])
            out = decay.scores(qs, ws) @ errors
            piece.put(y, out.add_(decay.from_start(qs) @ before))
            saved += [inverse, reads, before, errors]
        S = S.view_as(start).clone()
        ctx.save_for_backward(q, k, v, b, g, start, S, *saved)
        ctx.size = size
        return y, S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, b, g, start, end, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return *second_order(ctx.needs_input_grad[:6], _loop, (q, k, v, b, g, start), grads), None
        d_y, d_end = grads
        d_q, d_k, d_v, d_b = (torch.empty_like(x) for x in (q, k, v, b))
        d_g = None if g is None else torch.empty_like(g)
        d_S, after_all = d_end.flatten(0, 1), end.flatten(0, 1)
        for i, piece in reversed(list(enumerate(pieces(k, ctx.size)))):
            inverse, reads, before, errors = saved[4 * i : 4 * i + 4]
            qs, ks, bs, d_ys = piece.cut(q), piece.cut(k), piece.cut(b)[..., None], piece.cut(d_y)
            ws = ks * bs
            decay = ChunkDecay(None if g is None else piece.cut(g), qs)
            from_reads = decay.from_start(qs).mT @ d_ys
            d_errors = decay.scores(qs, ws).mT @ d_ys
            written = decay.to_end(ws)
            d_after = torch.empty_like(from_reads)
            for c in reversed(range(from_reads.shape[1])):
                d_after[:, c] = d_S
                d_errors[:, c].baddbmm_(written[:, c], d_S)
                new = torch.baddbmm(from_reads[:, c], reads[:, c].mT, d_errors[:, c], alpha=-1)
                d_S = decay.over(c, d_S, new)
            d_vs = inverse.mT @ d_errors
            piece.put(d_v, d_vs)
            d_qs, d_ws = decay.scores_backward(d_ys @ errors.mT, qs, ws)
            d_qs.add_(decay.from_start(d_ys @ before.mT))
            d_ks, d_ws_of_reads = decay.scores_backward((d_vs @ errors.mT).tril_(-1).neg_(), ks, ws)
            d_ks.sub_(decay.from_start(d_vs @ before.mT))
            d_ws.add_(d_ws_of_reads).add_(decay.to_end(errors @ d_after.mT))
            if d_g is not None:
                after = torch.cat([before[:, 1:], after_all[:, None]], 1)
                read_minus_written = (qs * d_qs).addcmul_(ks, d_ks).sub_(ws * d_ws)
                piece.put(d_g, decay.gradient(read_minus_written, after * d_after))
            piece.put(d_q, d_qs)
            piece.put(d_b, (ks * d_ws).sum(-1))
            piece.put(d_k, d_ks.addcmul_(d_ws, bs))
            after_all = before[:, 0]
        return d_q, d_k, d_v, d_b, d_g, d_S.view_as(start), None


def _loop(q: Tensor, k: Tensor, v: Tensor, b: Tensor, g: Tensor | None, start: Tensor) -> tuple[Tensor, Tensor]:
    y, state = gated_delta_rule_reference(q, k, v, b, g, {"S": start})
    return y, state["S"]


def unit_lower_inverse(A: Tensor) -> Tensor:
    """The inverse of I + strictLower(A) for A [..., C, C]: halves by substitution, then the block between them.

    Not by powers of A: where keys repeat, they grow to millions before they cancel, which float32 does not survive.
    """
    C = A.shape[-1]
    if C <= 16 or C % 2:
        one = torch.eye(C, dtype=A.dtype, device=A.device).expand_as(A)
        return torch.linalg.solve_triangular(A, one, upper=False, unitriangular=True)
    half = C // 2
    early, late = unit_lower_inverse(torch.stack([A[..., :half, :half], A[..., half:, half:]]))
    inverse = A.new_zeros(A.shape)
    inverse[..., :half, :half], inverse[..., half:, half:] = early, late
    inverse[..., half:, :half] = -(late @ (A[..., half:, :half] @ early))
    return inverse


def gated_delta_rule_carry(
    key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, chunk_size: int = 64
) -> tuple[Tensor, Tensor]:
    """(M [B, H, K, K], N [B, H, K, V]) with S_end = M @ S_start + N for every state S_start.

    The rule acts on each column of S by itself, so columns of the identity that write nothing become M.
    """
    B, H, T, K = key.shape
    V = value.shape[3]
    one = torch.eye(K, dtype=recurrent_dtype(value), device=value.device).expand(B, H, K, K)
    start = torch.cat([one.new_zeros(B, H, K, V), one], -1)
    wide = torch.cat([value, value.new_zeros(B, H, T, K)], -1)
    S = gated_delta_rule(key, key, wide, beta, log_decay, {"S": start}, chunk_size=chunk_size)[1]["S"]
    N, M = S.split([V, K], -1)
    return M, N


def _check(query: Tensor, key: Tensor, value: Tensor, beta: Tensor, log_decay: Tensor | None) -> None:
    where = "gated_delta_rule"
    expect(where, "key", key, "batch heads time features")
    B, H, T, K = key.shape
    expect(where, "query", query, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect(where, "value", value, "batch heads time features", batch=B, heads=H, time=T)
    expect(where, "beta", beta, "batch heads time", batch=B, heads=H, time=T)
    if log_decay is not None:
        expect(where, "log_decay", log_decay, "batch heads time", batch=B, heads=H, time=T)
