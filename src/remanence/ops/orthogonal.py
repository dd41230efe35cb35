"""Orthogonal steps for every token of a chunk, compiled for the CPU, with gradients by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from remanence.ops import dispatch
from remanence.ops.chunk_rule import momentum_coefficients
from remanence.ops.decay import second_order
from remanence.ops.inner_network import Affine, Weights, standardised
from remanence.ops.token_stream import Form, kernel_sizes, unpacked
from remanence.ops.token_weights import token_weights

MOST_STEPS = 6
"""Of the compiled iteration, which runs on squares: with each step what they lost to rounding grows twelvefold."""


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
    return y, unpacked(end, form), None if momentum is None else unpacked(pushed, form)


def _plain(form: Form, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same of the packed tensors, in operations that can be differentiated twice."""
    query, theta, a, eta, band, inputs, deltas, W, S = tensors
    outs, ins = zip(*form.shapes, strict=True)
    logs = theta, a.log(), eta.log() if form.momentum else None
    y, end, pushed = token_weights(
        query, list(inputs.split(ins, 3)), list(deltas.split(outs, 3)), unpacked(W, form),
        unpacked(S, form) if form.momentum else None, logs, band, momentum_coefficients(*logs), form.steps, None,
        "before" if form.before else "after", False, form.gated, None,
    )  # fmt: skip
    last = torch.cat([x.flatten(2) for x in end], 2)
    return y, last, S if pushed is None else torch.cat([x.flatten(2) for x in pushed], 2)


class _Compiled(torch.autograd.Function):
    """A head at a time, a token at a time, in the cache; for the gradient every token's weights are made again."""

    @staticmethod
    def forward(ctx: Any, form: Form, *tensors: Any) -> Any:
        from remanence.ops import token_weights_kernels as kernels
        from remanence.ops.compiled import rows, spread_products

        query, start = tensors[0], tensors[7]
        outs = [query.new_empty(*query.shape[:3], form.shapes[-1][0])]
        outs += [torch.empty_like(start, memory_format=torch.contiguous_format) for _ in range(2)]
        spread_products(kernels.forward, *kernel_sizes(form, query), *(rows(x) for x in (*tensors, *outs)))
        ctx.save_for_backward(*tensors)
        ctx.form = form
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import token_weights_kernels as kernels
        from remanence.ops.compiled import rows, spread_products

        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return None, *second_order(ctx.needs_input_grad[1:], partial(_plain, ctx.form), tensors, grads)
        outs = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tensors[:7]]
        outs += [x.clone(memory_format=torch.contiguous_format) for x in grads[1:]]
        given = (*tensors, grads[0], *outs)
        spread_products(kernels.backward, *kernel_sizes(ctx.form, tensors[0]), *(rows(x) for x in given))
        return None, *outs
