r"""Test-time training: a normalised network that learns by mini-batch gradient descent while it is read.

The memory is $f(W, x) = x + \mathrm{LN}(g(W, x))$, with g a matrix, or more layers with GELU (in its tanh form) between
them, each with a bias, and LN with learned weights of its own. Per row and head, with $W_ξ$ the weights as the token's
chunk began and t counted in the chunk:

$$u_i = ∇_W \tfrac12 ‖\mathrm{LN}(g(W_ξ, k_i)) - (v_i - k_i)‖^2,\quad W_t = W_ξ - c_t \sum_{i ≤ t} θ_i u_i,\quad
  y_t = f(W_t, q_t).$$

The factor $c_t$, about 1/(t+1), averages anew at every token: so $W_t$ is not $W_{t-1}$ and a step, and the open chunk
keeps the sum without it. Chunks are counted from the stream's first token, so any cut gives the same result.

Source: Sun et al., Learning to (Learn at Test Time), arXiv:2407.04620 (2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from remanence.errors import ShapeError, expect
from remanence.ops.decay import recurrent_dtype
from remanence.ops.dispatch import compiled
from remanence.ops.phases import by_phase, cuts, joined, piece_sizes, whole_sizes
from remanence.ops.taps import tapped
from remanence.ops.whole_chunks import Form, unpacked, whole_chunks
from remanence.state import State

EPS = 1e-6
"""Of the layer norm, as its authors' code has it."""


def ttt_state(weights: Sequence[Tensor], batch: int) -> State:
    """The state before the first token: `batch` rows that all start from the same weights.

    Shapes: weights by layer [H, out, in + 1], the bias in the last column; `anchor` and `sum` hold a tensor
        [B, H, out, in + 1] per layer under "0", "1", ...: the weights as the open chunk began, and the steps taken in
        it, before averaging; `pos` int64 [B].
    """
    rows = {str(i): W.to(recurrent_dtype(W)).expand(batch, *W.shape) for i, W in enumerate(weights)}
    pos = torch.zeros(batch, dtype=torch.int64, device=weights[0].device)
    return {"anchor": rows, "sum": {i: torch.zeros_like(W) for i, W in rows.items()}, "pos": pos}


def ttt_weights(state: State, average: Tensor) -> list[Tensor]:
    """W_t, the weights after the last token read, by layer [B, H, out, in + 1]; `average` is c, [chunk]."""
    last = average.to(next(iter(state["sum"].values())))[(state["pos"] - 1) % len(average)][:, None, None, None]
    return [W - last * total for W, total in zip(state["anchor"].values(), state["sum"].values(), strict=True)]


def ttt_read(query: Tensor, weights: Sequence[Tensor], scale: Tensor, shift: Tensor) -> Tensor:
    """f(W, q) with the same weights for every query. query [B, H, T, K]; scale and shift, of the norm, [H, K]."""
    z = query
    for depth, W in enumerate(weights):
        z = F.pad(F.gelu(z, approximate="tanh") if depth else z, (0, 1), value=1.0) @ W.mT
    return query + _norm(z, scale, shift)


def turned(x: Tensor, turn: Tensor | None, pos: Tensor | int) -> Tensor:
    """x [B, H, T, K] turned by its tokens' places in the chunk, where the first of a row stands at `pos` [B]."""
    if turn is None:
        return x
    tokens = torch.arange(x.shape[2], device=x.device)
    place = (torch.as_tensor(pos, device=x.device).reshape(-1, 1) + tokens) % len(turn)
    cos, sin = turn.to(x)[place][:, None].unbind(3)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def _norm(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(z, z.shape[-1:], eps=EPS) * scale[:, None] + shift[:, None]


def ttt_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    average: Tensor,
    scale: Tensor,
    shift: Tensor,
    state: State,
    *,
    turn: Tensor | None = None,
) -> tuple[Tensor, State]:
    """The definition of `ttt`, token by token, its inner gradients taken by automatic differentiation."""
    anchor, total, pos = state["anchor"], state["sum"], state["pos"]
    query, key = turned(query, turn, pos), turned(key, turn, pos)

    def loss(weights: dict[str, Tensor], k: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (ttt_read(k, list(weights.values()), scale, shift) - v).square().sum()

    y = [value[:, :, :0]]
    for t in range(query.shape[2]):
        now = slice(t, t + 1)
        u = torch.func.grad(loss)(anchor, key[:, :, now], value[:, :, now])
        total = {i: total[i] + step[:, :, now, None] * u[i] for i in u}
        c = average[pos % len(average)][:, None, None, None]
        W = {i: anchor[i] - c * total[i] for i in u}
        y.append(ttt_read(query[:, :, now], list(W.values()), scale, shift))
        pos = pos + 1
        closed = (pos % len(average) == 0)[:, None, None, None]
        anchor = {i: torch.where(closed, W[i], anchor[i]) for i in W}
        total = {i: torch.where(closed, 0, total[i]) for i in W}
    return torch.cat(y, 2), {"anchor": anchor, "sum": total, "pos": pos}


@tapped
def ttt(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    average: Tensor,
    scale: Tensor,
    shift: Tensor,
    state: State,
    *,
    turn: Tensor | None = None,
    checkpoint: int = 0,
) -> tuple[Tensor, State]:
    """A normalised network memory over a sequence, a chunk at a time; equal to `ttt_reference`.

    Within a chunk the gradients share their anchor and are outer products, so W_t z needs no weights per token.

    Args:
        query, key, value: [B, H, T, K], T ≥ 0.
        step: θ ≥ 0, [B, H, T].
        average: c, [chunk]: as many tokens share an anchor.
        scale, shift: of the norm, [H, K].
        state: from `ttt_state`, or as an earlier call returned it. Rows may stand at different positions.
        turn: cosines and sines [chunk, 2, K/2] by which pairs of features (j, j + K/2) of queries and keys are turned
            before all else, by the token's place in its chunk; None turns nothing.
        checkpoint: chunks whose intermediate results are made again for the gradient, instead of being kept; 0 keeps
            all, which is faster and takes more memory.

    Returns: what each query reads after its own token [B, H, T, K], and the state, of constant size.
    Raises: `ShapeError`.
    """
    _check(query, key, value, step, average, scale, shift, state, turn)
    if not query.shape[2]:
        return value, state
    wide = recurrent_dtype(query)
    average, scale, shift = (x.to(wide) for x in (average, scale, shift))
    names, chunk, depth = list(state["anchor"]), len(average), len(state["anchor"])
    fused = compiled(query)

    def span(phase: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Some tokens from a phase of a chunk on: what they read, and the anchor and sums after them."""
        sequence, W, S = tensors[:4], list(tensors[4 : 4 + depth]), list(tensors[4 + depth :])
        y = []
        T = sequence[0].shape[2]
        sizes = whole_sizes(T, phase, chunk, T) if fused else piece_sizes(T, phase, chunk)
        for q, k, v, theta in zip(*(cuts(x, sizes, 2) for x in sequence), strict=True):
            if fused and not phase and q.shape[2] >= chunk:
                out, W = _whole(q, k, v, theta, average, scale, shift, turn, W)
                y.append(out)
                continue
            q, k = turned(q, turn, phase), turned(k, turn, phase)
            c = average[phase : phase + q.shape[2], None]
            z, inputs, deltas = _piece(q, k, v - k, theta, c, scale, shift, W, S if phase else None)
            y.append(q + _norm(z, scale, shift))
            after = (phase + q.shape[2]) % chunk
            if phase:
                S = [_plus(total, d, x) for total, d, x in zip(S, deltas, inputs, strict=True)]
            if phase and not after:
                W = [anchor - c[-1] * total for anchor, total in zip(W, S, strict=True)]
            elif not after:  # a whole chunk: its sum of steps is never made
                W = [_plus(anchor, -c[-1] * d, x) for anchor, d, x in zip(W, deltas, inputs, strict=True)]
            elif not phase:
                S = [d.mT @ x for d, x in zip(deltas, inputs, strict=True)]
            phase = after
        return joined(y, 2), *W, *(S if phase else [torch.zeros_like(total) for total in S])

    def run(tensors: list[Tensor], state: State, phase: int) -> tuple[Tensor, State]:
        held = [*state["anchor"].values(), *state["sum"].values()]
        T, y = tensors[0].shape[2], []
        most = checkpoint * chunk if checkpoint and torch.is_grad_enabled() else T + phase
        for piece in zip(*(cuts(x, piece_sizes(T, phase, most), 2) for x in tensors), strict=True):
            if most < T + phase:
                out, *held = torch.utils.checkpoint.checkpoint(span, phase, *piece, *held, use_reentrant=False)
            else:
                out, *held = span(phase, *piece, *held)
            y.append(out)
            phase = (phase + out.shape[2]) % chunk
        named = [dict(zip(names, x, strict=True)) for x in (held[:depth], held[depth:])]
        return joined(y, 2), {"anchor": named[0], "sum": named[1], "pos": state["pos"] + T}

    y, after = by_phase(run, [x.to(wide) for x in (query, key, value, step)], state, state["pos"], chunk)
    return y.to(query.dtype), after


def _whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    step: Tensor,
    average: Tensor,
    scale: Tensor,
    shift: Tensor,
    turn: Tensor | None,
    anchor: list[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Whole chunks: what they read, and the anchor after them."""
    factors = average.repeat(q.shape[2] // len(average)).expand(*q.shape[:3])

    def plain(q: Tensor, k: Tensor, v: Tensor, step: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        _, _, factors, _, norm, start = rest
        assert factors is not None
        assert norm is not None
        assert start is not None
        W, y = unpacked(start, anchor, False)[0], []
        q, k = turned(q, turn, 0), turned(k, turn, 0)
        scale, shift = norm[0, :, 0], norm[0, :, 1]
        for first in range(0, q.shape[2], len(average)):
            now = slice(first, first + len(average))
            c = factors[:, :, now, None]
            target = v[:, :, now] - k[:, :, now]
            z, inputs, deltas = _piece(q[:, :, now], k[:, :, now], target, step[:, :, now], c, scale, shift, W, None)
            y.append(q[:, :, now] + _norm(z, scale, shift))
            W = [_plus(w, -c[:, :, -1:] * d, x) for w, d, x in zip(W, deltas, inputs, strict=True)]
        return torch.cat(y, 2), torch.cat([w.flatten(2) for w in W], 2)

    form = Form(len(average), averages=True, bias=True, tanh=True, residual=True, turn=turn)
    norm = torch.stack([scale, shift])
    return whole_chunks(q, k, v, step, None, None, factors, None, norm, anchor, None, form, plain)[:2]


def _piece(
    q: Tensor,
    k: Tensor,
    target: Tensor,
    step: Tensor,
    average: Tensor,
    scale: Tensor,
    shift: Tensor,
    anchor: list[Tensor],
    total: list[Tensor] | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Tokens of one chunk: g(W_t, q_t), and by layer the inputs x and the steps' δ: a token's step is δ xᵀ.

    `target` is v − k.
    """
    inputs, hidden = [F.pad(k, (0, 1), value=1.0)], []
    for W in anchor[:-1]:
        h = inputs[-1] @ W.mT
        inputs.append(F.pad(F.gelu(h, approximate="tanh"), (0, 1), value=1.0))
        hidden.append(h)
    h = inputs[-1] @ anchor[-1].mT
    centred = h - h.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
    unit = centred * inverse
    e = (unit * scale[:, None] + shift[:, None] - target) * scale[:, None]
    e = e - e.mean(-1, keepdim=True) - unit * (e * unit).mean(-1, keepdim=True)
    deltas = [e * (inverse * step[..., None])]
    for W, h in zip(reversed(anchor[1:]), reversed(hidden), strict=True):
        deltas.append(_GeluGradient.apply(deltas[-1] @ W[..., :-1], h))
    deltas.reverse()
    z = q
    for depth, (x, delta, W) in enumerate(zip(inputs, deltas, anchor, strict=True)):
        z = F.pad(F.gelu(z, approximate="tanh") if depth else z, (0, 1), value=1.0)
        moved = (z @ x.mT).tril() @ delta
        if total is not None:
            moved = moved + z @ total[depth].mT
        z = z @ W.mT - average * moved
    return z, inputs, deltas


def _plus(W: Tensor, delta: Tensor, x: Tensor) -> Tensor:
    """W + Σ δ xᵀ, in one pass over W."""
    return torch.baddbmm(*(t.flatten(0, 1) for t in (W, delta.mT, x))).view_as(W)


class _GeluGradient(torch.autograd.Function):
    """δ ⊙ GELU′(h), of the tanh form, in one pass; and its own gradient, which autograd would not find."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, h: Tensor) -> Tensor:
        ctx.save_for_backward(delta, h)
        return torch.ops.aten.gelu_backward(delta, h, approximate="tanh")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        delta, h = ctx.saved_tensors
        # with u = √(2/π) (h + 0.044715 h³): GELU″ = (1 − tanh²u) (u′ + h (u″/2 − u′² tanh u))
        a, square = math.sqrt(2 / math.pi), h.square()
        t = (h * square.mul(0.044715 * a).add_(a)).tanh_()
        rise = square.mul(3 * 0.044715 * a).add_(a)
        bend = square.mul_(3 * 0.044715 * a).addcmul_(rise.square() * h, t, value=-1).add_(rise)
        bend.mul_(t.square_().neg_().add_(1)).mul_(grad).mul_(delta)
        return torch.ops.aten.gelu_backward(grad, h, approximate="tanh"), bend


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    average: Tensor,
    scale: Tensor,
    shift: Tensor,
    state: State,
    turn: Tensor | None,
) -> None:
    expect("ttt", "query", query, "batch heads time features")
    B, H, T, K = query.shape
    for name, x in {"key": key, "value": value}.items():
        expect("ttt", name, x, "batch heads time features", batch=B, heads=H, time=T, features=K)
    expect("ttt", "step", step, "batch heads time", batch=B, heads=H, time=T)
    expect("ttt", "average", average, "chunk")
    if turn is not None:
        expect("ttt", "turn", turn, "chunk 2 pairs", chunk=len(average), pairs=K // 2)
    for name, x in {"scale": scale, "shift": shift}.items():
        expect("ttt", name, x, "heads features", heads=H, features=K)
    width = K
    for i, W in enumerate(state["anchor"].values()):
        known: dict[str, Any] = {"batch": B, "heads": H, "in": width + 1}
        expect("ttt", f"state anchor {i}", W, "batch heads out in", **known)
        width = W.shape[2]
    if width != K:
        raise ShapeError(f"ttt: the last layer must give {K} features, as the keys have, got {width}.")
