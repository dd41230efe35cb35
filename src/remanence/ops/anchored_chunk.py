"""What tokens that share an anchor do to a fast-weight memory, in operations that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.ops.chunk_rule import Coefficients, after_chunk, momentum_coefficients, of_outputs, shifted, times
from remanence.ops.inner_network import Affine, Weights, fast_weight_read, inner_gradient_along, network
from remanence.ops.whole_chunks import Form, unpacked


def _scaled(z: Tensor, W: Tensor, rows: Tensor, outputs: bool = True) -> Tensor:
    """diag(rows) z W, scaling whichever side is narrower, or that of the channels."""
    if rows.ndim == 4:
        return (z @ W) * rows.mT if outputs else (z * rows.mT) @ W
    return (z * rows[..., None]) @ W if W.shape[-2] < W.shape[-1] else (z @ W) * rows[..., None]


def _written(z: Tensor, x: Tensor, delta: Tensor, write: Tensor, outputs: bool) -> Tensor:
    """What z reads of Σ_i K_ti δ_i x_iᵀ."""
    if write.ndim == 4:
        return (z @ x.mT * write) @ delta
    if outputs:
        return torch.einsum("bhti,bhrti,bhir->bhtr", z @ x.mT, write, delta)
    return torch.einsum("bhtc,bhcti,bhic->bhti", z, write, x) @ delta


def fast_weight_chunk(
    query: Tensor,
    inputs: Weights,
    deltas: Weights,
    weights: Weights,
    momentum: Weights | None,
    c: Coefficients,
    *,
    residual: bool = False,
    gated: bool = False,
    norm: Affine | None = None,
    reads: Coefficients | None = None,
    factors: Weights | None = None,
    toward: Weights | None = None,
) -> tuple[Tensor, Weights, Weights | None]:
    """Tokens that share an anchor, all at once, under any objective and any rule that `Coefficients` can say.

    Shapes: query [B, H, C, K]; by layer: inputs x [B, H, C', in] and deltas δ [B, H, C', out] (the token's gradient is
    δ xᵀ), weights [B, H, out, in]; momentum likewise, with a second order its layers after those of the first. `reads`
    are the coefficients of what each query sees where these are not c; `factors` scale what a layer's weights are
    read as, `toward` is added to them. Returns what the queries read, and the weights and momentum after the last
    token.
    """
    layers = len(weights)
    r = c if reads is None else reads

    def linear(i: int, z: Tensor) -> Tensor:
        outputs = of_outputs(i, layers)
        y = _scaled(z, weights[i].mT, r.retain, outputs) - _written(z, inputs[i], deltas[i], r.write, outputs)
        if momentum is not None and r.push is not None:
            y = y + _scaled(z, momentum[i].mT, r.push, outputs)
            if r.second is not None:
                y = y + _scaled(z, momentum[layers + i].mT, r.second.push, outputs)
        y = y if toward is None else y + z @ toward[i].mT
        return y if factors is None else y * factors[i]

    y = network(query, linear, layers, residual, gated, norm)
    return y, *after_chunk(inputs, deltas, weights, momentum, c)


def exact_chunk(
    x: dict[str, Tensor],
    W: Weights,
    S: Weights | None,
    bound: float | None,
    residual: bool,
    read: str,
    coefficients: Callable[..., Coefficients],
) -> tuple[Tensor, Weights, Weights | None]:
    """A matrix under the squared error at chunk size 1: every token's error, at the weights before it, by one solve.

    The errors obey Δ_t = W_{t−1} k_t − v_t, and W_{t−1} holds those before: (I + K' ∘ Key Keyᵀ) Δ = A' Key Wᵀ + F' Key
    Sᵀ − V, with the coefficients of the weights before each token.
    """
    k, theta = x["key"], x["step"]
    logs = [x.get(f"{name}_log") for name in ("retain", "momentum", "second")]
    if bound is not None:
        most = ceiling([square(k)], torch.ones_like(theta), W, None, logs, 1, True)
        theta = torch.minimum(theta, bound * most)
    c = coefficients(theta, *logs) if logs[2] is not None else coefficients(theta, *logs[:2])
    before = shifted(c)
    known = _scaled(k, W[0].mT, before.retain) - (x["value"] - k if residual else x["value"])
    if S is not None and before.push is not None:
        known = known + _scaled(k, S[0].mT, before.push)
        if before.second is not None:
            known = known + _scaled(k, S[1].mT, before.second.push)
    system = before.write * (k @ k.mT)  # strictly below the diagonal; the solver supplies the ones on it
    error = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    reads = c if read == "after" else before
    return fast_weight_chunk(x["query"], [k], [error], W, S, c, residual=residual, reads=reads)


def by_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    most: Tensor | None,
    threshold: Tensor | None,
    decay: Tensor,
    momentum_decay: Tensor | None,
    norm: Tensor | None,
    start: Tensor,
    *,
    like: Weights,
    form: Form,
) -> tuple[Tensor, Tensor]:
    """`whole_chunks` of packed tensors in operations that can be differentiated twice."""
    W, S = unpacked(start, like, momentum_decay is not None)
    affine = None if norm is None else (norm[0, :, 0], norm[0, :, 1])
    read, residual, objective, y = form.read, form.residual, form.objective, []
    for first in range(0, q.shape[2], form.chunk_size):
        now = slice(first, first + form.chunk_size)
        bends = None if threshold is None else threshold[:, :, now]
        near, deltas, along = inner_gradient_along(
            k[:, :, now], v[:, :, now], W, residual, False, affine, objective, bends
        )
        steps = theta[:, :, now]
        if most is not None:
            parts = [square(i) * square(d) for i, d in zip(near, deltas, strict=True)]
            if objective.targets:
                share = along / (torch.stack(parts).sum(0) + 1e-12)
            else:
                growth = [(p + 1e-24).sqrt() / w.shape[-2] ** 0.5 for p, w in zip(parts, W, strict=True)]
                share = 1 / (torch.stack(growth).amax(0) + 1e-12)
            steps = torch.minimum(steps, most[:, :, now] * share)
        eta_log = None if momentum_decay is None else momentum_decay[:, :, now].log()
        rule = momentum_coefficients(steps, decay[:, :, now].log(), eta_log)
        fixed = fast_weight_read(q[:, :, now], W, residual=residual, norm=affine) if read == "anchor" else None
        reads = shifted(rule) if read == "before" else rule
        out, W, S = fast_weight_chunk(
            q[:, :, now], near, deltas, W, S, rule, residual=residual, norm=affine, reads=reads
        )
        y.append(out if fixed is None else fixed)
    both = W if S is None else [torch.cat(pair, -1) for pair in zip(W, S, strict=True)]
    return torch.cat(y, 2), torch.cat([x.flatten(2) for x in both], 2)


def one_token(
    x: dict[str, Tensor],
    anchor: Weights,
    W: Weights,
    S: Weights | None,
    residual: bool,
    bound: float | None,
    read: str,
) -> tuple[Tensor, Weights, Weights | None]:
    """One token of the plain rule, without gradients, in as few operations as it takes."""
    shape = x["query"].shape
    flat = {name: t.flatten(0, 1) for name, t in x.items()}
    q, k, v, theta = (flat[name] for name in ("query", "key", "value", "step"))
    fixed = [A.flatten(0, 1) for A in anchor]
    inputs, hidden = [k], []
    for A in fixed[:-1]:
        hidden.append(torch.bmm(inputs[-1], A.mT))
        inputs.append(F.gelu(hidden[-1]))
    target = v - k if residual else v
    deltas = [torch.baddbmm(target, inputs[-1], fixed[-1].mT, beta=-1)]
    for A, h in zip(reversed(fixed[1:]), reversed(hidden), strict=True):
        deltas.append(torch.ops.aten.gelu_backward(torch.bmm(deltas[-1], A), h))
    deltas.reverse()
    eta_log = flat.get("momentum_log")
    if bound is not None:
        parts = [square(i) * square(d) for i, d in zip(inputs, deltas, strict=True)]
        most = bound * square(deltas[-1]) / (sum(parts[1:], parts[0]) + 1e-12)
        theta = torch.minimum(theta, most if eta_log is None else -torch.expm1(eta_log) * most)
    theta, a = theta[..., None], flat["retain_log"].exp()[..., None]
    after, pushed, z = [], [], q
    for i, (each, delta, inner) in enumerate(zip(W, deltas, inputs, strict=True)):
        step = torch.bmm((delta * -theta).mT, inner)
        if S is not None:
            assert eta_log is not None
            step = step.addcmul_(S[i].flatten(0, 1), eta_log.exp()[..., None])
            pushed.append(step.view_as(S[i]))
        weight = torch.addcmul(step, each.flatten(0, 1), a)
        after.append(weight.view_as(each))
        seen = {"after": weight, "before": each.flatten(0, 1), "anchor": fixed[i]}[read]
        z = torch.bmm(F.gelu(z) if i else z, seen.mT)
    y = (q + z if residual else z).view(*shape[:3], -1)
    return y, after, None if S is None else pushed


def square(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).square()  # one pass over x, where x² would be kept for the gradient


def ceiling(
    squares: Weights,
    along: Tensor,
    weights: Weights,
    band: Tensor | None,
    logs: Sequence[Tensor | None],
    chunk_size: int,
    targets: bool,
) -> Tensor:
    """The largest steps θ that a bound of 1 lets pass, from ‖u‖² by layer and ⟨e, ∂ℓ/∂f⟩; each [B, H, C].

    With targets, Polyak's step shared out over a chunk: an error of zero takes none. Without, what the decay undoes.
    """

    def summed(x: Tensor) -> Tensor:
        # √ has no slope at 0, where a token that is already known, or before the stream's start, has its ‖u‖
        x = (x + 1e-24).sqrt()
        return x if band is None else times(band, x)

    retain_log, momentum_log, second_log = logs
    if targets:
        along = along if band is None else times(band, along)
        total = torch.stack(squares).sum(0)
        most = along / ((total if band is None else summed(total).square()) + 1e-12) / chunk_size
    else:
        assert retain_log is not None
        growth = torch.stack([summed(p) / W.shape[-2] ** 0.5 for p, W in zip(squares, weights, strict=True)])
        most = -torch.expm1(retain_log) / (growth.amax(0) + 1e-12)
    for log in (momentum_log, second_log):
        most = most if log is None else -torch.expm1(log) * most
    return most
