"""The recurrence of decay plus rank one. Axes: B batch, H heads, T time, K key features, V value features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from remanence.errors import expect
from remanence.ops import steps
from remanence.ops.decay import cumulative, floored, recurrent_dtype, second_order
from remanence.ops.taps import tapped
from remanence.state import State

REMEMBERED = 32
"""The compiled form keeps one state in so many tokens, and finds those between again for the gradients."""


def dplr_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """The definition: S_t = Diag(exp g_t) S_{t−1} + b_t (S_{t−1}ᵀ a_t)ᵀ + k_t v_tᵀ;  y_t = S_tᵀ q_t."""
    dtype = recurrent_dtype(value)
    query, key, v, a, b = (x.to(dtype) for x in (query, key, value, a, b))
    S = v.new_zeros(*key.shape[:2], key.shape[3], v.shape[3]) if state is None else state["S"]
    decay = None if log_decay is None else floored(log_decay.to(dtype)).exp()
    y = []
    for t in range(key.shape[2]):
        read = torch.einsum("bhk,bhkv->bhv", a[:, :, t], S)
        kept = S if decay is None else decay[:, :, t, :, None] * S
        S = kept + b[:, :, t, :, None] * read[..., None, :] + key[:, :, t, :, None] * v[:, :, t, None, :]
        y.append(torch.einsum("bhk,bhkv->bhv", query[:, :, t], S))
    return (torch.stack(y, 2).to(value.dtype) if y else value), {"S": S}


@tapped
def dplr(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, State]:
    """S_t = Diag(exp g_t) S_{t−1} + b_t (S_{t−1}ᵀ a_t)ᵀ + k_t v_tᵀ;  y_t = S_tᵀ q_t.

    The transition is diagonal plus low rank: decay per key feature, and what `a` reads from the undecayed state
    is written along `b`. With a = −exp(g) ⊙ k and b = k it is a delta rule with a decay per feature. Stability is
    the caller's affair; the query is not scaled.

    On a CPU a compiled loop walks the tokens; elsewhere `chunk_size` tokens are handled at a time by the WY form.
    `chunk_size` changes speed, never the result.

    Shapes: `query`, `key`, `a`, `b` [B, H, T, K], `value` and y [B, H, T, V], `log_decay` (≤ 0, clamped at −60)
    None or [B, H, T, K], any T ≥ 0; state {"S": [B, H, K, V]}, float32 or wider.
    Raises: `ShapeError`; `ValueError` for a chunk below 1.
    Source: Peng et al., RWKV-7 "Goose", arXiv:2503.14456 (2025); chunked by the WY form of arXiv:2406.06484 (2024).
    """
    _check(query, key, value, a, b, log_decay)
    if chunk_size < 1:
        raise ValueError(f"dplr: chunk_size must be at least 1, got {chunk_size}.")
    if key.shape[2] == 1 and state is not None and steps.worth(state["S"], query, key, value, a, b, log_decay):
        y, S = steps.dplr(query, key, value, a, b, log_decay, state["S"])
        return y, {"S": S}
    if not key.shape[2]:
        return dplr_reference(query, key, value, a, b, log_decay, state)
    dtype = recurrent_dtype(value)
    q, k, v, a, b = (x.to(dtype) for x in (query, key, value, a, b))
    if state is None:
        S = v.new_zeros(*k.shape[:2], k.shape[3], v.shape[3])
    else:
        S = state["S"].to(dtype)
    g = None if log_decay is None else floored(log_decay.to(dtype))
    if key.shape[2] == 1:
        y, S = _step(q, k, v, a, b, g, S)
    elif value.device.type == "cpu":
        y, S = _Compiled.apply(q, k, v, a, b, g, S)
    else:
        y, S = dplr_chunked(q, k, v, a, b, g, S, chunk_size)
    return y.to(value.dtype), {"S": S}


def dplr_carry(
    key: Tensor, value: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None = None, *, chunk_size: int = 64
) -> tuple[Tensor, Tensor]:
    """(M [B, H, K, K], N [B, H, K, V]) with S_end = M @ S_start + N for every state S_start.

    The recurrence acts on each column of S by itself, so columns of the identity that write nothing become M.
    """
    B, H, T, K = key.shape
    V = value.shape[3]
    one = torch.eye(K, dtype=recurrent_dtype(value), device=value.device).expand(B, H, K, K)
    start = torch.cat([one.new_zeros(B, H, K, V), one], -1)
    wide = torch.cat([value, value.new_zeros(B, H, T, K)], -1)
    S = dplr(key, key, wide, a, b, log_decay, {"S": start}, chunk_size=chunk_size)[1]["S"]
    N, M = S.split([V, K], -1)
    return M, N


def _step(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    """One token, as matrix products with a time axis of one."""
    written = torch.cat([k, b], 2).mT @ torch.cat([v, a @ S], 2)
    S = written + (S if g is None else g.exp().mT * S)
    return q @ S, S


def dplr_chunked(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, S: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """The WY form in tensor operations, on any device: outputs and the last state.

    A few chunks are handled at a time; for the gradients only what enters them is kept, the rest is found again.
    """
    if g is None:
        g = torch.zeros_like(k)
    y = []
    for parts in zip(*(x.split(16 * size, dim=2) for x in (q, k, v, a, b, g)), strict=True):
        out, S = checkpoint(_chunks, *parts, S, size, use_reentrant=False, preserve_rng_state=False)
        y.append(out)
    return torch.cat(y, 2), S


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, S: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """With sums G of the log decays since the chunk began, and Ḡ without the token's own: what a_i reads is U_i,

    U = (I − A^ab)^{−1} (A^ak V + (a ⊙ e^Ḡ) S),  Y = P^qk V + P^qb U + (q ⊙ e^G) S,
    S' = Diag(e^{G_C}) S + (k ⊙ e^{G_C − G})ᵀ V + (b ⊙ e^{G_C − G})ᵀ U.
    """
    T = q.shape[2]
    size = min(size, 1 << (T - 1).bit_length())
    q, k, v, a, b, g = (F.pad(x, (0, 0, 0, -T % size)).unflatten(2, (-1, size)) for x in (q, k, v, a, b, g))
    G = cumulative(g, 3)
    before = F.pad(G[..., :-1, :], (0, 0, 1, 0))
    P = _scores(torch.stack([q, a]), torch.stack([G, before]), torch.stack([k, b]), G)
    (P_qk, P_qb), (A_ak, A_ab) = P[0], P[1].tril(-1)
    to_end = (G[..., -1:, :] - G).exp().to(v.dtype)
    over = G[..., -1, :, None].exp().to(v.dtype)
    system = torch.eye(size, dtype=v.dtype, device=v.device) - A_ab
    known = torch.cat([A_ak @ v, a * before.exp().to(v.dtype)], -1)
    U, reads = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True).split(
        [v.shape[-1], a.shape[-1]], -1
    )
    new, erased = (k * to_end).mT @ v, (b * to_end).mT
    states = []
    for c in range(G.shape[2]):
        states.append(S)
        S = over[:, :, c] * S + new[:, :, c] + erased[:, :, c] @ (U[:, :, c] + reads[:, :, c] @ S)
    start = torch.stack(states, 2)
    y = P_qk @ v + P_qb @ (U + reads @ start) + (q * G.exp().to(v.dtype)) @ start
    return y.flatten(2, 3)[:, :, :T], S


def _scores(late: Tensor, seen: Tensor, early: Tensor, sums: Tensor) -> Tensor:
    """P_ij = Σ_d late_id early_jd e^{seen_id − sums_jd} for j ≤ i, else 0, for all pairs of readers and writers.

    Halves are seen from the border between them, so that neither factor exceeds 1; the smallest pieces directly.
    Shapes: late, seen [readers, ..., C, K], early [writers, ..., C, K], sums [..., C, K]
    -> [readers, writers, ..., C, C].
    """
    C = sums.shape[-2]
    if C <= 8 or C % 2:
        # clamped before exp: above the diagonal the exponent is positive
        between = (seen[..., :, None, :] - sums[..., None, :, :]).clamp(max=0).exp().to(late.dtype)
        return torch.einsum("r...id,w...jd,r...ijd->rw...ij", late, early, between).tril()
    first, last = slice(None, C // 2), slice(C // 2, None)
    halves = [torch.stack([x[..., first, :], x[..., last, :]], -3) for x in (late, seen, early, sums)]
    upper, lower = _scores(*halves).unbind(-3)
    border = sums[..., C // 2 - 1, None, :]
    onto = late[..., last, :] * (seen[..., last, :] - border).exp().to(late.dtype)
    from_ = early[..., first, :] * (border - sums[..., first, :]).exp().to(late.dtype)
    across = onto[:, None] @ from_.mT
    return torch.cat([torch.cat([upper, torch.zeros_like(across)], -1), torch.cat([across, lower], -1)], -2)


class _Compiled(torch.autograd.Function):
    """Compiled loops over time, forwards for y and backwards for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        tokens, rows = _rows(q, k, v, a, b, g), start.flatten(0, 1).contiguous()
        y, u, S = torch.empty_like(tokens[2]), torch.empty_like(tokens[2]), torch.empty_like(rows)
        kept = S.new_empty(len(S), -(-k.shape[2] // REMEMBERED), *S.mT.shape[1:])
        _run("forward", *tokens, rows, y, S, u, kept)
        ctx.save_for_backward(q, k, v, a, b, g, start, u, kept)
        return y.view(v.shape), S.view(start.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, u, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return second_order(ctx.needs_input_grad, _loop, inputs, grads)
        tokens = _rows(*inputs[:6])
        d_y, d_start = grads[0].flatten(0, 1).contiguous(), grads[1].flatten(0, 1).contiguous().clone()
        found = [torch.empty_like(x) for x in tokens]
        _run("backward", *tokens, u, kept, d_y, d_start, *found)
        d_tokens = [None if x is None else d.view(x.shape) for d, x in zip(found, inputs, strict=False)]
        return *d_tokens, d_start.view(inputs[6].shape)


def _rows(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None) -> list[Tensor]:
    """What a compiled loop reads: [B·H, T, features] each, one token's features side by side, and the decay as such."""
    decay = torch.ones_like(k) if g is None else g.exp()
    return [x.flatten(0, 1).contiguous() for x in (q, k, v, a, b, decay)]


def _loop(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
    y, state = dplr_reference(q, k, v, a, b, g, {"S": S})
    return y, state["S"]


def _run(name: str, *tensors: Tensor) -> None:
    """A kernel over the rows, which know nothing of each other."""
    from remanence.ops import dplr_kernels  # here, because Numba takes half a second that most programs need not pay
    from remanence.ops.compiled import spread

    arrays = [x.detach().numpy() for x in tensors]
    spread(getattr(dplr_kernels, name), len(arrays[0]), 4 * arrays[0].size, REMEMBERED, *arrays)


def _check(q: Tensor, key: Tensor, value: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None) -> None:
    axes = "batch heads time features"
    expect("dplr", "key", key, axes)
    B, H, T, K = key.shape
    like_key = {"query": q, "a": a, "b": b} | ({} if log_decay is None else {"log_decay": log_decay})
    for name, x in like_key.items():
        expect("dplr", name, x, axes, batch=B, heads=H, time=T, features=K)
    expect("dplr", "value", value, axes, batch=B, heads=H, time=T)
