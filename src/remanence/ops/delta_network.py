r"""Networks under delta gradient descent: what a key held is taken out before its gradient is written.

A token steps down the gradient of its error, taken at the *anchor* $W_ξ$; the layer that receives the key also
unlearns what it says to it. Per row and head, with the network $f(W, x) = [x +]\; W_L σ(\cdots σ(W_1 x))$, σ = GELU:

$$y_t = f(W_{t-1}, q_t),\quad W_{1,t} = W_{1,t-1}(a_t I - θ_t k_t k_t^\top) - θ_t ∇_1 ℓ(W_ξ; k_t, v_t),\quad
  W_{l,t} = a_t W_{l,t-1} - θ_t ∇_l ℓ(W_ξ; k_t, v_t).$$

Gradients of one anchor are outer products $δ x^\top$, so the first layer is a gated delta rule whose value is $-δ$, and
the others are linear attentions with decay.

Source: Nested Learning (2025), arXiv:2512.24695, on self-modifying Titans; the form as delta rule is derived here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.errors import expect
from remanence.ops.decay import floored
from remanence.ops.delta import gated_delta_rule
from remanence.ops.inner_network import Weights, fast_weight_read, inner_gradient
from remanence.ops.linear_attention import linear_attention


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
    inputs, deltas = inner_gradient(key, value, anchor, residual)
    if bound is not None and not dot:
        squares = [_square(x) * _square(d) for x, d in zip(inputs, deltas, strict=True)]
        step = torch.minimum(step, bound * _square(deltas[-1]) / (torch.stack(squares).sum(0) + 1e-12))
    retain_log = floored(retain_log)
    a, total, z, after = retain_log.exp(), retain_log.sum(-1).exp()[..., None, None], query, []
    for depth, (x, delta, W) in enumerate(zip(inputs, deltas, weights, strict=True)):
        if z is not None:
            z = F.gelu(z) if depth else z
        ahead = x if z is None else torch.cat([z[:, :, 1:], z[:, :, :1]], 2)  # a read comes before its token's write
        if depth == 0:
            # the rule decays first; the error that it would see after the decay is scaled back
            y, S = gated_delta_rule(ahead, x, -a[..., None] * delta, step / a, retain_log, {"S": W.mT})
            after.append(S["S"].mT)
        elif z is not None:
            y, S = linear_attention(ahead, x, -step[..., None] * delta, retain_log, {"S": W.mT})
            after.append(S["S"].mT)
        else:
            left = retain_log.sum(-1, keepdim=True) - retain_log.cumsum(-1)
            after.append(total * W - (delta * (step * left.exp())[..., None]).mT @ x)
        if z is not None:
            z = torch.cat([z[:, :, :1] @ W.mT, y[:, :, :-1]], 2)
    if z is not None and residual:
        assert query is not None
        z = query + z
    return z, after


def _square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).square()
