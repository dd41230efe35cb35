r"""The anchored fast-weight memory: a small network that learns by gradient descent while it is read.

The memory is a multi-layer perceptron without biases, $f(W, x) = [x +]\; W_L\,\sigma(\cdots\sigma(W_1 x))$ with
$\sigma$ = GELU. Every token steps down the gradient of its error, taken at the *anchor* $W_\xi$: the weights as
they were when the token's chunk began. Per row and head:

$$u_t = \nabla_W \tfrac12\lVert f(W_\xi, k_t) - v_t\rVert^2,\quad
  S_t = \eta_t S_{t-1} - \theta_t u_t,\quad W_t = a_t W_{t-1} + S_t,\quad y_t = f(W_t, q_t).$$

Chunks are counted from the stream's first token, never from the call, so any cut gives the same result; the chunk
size belongs to the definition (it says where gradients are taken).

Because the gradients of a chunk share their anchor, what remains is linear in $(W, S)$:
$W_t = A_t W + F_t S - \sum_{i\le t} K_{ti} u_i$. And because each $u_i$ is an outer product $\delta_i x_i^\top$ in
every layer, $W_t z = A_t W z + F_t S z - \sum_{i\le t} K_{ti} (x_i\cdot z)\,\delta_i$ needs no weights per token.

Sources: Titans, arXiv:2501.00663; the dual form from Learning to (Learn at Test Time), arXiv:2407.04620.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.errors import ShapeError, StateError, expect
from remanence.ops.decay import cumulative, floored, lower_decay, recurrent_dtype
from remanence.ops.taps import tapped
from remanence.state import State, concat, select

Weights = list[Tensor]


class Coefficients(NamedTuple):
    """How the C tokens of a chunk (or of a piece of one) enter the memory: all that tells one rule from another.

    `write` K [B, H, C, C]: −u_i in W_t. `retain` A [B, H, C] and `push` F [B, H, C]: the earlier W and S in W_t.
    `tail` [B, H, C]: −u_i in the last S. `keep` [B, H]: the earlier S in the last S. Without momentum the last
    three are None.
    """

    write: Tensor
    retain: Tensor
    push: Tensor | None = None
    tail: Tensor | None = None
    keep: Tensor | None = None


def momentum_coefficients(step: Tensor, retain_log: Tensor, momentum_log: Tensor | None) -> Coefficients:
    """K = D(a) D(η) diag(θ), F = D(a) E; with no momentum K = D(a) diag(θ). All arguments are [B, H, C]."""
    G = cumulative(retain_log, -1)
    decay, retain = lower_decay(G, step.dtype), G.exp().to(step.dtype)
    if momentum_log is None:
        return Coefficients(decay * step[..., None, :], retain)
    E = cumulative(momentum_log, -1)
    kept, pushes = E.exp().to(step.dtype), lower_decay(E, step.dtype) * step[..., None, :]
    return Coefficients(decay @ pushes, retain, (decay @ kept[..., None])[..., 0], pushes[..., -1, :], kept[..., -1])


class _GeluSlope(torch.autograd.Function):
    """GELU's derivative, whose own derivative is φ(x)(2 − x²)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gelu_slope(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.square() * -0.5).exp() * (2 - x.square()) / math.sqrt(2 * math.pi)


def _gelu_slope(x: Tensor) -> Tensor:
    return torch.special.ndtr(x) + x * (x.square() * -0.5).exp() / math.sqrt(2 * math.pi)


def fast_weight_read(query: Tensor, weights: Sequence[Tensor], *, residual: bool = False) -> Tensor:
    """f(W, q) with the same weights for every query. query [B, H, T, K], weights [B, H, out, in] by layer."""
    z = query
    for depth, W in enumerate(weights):
        z = (F.gelu(z) if depth else z) @ W.mT
    return query + z if residual else z


def inner_gradient(key: Tensor, value: Tensor, anchor: Weights, residual: bool) -> tuple[Weights, Weights]:
    """The gradient δ_i x_iᵀ of every token in every layer, as the layers' inputs x and output gradients δ."""
    x, inputs, slopes = key, [key], []
    for W in anchor[:-1]:
        h = x @ W.mT
        x = F.gelu(h)
        inputs.append(x)
        slopes.append(_GeluSlope.apply(h))
    error = x @ anchor[-1].mT - (value - key if residual else value)
    deltas = [error]
    for W, slope in zip(reversed(anchor[1:]), reversed(slopes), strict=True):
        deltas.append(deltas[-1] @ W * slope)
    return inputs, deltas[::-1]


def _scaled(z: Tensor, W: Tensor, rows: Tensor) -> Tensor:
    """diag(rows) z W, scaling whichever side is narrower."""
    return (z * rows[..., None]) @ W if W.shape[-2] < W.shape[-1] else (z @ W) * rows[..., None]


def _outer(delta: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Σ_i rows_i δ_i x_iᵀ, scaling whichever side is narrower."""
    if x.shape[-1] < delta.shape[-1]:
        return delta.mT @ (x * rows[..., None])
    return (delta * rows[..., None]).mT @ x


def fast_weight_chunk(
    query: Tensor,
    inputs: Weights,
    deltas: Weights,
    weights: Weights,
    momentum: Weights | None,
    c: Coefficients,
    *,
    residual: bool = False,
) -> tuple[Tensor, Weights, Weights | None]:
    """Tokens that share an anchor, all at once, under any objective and any rule that `Coefficients` can say.

    Shapes: query [B, H, C, K]; by layer: inputs x [B, H, C, in] and deltas δ [B, H, C, out] (the token's gradient is
    δ xᵀ), weights and momentum [B, H, out, in]. Returns what the queries read after their own token was written, and
    the weights and momentum after the last token.
    """
    z, after, pushed = query, [], []
    for depth, (x, delta, W) in enumerate(zip(inputs, deltas, weights, strict=True)):
        z = F.gelu(z) if depth else z
        read = _scaled(z, W.mT, c.retain) - (z @ x.mT * c.write) @ delta
        last = c.retain[..., -1, None, None] * W - _outer(delta, x, c.write[..., -1, :])
        if momentum is not None:
            assert c.push is not None
            assert c.tail is not None
            assert c.keep is not None
            S = momentum[depth]
            read = read + _scaled(z, S.mT, c.push)
            last = last + c.push[..., -1, None, None] * S
            pushed.append(c.keep[..., None, None] * S - _outer(delta, x, c.tail))
        after.append(last)
        z = read
    return (query + z if residual else z), after, (None if momentum is None else pushed)


def fast_weight_state(weights: Sequence[Tensor], batch: int, *, momentum: bool = True) -> State:
    """The state before the first token: `batch` rows that all start from the same weights.

    Args:
        weights: by layer [H, out, in]; they receive gradients through the state.
        momentum: whether the rule has momentum (it doubles what must be carried).

    Shapes: `anchor`, `weight`, `momentum` hold a tensor [B, H, out, in] per layer under "0", "1", ...; `pos` [B].
    """
    wide = [W.to(recurrent_dtype(W)) for W in weights]
    rows = {str(i): W.expand(batch, *W.shape) for i, W in enumerate(wide)}
    state: State = {"anchor": dict(rows), "weight": dict(rows)}
    if momentum:
        state["momentum"] = {name: torch.zeros_like(W) for name, W in rows.items()}
    state["pos"] = torch.zeros(batch, dtype=torch.int64, device=weights[0].device)
    return state


def fast_weight_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    state: State,
    *,
    retain_log: Tensor | None = None,
    momentum_log: Tensor | None = None,
    chunk_size: int = 64,
    residual: bool = False,
    bound: float | None = None,
) -> tuple[Tensor, State]:
    """The definition of `fast_weight`, token by token, its inner gradients taken by automatic differentiation."""
    anchor, W, S, pos = state["anchor"], state["weight"], state.get("momentum"), state["pos"]
    a = (torch.zeros_like(step) if retain_log is None else floored(retain_log)).exp()
    eta = None if momentum_log is None else floored(momentum_log).exp()

    def loss(weights: dict[str, Tensor], k: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (fast_weight_read(k, list(weights.values()), residual=residual) - v).square().sum()

    y = [value[:, :, :0]]
    for t in range(query.shape[2]):
        now = slice(t, t + 1)
        k, v, theta = key[:, :, now], value[:, :, now], step[:, :, now]
        gradient = torch.func.grad(loss)(anchor, k, v)
        if bound is not None:
            error = _square(fast_weight_read(k, list(anchor.values()), residual=residual) - v)
            squares = torch.stack([_square(u.flatten(2)) for u in gradient.values()], -1).sum(-1, keepdim=True)
            log = None if eta is None else eta[:, :, now].log()
            theta = _bounded(theta, squares, error, log, bound / chunk_size)
        change = {i: -theta[..., None] * u for i, u in gradient.items()}
        if eta is not None:
            assert S is not None
            change = S = {i: eta[:, :, now, None] * S[i] + u for i, u in change.items()}
        W = {i: a[:, :, now, None] * W[i] + u for i, u in change.items()}
        y.append(fast_weight_read(query[:, :, now], list(W.values()), residual=residual))
        pos = pos + 1
        closed = (pos % chunk_size == 0)[:, None, None, None]
        anchor = {i: torch.where(closed, W[i], anchor[i]) for i in W}
    return torch.cat(y, 2), _pack(anchor, W, S, pos)


@tapped
def fast_weight(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    state: State,
    *,
    retain_log: Tensor | None = None,
    momentum_log: Tensor | None = None,
    chunk_size: int = 64,
    residual: bool = False,
    bound: float | None = None,
    coefficients: Callable[[Tensor, Tensor, Tensor | None], Coefficients] = momentum_coefficients,
) -> tuple[Tensor, State]:
    """A network memory over a sequence, a chunk at a time; equal to `fast_weight_reference`.

    Args:
        query, key: [B, H, T, K], T ≥ 0; keys of about unit length keep the inner steps stable.
        value: [B, H, T, V]; V = K with `residual`.
        step: θ [B, H, T], the inner step sizes.
        state: from `fast_weight_state`, or as an earlier call returned it. Rows may stand at different positions.
        retain_log: log a [B, H, T] ≤ 0, clamped at −60; None forgets nothing.
        momentum_log: log η [B, H, T] ≤ 0, clamped at −60; None is plain gradient descent.
        chunk_size: tokens per anchor; part of the definition.
        residual: add the query to what is read (and the key to what is predicted).
        bound: keep every step at or below (1 − η) · bound / chunk_size · ‖e‖² / ‖u‖², where e is the token's error.
            ‖e‖² / ‖u‖² is the step that would mend the error at once (Polyak's); with bound ≤ 1 a whole chunk of equal
            tokens goes no further, where unbounded steps, which add up at one anchor, may diverge. None: θ as given.
        coefficients: the rule inside a chunk, of (step, retain_log, momentum_log), each [B, H, C]; since a call may
            cut a chunk, the rule must compose: two pieces in turn equal one.

    Returns: what each query reads after its token was written [B, H, T, V], and the state, of constant size.
    Raises: `ShapeError` or `StateError` when the tensors and the state do not fit together.
    """
    state = _check(query, key, value, step, state, retain_log, momentum_log, residual)
    dtype = query.dtype
    wide = recurrent_dtype(query)
    retain_log = torch.zeros_like(step) if retain_log is None else retain_log
    momentum_log = None if momentum_log is None else floored(momentum_log.to(wide))
    inputs = [query.to(wide), key.to(wide), value.to(wide), step.to(wide), floored(retain_log.to(wide))]
    inputs += [] if momentum_log is None else [momentum_log]

    def run(tensors: list[Tensor], state: State, phase: int) -> tuple[Tensor, State]:
        anchor, W = list(state["anchor"].values()), list(state["weight"].values())
        S = list(state["momentum"].values()) if momentum_log is not None else None
        T, y = tensors[0].shape[2], []
        sizes = piece_sizes(T, phase, chunk_size)
        for piece in zip(*(x.split(sizes, 2) for x in tensors), strict=True):
            q, k, v, *gates = piece
            layer_inputs, deltas = inner_gradient(k, v, anchor, residual)
            eta_log = gates[2] if S is not None else None
            if bound is not None:
                parts = [_square(x) * _square(d) for x, d in zip(layer_inputs, deltas, strict=True)]
                squares = torch.stack(parts).sum(0)
                gates[0] = _bounded(gates[0], squares, _square(deltas[-1]), eta_log, bound / chunk_size)
            c = coefficients(gates[0], gates[1], eta_log)
            out, W, S = fast_weight_chunk(q, layer_inputs, deltas, W, S, c, residual=residual)
            phase = (phase + q.shape[2]) % chunk_size
            anchor = anchor if phase else W
            y.append(out)
        named = [None if x is None else dict(zip(state["weight"], x, strict=True)) for x in (anchor, W, S)]
        return torch.cat(y, 2), _pack(named[0], named[1], named[2], state["pos"] + T)

    if query.shape[2] == 0:
        return value, state
    y, state = by_phase(run, inputs, state, state["pos"], chunk_size)
    return y.to(dtype), state


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).square()  # one pass over x, where x² would be kept for the gradient


def _bounded(step: Tensor, gradient: Tensor, error: Tensor, momentum_log: Tensor | None, share: float) -> Tensor:
    """At most `share` of Polyak's step, from ‖u‖² and ‖e‖²; an error of zero takes none."""
    left = 1.0 if momentum_log is None else -torch.expm1(momentum_log)
    return torch.minimum(step, left * share * error / (gradient + 1e-12))


def piece_sizes(length: int, phase: int, chunk_size: int) -> list[int]:
    """How `length` tokens fall into chunks when `phase` tokens of the first one were already read."""
    first = min(length, chunk_size - phase)
    full, rest = divmod(length - first, chunk_size)
    return [first] + [chunk_size] * full + [rest] * (rest > 0)


def by_phase(
    run: Callable[[list[Tensor], State, int], tuple[Tensor, State]],
    inputs: list[Tensor],
    state: State,
    pos: Tensor,
    chunk_size: int,
) -> tuple[Tensor, State]:
    """`run(inputs, state, phase)` on each group of rows that stand at the same phase of a chunk."""
    phases = (pos % chunk_size).tolist()
    if len(set(phases)) == 1:
        return run(inputs, state, phases[0])
    groups = [[i for i, p in enumerate(phases) if p == phase] for phase in sorted(set(phases))]
    parts = [run([x[rows] for x in inputs], select(state, rows), phases[rows[0]]) for rows in groups]
    order = torch.tensor([i for rows in groups for i in rows], device=pos.device).argsort()
    return torch.cat([y for y, _ in parts])[order], select(concat(s for _, s in parts), order)


def _pack(anchor: State | None, weight: State | None, momentum: State | None, pos: Tensor) -> State:
    parts = {"anchor": anchor, "weight": weight, "momentum": momentum, "pos": pos}
    return {name: part for name, part in parts.items() if part is not None}


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    state: State,
    retain_log: Tensor | None,
    momentum_log: Tensor | None,
    residual: bool,
) -> State:
    expect("fast_weight", "query", query, "batch heads time features")
    B, H, T, K = query.shape
    expect("fast_weight", "key", key, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect("fast_weight", "value", value, "batch heads time features", batch=B, heads=H, time=T)
    gates = {"step": step, "retain_log": retain_log, "momentum_log": momentum_log}
    for name, gate in gates.items():
        if gate is not None:
            expect("fast_weight", name, gate, "batch heads time", batch=B, heads=H, time=T)
    if residual and value.shape[3] != K:
        raise ShapeError(f"fast_weight: residual needs values of the queries' {K} features, got {value.shape[3]}.")
    if ("momentum" in state) != (momentum_log is not None):
        has = "has" if "momentum" in state else "has no"
        raise StateError(f"fast_weight: the state {has} momentum; fast_weight_state(momentum=...) must match the call.")
    layers = list(state["weight"].values())
    widths = [K] + [W.shape[2] for W in layers]
    for i, W in enumerate(layers):
        expect("fast_weight", f"state weight {i}", W, "batch heads out in", **{"batch": B, "heads": H, "in": widths[i]})
    if widths[-1] != value.shape[3]:
        raise StateError(f"fast_weight: the last layer gives {widths[-1]} features, but values have {value.shape[3]}.")
    return state
