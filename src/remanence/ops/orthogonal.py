"""Orthogonal steps for every token of a chunk, compiled for the CPU, with gradients by hand."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remanence.ops import dispatch
from remanence.ops.chunk_rule import momentum_coefficients
from remanence.ops.decay import second_order
from remanence.ops.inner_network import Affine, Weights, standardised
from remanence.ops.token_weights import token_weights
from remanence.state import State

MOST_STEPS = 6
"""Of the compiled iteration, which runs on squares: with each step what they lost to rounding grows twelvefold."""


class Form(NamedTuple):
    """What the compiled rule is besides its tensors. steps: of the iteration."""

    steps: int
    gated: bool
    before: bool
    momentum: bool
    shapes: list[tuple[int, ...]]


def worth(query: Tensor, weights: Weights, steps: int) -> bool:
    """Whether the compiled form is to take these tokens: on the CPU, where there is work enough."""
    work = query.shape[2] * sum(W.numel() * min(W.shape[2:]) for W in weights)
    return query.device.type == "cpu" and steps <= MOST_STEPS and work >= dispatch.COMPILED_FROM


def orthogonal_tokens(
    query: Tensor,
    inputs: Weights,
    deltas: Weights,
    weights: Weights,
    momentum: Weights | None,
    gates: tuple[Tensor, Tensor, Tensor | None],
    band: Tensor | None,
    steps: int,
    read: str,
    residual: bool,
    gated: bool,
    norm: Affine | None,
) -> tuple[Tensor, Weights, Weights | None]:
    """`token_weights` where S_t = η_t S_{t−1} − Σ_i Γ_ti u_i and W_t = a_t W_{t−1} + θ_t NS(S_t).

    Shapes: query [B, H, C, K]; by layer: inputs [B, H, C', in], deltas [B, H, C', out], weights and momentum
    [B, H, out, in]; gates θ, log a and log η [B, H, C]; band Γ [B, H, C, C'], of whose rows C' − C + 1 entries, from
    the diagonal on, are not 0; None where each token sees itself alone. Returns what the queries read, and the weights
    and the momentum after the last token.
    """
    theta, retain_log, momentum_log = gates
    eye = torch.eye(query.shape[2], dtype=query.dtype) if band is None else band
    eta = torch.zeros_like(theta) if momentum_log is None else momentum_log.exp()
    start = torch.cat([W.flatten(2) for W in weights], 2)
    S = torch.zeros_like(start) if momentum is None else torch.cat([x.flatten(2) for x in momentum], 2)
    form = Form(steps, gated, read == "before", momentum is not None, [(W.shape[2], W.shape[3]) for W in weights])
    z, end, pushed = _Compiled.apply(
        form, query, theta, retain_log.exp(), eta, eye.expand(*query.shape[:2], *eye.shape[-2:]),
        torch.cat(inputs, 3), torch.cat(deltas, 3), start, S,
    )  # fmt: skip
    if norm is not None:
        z = standardised(z)[0] * norm[0][:, None] + norm[1][:, None]
    y = query + z if residual else z
    return y, _unpacked(end, form), None if momentum is None else _unpacked(pushed, form)


def orthogonal_stream(
    x: dict[str, Tensor], state: State, phase: int, chunk_size: int, steps: int, read: str, residual: bool, gated: bool
) -> tuple[Tensor, State]:
    """`fast_weight` under the squared error without a norm, and without gradients, in one call; `x` by its names.

    Rows stand at `phase` tokens of a chunk.
    """
    from remanence.ops import orthogonal_kernels as kernels
    from remanence.ops.compiled import rows, spread_products

    query, theta, past = x["query"], x["step"], state.get("window", {})
    seen = {i: torch.cat([past[i], x[i]], 2) if past else x[i] for i in ("key", "value")}
    weights, T = state["weight"], query.shape[2]
    form = Form(steps, gated, read == "before", "momentum" in state, [tuple(W.shape[2:]) for W in weights.values()])
    anchor, W = (torch.cat([A.flatten(2) for A in state[i].values()], 2) for i in ("anchor", "weight"))
    S = torch.cat([A.flatten(2) for A in state["momentum"].values()], 2) if form.momentum else torch.zeros_like(W)
    eta = x["momentum_log"].exp() if form.momentum else torch.zeros_like(theta)
    gamma = x["window"] if past else torch.ones_like(theta)[..., None]
    target = seen["value"] - seen["key"] if residual else seen["value"]
    z = query.new_empty(*query.shape[:3], form.shapes[-1][0])
    parts, work, *kinds = _sizes(form, query)
    inputs = [rows(part) for part in (query, seen["key"], target, theta, x["retain_log"].exp(), eta, gamma)]
    moved = [rows(part) for part in (anchor, W, S, z)]
    spread_products(
        kernels.stream, parts, work, *kinds, query.shape[1], chunk_size, phase, *inputs, state["pos"].numpy(), *moved
    )

    def named(packed: Tensor) -> State:
        return dict(zip(weights, _unpacked(packed, form), strict=True))

    after: State = {"anchor": named(anchor), "weight": named(W)}
    after |= {"momentum": named(S)} if form.momentum else {}
    after |= {"window": {i: part[:, :, T:] for i, part in seen.items()}} if past else {}
    return query + z if residual else z, {**after, "pos": state["pos"] + T}


def _unpacked(x: Tensor, form: Form) -> Weights:
    parts = x.split([out * into for out, into in form.shapes], 2)
    return [part.unflatten(2, shape) for part, shape in zip(parts, form.shapes, strict=True)]


def _plain(form: Form, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same of the packed tensors, in operations that can be differentiated twice."""
    query, theta, a, eta, band, inputs, deltas, W, S = tensors
    outs, ins = zip(*form.shapes, strict=True)
    logs = theta, a.log(), eta.log() if form.momentum else None
    y, end, pushed = token_weights(
        query, list(inputs.split(ins, 3)), list(deltas.split(outs, 3)), _unpacked(W, form),
        _unpacked(S, form) if form.momentum else None, logs, band, momentum_coefficients(*logs), form.steps, None,
        "before" if form.before else "after", False, form.gated, None,
    )  # fmt: skip
    last = torch.cat([x.flatten(2) for x in end], 2)
    return y, last, S if pushed is None else torch.cat([x.flatten(2) for x in pushed], 2)


class _Compiled(torch.autograd.Function):
    """A head at a time, a token at a time, in the cache; for the gradient every token's weights are made again."""

    @staticmethod
    def forward(ctx: Any, form: Form, *tensors: Any) -> Any:
        from remanence.ops import orthogonal_kernels as kernels
        from remanence.ops.compiled import rows, spread_products

        query, start = tensors[0], tensors[7]
        outs = [query.new_empty(*query.shape[:3], form.shapes[-1][0])]
        outs += [torch.empty_like(start, memory_format=torch.contiguous_format) for _ in range(2)]
        spread_products(kernels.forward, *_sizes(form, query), *(rows(x) for x in (*tensors, *outs)))
        ctx.save_for_backward(*tensors)
        ctx.form = form
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import orthogonal_kernels as kernels
        from remanence.ops.compiled import rows, spread_products

        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return None, *second_order(ctx.needs_input_grad[1:], partial(_plain, ctx.form), tensors, grads)
        outs = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tensors[:7]]
        outs += [x.clone(memory_format=torch.contiguous_format) for x in grads[1:]]
        given = (*tensors, grads[0], *outs)
        spread_products(kernels.backward, *_sizes(ctx.form, tensors[0]), *(rows(x) for x in given))
        return None, *outs


def _sizes(form: Form, query: Tensor) -> list[Any]:
    """How many heads, how much work, and what the kernels are told of the form."""
    import numpy as np

    parts = query.shape[0] * query.shape[1]
    work = parts * query.shape[2] * sum(out * into * min(out, into) for out, into in form.shapes)
    return [parts, work, form.steps, int(form.gated), int(form.before), np.array(form.shapes)]
