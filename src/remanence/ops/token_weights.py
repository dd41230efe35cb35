"""Fast-weight rules that are not linear in the gradients: with the weights of every token, a chunk at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.ops.chunk_rule import Coefficients, after_chunk, beside, of_outputs
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
    toward: Weights | None = None,
    factors: Weights | None = None,
) -> tuple[Tensor, Weights, Weights | None]:
    """As `fast_weight_chunk`, for rules that are not linear in the gradients: with the weights of every token.

    Under a sequential retention `rule` is that of its steps: of a memory that keeps nothing.
    """
    step, retain_log, momentum_log = gates
    layers, every, pushed = len(weights), [], []
    decay = lower_decay(cumulative(retain_log if step.ndim == 3 else retain_log.mT, -1), step.dtype)
    sequential = link if isinstance(link, Sequential) else None
    for i, (x, delta, W) in enumerate(zip(inputs, deltas, weights, strict=True)):
        outputs = of_outputs(i, layers)
        u = delta[..., :, None] * x[..., None, :]
        if orthogonal:
            S = -u if band is None else -_mixed(band, u, outputs)
            if momentum is not None:
                assert momentum_log is not None
                E = cumulative(momentum_log, -1)
                S = _mixed(lower_decay(E, step.dtype), S, outputs)
                S = S + _every(E.exp().to(step.dtype), outputs) * momentum[i][:, :, None]
                pushed.append(S[:, :, -1])
            moved = _every(step if step.ndim == 3 else step.mT, outputs) * newton_schulz(S, orthogonal)
            moved = moved if sequential else _mixed(decay, moved, outputs)
        else:
            moved = -_mixed(rule.write, u, outputs)
            if momentum is not None and rule.push is not None:
                moved = moved + _every(rule.push, outputs) * momentum[i][:, :, None]
                if rule.second is not None:
                    moved = moved + _every(rule.second.push, outputs) * momentum[layers + i][:, :, None]
        if sequential is None:
            A = _every(rule.retain, outputs) * W[:, :, None] + moved
        else:
            A = _in_turn(W, retain_log.exp(), moved, step, sequential, outputs)
        every.append(A)
    if not orthogonal:
        pushed = after_chunk(inputs, deltas, weights, momentum, rule)[1] or []

    def linear(i: int, z: Tensor) -> Tensor:
        A = every[i]
        if read == "before":
            A = torch.cat([weights[i][:, :, None], A[:, :, :-1]], 2)
        A = A if toward is None else A + toward[i][:, None]
        A = A if link is None else link.link(A)
        y = (A @ z[..., None])[..., 0]
        return y if factors is None else y * factors[i]

    y = query if read == "anchor" else network(query, linear, layers, residual, gated, norm)
    return y, [A[:, :, -1] for A in every], (None if momentum is None else pushed)


def _every(gate: Tensor, outputs: bool) -> Tensor:
    """A gate of every token [B, H, C], or of every channel and token [B, H, d, C], to multiply [B, H, C, out, in]."""
    if gate.ndim == 3:
        return gate[..., None, None]
    return gate.mT[..., None] if outputs else gate.mT[..., None, :]


def _mixed(M: Tensor, u: Tensor, outputs: bool) -> Tensor:
    """Σ_i M_ti u_i: M [B, H, C, C'], or of every channel [B, H, d, C, C'], and u [B, H, C', out, in]."""
    if M.ndim == 4:
        return (M @ u.flatten(-2)).unflatten(-1, u.shape[-2:])
    u = u.movedim(2, -2) if outputs else u.permute(0, 1, 4, 2, 3)  # channels first
    return (M @ u).movedim(-2, 2) if outputs else (M @ u).permute(0, 1, 3, 4, 2)


def _in_turn(W: Tensor, retain: Tensor, moved: Tensor, step: Tensor, retention: Sequential, outputs: bool) -> Tensor:
    """The weights of every token [B, H, C, out, in], each from those before."""
    every = []
    for t in range(moved.shape[2]):
        W = retention.move(W, beside(retain[:, :, t], outputs), moved[:, :, t], beside(step[:, :, t], outputs))
        every.append(W)
    return torch.stack(every, 2)
