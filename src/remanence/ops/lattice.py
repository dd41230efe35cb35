"""Slots that learn only what they lack. Axes: B batch, H heads, T time, M slots, D features of a slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from remanence.errors import expect
from remanence.ops.decay import recurrent_dtype, second_order
from remanence.ops.taps import tapped
from remanence.state import State

REMEMBERED = 32
"""One state in so many tokens is kept; those between are found again for the gradients."""


def lattice_reference(
    query: Tensor,
    code: Tensor,
    target: Tensor,
    rate: Tensor,
    state: State,
    *,
    correct: bool = True,
    renormalise: bool = False,
    by_slot: bool = False,
) -> tuple[Tensor, State]:
    """The definition: s_i ← s_i + γ c_i (I − φ_i φ_iᵀ) e / ‖s_i‖, with φ_i = s_i / ‖s_i‖; y_t = Φᵀ q or Φ q."""
    dtype = recurrent_dtype(target)
    q, code, target, rate = (x.to(dtype) for x in (query, code, target, rate))
    S, read = state["S"], []
    size, direction = _polar(S)
    for t in range(target.shape[2]):
        c, e = code[:, :, t, None], target[:, :, t, None]
        if correct:
            e = e - c @ direction
        known = e @ direction.mT
        S = S + (rate[:, :, t, None, None] * c / size.mT).mT * (e - known.mT * direction)
        if renormalise:
            S = _polar(S)[1]
        size, direction = _polar(S)
        read.append((q[:, :, t, None] @ (direction.mT if by_slot else direction))[:, :, 0])
    empty = code if by_slot else target
    return (torch.stack(read, 2) if read else empty).to(query.dtype), {"S": S}


@tapped
def lattice(
    query: Tensor,
    code: Tensor,
    target: Tensor,
    rate: Tensor,
    state: State,
    *,
    correct: bool = True,
    renormalise: bool = False,
    by_slot: bool = False,
) -> tuple[Tensor, State]:
    """s_i ← s_i + γ c_i (I − φ_i φ_iᵀ) e / ‖s_i‖ for every slot i, with φ_i = s_i / ‖s_i‖; then it is read.

    With e = `target` − Φᵀ `code` (`correct`) it is a gradient step on ½‖target − Φᵀ code‖², with e = `target` on
    −targetᵀ Φᵀ code, each through the normalisation. What is read is Φᵀ q, or Φ q (`by_slot`). `renormalise` brings
    slots to unit length after each write. Nonlinear in the state: token by token, and no affine carry.

    Shapes: `code` [B, H, T, M], `target` [B, H, T, D], `rate` [B, H, T], any T ≥ 0; `query` [B, H, T, M] and
    y [B, H, T, D], or the other way round with `by_slot`; state {"S": [B, H, M, D]}, not zero, float32 or wider.
    Raises: `ShapeError`.
    Source: Lattice, arXiv:2504.05646 (2025).
    """
    expect("lattice", "code", code, "batch heads time slots")
    B, H, T, M = code.shape
    expect("lattice", "target", target, "batch heads time features", batch=B, heads=H, time=T)
    width = target.shape[3] if by_slot else M
    expect("lattice", "query", query, "batch heads time width", batch=B, heads=H, time=T, width=width)
    expect("lattice", "rate", rate, "batch heads time", batch=B, heads=H, time=T)
    expect(
        "lattice", "S", state["S"], "batch heads slots features", batch=B, heads=H, slots=M, features=target.shape[3]
    )
    options = correct, renormalise, by_slot
    if T <= 1:
        return _reference(options, query, code, target, rate, state)
    dtype = recurrent_dtype(target)
    q, c, v, r, S = (x.to(dtype) for x in (query, code, target, rate, state["S"]))
    y, S = (_Compiled.apply if target.device.type == "cpu" else _in_segments)(q, c, v, r, S, options)
    return y.to(query.dtype), {"S": S}


def _polar(S: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths and directions of slots; one at zero has no direction, and stays finite."""
    size = (S.square().sum(-1, keepdim=True) + 1e-30).sqrt()
    return size, S / size


def _reference(
    options: tuple[bool, bool, bool], q: Tensor, c: Tensor, v: Tensor, r: Tensor, state: State
) -> tuple[Tensor, State]:
    correct, renormalise, by_slot = options
    return lattice_reference(q, c, v, r, state, correct=correct, renormalise=renormalise, by_slot=by_slot)


def _in_segments(
    q: Tensor, c: Tensor, v: Tensor, r: Tensor, S: Tensor, options: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor]:
    """The same in tensor operations, on any device; for the gradients a segment's tokens are run again."""

    def run(q: Tensor, c: Tensor, v: Tensor, r: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        y, state = _reference(options, q, c, v, r, {"S": S})
        return y, state["S"]

    read = []
    for part in zip(*(p.split(REMEMBERED, 2) for p in (q, c, v, r)), strict=True):
        out, S = checkpoint(run, *part, S, use_reentrant=False, preserve_rng_state=False)
        read.append(out)
    return torch.cat(read, 2), S


class _Compiled(torch.autograd.Function):
    """Compiled loops over time, forwards for y and backwards for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, c: Tensor, v: Tensor, r: Tensor, start: Tensor, options: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor]:
        tokens, S = [x.flatten(0, 1).contiguous() for x in (q, c, v, r)], start.flatten(0, 1).contiguous()
        y, end = torch.empty_like(tokens[1] if options[2] else tokens[2]), torch.empty_like(S)
        kept = S.new_empty(len(S), -(-v.shape[2] // REMEMBERED), *S.shape[1:])
        _run("forward", options, *tokens, S, y, end, kept)
        ctx.save_for_backward(q, c, v, r, start, kept)
        ctx.options = options
        return y.view(*v.shape[:3], -1), end.view(start.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted

            def plain(q: Tensor, c: Tensor, v: Tensor, r: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
                y, state = _reference(ctx.options, q, c, v, r, {"S": S})
                return y, state["S"]

            return *second_order(ctx.needs_input_grad[:5], plain, inputs, grads), None
        tokens = [x.flatten(0, 1).contiguous() for x in inputs[:4]]
        d_y, d_S = grads[0].flatten(0, 1).contiguous(), grads[1].flatten(0, 1).contiguous().clone()
        found = [torch.empty_like(x) for x in tokens]
        _run("backward", ctx.options, *tokens, kept, d_y, d_S, *found)
        return *(d.view(x.shape) for d, x in zip([*found, d_S], inputs, strict=True)), None


def _run(name: str, options: tuple[bool, bool, bool], *tensors: Tensor) -> None:
    """A kernel over the rows, which know nothing of each other."""
    from remanence.ops import lattice_kernels  # here, because Numba takes half a second that most need not pay
    from remanence.ops.compiled import spread

    arrays = [x.detach().numpy() for x in tensors]
    spread(getattr(lattice_kernels, name), len(arrays[0]), 4 * arrays[2].size, REMEMBERED, *options, *arrays)
