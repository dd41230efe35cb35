r"""Exact test-time regression. Axes: B batch, H heads, T time, K key features, V value features.

What a memory with weights $γ$ over the past should answer to a query is the minimiser of a sum that anyone can write
down, $\min_m \sum_{i ≤ t} γ_i ‖v_i - m(k_i)‖^2$, read at the query. The ops here solve it, with no inner step size:

- `least_squares`: m linear, γ decaying, a ridge that does not (MesaNet, arXiv:2506.05233);
- `recursive_least_squares`: m linear, γ constant, the ridge counted once, at the beginning (RLS);
- `regress`: any weights, m constant, linear or affine around the query, over keys that are given (the definition);
- `local_regression`: the same over a sliding window, all pairs alike or those near the query more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from remanence.errors import expect
from remanence.ops.decay import cumulative, floored, lower_decay, recurrent_dtype
from remanence.ops.linear_attention import linear_attention
from remanence.ops.taps import tapped
from remanence.state import State

ORDERS = ("constant", "linear", "affine")
EXACT_CHUNK = 16
"""Tokens whose matrices are held at once where each is factorised."""


def least_squares_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    ridge: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """The definition: H ← e^g H + β k kᵀ, G ← e^g G + β k vᵀ, y = Gᵀ (H + diag ridge)⁻¹ q."""
    dtype = recurrent_dtype(value)
    q, k, v, b = (x.to(dtype) for x in (query, key, value, beta))
    H, G = _begin(k, v, state)
    y = []
    for t in range(k.shape[2]):
        if log_decay is not None:
            a = floored(log_decay[:, :, t].to(dtype)).exp()[..., None, None]
            H, G = a * H, a * G
        written = (b[:, :, t, None] * k[:, :, t])[..., None]
        H, G = H + written * k[:, :, t, None], G + written * v[:, :, t, None]
        x = torch.linalg.solve(H + torch.diag_embed(ridge.to(dtype)), q[:, :, t])
        y.append(torch.einsum("bhk,bhkv->bhv", x, G))
    return (torch.stack(y, 2).to(value.dtype) if y else value), {"H": H, "G": G}


@tapped
def least_squares(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    ridge: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    *,
    steps: int | None = 30,
) -> tuple[Tensor, State]:
    """The optimum of the decayed, ridged squared error, at every token: `least_squares_reference`, all tokens at once.

    Each token's system (H_t + diag ridge) x = q is solved by conjugate gradients, whose products with all H_t at once
    are one linear attention; gradients come from solving again with the gradient of the output.

    Args:
        query, key: [B, H, T, K], any T ≥ 0; value: [B, H, T, V]; beta: ≥ 0, [B, H, T].
        ridge: > 0, [H, K]; it does not decay, so the system always has a solution.
        log_decay: ≤ 0, clamped at −60, [B, H, T]; None forgets nothing.
        state: {"H": [B, H, K, K], "G": [B, H, K, V]}, float32 or wider.
        steps: of conjugate gradients at most; a token stops when its residual is rounding. K steps are exact but for
            rounding, fewer are a memory of their own. None factorises each H_t instead, at K³/3 operations a token.

    Raises: `ShapeError`; `ValueError` for steps below 1. A second derivative is refused.
    Source: von Oswald et al., MesaNet, arXiv:2506.05233 (2025).
    """
    expect("least_squares", "key", key, "batch heads time features")
    B, heads, T, K = key.shape
    expect("least_squares", "query", query, "batch heads time features", batch=B, heads=heads, time=T, features=K)
    expect("least_squares", "value", value, "batch heads time features", batch=B, heads=heads, time=T)
    expect("least_squares", "beta", beta, "batch heads time", batch=B, heads=heads, time=T)
    expect("least_squares", "ridge", ridge, "heads features", heads=heads, features=K)
    if steps is not None and steps < 1:
        raise ValueError(f"least_squares: steps must be at least 1, or None for a factorisation, got {steps}.")
    dtype = recurrent_dtype(value)
    q, k, v, b, ridge = (x.to(dtype) for x in (query, key, value, beta, ridge))
    g = None if log_decay is None else log_decay.to(dtype)
    H, G = _begin(k, v, state)
    if not T:
        return value, {"H": H, "G": G}
    written, ridge = b[..., None] * k, ridge[:, None]

    @torch.no_grad()
    def solve(rhs: Tensor) -> Tensor:
        if steps is None:
            return _factorised(rhs, k, written, g, H, ridge)
        diagonal = linear_attention(torch.ones_like(written[..., :1]), torch.ones_like(b)[..., None], written * k, g,
                                    {"S": H.diagonal(dim1=2, dim2=3)[:, :, None]})[0] + ridge  # fmt: skip
        return _conjugate_gradients(
            lambda p: linear_attention(p, written, k, g, {"S": H})[0] + ridge * p, rhs, rhs / diagonal, steps
        )

    x = solve(q)
    product, after_H = linear_attention(x, written, k, g, {"S": H})
    if torch.is_grad_enabled():
        x = x + _Solution.apply(q - product - ridge * x, solve)
    y, after_G = linear_attention(x, written, v, g, {"S": G})
    return y.to(value.dtype), {"H": after_H["S"], "G": after_G["S"]}


class _Solution(torch.autograd.Function):
    """What is left of a residual once the system is solved: nothing; but its gradient is a solution, too."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return torch.zeros_like(residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.solve(grad), None


def _conjugate_gradients(product: Callable[[Tensor], Tensor], rhs: Tensor, x: Tensor, steps: int) -> Tensor:
    """Each token by itself: what it finds does not depend on which others are solved with it."""
    enough = (10 * torch.finfo(rhs.dtype).eps) ** 2 * _square(rhs)
    r = rhs - product(x)
    p, left = r, _square(r)
    for _ in range(steps):
        open_ = left > enough
        if not open_.any():
            break
        image = product(p)
        rate = torch.where(open_, left / (p * image).sum(-1, keepdim=True), 0)
        x, r = x + rate * p, r - rate * image
        now = _square(r)
        p, left = r + torch.where(open_, now / left, 0) * p, now
    return x


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)


def _factorised(rhs: Tensor, k: Tensor, written: Tensor, g: Tensor | None, H: Tensor, ridge: Tensor) -> Tensor:
    """Cholesky of every token's matrix, a few at a time."""
    g = k.new_zeros(k.shape[:3]) if g is None else floored(g)
    found = []
    for r, ks, ws, gs in zip(*(x.split(EXACT_CHUNK, 2) for x in (rhs, k, written, g)), strict=True):
        total = cumulative(gs, 2)
        outer = (ws[..., None] * ks[..., None, :]).flatten(3)
        new = (lower_decay(total, k.dtype) @ outer).unflatten(3, H.shape[2:])
        every = total.exp().to(k.dtype)[..., None, None] * H[:, :, None] + new
        found.append(torch.cholesky_solve(r[..., None], torch.linalg.cholesky(every + torch.diag_embed(ridge)))[..., 0])
        H = every[:, :, -1]
    return torch.cat(found, 2)


def _begin(k: Tensor, v: Tensor, state: State | None) -> tuple[Tensor, Tensor]:
    if state is not None:
        return state["H"].to(k.dtype), state["G"].to(k.dtype)
    B, heads, _, K = k.shape
    return k.new_zeros(B, heads, K, K), k.new_zeros(B, heads, K, v.shape[3])


def recursive_least_squares_reference(
    query: Tensor, key: Tensor, value: Tensor, state: State, beta: Tensor | None = None
) -> tuple[Tensor, State]:
    """The definition: r = P k / (1 + β kᵀP k);  W ← W + β r (v − Wᵀk)ᵀ;  P ← P − β r (P k)ᵀ;  y = Wᵀ q."""
    P, W = state["P"], state["W"]
    y = [value[:, :, :0].to(P.dtype)]
    for t in range(key.shape[2]):
        q, k, v = (x[:, :, t : t + 1].to(P.dtype) for x in (query, key, value))
        b = 1.0 if beta is None else beta[:, :, t, None, None]
        image = k @ P
        r = b * image / (1 + b * (image * k).sum(-1, keepdim=True))
        W, P = W + r.mT @ (v - k @ W), P - r.mT @ image
        y.append(q @ W)
    return torch.cat(y, 2).to(value.dtype), {"P": P, "W": W}


def recursive_least_squares_state(ridge: Tensor, batch: int, values: int) -> State:
    """Nothing learnt yet: P = diag(1/ridge), W = 0. Shapes: ridge > 0, [H, K]; P [B, H, K, K], W [B, H, K, V]."""
    P = torch.diag_embed(1 / ridge.to(recurrent_dtype(ridge))).expand(batch, -1, -1, -1)
    return {"P": P, "W": P.new_zeros(*P.shape[:3], values)}


@tapped
def recursive_least_squares(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    beta: Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, State]:
    r"""Ridge regression over all that was read, answered at every token; `chunk_size` changes speed, never the result.

    In a chunk with keys K, from P and W before it: with the Cholesky factor $LL^\top = I + K P K^\top$ the optimum over
    the first t tokens reads $q^\top W + \sum_{i ≤ t} [Q P K^\top L^{-\top}]_{ti} [L^{-1}(V - K W)]_i$, since the
    factor of a leading block is the leading block of the factor. So no token needs a matrix of its own.

    Shapes: query, key [B, H, T, K], value [B, H, T, V], any T ≥ 0; beta ≥ 0 None (ones) or [B, H, T];
        state {"P": [B, H, K, K], "W": [B, H, K, V]} from `recursive_least_squares_state`.
    Raises: `ShapeError`.
    """
    expect("recursive_least_squares", "key", key, "batch heads time features")
    B, heads, T, K = key.shape
    known: dict[str, Any] = {"batch": B, "heads": heads, "time": T}
    expect("recursive_least_squares", "query", query, "batch heads time features", **known, features=K)
    expect("recursive_least_squares", "value", value, "batch heads time features", **known)
    P, W = state["P"], state["W"]
    q, k, v = (x.to(P.dtype) for x in (query, key, value))
    if beta is not None:  # a weight on a squared error is a scale of its row
        expect("recursive_least_squares", "beta", beta, "batch heads time", **known)
        scale = beta.to(P.dtype)[..., None].clamp(min=torch.finfo(P.dtype).tiny).sqrt()
        k, v = scale * k, scale * v
    y = [v[:, :, :0]]
    for qs, ks, vs in zip(*(x.split(chunk_size, 2) for x in (q, k, v)), strict=True) if T else ():
        image = ks @ P
        one = torch.eye(ks.shape[2], dtype=P.dtype, device=P.device)
        L = torch.linalg.cholesky(image @ ks.mT + one)
        both = torch.linalg.solve_triangular(L, torch.cat([vs - ks @ W, image], -1), upper=False)
        error, image = both.split([v.shape[3], K], -1)
        y.append(qs @ W + (qs @ image.mT).tril() @ error)
        W, P = W + image.mT @ error, P - image.mT @ image
    return torch.cat(y, 2).to(value.dtype), {"P": P, "W": W}


def regress(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, *, order: str = "linear", ridge: float | Tensor = 1e-6
) -> Tensor:
    r"""The frame itself: $m_t = \arg\min_m \sum_i w_{ti} ‖v_i - m(k_i)‖^2$ (+ ridge), read as $m_t(q_t)$.

    Args:
        weights: w ≥ 0, [B, H, T, N]: how much each query's regression counts each pair. Zeros hide the future. They
            are divided by each query's largest, which changes nothing but what the ridge means.
        order: "constant" (m(k) = c: a weighted mean, Nadaraya and Watson), "linear" (m(k) = Mᵀk), or "affine"
            (m(k) = c + Mᵀ(k − q): local linear regression, exact on affine maps up to the edge of the data).
        ridge: on M: as it is for "linear"; for "affine" relative to the mean spread of the keys and a
            thousandth of their size. It must be positive where fewer keys than features count.

    Shapes: query [B, H, T, K], key [B, H, N, K], value [B, H, N, V] -> [B, H, T, V]. A query whose weights are all
        zero reads zero.
    Raises: `ShapeError`; `ValueError` for an unknown order.
    Source: Wang, Shi & Fox, Test-time regression, arXiv:2501.12352 (2025).
    """
    if order not in ORDERS:
        raise ValueError(f"regress: order must be one of {', '.join(ORDERS)}, got {order!r}.")
    expect("regress", "key", key, "batch heads pairs features")
    B, heads, N, K = key.shape
    expect("regress", "query", query, "batch heads time features", batch=B, heads=heads, features=K)
    expect("regress", "value", value, "batch heads pairs features", batch=B, heads=heads, pairs=N)
    expect("regress", "weights", weights, "batch heads time pairs", batch=B, heads=heads, time=query.shape[2], pairs=N)
    if not N:
        return value.new_zeros(*query.shape[:3], value.shape[3])
    dtype = recurrent_dtype(value)
    # in float64: where few keys count, the systems are as good as singular, and their gradients need the digits
    query, key, v, w = (x.double() for x in (query, key, value, weights))
    w = w / w.amax(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    one = torch.eye(K, dtype=w.dtype, device=w.device)
    total = w.sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    if order == "constant":
        return ((w @ v) / total).to(dtype)
    if order == "linear":
        second = (w @ (key[..., None] * key[..., None, :]).flatten(3)).unflatten(3, (K, K))
        x = torch.linalg.solve(second + ridge * one, query)
        return ((w * (x @ key.mT)) @ v).to(dtype)
    # keys around their weighted mean first: a difference of second moments would lose half of the digits
    mean = (w @ key) / total
    z = key[:, :, None] - mean[:, :, :, None]
    spread = (z * (w / total)[..., None]).mT @ z
    floor = 1e-3 * mean.square().mean(-1, keepdim=True)  # where all keys are one, gradients stay finite
    size = (spread.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) + floor)[..., None]
    x = torch.linalg.solve(spread + ridge * size * one, query - mean)
    slope = (z @ x[..., None])[..., 0]
    return ((w * (1 + slope)) @ v / total).to(dtype)


def local_regression_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    order: str = "affine",
    bandwidth: Tensor | None = None,
    ridge: float | Tensor = 0.1,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """The definition: `regress` over the tokens in (t − window, t], token by token."""
    k, v, seen = _begin_window(key, value, window, state)
    y = [value[:, :, :0].to(k.dtype)]
    for t in range(key.shape[2]):
        now = slice(t, t + 1)
        q, seen = query[:, :, now].to(k.dtype), seen + 1
        k, v = torch.cat([k, key[:, :, now]], 2), torch.cat([v, value[:, :, now]], 2)
        there = (torch.arange(window, device=k.device) >= (window - seen)[:, None])[:, None, None]
        w = there.to(k.dtype).expand(-1, q.shape[1], -1, -1)
        if bandwidth is not None:
            w = w * ((q @ k.mT) / bandwidth[:, None, None]).exp()
        y.append(regress(q, k, v, w, order=order, ridge=ridge))
        k, v = k[:, :, 1:], v[:, :, 1:]
    return torch.cat(y, 2).to(value.dtype), {"k": k, "v": v, "seen": seen}


@tapped
def local_regression(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    order: str = "affine",
    bandwidth: Tensor | None = None,
    ridge: float | Tensor = 0.1,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """Regression over the tokens in (t − window, t], read at each query, a window's length at a time.

    Args:
        order: of `regress`: "constant", "linear" or "affine".
        bandwidth: τ > 0, [H]: pairs count exp(q·k/τ), which for unit vectors is a Gaussian in their distance; None
            counts all alike. A constant with such weights is softmax attention.
        ridge: of `regress`; a number, or a tensor that broadcasts with [B, H, T, 1, 1].

    Shapes: query, key [B, H, T, K], value and y [B, H, T, V], any T ≥ 0; state {"k": [B, H, window − 1, K], "v": [B, H,
        window − 1, V], latest last, "seen": int64 [B]}, float32 or wider.
    Raises: `ShapeError`; `ValueError` for an unknown order or a window below 1.
    """
    if window < 1:
        raise ValueError(f"local_regression: window must be at least 1, got {window}.")
    expect("local_regression", "key", key, "batch heads time features")
    B, H, T, K = key.shape
    expect("local_regression", "query", query, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect("local_regression", "value", value, "batch heads time features", batch=B, heads=H, time=T)
    old_k, old_v, seen = _begin_window(key, value, window, state)
    k, v = torch.cat([old_k, key], 2), torch.cat([old_v, value], 2)
    y = [value[:, :, :0].to(k.dtype)]
    for start in range(0, T, window):
        q = query[:, :, start : start + window].to(k.dtype)
        stop = start + q.shape[2] + window - 1
        ks, vs = k[:, :, start:stop], v[:, :, start:stop]
        row, column = torch.arange(q.shape[2], device=k.device)[:, None], torch.arange(stop - start, device=k.device)
        there = (column >= row) & (column < row + window) & (column + start >= (window - 1 - seen)[:, None, None])
        there = there[:, None].expand(-1, H, -1, -1)
        if bandwidth is None:
            w = there.to(k.dtype)
        else:
            w = ((q @ ks.mT) / bandwidth[:, None, None]).masked_fill(~there, -torch.inf).softmax(-1)
        y.append(regress(q, ks, vs, w, order=order, ridge=ridge))
    after = {"k": k[:, :, T:], "v": v[:, :, T:], "seen": seen + T}
    return torch.cat(y, 2).to(value.dtype), after


def _begin_window(key: Tensor, value: Tensor, window: int, state: State | None) -> tuple[Tensor, Tensor, Tensor]:
    if state is not None:
        return state["k"], state["v"], state["seen"]
    k, v = (x.new_zeros(*x.shape[:2], window - 1, x.shape[3], dtype=recurrent_dtype(x)) for x in (key, value))
    return k, v, torch.zeros(len(key), dtype=torch.int64, device=key.device)
