r"""The Omega rule on a matrix, exact at every token: a delta rule that corrects a window of tokens at once.

$$S_t = \eta_t S_{t-1} - \sum_{j<c} \theta_t \gamma_{tj} (W_{t-1} k_{t-j} - v_{t-j}) k_{t-j}^\top,\quad
  W_t = a_t W_{t-1} + S_t,\quad y_t = W_t q_t.$$

This is `fast_weight` with one layer, a window, and chunks of one token, which that op would take one at a time. Here a
triangular solve over (token, place in its window) gives the errors of many tokens at once; momentum and decay enter as
coefficients, so it is exact with both. With c = 1 and neither it is the delta rule.

Source: ATLAS, arXiv:2505.23735 (2025); the parallel form is derived here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.errors import StateError, expect
from remanence.ops import dispatch
from remanence.ops.chunk_rule import Coefficients, momentum_coefficients
from remanence.ops.decay import floored, recurrent_dtype, second_order
from remanence.ops.taps import tapped
from remanence.ops.unit_solve import unit_solve
from remanence.state import State

PAIRS = 128
"""The largest triangular system: tokens times window."""
CHUNK = 16
"""Tokens whose writes stay in the cache, where they are compiled."""


def omega_delta_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    gate: Tensor,
    state: State,
    *,
    retain_log: Tensor | None = None,
    momentum_log: Tensor | None = None,
    bound: float | None = None,
) -> tuple[Tensor, State]:
    """The definition of `omega_delta`, token by token."""
    W, S, (keys, values) = state["weight"]["0"], state.get("momentum", {}).get("0"), _window(state)
    c, y = gate.shape[3], [value[:, :, :0]]
    for t in range(query.shape[2]):
        now = slice(t, t + 1)
        keys, values = torch.cat([keys, key[:, :, now]], 2), torch.cat([values, value[:, :, now]], 2)
        a = 1.0 if retain_log is None else floored(retain_log[:, :, now, None]).exp()
        eta = torch.zeros_like(step[:, :, now, None])
        eta = eta if momentum_log is None else floored(momentum_log[:, :, now, None]).exp()
        change = eta * (0 if S is None else S)
        for j in range(c):
            k, v = keys[:, :, c - 1 - j, None], values[:, :, c - 1 - j, None]
            much = (step[:, :, t] * gate[:, :, t, j])[..., None, None]
            if bound is not None:
                much = torch.minimum(much, (1 - eta) * bound / c / (k.square().sum(-1, keepdim=True) + 1e-12))
            change = change - much * (k @ W.mT - v).mT @ k
        S = change if S is not None else None
        W = a * W + change
        keys, values = keys[:, :, 1:], values[:, :, 1:]
        y.append(query[:, :, now] @ W.mT)
    return torch.cat(y, 2), _after(state, W, S, keys, values, query.shape[2])


@tapped
def omega_delta(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    gate: Tensor,
    state: State,
    *,
    retain_log: Tensor | None = None,
    momentum_log: Tensor | None = None,
    bound: float | None = None,
) -> tuple[Tensor, State]:
    """A matrix that corrects its answers to a window of tokens at every token; equal to `omega_delta_reference`.

    Args:
        query, key: [B, H, T, K], T ≥ 0. value: [B, H, T, V].
        step: θ [B, H, T].
        gate: γ [B, H, T, c]: entry j is the weight of the token j places back.
        state: from `fast_weight_state` with one matrix [H, V, K] and `window=c`, or as an earlier call (also of
            `fast_weight`, with chunks of one token) returned it.
        retain_log: log a [B, H, T] ≤ 0, clamped at −60; None forgets nothing.
        momentum_log: log η [B, H, T] ≤ 0, clamped at −60; None is plain gradient descent.
        bound: keep every θγ at or below (1 − η) · bound / (c ‖k‖²), k the key that it writes; up to 2, equal tokens
            cannot diverge. None: as given.

    Returns: what each query reads after its own token was written [B, H, T, V], and the state, of constant size.
    Raises: `ShapeError` or `StateError` when the tensors and the state do not fit together.
    """
    W, S, (keys, values) = state["weight"]["0"], state.get("momentum", {}).get("0"), _window(state)
    _check(query, key, value, {"step": step, "retain_log": retain_log, "momentum_log": momentum_log}, gate, W)
    if (S is not None) != (momentum_log is not None):
        has = "has no" if S is None else "has"
        raise StateError(f"omega_delta: the state {has} momentum; fast_weight_state(momentum=...) must match the call.")
    if gate.shape[3] != keys.shape[2] + 1:
        raise StateError(f"omega_delta: the state is for a window of {keys.shape[2] + 1}, the gate of {gate.shape[3]}.")
    if query.shape[2] == 0:
        return value, state
    wide, c = recurrent_dtype(query), gate.shape[3]
    decay = torch.zeros_like(step) if retain_log is None else floored(retain_log)
    tensors = [x.to(wide) for x in (query, key, value, step, gate, decay)]
    tensors += [] if momentum_log is None else [floored(momentum_log.to(wide))]
    q, k, v, theta, gamma, a_log, *rest = tensors
    k, v, T = torch.cat([keys, k], 2), torch.cat([values, v], 2), q.shape[2]
    pair, eta_log = theta[..., None] * gamma, rest[0] if rest else None
    if bound is not None:
        left = 1.0 if eta_log is None else -torch.expm1(eta_log)[..., None]
        squares = k.square().sum(-1).unfold(2, c, 1).flip(-1)
        pair = torch.minimum(pair, left * (bound / c) / (squares + 1e-12))
    if T == 1:
        y, W, S = _token(q, k, v, pair, a_log, eta_log, W, S)
    elif S is None and dispatch.compiled(k):
        y, W = _Compiled.apply(q, k, v, pair, a_log, W)
    else:
        y, W, S = _by_chunks(q, k, v, pair, a_log, eta_log, W, S)
    return y.to(query.dtype), _after(state, W, S, k[:, :, T:], v[:, :, T:], T)


def _by_chunks(
    q: Tensor, k: Tensor, v: Tensor, pair: Tensor, a_log: Tensor, eta_log: Tensor | None, W: Tensor, S: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In tensor operations, on any device; k and v have the c − 1 tokens before the first as well."""
    c, size, y = pair.shape[3], max(1, PAIRS // pair.shape[3]), []
    for t in range(0, q.shape[2], size):
        now, window = slice(t, t + size), slice(t, t + size + c - 1)
        n = q[:, :, now].shape[2]
        places = torch.arange(c - 1, n + c - 1, device=k.device)[:, None] - torch.arange(c, device=k.device)
        places = places.flatten()  # (token, place in its window) -> row of k
        one, eta = torch.ones_like(a_log[:, :, now]), None if eta_log is None else eta_log[:, :, now]
        rule, near = momentum_coefficients(one, a_log[:, :, now], eta), k[:, :, window]
        errors, rule = _solved(near, v[:, :, window], places, pair[:, :, now], rule, W, S)
        scores = (q[:, :, now] @ near.mT).index_select(3, places) * rule.write
        read = rule.retain[..., None] * (q[:, :, now] @ W.mT) - scores @ errors
        if S is not None:
            assert rule.push is not None
            read = read + rule.push[..., None] * (q[:, :, now] @ S.mT)
        y.append(read)
        W, S = _written(near, places, errors, rule, W, S)
    return torch.cat(y, 2), W, S


class _Compiled(torch.autograd.Function):
    """A head at a time, its chunks in the cache; keeps the weights as each chunk began."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pair: Tensor, a_log: Tensor, W: Tensor
    ) -> tuple[Tensor, Tensor]:
        B, H, T = q.shape[:3]
        start = W.flatten(0, 1)
        y, end = q.new_empty(B * H, T, v.shape[3]), torch.empty_like(start, memory_format=torch.contiguous_format)
        befores = q.new_empty(B * H, -(-T // CHUNK), *start.shape[1:])
        _run("forward", *(x.flatten(0, 1) for x in (q, k, v, pair, a_log.exp())), start, y, befores, end)
        ctx.save_for_backward(q, k, v, pair, a_log, W, befores)
        return y.unflatten(0, (B, H)), end.unflatten(0, (B, H))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, befores = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted

            def plain(q: Tensor, k: Tensor, v: Tensor, pair: Tensor, a_log: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
                return _by_chunks(q, k, v, pair, a_log, None, W, None)[:2]

            return second_order(ctx.needs_input_grad, plain, inputs, grads)
        decay = inputs[4].exp()
        given = [x.flatten(0, 1) for x in (*inputs[:4], decay)]
        d_y, d_W = (x.flatten(0, 1) for x in grads)
        # zeros, since the windows of chunks share tokens
        found = [*(x.new_zeros(x.shape) for x in given), d_W.clone(memory_format=torch.contiguous_format)]
        _run("backward", *given, befores, d_y, *found)
        *others, d_a, d_W = (x.unflatten(0, decay.shape[:2]) for x in found)
        return *others, d_a * decay, d_W


def _run(name: str, *tensors: Tensor) -> None:
    """A kernel over the heads, which know nothing of each other."""
    from remanence.ops import omega_kernels  # here, because Numba takes half a second that most need not pay
    from remanence.ops.compiled import spread_products

    arrays = [x.detach().contiguous().numpy() for x in tensors]
    spread_products(getattr(omega_kernels, name), len(arrays[0]), tensors[1].numel(), CHUNK, *arrays)


def _token(
    q: Tensor, k: Tensor, v: Tensor, pair: Tensor, a_log: Tensor, eta_log: Tensor | None, W: Tensor, S: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One token, whose errors nothing but W tells."""
    change = ((v - k @ W.mT) * pair.flip(-1).mT).mT @ k
    if S is not None:
        assert eta_log is not None
        S = change = torch.addcmul(change, eta_log.exp()[..., None], S)
    W = torch.addcmul(change, a_log.exp()[..., None], W)
    return q @ W.mT, W, S


def _solved(
    k: Tensor, v: Tensor, places: Tensor, pair: Tensor, rule: Coefficients, W: Tensor, S: Tensor | None
) -> tuple[Tensor, Coefficients]:
    """The errors W_{t−1} k_{t−j} − v_{t−j} of all pairs, and the rule that writes them.

    W_{t−1} is linear in the errors of earlier tokens, and none of token t's errors depends on another.
    """
    c = pair.shape[-1]
    spread = pair.flatten(-2)[..., None, :]

    def before(x: Tensor, first: float = 0.0) -> Tensor:
        """The coefficients of one token earlier, for every pair: [B, H, n, ...] to [B, H, n·c, ...]."""
        return F.pad(x[..., :-1, :], (0, 0, 1, 0), value=first).repeat_interleave(c, -2)

    known = before(rule.retain[..., None], 1.0) * (k @ W.mT).index_select(2, places) - v.index_select(2, places)
    if S is not None:
        assert rule.push is not None
        known = known + before(rule.push[..., None]) * (k @ S.mT).index_select(2, places)
    alike = (k @ k.mT).index_select(2, places).index_select(3, places)
    system = before(rule.write).repeat_interleave(c, -1) * spread * alike
    errors = unit_solve(system, known)
    tail = None if rule.tail is None else rule.tail.repeat_interleave(c, -1) * spread[..., 0, :]
    return errors, rule._replace(write=rule.write.repeat_interleave(c, -1) * spread, tail=tail)


def _written(
    k: Tensor, places: Tensor, errors: Tensor, rule: Coefficients, W: Tensor, S: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The last W and S. Errors of one key at several places are added up before they meet it."""

    def outer(coefficients: Tensor) -> Tensor:
        empty = errors.new_zeros(*k.shape[:3], errors.shape[3])
        return empty.index_add(2, places, coefficients[..., None] * errors).mT @ k

    last = rule.retain[..., -1, None, None] * W - outer(rule.write[..., -1, :])
    if S is None:
        return last, None
    assert rule.push is not None
    assert rule.tail is not None
    assert rule.keep is not None
    return last + rule.push[..., -1, None, None] * S, rule.keep[..., None, None] * S - outer(rule.tail)


def _window(state: State) -> tuple[Tensor, Tensor]:
    """The keys and values of the tokens before, which a state for a window of one does not have."""
    W = state["weight"]["0"]
    none = {"key": W.new_zeros(*W.shape[:2], 0, W.shape[3]), "value": W.new_zeros(*W.shape[:2], 0, W.shape[2])}
    kept = state.get("window", none)
    return kept["key"], kept["value"]


def _after(state: State, W: Tensor, S: Tensor | None, keys: Tensor, values: Tensor, tokens: int) -> State:
    after: State = {"anchor": {"0": W}, "weight": {"0": W}}
    after |= {} if S is None else {"momentum": {"0": S}}
    after |= {"window": {"key": keys, "value": values}} if "window" in state else {}
    return {**after, "pos": state["pos"] + tokens}


def _check(
    query: Tensor, key: Tensor, value: Tensor, gates: dict[str, Tensor | None], window: Tensor, W: Tensor
) -> None:
    expect("omega_delta", "query", query, "batch heads time features", features=W.shape[3])
    B, H, T, K = query.shape
    expect("omega_delta", "key", key, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect("omega_delta", "value", value, "batch heads time features", batch=B, heads=H, time=T, features=W.shape[2])
    expect("omega_delta", "gate", window, "batch heads time window", batch=B, heads=H, time=T)
    for name, gate in gates.items():
        if gate is not None:
            expect("omega_delta", name, gate, "batch heads time", batch=B, heads=H, time=T)
