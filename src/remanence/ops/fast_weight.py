r"""The anchored fast-weight memory: a small network that learns by gradient descent while it is read.

The memory is a multi-layer perceptron without biases, $f(W, x) = [x +]\; [\mathrm{LN}]\, W_L\,\sigma(\cdots
\sigma(W_1 x))$ with $\sigma$ = GELU. Every token steps down the gradient of its loss, taken at the *anchor* $W_\xi$:
the weights as they were when the token's chunk began. Per row and head:

$$u_t = \nabla_W \ell(f(W_\xi, k_t), v_t),\quad
  S_t = \eta_t S_{t-1} - \theta_t u_t,\quad W_t = a_t W_{t-1} + S_t,\quad y_t = f(W_t, q_t).$$

Chunks are counted from the stream's first token, never from the call, so any cut gives the same result; the chunk
size belongs to the definition (it says where gradients are taken).

Because the gradients of a chunk share their anchor, what remains is linear in $(W, S)$:
$W_t = A_t W + F_t S - \sum_{i\le t} K_{ti} u_i$. And because each $u_i$ is an outer product $\delta_i x_i^\top$ in
every layer, $W_t z = A_t W z + F_t S z - \sum_{i\le t} K_{ti} (x_i\cdot z)\,\delta_i$ needs no weights per token.

A matrix under the squared error learns from every token at its own weights (chunk size 1) without a loop over tokens:
its errors solve one triangular system per 64 tokens.

Whatever else a rule may be is an argument: the loss (`ops.objectives`), a window of tokens whose losses are summed (K
times a band), a second momentum (one more product in K), a nonlinear retention (`ops.retention`), steps that are
orthogonalised, and when the memory is read. The last two kinds of rule are not linear in the gradients: they make the
weights of each token, a chunk at a time, and make them again for the gradient rather than keep them.

Sources: Titans, arXiv:2501.00663; the dual form from Learning to (Learn at Test Time), arXiv:2407.04620; the objectives
and retentions from Miras, arXiv:2504.13173; the window and the orthogonal step from ATLAS, arXiv:2505.23735.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from remanence.errors import ShapeError, StateError, expect
from remanence.ops.anchored_chunk import by_chunks, ceiling, exact_chunk, fast_weight_chunk, one_token, square
from remanence.ops.chunk_rule import (
    Coefficients,
    banded,
    beside,
    momentum_coefficients,
    of_outputs,
    shifted,
    window_band,
)
from remanence.ops.decay import FLOOR, floored, recurrent_dtype
from remanence.ops.dispatch import compiled
from remanence.ops.inner_network import (
    Affine,
    Weights,
    fast_weight_read,
    inner_gradient_along,
)
from remanence.ops.newton_schulz import newton_schulz
from remanence.ops.objectives import Dot, Huber, LogCosh, Objective, PNorm, Shifted, Squared
from remanence.ops.orthogonal import orthogonal_tokens, worth
from remanence.ops.phases import by_phase, cuts, joined, piece_sizes, whole_sizes
from remanence.ops.retention import Retention, Sequential
from remanence.ops.taps import tapped
from remanence.ops.token_stream import token_stream
from remanence.ops.token_weights import token_weights
from remanence.ops.whole_chunks import Form, whole_chunks
from remanence.state import State

READS = ("after", "before", "anchor")


def fast_weight_state(
    weights: Sequence[Tensor],
    batch: int,
    *,
    momentum: bool | int = True,
    window: int = 1,
    thresholds: bool | int = False,
    retention: Retention | None = None,
) -> State:
    """The state before the first token: `batch` rows that all start from the same weights.

    Args:
        weights: by layer [H, out, in]; they receive gradients through the state. A gated network, W_3(σ(W_1 x) ∘
            W_2 x), has three.
        momentum: its order, 0 to 2 (each order is one more tensor per layer); True is 1.
        window: tokens whose losses a step sums; of the last `window` − 1 the keys and values are kept.
        thresholds: whether those come with thresholds; above 1, one of each of so many channels.
        retention: what weights are of what is kept, if not the same; its `start` makes the latter.

    Shapes: `anchor`, `weight`, `momentum` (and `second`) hold a tensor [B, H, out, in] per layer under "0", "1", ...;
    `window` {"key" [B, H, window − 1, K], "value" [B, H, window − 1, V]}, where window > 1; `pos` [B].
    """
    wide = [W.to(recurrent_dtype(W)) for W in weights]
    wide = wide if retention is None else [retention.start(W) for W in wide]
    rows = {str(i): W.expand(batch, *W.shape) for i, W in enumerate(wide)}
    state: State = {"anchor": dict(rows), "weight": dict(rows)}
    for name in ("momentum", "second")[: int(momentum)]:
        state[name] = {i: torch.zeros_like(W) for i, W in rows.items()}
    if window > 1:
        shape = batch, wide[0].shape[0], window - 1
        ends = {"key": wide[0].shape[2], "value": wide[-1].shape[1]}
        state["window"] = {name: wide[0].new_zeros(*shape, width) for name, width in ends.items()}
        if thresholds:
            state["window"]["threshold"] = wide[0].new_zeros(*shape, *([thresholds] if thresholds > 1 else []))
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
    second_log: Tensor | None = None,
    threshold: Tensor | None = None,
    window: Tensor | None = None,
    chunk_size: int = 64,
    residual: bool = False,
    gated: bool = False,
    norm: Affine | None = None,
    objective: Objective = Squared(),
    retention: Retention | None = None,
    orthogonal: int = 0,
    read: str = "after",
    bound: float | None = None,
    toward: Sequence[Tensor] | None = None,
) -> tuple[Tensor, State]:
    """The definition of `fast_weight`, token by token, its inner gradients taken by automatic differentiation."""
    anchor, W, pos = state["anchor"], state["weight"], state["pos"]
    S, S2 = state.get("momentum"), state.get("second")
    past = {name: list(x.unbind(2)) for name, x in state.get("window", {}).items()}
    look = functools.partial(fast_weight_read, residual=residual, gated=gated, norm=norm)
    a = (torch.zeros_like(step) if retain_log is None else floored(retain_log)).exp()
    eta, eta2 = (None if g is None else floored(g).exp() for g in (momentum_log, second_log))

    layers = len(W)

    def fit(gate: Tensor, layer: str) -> Tensor:
        return beside(gate[:, :, 0], of_outputs(int(layer), layers))

    def weights(A: State, start: State) -> Weights:
        if retention is None:
            return [W if toward is None else W + toward[i] for i, W in enumerate(A.values())]
        if retention.frozen:
            return [A[i] * retention.factor(start[i]) for i in A]
        return [retention.link(A[i]) for i in A]

    def loss(kept: list[Tensor], k: Tensor, v: Tensor, delta: Tensor | None) -> Tensor:
        y = look(k, kept)
        return objective.loss(y - k if residual else y, v - k if residual else v, delta).sum()

    y = [value[:, :, :0]]
    for t in range(query.shape[2]):
        now = slice(t, t + 1)
        token = {"key": key[:, :, t], "value": value[:, :, t]}
        if threshold is not None:
            token["threshold"] = threshold[:, :, t]
        past = {name: [*past.get(name, []), x] for name, x in token.items()}
        fixed = weights(anchor, anchor)
        u = [torch.zeros_like(w) for w in fixed]
        size, along, growth = (torch.zeros_like(query[:, :, now, 0]) for _ in range(3))
        for j in range(1 if window is None else window.shape[3]):
            k, v = past["key"][-1 - j][:, :, None], past["value"][-1 - j][:, :, None]
            delta = past["threshold"][-1 - j][:, :, None] if threshold is not None else None
            much = torch.ones_like(size) if window is None else window[:, :, now, j]
            real = (pos >= j)[:, None, None]
            much = much * real
            # where there was no token, any but zero: a norm has no second derivative there
            k, v = (torch.where(real[..., None], x, fill) for x, fill in ((k, 1.0), (v, 9.0)))
            part = torch.func.grad(loss)(fixed, k, v, delta)
            u = [x + much[..., None] * new for x, new in zip(u, part, strict=True)]
            out = look(k, fixed)
            slope = objective.slope(out - k if residual else out, v - k if residual else v, delta)
            gains = [1.0 if retention is None else retention.gain(A)[..., None] for A in anchor.values()]
            squares = [gain * square(p.flatten(2))[..., None] for gain, p in zip(gains, part, strict=True)]
            size = size + much * (torch.stack(squares).sum(0) + 1e-24).sqrt()
            shares = [(p + 1e-24).sqrt() / len(w[0, 0]) ** 0.5 for p, w in zip(squares, fixed, strict=True)]
            growth = growth + much * torch.stack(shares)
            along = along + much * (slope * (out - v)).sum(-1)
        past = {name: x[len(x) - (0 if window is None else window.shape[3] - 1) :] for name, x in past.items()}
        theta = step[:, :, now]
        if bound is not None:
            left = 1.0 if eta is None else 1 - eta[:, :, now]
            left = left if eta2 is None else left * (1 - eta2[:, :, now])
            if objective.targets:
                plain = len(W) == 1 and isinstance(objective, Squared) and norm is None and retention is None
                ratio = along / (size.square() + 1e-12)
                ratio = 1 / (square(key[:, :, now]) + 1e-12) if plain and window is None else ratio
                most = ratio / chunk_size
            else:
                slowest = a[:, :, now] if a.ndim == 3 else a[:, :, now].amax(-1)
                most = (1 - slowest) / (growth.amax(0) + 1e-12)
            if objective.targets or len(W) > 1 or norm is not None:
                most = left * bound * most
                theta = torch.minimum(theta, most if theta.ndim == 3 else most[..., None])
        sign = torch.ones_like(theta) if orthogonal else theta
        change = {i: -fit(sign, i) * x for i, x in zip(W, u, strict=True)}
        before = W
        if eta is not None:
            assert S is not None
            change = S = {i: eta[:, :, now, None] * S[i] + x for i, x in change.items()}
        if eta2 is not None:
            assert S2 is not None
            change = S2 = {i: eta2[:, :, now, None] * S2[i] + x for i, x in change.items()}
        if orthogonal:
            change = {i: fit(theta, i) * newton_schulz(x, orthogonal) for i, x in change.items()}
        if isinstance(retention, Sequential):
            W = {i: retention.move(W[i], fit(a[:, :, now], i), x, fit(theta, i)) for i, x in change.items()}
        else:
            W = {i: fit(a[:, :, now], i) * W[i] + x for i, x in change.items()}
        seen = weights({"after": W, "before": before, "anchor": anchor}[read], anchor)
        y.append(look(query[:, :, now], seen))
        pos = pos + 1
        closed = (pos % chunk_size == 0)[:, None, None, None]
        anchor = {i: torch.where(closed, W[i], anchor[i]) for i in W}
    kept = {name: torch.stack(x, 2) for name, x in past.items() if x}
    return torch.cat(y, 2), _pack(anchor, W, S, S2, kept or None, pos)


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
    second_log: Tensor | None = None,
    threshold: Tensor | None = None,
    window: Tensor | None = None,
    chunk_size: int = 64,
    residual: bool = False,
    gated: bool = False,
    norm: Affine | None = None,
    objective: Objective = Squared(),
    retention: Retention | None = None,
    orthogonal: int = 0,
    read: str = "after",
    bound: float | None = None,
    toward: Sequence[Tensor] | None = None,
    remake: bool = False,
    coefficients: Callable[..., Coefficients] = momentum_coefficients,
) -> tuple[Tensor, State]:
    """A network memory over a sequence, a chunk at a time; equal to `fast_weight_reference`.

    Args:
        query, key: [B, H, T, K], T ≥ 0; keys of about unit length keep the inner steps stable.
        value: [B, H, T, V]; V = K with `residual`.
        step: θ [B, H, T], the inner step sizes; or of every channel [B, H, T, V], as may be `retain_log` and
            `threshold`. Channels are what the last layer gives and what the first (of a gated network, both of its
            first) reads: so K is V, but for a matrix, and there are at most two layers, or a gated three.
        state: from `fast_weight_state`, or as an earlier call returned it. Rows may stand at different positions.
        retain_log: log a [B, H, T] ≤ 0, clamped at −60; None forgets nothing.
        momentum_log: log η [B, H, T] ≤ 0, clamped at −60; None is plain gradient descent.
        second_log: likewise of a second momentum, which sums the first: S²_t = η²_t S²_{t−1} + S_t, and W sums S².
        threshold: [B, H, T], of objectives that have one (the Huber losses); None is the objective's own.
        window: γ [B, H, T, c]: the loss of token t is the sum over j < c of γ_tj times that of the token j before it
            (what lies before the stream's start counts nothing). None is the token's own loss.
        chunk_size: tokens per anchor; part of the definition.
        residual: add the query to what is read (and the key to what is predicted).
        gated: the network is W_3(σ(W_1 x) ∘ W_2 x).
        norm: scale and shift [H, V] of a layer norm on the network's output, inside the residual.
        objective: one of `ops.objectives`.
        retention: one of `ops.retention`: what the weights are of what is summed; None is the same.
        orthogonal: steps of a Newton–Schulz iteration that every layer's step is put through (S is then without θ,
            W_t = a_t W_{t−1} + θ_t NS(S_t)); 0 is none.
        read: "after" a token's write (W_t), "before" it (W_{t−1}), or the "anchor" W_ξ.
        bound: keep every step at or below (1 − η) · bound / chunk_size · ⟨e, ∂ℓ/∂f⟩ / ‖u‖², where e is the token's
            error (and ‖u‖² counts by how much a retention moves the weights): for the squared loss the step that
            would mend the error at once (Polyak's); with bound ≤ 1 a whole chunk of equal tokens goes no further, where
            unbounded steps, which add up at one anchor, may diverge. The dot product has no error to mend, but in a
            network it lets layers feed each other's growth: its steps are kept at or below (1 − η) · (1 − a) · bound ·
            √out / ‖u‖ in every layer, so that none outgrows its decay. None: θ as given.
        toward: by layer [H, out, in]: what is forgotten turns into these weights instead of zero. The state then
            holds how far the weights are from them: make it of zeros. Not with a `retention`.
        remake: make what happens within a chunk again for the gradient rather than keep it: of every chunk only the
            state is kept (the nonlinear rules do so anyway). Changes time and memory, never the result.
        coefficients: the rule inside a chunk, of (step, retain_log, momentum_log[, second_log]), each [B, H, C]; since
            a call may cut a chunk, the rule must compose: two pieces in turn equal one.

    Returns: what each query reads [B, H, T, V], and the state, of constant size.
    Raises: `ShapeError` or `StateError` when the tensors and the state do not fit together; `ValueError` for what
        cannot be combined.
    """
    gates = {"step": step, "retain_log": retain_log, "momentum_log": momentum_log, "second_log": second_log}
    _check(query, key, value, state, {**gates, "threshold": threshold}, window, residual)
    _combine(len(state["weight"]), gated, orthogonal, second_log, bound, read)
    dtype, wide = query.dtype, recurrent_dtype(query)
    retained = torch.zeros_like(step) if retain_log is None else retain_log
    channels = max(step.ndim, retained.ndim) == 4
    if channels:
        _check_channels(query, value, list(state["weight"].values()), gated)
        gates["step"], retained = _to_channels(step, value.shape[3]), _to_channels(retained, value.shape[3])
    gates["retain_log"] = retained
    if toward is not None and retention is not None:
        raise ValueError("fast_weight: weights that decay toward others (`toward`) have no other retention.")
    start = None if toward is None else [W.to(wide) for W in toward]
    given = {"query": query, "key": key, "value": value, "threshold": threshold, "window": window, **gates}
    inputs = {name: x.to(wide) for name, x in given.items() if x is not None}
    inputs |= {name: floored(x) for name, x in inputs.items() if name.endswith("_log")}
    norm = None if norm is None else (norm[0].to(wide), norm[1].to(wide))
    orders = [name for name in ("momentum", "second") if name in state]
    plain = len(state["weight"]) == 1 and isinstance(objective, Squared) and norm is None and retention is None
    plain = plain and window is None  # ‖e‖² / ‖u‖² is 1 / ‖k‖², whatever the error
    exact = plain and chunk_size == 1 and not orthogonal and not channels and toward is None
    sequential = isinstance(retention, Sequential)
    nonlinear = bool(orthogonal) or (retention is not None and not retention.frozen and read != "anchor") or sequential
    simple = retention is None and window is None and second_log is None and not gated
    simple = simple and not (exact or nonlinear) and type(objective) in LEARNT
    simple = simple and coefficients is momentum_coefficients and not channels and toward is None
    fused = simple and (threshold is None or threshold.ndim == 3) and compiled(query)
    single = simple and type(objective) is Squared and norm is None
    single = single and query.shape[2] == 1 and not torch.is_grad_enabled()

    known = retention is None and toward is None and not channels and read != "anchor"

    def separate(q: Tensor) -> bool:
        return known and bool(orthogonal) and worth(q, list(state["weight"].values()), orthogonal)

    streamed = known and not exact and type(objective) is Squared and threshold is None and second_log is None
    streamed = streamed and norm is None and bool(orthogonal or gated or window is not None)
    streamed = streamed and coefficients is momentum_coefficients and not torch.is_grad_enabled()
    streamed = streamed and worth(query, list(state["weight"].values()), orthogonal)

    def piece(
        x: dict[str, Tensor], seen: dict[str, Tensor], pos: Tensor, anchor: Weights, W: Weights, S: Weights | None
    ) -> tuple[Tensor, Weights, Weights | None]:
        factors = None if retention is None or not retention.frozen else [retention.factor(A) for A in anchor]
        if exact:
            return exact_chunk(x, W, S, bound, residual, read, coefficients)
        fixed = anchor if retention is None else [retention.link(A) for A in anchor]
        fixed = fixed if start is None else [A + W0 for A, W0 in zip(fixed, start, strict=True)]
        near, deltas, along = inner_gradient_along(
            seen["key"], seen["value"], fixed, residual, gated, norm, objective, seen.get("threshold")
        )
        band = None if window is None else window_band(x["window"], pos)
        theta, logs = x["step"], [x.get(f"{name}_log") for name in ("retain", "momentum", "second")]
        log, eta_log = logs[:2]
        assert log is not None
        if bound is not None and (objective.targets or len(W) > 1 or norm is not None):
            parts = [square(i) * square(d) for i, d in zip(near, deltas, strict=True)]
            if retention is not None:
                parts = [p * retention.gain(A)[..., None] for p, A in zip(parts, anchor, strict=True)]
            slowest = [log.amax(-1) if channels else log, *logs[1:]]
            most = bound * ceiling(parts, along, fixed, band, slowest, chunk_size, objective.targets)
            theta = torch.minimum(theta, most[..., None] if channels else most)
        if separate(x["query"]):
            return orthogonal_tokens(
                x["query"], near, deltas, W, S, (theta, log, eta_log), band, orthogonal, read, residual, gated, norm
            )  # fmt: skip
        steps, kept, others = theta, torch.full_like(log, FLOOR) if sequential else log, logs[1:]
        if channels:
            steps, kept, others = theta.mT, kept.mT, [None if g is None else g[:, :, None] for g in others]
        c = coefficients(steps, kept, *others) if logs[2] is not None else coefficients(steps, kept, others[0])
        if band is not None:
            c = banded(c, band[:, :, None] if channels else band)
        if nonlinear:
            y, W, S = token_weights(
                x["query"], near, deltas, W, S, (theta, log, eta_log), band, c, orthogonal,
                retention if factors is None else None, read, residual, gated, norm, start, factors,
            )  # fmt: skip
        else:
            reads = shifted(c) if read == "before" else c
            y, W, S = fast_weight_chunk(
                x["query"], near, deltas, W, S, c, residual=residual, gated=gated, norm=norm, reads=reads,
                factors=factors, toward=start,
            )  # fmt: skip
        if read == "anchor":
            y = fast_weight_read(x["query"], fixed, residual=residual, gated=gated, norm=norm)
        return y, W, S

    def whole(x: dict[str, Tensor], W: Weights, S: Weights | None) -> tuple[Tensor, Weights, Weights | None]:
        eta_log = x.get("momentum_log")
        left = torch.ones_like(x["step"]) if eta_log is None else -torch.expm1(eta_log)
        most, bends = None, x.get("threshold")
        if bound is not None and objective.targets:
            most = left * (bound / chunk_size)
        elif bound is not None and (len(W) > 1 or norm is not None):
            most = left * bound * -torch.expm1(x["retain_log"])
        if isinstance(objective, Huber) and bends is None:
            bends = torch.full_like(x["step"], objective.delta)
        return whole_chunks(
            x["query"],
            x["key"],
            x["value"],
            x["step"],
            most,
            bends,
            x["retain_log"].exp(),
            None if eta_log is None else eta_log.exp(),
            None if norm is None else torch.stack(norm),
            W,
            S,
            form := Form(chunk_size, read, residual=residual, objective=objective),
            functools.partial(by_chunks, like=W, form=form),
        )

    def run(tensors: list[Tensor], state: State, phase: int) -> tuple[Tensor, State]:
        x = dict(zip(inputs, tensors, strict=True))
        if streamed:
            return token_stream(
                x, state, phase, chunk_size, orthogonal=orthogonal, read=read, residual=residual, gated=gated,
                bound=bound,
            )  # fmt: skip
        anchor, W = list(state["anchor"].values()), list(state["weight"].values())
        S = [t for name in orders for t in state[name].values()] if orders else None
        T, at, y = x["query"].shape[2], 0, []
        past = state.get("window", {})
        sizes = piece_sizes(T, 0, TOGETHER) if exact else piece_sizes(T, phase, chunk_size)
        if fused:
            sizes = whole_sizes(T, phase, chunk_size, SPAN if remake else T)
        for tokens in zip(*(cuts(t, sizes, 2) for t in x.values()), strict=True):
            part = dict(zip(x, tokens, strict=True))
            n = part["query"].shape[2]
            seen = {i: torch.cat([past[i], part[i]], 2) if i in past else part[i] for i in SEEN if i in part}
            past = {i: seen[i][:, :, n:] for i in past}
            arguments = (part, seen, state["pos"] + at, anchor, W, S)
            if single:
                out, W, S = one_token(part, anchor, W, S, residual, None if bound is None else bound / chunk_size, read)
            elif fused and not phase and n >= chunk_size:
                if remake and torch.is_grad_enabled():
                    out, W, S = checkpoint(whole, part, W, S, use_reentrant=False, preserve_rng_state=False)
                else:
                    out, W, S = whole(part, W, S)
            elif (remake or (nonlinear and not separate(part["query"]))) and torch.is_grad_enabled():
                out, W, S = checkpoint(piece, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                out, W, S = piece(*arguments)
            phase, at = (phase + n) % chunk_size, at + n
            anchor = anchor if phase else W
            y.append(out)

        def named(x: Weights | None, part: int = 0) -> State:
            assert x is not None
            return dict(zip(state["weight"], x[part * len(W) : (part + 1) * len(W)], strict=True))

        moved = [named(S, i) if i < len(orders) else None for i in range(2)]
        return joined(y, 2), _pack(named(anchor), named(W), moved[0], moved[1], past or None, state["pos"] + T)

    if query.shape[2] == 0:
        return value, state
    y, state = by_phase(run, list(inputs.values()), state, state["pos"], chunk_size)
    return y.to(dtype), state


LEARNT = Squared, Dot, PNorm, LogCosh, Huber, Shifted
"""The objectives that the compiled form has."""
TOGETHER = 64
"""Tokens whose errors one triangular system gives."""
SPAN = 512
"""Tokens whose chunks are made again together for the gradient, where `remake` and the compiled form meet."""


SEEN = ("key", "value", "threshold")
"""What a window keeps of its tokens."""


def _pack(
    anchor: State, weight: State, momentum: State | None, second: State | None, window: State | None, pos: Tensor
) -> State:
    parts = {"anchor": anchor, "weight": weight, "momentum": momentum, "second": second, "window": window, "pos": pos}
    return {name: part for name, part in parts.items() if part is not None}


def _combine(
    layers: int, gated: bool, orthogonal: int, second_log: Tensor | None, bound: float | None, read: str
) -> None:
    if gated and layers != 3:
        raise ValueError(f"fast_weight: a gated network has three matrices, got {layers}.")
    if orthogonal and (second_log is not None or bound is not None):
        raise ValueError(
            "fast_weight: orthogonal steps take no second momentum (there is one rule for them) and no bound "
            "(their size is θ)."
        )
    if read not in READS:
        raise ValueError(f"fast_weight: read must be one of {', '.join(READS)}, got {read!r}.")


def _to_channels(gate: Tensor, width: int) -> Tensor:
    return gate if gate.ndim == 4 else gate[..., None].expand(*gate.shape, width)


def _check_channels(query: Tensor, value: Tensor, weights: Weights, gated: bool) -> None:
    K, V = query.shape[3], value.shape[3]
    if len(weights) > 1 and K != V:
        raise ShapeError(f"fast_weight: gates of every channel need keys of the values' {V} features, got {K}.")
    if len(weights) > 2 and not gated:
        raise ValueError(
            f"fast_weight: gates of every channel have no side of a matrix between hidden features; got {len(weights)} "
            "layers, at most 2."
        )


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: State,
    gates: dict[str, Tensor | None],
    window: Tensor | None,
    residual: bool,
) -> None:
    expect("fast_weight", "query", query, "batch heads time features")
    B, H, T, K = query.shape
    expect("fast_weight", "key", key, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect("fast_weight", "value", value, "batch heads time features", batch=B, heads=H, time=T)
    for name, gate in gates.items():
        if gate is not None and gate.ndim == 4 and name in ("step", "retain_log", "threshold"):
            channels = value.shape[3]
            expect("fast_weight", name, gate, "batch heads time channels", batch=B, heads=H, time=T, channels=channels)
        elif gate is not None:
            expect("fast_weight", name, gate, "batch heads time", batch=B, heads=H, time=T)
    if window is not None:
        expect("fast_weight", "window", window, "batch heads time tokens", batch=B, heads=H, time=T)
    if residual and value.shape[3] != K:
        raise ShapeError(f"fast_weight: residual needs values of the queries' {K} features, got {value.shape[3]}.")
    for name in ("momentum", "second"):
        if (name in state) != (gates[f"{name}_log"] is not None):
            has = "has" if name in state else "has no"
            said = "momentum" if name == "momentum" else "second momentum"
            raise StateError(
                f"fast_weight: the state {has} {said}; fast_weight_state(momentum=...) must match the call."
            )
    kept = 1 if "window" not in state else state["window"]["key"].shape[2] + 1
    if kept != (1 if window is None else window.shape[3]):
        raise StateError(
            f"fast_weight: the state is for a window of {kept} tokens; fast_weight_state(window=...) tells."
        )
    layers = list(state["weight"].values())
    gated = len(layers) == 3 and layers[1].shape[3] == K and layers[2].shape[3] == layers[1].shape[2]
    if not gated or layers[1].shape[3] == layers[0].shape[2]:
        widths = [K] + [W.shape[2] for W in layers]
        for i, W in enumerate(layers):
            sizes = {"batch": B, "heads": H, "in": widths[i]}
            expect("fast_weight", f"state weight {i}", W, "batch heads out in", **sizes)
    if layers[-1].shape[2] != value.shape[3]:
        raise StateError(
            f"fast_weight: the last layer gives {layers[-1].shape[2]} features, but values have {value.shape[3]}."
        )
