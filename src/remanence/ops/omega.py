r"""The Omega rule: every token improves the memory's answers to a window of recent tokens, not to the last one alone.

$$\ell_t(W) = \sum_{j<c} \gamma_{tj}\, \ell(W; k_{t-j}, v_{t-j}),\quad
  S_t = \eta_t S_{t-1} - \theta_t \nabla\ell_t(W_\xi),\quad W_t = a_t W_{t-1} + S_t,\quad y_t = f(W_t, q_t),$$

with $\ell = \tfrac12\lVert f(W,k) - v\rVert^2$ or $-\langle f(W,k), v\rangle$, and gradients taken at the anchor
$W_\xi$, the weights as the token's chunk began. The orthogonal rule writes directions instead of gradients:
$S_t = \eta_t S_{t-1} - \nabla\ell_t(W_\xi)$, $W_t = a_t W_{t-1} + \theta_t \mathrm{NS}(S_t)$.

Three forms. In general the rule of a chunk is that of `fast_weight` times a band of $\gamma$, with the last c − 1
tokens as further columns. A matrix at chunk size 1 would have to be read before each write: its errors come from one
triangular solve. The orthogonal rule is not linear in the gradients, so it makes the weights of every token, a few
tokens at a time.

Source: ATLAS, arXiv:2505.23735 (2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from remanence.errors import StateError, expect, unknown
from remanence.ops.decay import floored, recurrent_dtype
from remanence.ops.fast_weight import (
    Coefficients,
    Weights,
    by_phase,
    fast_weight_chunk,
    fast_weight_state,
    inner_gradient,
    momentum_coefficients,
    piece_sizes,
)
from remanence.ops.newton_schulz import newton_schulz
from remanence.ops.taps import tapped
from remanence.state import State

OBJECTIVES = ("squared", "dot")
PAIRS = 128
"""The largest triangular system of the exact form: tokens times window."""
MATERIALISED = 16
"""Tokens whose weights are made at once by the orthogonal rule."""
TINY = 1e-12

Maps = Sequence[Callable[[Tensor], Tensor]]


def network(z: Tensor, maps: Maps, *, residual: bool = False, gated: bool = False) -> Tensor:
    """[z +] W_L σ(… σ(W_1 z)), or with `gated` [z +] W_3 (σ(W_1 z) ⊙ W_2 z), from what each layer does to its input."""
    if gated:
        first, second, last = maps
        out = last(F.gelu(first(z)) * second(z))
    else:
        out = maps[0](z)
        for layer in maps[1:]:
            out = layer(F.gelu(out))
    return z + out if residual else out


def _times(W: Tensor, z: Tensor) -> Tensor:
    return z @ W.mT


def omega_read(query: Tensor, weights: Sequence[Tensor], *, residual: bool = False, gated: bool = False) -> Tensor:
    """f(W, q) with the same weights for every query. query [B, H, T, K], weights [B, H, out, in] by layer."""
    return network(query, [partial(_times, W) for W in weights], residual=residual, gated=gated)


def omega_state(weights: Sequence[Tensor], batch: int, *, window: int = 1, momentum: bool = True) -> State:
    """The state before the first token: that of `fast_weight`, and room for the window's earlier tokens.

    Args:
        weights: by layer [H, out, in]; of a gated network the two inner layers, then the last.
        window: c, the tokens whose answers each token improves.

    Shapes: as `fast_weight_state`; `window` {"key" [B, H, c − 1, K], "value" [B, H, c − 1, V]}, zeros at first, whose
    gradients are zero.
    """
    state = fast_weight_state(weights, batch, momentum=momentum)
    first, last = state["weight"]["0"], state["weight"][str(len(weights) - 1)]
    rows = batch, first.shape[1], window - 1
    state["window"] = {
        "key": first.new_zeros(*rows, first.shape[3]),
        "value": first.new_zeros(*rows, last.shape[2]),
    }
    return state


def omega_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    gate: Tensor,
    state: State,
    *,
    retain_log: Tensor | None = None,
    momentum_log: Tensor | None = None,
    chunk_size: int = 16,
    objective: str = "squared",
    orthogonal: bool = False,
    residual: bool = False,
    gated: bool = False,
    bound: float | None = None,
) -> tuple[Tensor, State]:
    """The definition of `omega`, token by token, its inner gradients taken by automatic differentiation."""
    anchor, W, S, pos = state["anchor"], state["weight"], state.get("momentum"), state["pos"]
    keys, values = state["window"]["key"], state["window"]["value"]
    c, L = gate.shape[3], len(anchor)
    a = (torch.zeros_like(step) if retain_log is None else floored(retain_log)).exp()
    eta = torch.zeros_like(step) if momentum_log is None else floored(momentum_log).exp()

    def loss(weights: dict[str, Tensor], k: Tensor, v: Tensor) -> Tensor:
        y = omega_read(k, list(weights.values()), residual=residual, gated=gated)
        return 0.5 * (y - v).square().sum() if objective == "squared" else -(y * v).sum()

    y = [value[:, :, :0]]
    for t in range(query.shape[2]):
        keys, values = (torch.cat([x, new[:, :, t : t + 1]], 2) for x, new in ((keys, key), (values, value)))
        change = {i: torch.zeros_like(w) for i, w in W.items()}
        for j in range(c):
            at = keys.shape[2] - 1 - j
            k, v = keys[:, :, at : at + 1], values[:, :, at : at + 1]
            u = torch.func.grad(loss)(anchor, k, v)
            much = gate[:, :, t, j] * (1 if orthogonal else step[:, :, t])
            if bound is not None and not orthogonal and (objective == "squared" or L > 1):
                if objective == "dot":
                    most = (1 - a[:, :, t]) / (k.norm(dim=-1) * v.norm(dim=-1) + TINY)[..., 0]
                elif L == 1:
                    most = 1 / (k.square().sum((-1, -2)) + TINY) / chunk_size
                else:
                    error = omega_read(k, list(anchor.values()), residual=residual, gated=gated) - v
                    squares = sum(part.square().sum((-1, -2)) for part in u.values())
                    most = error.square().sum((-1, -2)) / (squares + TINY) / chunk_size
                much = torch.minimum(much, (1 - eta[:, :, t]) * bound / c * most)
            change = {i: change[i] - much[..., None, None] * u[i] for i in change}
        if S is not None:
            change = S = {i: eta[:, :, t, None, None] * S[i] + change[i] for i in change}
        if orthogonal:
            change = {i: step[:, :, t, None, None] * newton_schulz(x) for i, x in change.items()}
        W = {i: a[:, :, t, None, None] * W[i] + change[i] for i in W}
        y.append(omega_read(query[:, :, t : t + 1], list(W.values()), residual=residual, gated=gated))
        keys, values = (x[:, :, x.shape[2] - (c - 1) :] for x in (keys, values))
        pos = pos + 1
        closed = (pos % chunk_size == 0)[:, None, None, None]
        anchor = {i: torch.where(closed, W[i], anchor[i]) for i in W}
    return torch.cat(y, 2), _pack(anchor, W, S, pos, keys, values)


@tapped
def omega(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    gate: Tensor,
    state: State,
    *,
    retain_log: Tensor | None = None,
    momentum_log: Tensor | None = None,
    chunk_size: int = 16,
    objective: str = "squared",
    orthogonal: bool = False,
    residual: bool = False,
    gated: bool = False,
    bound: float | None = None,
) -> tuple[Tensor, State]:
    """A network memory that fits a window of tokens, a chunk at a time; equal to `omega_reference`.

    Args:
        query, key: [B, H, T, K], T ≥ 0.
        value: [B, H, T, V]; V = K with `residual`.
        step: θ [B, H, T], the inner step sizes.
        gate: γ [B, H, T, c]: entry j is the weight of the token j places back. c = 1 is `fast_weight`.
        state: from `omega_state`, or as an earlier call returned it. Rows may stand at different positions.
        retain_log: log a [B, H, T] ≤ 0, clamped at −60; None forgets nothing.
        momentum_log: log η [B, H, T] ≤ 0; None is plain gradient descent.
        chunk_size: tokens per anchor; part of the definition, save for a matrix with the dot objective, whose gradients
            no anchor changes.
        objective: "squared" or "dot".
        orthogonal: write θ·NS(S) instead of S, with the singular values of every write near θ.
        residual: add the query to what is read (and the key to what is predicted).
        gated: the network is W_3 (σ(W_1 z) ⊙ W_2 z).
        bound: keep θγ at or below (1 − η)/c times this share of what is safe: of ‖e‖² / ‖u‖² / chunk_size for the
            squared error (Polyak's step, shared out over the chunk), of (1 − a) / ‖k‖‖v‖ for a network under
            the dot objective, whose layers would else feed each other's growth (at 1/2 or less, two layers cannot
            outgrow the decay). A matrix under the dot objective and the orthogonal rule do without it.

    Returns: what each query reads after its own token was written [B, H, T, V], and the state, of constant size.
    Raises: `ShapeError`, `StateError` when the tensors and the state do not fit together; `UnknownName` for the
        objective; `ValueError` for a gated network that is not of three matrices.
    """
    _check(query, key, value, step, gate, state, momentum_log, objective, gated)
    if query.shape[2] == 0:
        return value, state
    dtype, wide, c = query.dtype, recurrent_dtype(query), gate.shape[3]
    names = list(state["weight"])
    retain_log = torch.zeros_like(step) if retain_log is None else retain_log
    tensors = [x.to(wide) for x in (query, key, value, step, gate)] + [floored(retain_log.to(wide))]
    tensors += [] if momentum_log is None else [floored(momentum_log.to(wide))]
    exact = chunk_size == 1 and len(names) == 1 and objective == "squared" and not orthogonal
    most = max(1, PAIRS // c) if exact else MATERIALISED if orthogonal else chunk_size
    options = {"residual": residual, "gated": gated}

    def piece(
        parts: Sequence[Tensor], past: Sequence[Tensor], anchor: Weights, W: Weights, S: Weights | None
    ) -> tuple[Tensor, Weights, Weights | None]:
        q, k, v, theta, gamma, decay, *rest = parts
        eta_log = rest[0] if rest else None
        k, v = (torch.cat([old, new], 2) for old, new in zip(past, (k, v), strict=True))
        inputs, deltas = omega_gradient(k, v, anchor, objective, **options)
        if orthogonal:
            return _directions(q, inputs, deltas, W, S, theta, banded(gamma), decay, eta_log, **options)
        pair = theta[..., None] * gamma
        if bound is not None and (objective == "squared" or len(names) > 1):
            safe = _safe(inputs, deltas, objective, chunk_size).unfold(-1, c, 1).flip(-1)
            safe = safe if objective == "squared" else -torch.expm1(decay)[..., None] * safe
            left = 1.0 if eta_log is None else -torch.expm1(eta_log)[..., None]
            pair = torch.minimum(pair, left * (bound / c) * safe)
        rule = momentum_coefficients(torch.ones_like(theta), decay, eta_log)
        if exact:
            inputs, deltas, rule = _solved(k, v - k if residual else v, pair, rule, W[0], S[0] if S else None)
        else:
            band = banded(pair)
            tail = None if rule.tail is None else (rule.tail[..., None, :] @ band)[..., 0, :]
            rule = rule._replace(write=rule.write @ band, tail=tail)
        return _written(q, inputs, deltas, W, S, rule, **options)

    def run(tensors: list[Tensor], state: State, phase: int) -> tuple[Tensor, State]:
        anchor, W = list(state["anchor"].values()), list(state["weight"].values())
        S = list(state["momentum"].values()) if "momentum" in state else None
        keys, values = (torch.cat([state["window"][n], x], 2) for n, x in (("key", tensors[1]), ("value", tensors[2])))
        at, T, y = 0, tensors[0].shape[2], []
        chunks = [T] if exact else piece_sizes(T, phase, chunk_size)
        sizes = [n for chunk in chunks for n in piece_sizes(chunk, 0, most)]
        for parts in zip(*(x.split(sizes, 2) for x in tensors), strict=True):
            past = [x[:, :, at : at + c - 1] for x in (keys, values)]
            if orthogonal and torch.is_grad_enabled():  # weights per token are made again for the gradient, not kept
                out, W, S = checkpoint(piece, parts, past, anchor, W, S, use_reentrant=False, preserve_rng_state=False)
            else:
                out, W, S = piece(parts, past, anchor, W, S)
            at += out.shape[2]
            anchor = anchor if (phase + at) % chunk_size else W
            y.append(out)
        held, now = (dict(zip(names, x, strict=True)) for x in (anchor, W))
        pushed = None if S is None else dict(zip(names, S, strict=True))
        return torch.cat(y, 2), _pack(held, now, pushed, state["pos"] + T, keys[:, :, T:], values[:, :, T:])

    y, state = by_phase(run, tensors, state, state["pos"], chunk_size)
    return y.to(dtype), state


def omega_gradient(
    key: Tensor, value: Tensor, anchor: Weights, objective: str, residual: bool, gated: bool
) -> tuple[Weights, Weights]:
    """The gradient δ_i x_iᵀ of every pair in every layer, as the layers' inputs x and output gradients δ."""
    if objective == "dot":  # the gradient at the output is −v, whatever was read
        value = value + omega_read(key, anchor, residual=residual, gated=gated)
    if not gated:
        return inner_gradient(key, value, anchor, residual)
    first, second, last = anchor
    h, g = key @ first.mT, key @ second.mT
    s = F.gelu(h)
    x = s * g
    error = x @ last.mT - (value - key if residual else value)
    back = error @ last
    slope = torch.special.ndtr(h) + h * (h.square() * -0.5).exp() / math.sqrt(2 * math.pi)
    return [key, key, x], [back * g * slope, back * s, error]


def banded(gate: Tensor) -> Tensor:
    """[B, H, C, c] -> [B, H, C, c − 1 + C]: row t holds its window's entries, the oldest first, from column t on."""
    C, c = gate.shape[-2:]
    # padded to c + C columns and read again with one column less, each row starts one place later
    padded = F.pad(gate.flip(-1), (0, C)).flatten(-2)
    return padded[..., : C * (C + c - 1)].unflatten(-1, (C, C + c - 1))


def _safe(inputs: Weights, deltas: Weights, objective: str, chunk_size: int) -> Tensor:
    """Per pair, the step that mends its error at once, shared out over the chunk; for dot, 1 / ‖k‖‖v‖."""
    x, delta = ([part.square().sum(-1) for part in parts] for parts in (inputs, deltas))
    if objective == "dot":
        norms = torch.linalg.vector_norm(inputs[0], dim=-1) * torch.linalg.vector_norm(deltas[-1], dim=-1)
        return 1 / (norms + TINY)
    if len(x) == 1:
        return 1 / (x[0] + TINY) / chunk_size
    squares = torch.stack([a * b for a, b in zip(x, delta, strict=True)]).sum(0)
    return delta[-1] / (squares + TINY) / chunk_size


def _solved(
    key: Tensor, target: Tensor, pair: Tensor, rule: Coefficients, W: Tensor, S: Tensor | None
) -> tuple[Weights, Weights, Coefficients]:
    """A matrix read before every write: the errors of all (token, window place) pairs, and the rule that writes them.

    The error of (t, j) is $W_{t-1} k_{t-j} - v_{t-j}$, and $W_{t-1}$ is linear in the errors of earlier tokens.
    """
    c = pair.shape[-1]
    k, v = (x.unfold(2, c, 1).flip(-1).mT.flatten(2, 3) for x in (key, target))
    spread = pair.flatten(-2)[..., None, :]

    def before(x: Tensor) -> Tensor:
        """The coefficients of one token earlier, for every pair."""
        return F.pad(x[..., :-1, :], (0, 0, 1, 0)).repeat_interleave(c, -2)

    start = F.pad(rule.retain[..., :-1, None], (0, 0, 1, 0), value=1.0).repeat_interleave(c, -2)
    known = start * (k @ W.mT) - v
    if S is not None:
        assert rule.push is not None
        known = known + before(rule.push[..., None]) * (k @ S.mT)
    system = before(rule.write).repeat_interleave(c, -1) * spread * (k @ k.mT)
    errors = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    tail = None if rule.tail is None else rule.tail.repeat_interleave(c, -1) * spread[..., 0, :]
    return [k], [errors], rule._replace(write=rule.write.repeat_interleave(c, -1) * spread, tail=tail)


def _written(
    query: Tensor,
    inputs: Weights,
    deltas: Weights,
    W: Weights,
    S: Weights | None,
    rule: Coefficients,
    residual: bool,
    gated: bool,
) -> tuple[Tensor, Weights, Weights | None]:
    """What the queries read, and the weights and momentum after the piece, from gradients that `rule` adds up."""
    after, pushed = list(W), list(W)

    def layer(i: int) -> Callable[[Tensor], Tensor]:
        def read(z: Tensor) -> Tensor:
            past = None if S is None else [S[i]]
            y, w, s = fast_weight_chunk(z, [inputs[i]], [deltas[i]], [W[i]], past, rule)
            after[i], pushed[i] = w[0], s[0] if s else w[0]
            return y

        return read

    y = network(query, [layer(i) for i in range(len(W))], residual=residual, gated=gated)
    return y, after, None if S is None else pushed


def _directions(
    query: Tensor,
    inputs: Weights,
    deltas: Weights,
    W: Weights,
    S: Weights | None,
    step: Tensor,
    band: Tensor,
    retain_log: Tensor,
    momentum_log: Tensor | None,
    residual: bool,
    gated: bool,
) -> tuple[Tensor, Weights, Weights | None]:
    """The orthogonal rule: the momentum of every token, its direction, and the weights it makes."""
    one = torch.ones_like(step)
    pushes, kept = band, None
    if momentum_log is not None:
        rule = momentum_coefficients(one, momentum_log, None)
        pushes, kept = rule.write @ band, rule.retain
    writes, retain, *_ = momentum_coefficients(step, retain_log, None)
    weights, pushed = [], []
    for i, (x, delta) in enumerate(zip(inputs, deltas, strict=True)):
        momentum = -(pushes[..., None] * delta[:, :, None]).mT @ x[:, :, None]  # [B, H, C, out, in]
        if S is not None:
            assert kept is not None
            momentum = momentum + kept[..., None, None] * S[i][:, :, None]
        direction = (writes @ newton_schulz(momentum).flatten(-2)).unflatten(-1, momentum.shape[-2:])
        weights.append(retain[..., None, None] * W[i][:, :, None] + direction)
        pushed.append(momentum[:, :, -1])
    maps = [lambda z, w=w: (w @ z[..., None])[..., 0] for w in weights]
    y = network(query, maps, residual=residual, gated=gated)
    return y, [w[:, :, -1] for w in weights], None if S is None else pushed


def _pack(anchor: State, weight: State, momentum: State | None, pos: Tensor, keys: Tensor, values: Tensor) -> State:
    state: State = {"anchor": anchor, "weight": weight}
    if momentum is not None:
        state["momentum"] = momentum
    return {**state, "pos": pos, "window": {"key": keys, "value": values}}


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    gate: Tensor,
    state: State,
    momentum_log: Tensor | None,
    objective: str,
    gated: bool,
) -> None:
    expect("omega", "query", query, "batch heads time features")
    B, H, T, K = query.shape
    c, W = state["window"]["key"].shape[2] + 1, list(state["weight"].values())
    expect("omega", "key", key, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect("omega", "value", value, "batch heads time features", batch=B, heads=H, time=T, features=W[-1].shape[2])
    expect("omega", "step", step, "batch heads time", batch=B, heads=H, time=T)
    expect("omega", "gate", gate, "batch heads time window", batch=B, heads=H, time=T, window=c)
    if objective not in OBJECTIVES:
        raise unknown("objective", objective, OBJECTIVES)
    if ("momentum" in state) != (momentum_log is not None):
        has = "has" if "momentum" in state else "has no"
        raise StateError(f"omega: the state {has} momentum; omega_state(momentum=...) must match the call.")
    if gated and len(W) != 3:
        raise ValueError(f"omega: a gated network is of three matrices, got {len(W)}.")
