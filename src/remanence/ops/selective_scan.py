"""Mamba's recurrence: a diagonal state of N numbers per feature, steered by the input.

Axes: B batch, T time, D features, N states per feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from remanence.errors import expect
from remanence.ops import steps
from remanence.ops.complex_scan import by_doubling
from remanence.ops.decay import floored, recurrent_dtype, second_order
from remanence.ops.taps import tapped
from remanence.state import State

kernels = steps.Kernels("selective_scan_kernels")
KEPT = 16
"""One state in so many tokens is kept for the gradients; those between are computed again."""


def selective_scan_reference(
    x: Tensor, delta: Tensor, A: Tensor | None, B: Tensor, C: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """The definition: h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t x_t B_tᵀ,  y_t = h_t C_t."""
    dtype = recurrent_dtype(x)
    u, delta, B, C = (z.to(dtype) for z in (x * delta, delta, B, C))
    h = u.new_zeros(x.shape[0], x.shape[2], B.shape[2]) if state is None else state["h"]
    y = []
    for t in range(x.shape[1]):
        h = _decay(delta[:, t, :, None], A, B[:, t, None]) * h + u[:, t, :, None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1))
    return (torch.stack(y, 1).to(x.dtype) if y else x), {"h": h}


@tapped
def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor | None, B: Tensor, C: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t x_t B_tᵀ, read as y_t = h_t C_t, without ever holding all h at once.

    With A = None the decay is 1 − Δ_t B_t², as Longhorn has it.

    Shapes: `x`, `delta` (≥ 0) and y [B, T, D], any T ≥ 0; `A` None or [D, N] (≤ 0; Δ A is clamped at −60);
    `B`, `C` [B, T, N]; state {"h": [B, D, N]}, float32 or wider.
    Raises: `ShapeError`.
    Source: Gu & Dao, Mamba, arXiv:2312.00752 (2023); Liu et al., Longhorn, arXiv:2407.14207 (2024).
    """
    expect("selective_scan", "x", x, "batch time features")
    batch, T, D = x.shape
    expect("selective_scan", "delta", delta, "batch time features", batch=batch, time=T, features=D)
    expect("selective_scan", "B", B, "batch time states", batch=batch, time=T)
    N = B.shape[2]
    expect("selective_scan", "C", C, "batch time states", batch=batch, time=T, states=N)
    if A is not None:
        expect("selective_scan", "A", A, "features states", features=D, states=N)
    if T == 1 and state is not None and steps.worth(state["h"], x, delta, A, B, C):
        y, h = steps.selective_scan(x, delta, A, B, C, state["h"])
        return y, {"h": h}
    if T == 0:
        return selective_scan_reference(x, delta, A, B, C, state)
    dtype = recurrent_dtype(x)
    u, delta, B, C = (z.to(dtype) for z in (x, delta, B, C))
    start = u.new_zeros(batch, D, N) if state is None else state["h"].to(dtype)
    op = _step if T == 1 else _SelectiveScan.apply if x.device.type == "cpu" else _in_tensors
    y, h = op(u, delta, None if A is None else A.to(dtype), B, C, start)
    return y.to(x.dtype), {"h": h}


def selective_token(
    mixed: Tensor,
    conv: tuple[Tensor, Tensor, Tensor | None],
    choose: Tensor,
    step: tuple[Tensor, Tensor],
    logs: Tensor | None,
    skip: Tensor,
    start: Tensor,
    eps: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of Mamba's block between its projections, in one compiled call: y, the next h and the next tail.

    Shapes: mixed [B, 1, 2D] (x, and z that gates by SiLU); `conv` the tail [B, width − 1, D], weights [D, width] and
    bias [D] or None; `choose` [R + 2N, D] maps x to δ, B and C, which are brought to root mean square 1 with `eps`
    unless it is None; `step` [D, R] and [D] map δ to Δ; `logs` [D, N] is log(−A), or None for Longhorn's decay and
    step; `skip` [D]; start and h [B, D, N]; y [B, 1, D].
    """
    (B, D, N), (tail, taps, bias) = start.shape, conv
    steps.fits("selective_token", tail, B, taps.shape[1] - 1, D)
    y, after, h = mixed.new_empty(B, 1, D), steps.blank(tail), steps.blank(start)
    given = mixed, tail, taps, bias, choose, *step, logs, skip, start, y, after, h
    steps.run(kernels.token, given, B, D, N, step[0].shape[1], taps.shape[1], eps is not None, float(eps or 0))
    return y, h, after


def selective_scan_carry(x: Tensor, delta: Tensor, A: Tensor | None, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """(M, N), both [B, D, N], with h_end = M ⊙ h_start + N for every state h_start."""
    N = selective_scan(x, delta, A, B, C)[1]["h"]
    return selective_scan(torch.zeros_like(x), delta, A, B, C, {"h": torch.ones_like(N)})[1]["h"], N


def _decay(delta: Tensor, A: Tensor | None, B: Tensor) -> Tensor:
    return 1 - delta * B.square() if A is None else floored(delta * A.to(delta.dtype)).exp()


def _step(x: Tensor, delta: Tensor, A: Tensor | None, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The same for one token, in few operations."""
    h = torch.addcmul(_decay(delta.mT, A, B) * h, (x * delta).mT, B)
    return (h @ C.mT).mT, h


def _in_tensors(x: Tensor, delta: Tensor, A: Tensor | None, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The same with tensor operations only, on any device, 64 tokens at a time."""
    y = []
    for piece in zip(*(z.split(64, 1) for z in (x, delta, B, C)), strict=True):
        out, h = checkpoint(_piece, *piece, A, h, use_reentrant=False)
        y.append(out)
    return torch.cat(y, 1), h


def _piece(x: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
    written = (x * delta)[..., None] * B[:, :, None]
    states = by_doubling(_decay(delta[..., None], A, B[:, :, None]), written, h)
    return (states @ C[..., None])[..., 0], states[:, -1]


class _SelectiveScan(torch.autograd.Function):
    """Compiled loops over time. Inside, states are [N, D]: features are the axis along which a CPU works at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, A: Tensor | None, B: Tensor, C: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, delta, B, C = (z.contiguous() for z in (x, delta, B, C))
        h, y = start.mT.contiguous().clone(), torch.empty_like(x)
        size = KEPT if any(ctx.needs_input_grad) else x.shape[1]
        kept = h.new_empty(h.shape[0], -(-x.shape[1] // size), *h.shape[1:])
        _over_bands("forward", x, delta, _rates(A, x), B, C, h, y, kept, size)
        ctx.save_for_backward(x, delta, A, B, C, start, kept)
        return y, h.mT.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, A, B, C, start, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return second_order(ctx.needs_input_grad, _in_tensors, (x, delta, A, B, C, start), grads)
        d_y, d_h = grads[0].contiguous(), grads[1].mT.contiguous().clone()
        d_x, d_delta, d_A = torch.empty_like(x), torch.empty_like(x), x.new_zeros(B.shape[2], x.shape[2])
        sums = x.new_zeros(2, _bands(x), *B.shape)  # B and C are read by all features: one sum per band
        _over_bands("backward", x, delta, _rates(A, x), B, C, kept, KEPT, d_y, d_h, d_x, d_delta, d_A, sums[0], sums[1])
        d_B, d_C = sums.sum(1)
        return d_x, d_delta, None if A is None else d_A.mT, d_B, d_C, d_h.mT


def _rates(A: Tensor | None, like: Tensor) -> Tensor:
    """A as [N, D], or an empty matrix for None."""
    return like.new_empty(0, 0) if A is None else A.mT.contiguous()


def _bands(x: Tensor) -> int:
    from remanence.ops.compiled import BAND

    return -(-x.shape[2] // BAND)


def _over_bands(name: str, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, *rest: Any) -> None:
    # here, because Numba takes half a second that most programs need not pay
    from remanence.ops import compiled, selective_scan_kernels

    kernel = getattr(selective_scan_kernels, name)
    compiled.spread_bands(kernel, x.shape[2], x.numel() * B.shape[2], x, delta, A, B, *rest)
