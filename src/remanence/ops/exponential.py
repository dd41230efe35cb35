r"""Memories over exponential features φ*, all monomials of every degree: what they hold grows with what they read.

$φ^*(q)·φ^*(k) = \exp(q·k)$, so a matrix over these features is kept as coefficients of the keys that were written:
$W φ(q) = \sum_i w_i\, κ(k_i, q)$. Features are used at unit length, $κ(k, q) = \exp(-\tfrac12‖k - q‖^2)$: with keys and
queries of one length that is $\exp(q·k)$ up to a constant, and a step of 1 mends an error exactly.

Source: ATLAS, arXiv:2505.23735 (2025).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.errors import expect, unknown
from remanence.ops.chunk_rule import momentum_coefficients, shifted
from remanence.ops.decay import cumulative, floored, recurrent_dtype
from remanence.ops.phases import by_phase, whole_sizes
from remanence.ops.taps import tapped
from remanence.ops.unit_solve import unit_solve
from remanence.state import State

PAIRS = 128
"""The largest triangular system: tokens times window."""
SPAN = 128
"""Tokens that read what was there before them by one product."""


def kernel(x: Tensor, y: Tensor, log: Tensor | None = None) -> Tensor:
    """exp(−½‖x − y‖² + log) between the rows of two [..., tokens, features]; `log` [..., tokens] goes with y.

    The exponent is one product: of rows that hold half their squares and a 1 as well.
    """
    half, own = (-0.5 * rows.square().sum(-1, keepdim=True) for rows in (x, y))
    own = own if log is None else own + log[..., None]
    return (torch.cat([x, half, torch.ones_like(half)], -1) @ torch.cat([y, torch.ones_like(own), own], -1).mT).exp()


def exponential_reference(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, state: State, *, objective: str = "squared"
) -> tuple[Tensor, State]:
    """The definition of `exponential_memory`, token by token."""
    keys, weights, values, pos = state["keys"], state["values"], state["recent"], state["position"]
    c, y = gate.shape[3], []
    for t in range(query.shape[2]):
        now = slice(t, t + 1)
        keys, values = torch.cat([keys, key[:, :, now]], 2), torch.cat([values, value[:, :, now]], 2)
        weights = torch.cat([weights, torch.zeros_like(value[:, :, now])], 2)
        written = weights
        for j in range(min(c, keys.shape[2])):
            at, v = keys.shape[2] - 1 - j, values[:, :, -1 - j]
            known = (kernel(keys[:, :, at : at + 1], keys) @ weights)[:, :, 0] if objective == "squared" else 0 * v
            real = (j <= pos)[:, None]
            change = torch.where(real, gate[:, :, t, j], 0)[..., None] * (v - known)
            place = F.one_hot(torch.tensor(at), keys.shape[2]).to(change)
            written = written + place[:, None] * change[:, :, None]
        weights, values, pos = written, values[:, :, values.shape[2] - c + 1 :], pos + 1
        y.append(kernel(query[:, :, now], keys) @ weights)
    out = torch.cat(y, 2) if y else value
    return out, {"keys": keys, "values": weights, "recent": values, "position": pos}


@tapped
def exponential_memory(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, state: State, *, objective: str = "squared"
) -> tuple[Tensor, State]:
    r"""The Omega rule on a matrix over exponential features, exact at every token.

    $W_t = W_{t-1} + \sum_{j<c} γ_{tj} (v_{t-j} - W_{t-1} φ(k_{t-j})) φ(k_{t-j})^\top$, read as $W_t φ(q_t)$; under the
    dot objective without the second term, which at c = 1 and γ = 1 is softmax attention before its division.

    Args:
        query, key: [B, H, T, K], T ≥ 0. value: [B, H, T, V].
        gate: γ [B, H, T, c] in [0, 1], entry j for the token j places back; stable while a row sums to at most 2.
        state: {"keys" [B, H, N, K], "values" [B, H, N, V], the coefficients; "recent" [B, H, c − 1, V], the window's
            values; "position" int64 [B]}. Each row's tokens lie at the end of its N places; others hold zeros.
        objective: "squared" or "dot".

    Returns: y [B, H, T, V] and the state, with N + T places. Time and memory are quadratic in what was read.
    Raises: `ShapeError`; `UnknownName` for the objective.
    Source: ATLAS (2025), arXiv:2505.23735: Dot, and under the dot objective the linear DeepTransformer.
    """
    B, H, T, K = query.shape
    expect("exponential_memory", "key", key, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect("exponential_memory", "value", value, "batch heads time features", batch=B, heads=H, time=T)
    c = state["recent"].shape[2] + 1
    expect("exponential_memory", "gate", gate, "batch heads time window", batch=B, heads=H, time=T, window=c)
    if objective not in ("squared", "dot"):
        raise unknown("objective", objective, ("squared", "dot"))
    if T == 0:
        return value, state
    dtype, wide = value.dtype, recurrent_dtype(value)
    query, key, value, gate = (x.to(wide) for x in (query, key, value, gate))
    keys, weights, recent, pos = state["keys"], state["values"], state["recent"], state["position"]
    places = torch.arange(c, device=pos.device)
    y = []
    for q, k, v, g in zip(*(x.split(max(1, PAIRS // c), 2) for x in (query, key, value, gate)), strict=True):
        n = q.shape[2]
        g = g * (places <= pos[:, None, None] + torch.arange(n, device=pos.device)[:, None])[:, None]
        past = F.pad(keys, (0, 0, max(0, c - 1 - keys.shape[2]), 0))
        near = torch.cat([past[:, :, past.shape[2] - c + 1 :], k], 2), torch.cat([recent, v], 2)
        pairs = [x.unfold(2, c, 1).flip(-1).mT.flatten(2, 3) for x in near]  # (token, place in its window)
        change = pairs[1]
        if objective == "squared":
            change = change - kernel(pairs[0], keys) @ weights
            before = torch.ones(n, n, dtype=torch.bool, device=q.device).tril(-1)
            before = before.repeat_interleave(c, 0).repeat_interleave(c, 1)
            system = kernel(pairs[0], pairs[0]) * before * g.flatten(2)[..., None, :]
            change = unit_solve(system, change)
        change = g.flatten(2)[..., None] * change
        seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril().repeat_interleave(c, 1)
        y.append(kernel(q, keys) @ weights + (kernel(q, pairs[0]) * seen) @ change)
        added = change.unflatten(2, (n, c))
        total = sum(F.pad(added[:, :, :, j], (0, 0, c - 1 - j, j)) for j in range(c))
        assert isinstance(total, Tensor)
        fill = keys.shape[2] + n
        weights = F.pad(weights, (0, 0, 0, n)) + F.pad(total, (0, 0, fill - n - c + 1, 0))[:, :, -fill:]
        keys, recent, pos = torch.cat([keys, k], 2), near[1][:, :, n:], pos + n
    return torch.cat(y, 2).to(dtype), {"keys": keys, "values": weights, "recent": recent, "position": pos}


def deep_exponential_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    retain_log: Tensor,
    start: Tensor,
    state: State,
    *,
    chunk_size: int = 16,
) -> tuple[Tensor, State]:
    """The definition of `deep_exponential`, token by token, with the decayed coefficients at hand; only its outputs."""
    keys, anchor = state["keys"], state["anchor"]
    held, W, y = state["values"] * state["logs"].exp(), state["weight"], [value[:, :, :0]]
    was = held * (-state["since"]).exp()[..., None, None]
    open_now = int(state["position"][0]) % chunk_size
    was = torch.cat([was[:, :, : was.shape[2] - open_now], 0 * was[:, :, was.shape[2] - open_now :]], 2)
    for t in range(query.shape[2]):
        now = slice(t, t + 1)
        k, v, theta, a = (
            key[:, :, now],
            value[:, :, now],
            step[:, :, now, None],
            floored(retain_log[:, :, now, None]).exp(),
        )
        h = kernel(k, keys) @ was
        slope = torch.func.grad(lambda h: (F.gelu(h) @ (start + anchor).mT * v).sum())(h)  # noqa: B023
        keys, held = torch.cat([keys, k], 2), torch.cat([a * held, theta * slope], 2)
        W = a * W + theta * v.mT @ F.gelu(h)
        y.append(F.gelu(kernel(query[:, :, now], keys) @ held) @ (start + W).mT)
        open_now = (open_now + 1) % chunk_size
        was, anchor = (F.pad(was, (0, 0, 0, 1)), anchor) if open_now else (held, W)
    return torch.cat(y, 2), {}


@tapped
def deep_exponential(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    retain_log: Tensor,
    start: Tensor,
    state: State,
    *,
    chunk_size: int = 16,
) -> tuple[Tensor, State]:
    r"""Two layers under the dot objective, the first over exponential features: $f(q) = W_2 σ(W_1 φ(q))$.

    $W_t = a_t W_{t-1} + θ_t ∇⟨f(W_ξ, k_t), v_t⟩$ in both layers, gradients taken where the token's chunk began; the
    second decays towards `start` and not to zero, where both would stay for good. The layers feed each other's growth;
    with ‖v‖ ≤ 1 it cannot outrun the decay while θ ≤ (1 − a)/2.

    Args:
        query, key: [B, H, T, K], T ≥ 0. value: [B, H, T, V].
        step, retain_log: θ and log a ≤ 0 (clamped at −60), [B, H, T].
        start: of the second layer, [H, V, F].
        state: {"keys" [B, H, N, K]; "values" [B, H, N, F], the first layer's coefficients as they were written, and
            "logs" [B, H, N, 1], their decay since; "weight" and "anchor" [B, H, V, F], what the second layer has moved
            by now and as the chunk began; "since" [B, H], the log decay since then; "position" int64 [B]}. Each row's
            tokens lie at the end of its N places; others hold zeros.
        chunk_size: tokens per anchor; part of the definition.

    Returns: y [B, H, T, V] and the state, with N + T places. Time and memory are quadratic in what was read.
    Raises: `ShapeError`.
    Source: ATLAS (2025), arXiv:2505.23735 (DeepTransformers); the decay is not in the paper.
    """
    B, H, T, K = query.shape
    expect("deep_exponential", "key", key, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect("deep_exponential", "value", value, "batch heads time features", batch=B, heads=H, time=T)
    expect("deep_exponential", "start", start, "heads values hidden", heads=H, values=value.shape[3])
    for name, gate in (("step", step), ("retain_log", retain_log)):
        expect("deep_exponential", name, gate, "batch heads time", batch=B, heads=H, time=T)
    if T == 0:
        return value, state
    wide = recurrent_dtype(value)
    start = start.to(wide)
    inputs = [x.to(wide) for x in (query, key, value, step)] + [floored(retain_log.to(wide))]

    def run(tensors: list[Tensor], state: State, phase: int) -> tuple[Tensor, State]:
        keys, held, logs, W, anchor, since = (state[n] for n in ("keys", "values", "logs", "weight", "anchor", "since"))
        y = []
        sizes = whole_sizes(tensors[0].shape[2], phase, chunk_size, SPAN)
        for q, k, v, theta, g in zip(*(x.split(sizes, 2) for x in tensors), strict=True):
            n, old = q.shape[2], keys.shape[2] - phase
            rule, G = momentum_coefficients(theta, g, None), cumulative(g, -1).to(wide)
            before, decay = shifted(rule), rule.retain[..., None]
            # what was there before the span, for all its tokens at once; then, chunk by chunk, what the span adds
            said = kernel(k, keys[:, :, :old], logs[:, :, :old, 0] - since[..., None]) @ held[:, :, :old]
            up, moved, near, alike = v @ start, v @ anchor, kernel(k, k), v @ v.mT
            x = delta = said[:, :, :0]
            for a in range(0, n, chunk_size):
                now, keep = slice(a, a + chunk_size), before.retain[:, :, a, None, None]
                write = before.write[:, :, a : a + 1, :a]
                h = keep * said[:, :, now] + (near[:, :, now, :a] * write) @ delta
                back = up[:, :, now] + keep * moved[:, :, now] + (alike[:, :, now, :a] * write) @ x
                slope = torch.special.ndtr(h) + h * (h.square() * -0.5).exp() / math.sqrt(2 * math.pi)
                x, delta = torch.cat([x, F.gelu(h)], 2), torch.cat([delta, back * slope], 2)
            z = F.gelu(decay * (kernel(q, keys, logs[..., 0]) @ held) + (kernel(q, k) * rule.write) @ delta)
            y.append(z @ start.mT + decay * (z @ W.mT) + (z @ x.mT * rule.write) @ v)
            W = decay[:, :, -1:] * W + (v * rule.write[:, :, -1, :, None]).mT @ x
            logs = torch.cat([logs + G[..., -1:, None], (G[..., -1:] - G)[..., None]], 2)
            keys, held = torch.cat([keys, k], 2), torch.cat([held, theta[..., None] * delta], 2)
            phase, since = (phase + n) % chunk_size, since + G[..., -1]
            anchor, since = (anchor, since) if phase else (W, 0 * since)
        position = state["position"] + tensors[0].shape[2]
        empty = torch.arange(logs.shape[2], device=logs.device) < (logs.shape[2] - position)[:, None]
        logs = logs.masked_fill(empty[:, None, :, None], 0.0)
        after = {"keys": keys, "values": held, "logs": logs, "weight": W, "anchor": anchor, "since": since}
        return torch.cat(y, 2), {**after, "position": position}

    y, state = by_phase(run, inputs, state, state["position"], chunk_size)
    return y.to(value.dtype), state
