"""Whole chunks of a network memory, compiled for the CPU, with gradients by hand; for `fast_weight` and `ttt`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remanence.ops.decay import second_order
from remanence.ops.inner_network import Weights
from remanence.ops.objectives import Dot, Huber, LogCosh, Objective, PNorm, Shifted, Squared


class Form(NamedTuple):
    """What a compiled network is besides its weights, and what it learns.

    chunk_size: tokens that share an anchor. averages: `decay` is c_t, what the chunk's steps up to t are scaled by,
    rather than a_t. bias: the last column of each matrix is added to its outputs. tanh: GELU in its tanh form. read:
    what queries see, the weights "after" or "before" their token's write, or the chunk's "anchor". residual: the query
    is added to what is read, and the key to what is predicted. turn [chunk_size, 2, K/2]: cosines and sines by which
    queries and keys are turned first, by their place in the chunk.
    """

    chunk_size: int
    read: str = "after"
    averages: bool = False
    bias: bool = False
    tanh: bool = False
    objective: Objective = Squared()
    residual: bool = False
    turn: Tensor | None = None


def whole_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    most: Tensor | None,
    threshold: Tensor | None,
    decay: Tensor,
    momentum_decay: Tensor | None,
    norm: Tensor | None,
    weights: Weights,
    momentum: Weights | None,
    form: Form,
    plain: Callable[..., Any],
) -> tuple[Tensor, Weights, Weights | None]:
    """What the queries read of a network that learns (key, value) a chunk at a time.

    Shapes, T a multiple of the chunk size: query, key [B, H, T, K]; value [B, H, T, V]; step [B, H, T], which is to be
    at most `most` [B, H, T] ⟨e, ∂ℓ/∂f⟩ / ‖u‖², or, of the dot product, at most `most` √out / ‖u‖ in every layer; the
    Huber losses' threshold [B, H, T]; decay a (or c) and momentum_decay η [B, H, T]; norm [2, H, V]; weights and
    momentum by layer [B, H, out, in (+ 1 with a bias)].
    Returns what the queries read [B, H, T, V], and the weights and momentum after the last token.
    `plain` computes the same, of the same tensors packed, for second derivatives.
    """
    B, H = query.shape[:2]
    parts = weights if momentum is None else [torch.cat(pair, -1) for pair in zip(weights, momentum, strict=True)]
    start = torch.cat([x.flatten(2) for x in parts], 2)
    scale = None if norm is None else norm.transpose(0, 1).expand(B, H, 2, norm.shape[2])
    widths = [W.shape[3] - form.bias for W in weights] + [weights[-1].shape[2]]
    y, end = _Compiled.apply(
        form, widths, plain, query, key, value, step, most, threshold, decay, momentum_decay, scale, start
    )  # fmt: skip
    return y, *unpacked(end, weights, momentum is not None)


def unpacked(flat: Tensor, like: Weights, momentum: bool) -> tuple[Weights, Weights | None]:
    """The weights and the momentum of [B, H, numbers], where the momentum of a layer stands beside its weights."""
    rows = [W.shape[2] for W in like]
    columns = [W.shape[3] * (1 + momentum) for W in like]
    parts = flat.split([o * i for o, i in zip(rows, columns, strict=True)], 2)
    both = [x.unflatten(2, (o, i)) for x, o, i in zip(parts, rows, columns, strict=True)]
    if not momentum:
        return both, None
    pairs = [x.chunk(2, -1) for x in both]
    return [W for W, _ in pairs], [S for _, S in pairs]


class _Compiled(torch.autograd.Function):
    """A head at a time, its chunks in the cache; keeps the weights as every few chunks began, and what queries met."""

    @staticmethod
    def forward(ctx: Any, form: Form, widths: list[int], plain: Callable[..., Any], *tensors: Any) -> Any:
        from remanence.ops import fast_weight_kernels as kernels
        from remanence.ops.compiled import blank, flat, rows, spread_products

        query, value, start = tensors[0], tensors[2], tensors[9]
        B, H, T = query.shape[:3]
        y, end = blank(value, 3), torch.empty_like(start, memory_format=torch.contiguous_format)
        chunks, anchored, normed = T // form.chunk_size, form.read == "anchor", tensors[8] is not None
        befores = start.new_empty(B * H, -(-chunks // every(form)), start.shape[2])
        last = anchored + (normed and (anchored or len(widths) > 2))  # one layer is read again for its gradient
        met = sum(widths[1:-1]) * (not anchored) + widths[-1] * last
        hidden = start.new_empty(B * H, chunks, form.chunk_size * met)
        arguments, work = _arguments(form, widths, tensors), query.numel() * form.chunk_size
        outputs = *flat(y, 3), befores.numpy(), hidden.numpy(), rows(end)
        spread_products(kernels.forward, B * H, work, *arguments, rows(start), *outputs)
        ctx.save_for_backward(*tensors, befores, hidden)
        ctx.form, ctx.widths, ctx.plain = form, widths, plain
        return y, end

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import fast_weight_kernels as kernels
        from remanence.ops.compiled import blank, flat, flat_or_none, rows, spread_products

        *tensors, befores, hidden = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return None, None, None, *second_order(ctx.needs_input_grad[3:], ctx.plain, tensors, grads)
        query, norm, start = tensors[0], tensors[8], tensors[9]
        B, H = query.shape[:2]
        outs = [None if x is None else blank(x, 3) for x in tensors[:8]]
        d_norm = query.new_zeros((B, H, 0, 1) if norm is None else norm.shape)
        d_start = grads[1].clone(memory_format=torch.contiguous_format)
        arguments, work = _arguments(ctx.form, ctx.widths, tensors), query.numel() * ctx.form.chunk_size
        outputs = [part for x in outs for part in flat_or_none(x, 3, query)]
        spread_products(
            kernels.backward, B * H, work, *arguments, befores.numpy(), hidden.numpy(), *flat(grads[0], 3), *outputs,
            rows(d_norm), rows(d_start),
        )  # fmt: skip
        return None, None, None, *outs, None if norm is None else d_norm, d_start.view_as(start)


EVERY, SPAN, LONG = 2, 256, 64
"""Chunks from one kept state to the next, or of chunks shorter than LONG, tokens if that is more.

Those between are made again for the gradient; beside what is kept of a long chunk a state is not large.
"""


def every(form: Form) -> int:
    return EVERY if form.chunk_size >= LONG else max(EVERY, SPAN // form.chunk_size)


def objective_code(objective: Objective) -> tuple[int, float] | None:
    """The kernels' name of an objective and its number, or None of one that they have not."""
    from remanence.ops import objective_kernels as kernels

    match objective:
        case Squared():
            return kernels.SQUARED, 0.0
        case Dot():
            return kernels.DOT, 0.0
        case PNorm(p):
            return kernels.POWER, p
        case LogCosh(sharpness):
            return kernels.LOG_COSH, sharpness
        case Shifted(shift):
            return kernels.SHIFTED, shift
        case Huber(kind):
            kinds = {"norm": kernels.HUBER, "coordinate": kernels.HUBER_EACH, "mixture": kernels.HUBER_MIXED}
            return kinds[kind], 0.0
    return None


def _arguments(form: Form, widths: list[int], tensors: Any) -> list[Any]:
    """The kernels' arguments up to what turns queries and keys."""
    import numpy as np

    from remanence.ops.compiled import flat_or_none, rows

    query, most, momentum, norm = tensors[0], tensors[4], tensors[7], tensors[8]
    B, H, T = query.shape[:3]
    sizes = H, T // form.chunk_size, form.chunk_size, np.array(widths), int(form.bias), 1 + (momentum is not None)
    reads = ("before", "after", "anchor").index(form.read)
    code = objective_code(form.objective)
    assert code is not None
    kinds = int(form.tanh), most is not None, form.averages, *code, reads, form.residual, every(form)
    inputs = [part for x in tensors[:8] for part in flat_or_none(x, 3, query)]
    turn = query.new_empty(0, 2, 0) if form.turn is None else form.turn.to(query).contiguous()
    return [*sizes, *kinds, *inputs, rows(query.new_empty(B, H, 0, 1) if norm is None else norm), turn.numpy()]
