r"""Networks under delta gradient descent: what a key held is taken out before its gradient is written.

A token steps down the gradient of its error, taken at the *anchor* $W_ξ$; the layer that receives the key also
unlearns what it says to it. Per row and head, with the network $f(W, x) = [x +]\; W_L σ(\cdots σ(W_1 x))$, σ = GELU:

$$y_t = f(W_{t-1}, q_t),\quad W_{1,t} = W_{1,t-1}(a_t I - θ_t k_t k_t^\top) - θ_t ∇_1 ℓ(W_ξ; k_t, v_t),\quad
  W_{l,t} = a_t W_{l,t-1} - θ_t ∇_l ℓ(W_ξ; k_t, v_t).$$

Gradients of one anchor are outer products $δ x^\top$, so the first layer is a gated delta rule whose value is $-δ$, and
the others are linear attentions with decay: within a piece all of them are a few products of matrices.

Source: Nested Learning (2025), arXiv:2512.24695, on self-modifying Titans; the form as delta rule is derived here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.errors import expect
from remanence.ops.chunk_rule import momentum_coefficients, shifted
from remanence.ops.decay import floored
from remanence.ops.inner_network import Weights, fast_weight_read, inner_gradient
from remanence.ops.unit_solve import unit_solve

PIECE = 64
"""Tokens whose effect on each other is held as one matrix."""


def delta_network_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    retain_log: Tensor,
    anchor: Weights,
    weights: Weights,
    *,
    residual: bool = False,
    dot: bool = False,
) -> tuple[Tensor, Weights]:
    """The definition of `delta_network`, token by token, its inner gradients taken by automatic differentiation."""

    def loss(given: Weights, k: Tensor, v: Tensor) -> Tensor:
        said = fast_weight_read(k, given, residual=residual)
        return -(said * v).sum() if dot else 0.5 * (said - v).square().sum()

    y = [value[:, :, :0]]
    for t in range(key.shape[2]):
        k, v, theta = key[:, :, t : t + 1], value[:, :, t : t + 1], step[:, :, t, None, None]
        y.append(fast_weight_read(query[:, :, t : t + 1], weights, residual=residual))
        gradient = torch.func.grad(loss)(anchor, k, v)
        unlearned = weights[0] @ k.mT @ k
        decayed = [floored(retain_log[:, :, t]).exp()[..., None, None] * W for W in weights]
        decayed[0] = decayed[0] - theta * unlearned
        weights = [W - theta * u for W, u in zip(decayed, gradient, strict=True)]
    return torch.cat(y, 2), weights


def delta_network(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    retain_log: Tensor,
    anchor: Weights,
    weights: Weights,
    *,
    residual: bool = False,
    dot: bool = False,
    bound: float | None = None,
) -> tuple[Tensor | None, Weights]:
    """Tokens that share an anchor, all at once; equal to `delta_network_reference`.

    Args:
        query: [B, H, T, K], T ≥ 0; each reads what was there before its own token. None reads nothing.
        key, value: [B, H, T, K] and [B, H, T, V]; V = K with `residual`. No inner gradient flows into values.
        step, retain_log: θ and log a ≤ 0 (clamped at −60), [B, H, T]; θ‖k‖² ≤ 1 + a is stable.
        anchor, weights: by layer [B, H, out, in]: where gradients are taken, and the present weights.
        residual: add the query to what is read (and the key to what is predicted).
        dot: the inner loss is −⟨f(k), v⟩ instead of ½‖f(k) − v‖².
        bound: with the squared loss, keep every step at or below bound · ‖e‖² / ‖u‖² (Polyak's step, which would mend
            the error e at once, times `bound`); so many equal tokens as 1/bound go no further.

    Returns: y [B, H, T, V], or None; and the weights after the last token.
    Raises: `ShapeError`.
    """
    expect("delta_network", "key", key, "batch heads time features", features=weights[0].shape[-1])
    B, H, T, _ = key.shape
    expect("delta_network", "value", value, "batch heads time features", batch=B, heads=H, time=T)
    for name, gate in {"step": step, "retain_log": retain_log}.items():
        expect("delta_network", name, gate, "batch heads time", batch=B, heads=H, time=T)
    if not T:
        return (None if query is None else value), weights
    if dot:  # −v is the error of this value
        value = value + fast_weight_read(key, anchor, residual=residual)
    y, read = [], query is not None
    for t in range(0, T, PIECE):
        now = slice(t, t + PIECE)
        q, k, v = (None if x is None else x[:, :, now] for x in (query, key, value))
        assert k is not None
        assert v is not None
        inputs, deltas = inner_gradient(k, v, anchor, residual)
        theta, a_log = step[:, :, now], floored(retain_log[:, :, now])
        if bound is not None and not dot:
            squares = [_square(x) * _square(d) for x, d in zip(inputs, deltas, strict=True)]
            theta = torch.minimum(theta, bound * _square(deltas[-1]) / (torch.stack(squares).sum(0) + 1e-12))
        z, weights = _learned(q, inputs, deltas, theta, a_log, weights)
        if q is not None and z is not None:
            y.append(q + z if residual else z)
    return torch.cat(y, 2) if read else None, weights


def _learned(
    z: Tensor | None, inputs: Weights, deltas: Weights, step: Tensor, retain_log: Tensor, weights: Weights
) -> tuple[Tensor | None, Weights]:
    """What z reads of each token's weights, before it is written, and the weights after the last token.

    Every layer gains θ f xᵀ and decays: f is −δ, and in the first layer also what its weights said to the key, which is
    linear in the f of earlier tokens.
    """
    rule = momentum_coefficients(step, retain_log, None)
    before, after = shifted(rule), []
    keep, last = before.retain[..., None], rule.write[..., -1, :, None]
    for depth, (x, delta, W) in enumerate(zip(inputs, deltas, weights, strict=True)):
        f = -delta if depth else unit_solve(before.write * (x @ x.mT), -delta - keep * (x @ W.mT))
        after.append(rule.retain[..., -1, None, None] * W + (last * f).mT @ x)
        if z is not None:
            z = F.gelu(z) if depth else z
            z = keep * (z @ W.mT) + (before.write * (z @ x.mT)) @ f
    return z, after


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).square()
