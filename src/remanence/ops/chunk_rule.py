"""How the tokens of a chunk enter a fast-weight memory, where that is linear in their gradients.

Token i's gradient in a layer is an outer product δ_i x_iᵀ at weights that the chunk shares, so a momentum, a decay, a
second momentum and a window are each a product of small triangular matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.ops.decay import cumulative, lower_decay
from remanence.ops.inner_network import Weights


class Second(NamedTuple):
    """What momentum of the second order adds: S² sums S¹, and W sums S².

    `push` [B, H, C]: the earlier S² in W_t. `tail` [B, H, C]: −u_i in the last S². `keep` and `mix` [B, H]: the earlier
    S² and S¹ in the last S².
    """

    push: Tensor
    tail: Tensor
    keep: Tensor
    mix: Tensor


class Coefficients(NamedTuple):
    """How the C tokens of a chunk (or of a piece of one) enter the memory: all that tells one rule from another.

    `write` K [B, H, C, C]: −u_i in W_t. `retain` A [B, H, C] and `push` F [B, H, C]: the earlier W and S in W_t.
    `tail` [B, H, C]: −u_i in the last S. `keep` [B, H]: the earlier S in the last S. Without momentum the last
    three are None. With gates of every channel all have one more axis after H, of d channels or of 1.
    """

    write: Tensor
    retain: Tensor
    push: Tensor | None = None
    tail: Tensor | None = None
    keep: Tensor | None = None
    second: Second | None = None


def momentum_coefficients(
    step: Tensor, retain_log: Tensor, momentum_log: Tensor | None, second_log: Tensor | None = None
) -> Coefficients:
    """K = D(a) D(η) diag(θ), F = D(a) E; with no momentum K = D(a) diag(θ); with a second, one more D.

    All arguments are [B, H, C].
    """
    G = cumulative(retain_log, -1)
    decay, retain = lower_decay(G, step.dtype), G.exp().to(step.dtype)
    if momentum_log is None:
        return Coefficients(decay * step[..., None, :], retain)
    E = cumulative(momentum_log, -1)
    kept, pushes = E.exp().to(step.dtype), lower_decay(E, step.dtype) * step[..., None, :]
    tail, second = pushes[..., -1, :], None
    if second_log is not None:
        E2 = cumulative(second_log, -1)
        D2, kept2 = lower_decay(E2, step.dtype), E2.exp().to(step.dtype)
        pushes, mixed = D2 @ pushes, times(D2, kept)
        second = Second(times(decay, kept2), pushes[..., -1, :], kept2[..., -1], mixed[..., -1])
        return Coefficients(decay @ pushes, retain, times(decay, mixed), tail, kept[..., -1], second)
    return Coefficients(decay @ pushes, retain, times(decay, kept), tail, kept[..., -1])


def times(M: Tensor, x: Tensor) -> Tensor:
    return (M @ x[..., None])[..., 0]


def shifted(c: Coefficients) -> Coefficients:
    """What the weights before each token are made of: those after the one before it."""

    def down(x: Tensor | None, first: float = 0.0) -> Tensor | None:
        return None if x is None else F.pad(x[..., :-1], (1, 0), value=first)

    second = None if c.second is None else c.second._replace(push=F.pad(c.second.push[..., :-1], (1, 0)))
    retain = F.pad(c.retain[..., :-1], (1, 0), value=1.0)
    return c._replace(write=F.pad(c.write[..., :-1, :], (0, 0, 1, 0)), retain=retain, push=down(c.push), second=second)


def window_band(gamma: Tensor, pos: Tensor) -> Tensor:
    """Γ [B, H, n, n + c − 1] from γ [B, H, n, c]: row t has γ_tj in the column of the token j before it.

    Columns before the stream's start are zero.
    """
    n, c = gamma.shape[2:]
    rows = F.pad(gamma.flip(-1), (0, n)).flatten(2)[..., : n * (n + c - 1)].unflatten(2, (n, n + c - 1))
    real = pos[:, None] + torch.arange(n + c - 1, device=pos.device) >= c - 1
    return rows * real[:, None, None]


def banded(c: Coefficients, band: Tensor) -> Coefficients:
    """The rule of tokens whose gradients are sums over a window."""

    def through(row: Tensor) -> Tensor:
        return (row[..., None, :] @ band)[..., 0, :]

    tail = None if c.tail is None else through(c.tail)
    second = None if c.second is None else c.second._replace(tail=through(c.second.tail))
    return c._replace(write=c.write @ band, tail=tail, second=second)


def of_outputs(layer: int, layers: int) -> bool:
    """Whether a layer's channels are its outputs, the rows of its weights: the last's are, others' are their inputs."""
    return layer == layers - 1


def beside(gate: Tensor, outputs: bool) -> Tensor:
    """A gate [B, H], or one of every channel [B, H, d], in a shape that multiplies weights [B, H, out, in]."""
    if gate.ndim == 2:
        return gate[..., None, None]
    return gate[..., None] if outputs else gate[..., None, :]


def _outer(delta: Tensor, x: Tensor, rows: Tensor, outputs: bool) -> Tensor:
    """Σ_i rows_i δ_i x_iᵀ, scaling whichever side is narrower, or that of the channels."""
    if rows.ndim == 4:
        return (delta * rows.mT).mT @ x if outputs else delta.mT @ (x * rows.mT)
    if x.shape[-1] < delta.shape[-1]:
        return delta.mT @ (x * rows[..., None])
    return (delta * rows[..., None]).mT @ x


def after_chunk(
    inputs: Weights, deltas: Weights, weights: Weights, momentum: Weights | None, c: Coefficients
) -> tuple[Weights, Weights | None]:
    """The weights and the momentum after a chunk's last token."""
    after, pushed, pushed2 = [], [], []
    for i, (x, delta, W) in enumerate(zip(inputs, deltas, weights, strict=True)):
        outputs = of_outputs(i, len(weights))
        last = beside(c.retain[..., -1], outputs) * W - _outer(delta, x, c.write[..., -1, :], outputs)
        if momentum is not None:
            assert c.push is not None
            assert c.tail is not None
            assert c.keep is not None
            S = momentum[i]
            last = last + beside(c.push[..., -1], outputs) * S
            pushed.append(beside(c.keep, outputs) * S - _outer(delta, x, c.tail, outputs))
            if c.second is not None:
                S2, s = momentum[len(weights) + i], c.second
                last = last + beside(s.push[..., -1], outputs) * S2
                S2 = beside(s.keep, outputs) * S2 + beside(s.mix, outputs) * S
                pushed2.append(S2 - _outer(delta, x, s.tail, outputs))
        after.append(last)
    return after, (None if momentum is None else pushed + pushed2)
