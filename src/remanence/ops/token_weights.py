"""Fast-weight rules that are not linear in the gradients: with the weights of every token, a chunk at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.ops.chunk_rule import Coefficients, after_chunk
from remanence.ops.decay import cumulative, lower_decay
from remanence.ops.inner_network import Affine, Weights, network
from remanence.ops.newton_schulz import newton_schulz
from remanence.ops.retention import Retention, Sequential


def token_weights(
    query: Tensor,
    inputs: Weights,
    deltas: Weights,
    weights: Weights,
    momentum: Weights | None,
    gates: tuple[Tensor, Tensor, Tensor | None],
    band: Tensor | None,
    rule: Coefficients,
    orthogonal: int,
    link: Retention | None,
    read: str,
    residual: bool,
    gated: bool,
    norm: Affine | None,
) -> tuple[Tensor, Weights, Weights | None]:
    """As `fast_weight_chunk`, for rules that are not linear in the gradients: with the weights of every token.

    Under a sequential retention `rule` is that of its steps: of a memory that keeps nothing.
    """
    step, retain_log, momentum_log = gates
    layers, every, pushed = len(weights), [], []
    decay = lower_decay(cumulative(retain_log, -1), step.dtype)
    sequential = link if isinstance(link, Sequential) else None
    for i, (x, delta, W) in enumerate(zip(inputs, deltas, weights, strict=True)):
        u = (delta[..., :, None] * x[..., None, :]).flatten(-2)
        if orthogonal:
            S = -u if band is None else -(band @ u)
            if momentum is not None:
                assert momentum_log is not None
                E = cumulative(momentum_log, -1)
                S = lower_decay(E, step.dtype) @ S
                S = S + E.exp().to(step.dtype)[..., None] * momentum[i].flatten(-2)[..., None, :]
                pushed.append(S[..., -1, :].unflatten(-1, W.shape[-2:]))
            O = newton_schulz(S.unflatten(-1, W.shape[-2:]), orthogonal).flatten(-2)
            moved = step[..., None] * O
            moved = moved if sequential else decay @ moved
        else:
            moved = -(rule.write @ u)
            if momentum is not None and rule.push is not None:
                moved = moved + rule.push[..., None] * momentum[i].flatten(-2)[..., None, :]
                if rule.second is not None:
                    moved = moved + rule.second.push[..., None] * momentum[layers + i].flatten(-2)[..., None, :]
        if sequential is None:
            A = (rule.retain[..., None] * W.flatten(-2)[..., None, :] + moved).unflatten(-1, W.shape[-2:])
        else:
            A = _in_turn(W, retain_log.exp(), moved.unflatten(-1, W.shape[-2:]), step, sequential)
        every.append(A)
    if not orthogonal:
        pushed = after_chunk(inputs, deltas, weights, momentum, rule)[1] or []

    def linear(i: int, z: Tensor) -> Tensor:
        A = every[i]
        if read == "before":
            A = torch.cat([weights[i][:, :, None], A[:, :, :-1]], 2)
        A = A if link is None else link.link(A)
        return (A @ z[..., None])[..., 0]

    y = query if read == "anchor" else network(query, linear, layers, residual, gated, norm)
    return y, [A[:, :, -1] for A in every], (None if momentum is None else pushed)


def _in_turn(W: Tensor, retain: Tensor, moved: Tensor, step: Tensor, retention: Sequential) -> Tensor:
    """The weights of every token [B, H, C, out, in], each from those before."""
    every = []
    for t in range(moved.shape[2]):
        W = retention.move(W, retain[:, :, t, None, None], moved[:, :, t], step[:, :, t, None, None])
        every.append(W)
    return torch.stack(every, 2)
