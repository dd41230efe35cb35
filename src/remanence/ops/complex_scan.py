"""Diagonal recurrences with complex or signed coefficients. Axes: B batch, T time, D features, N modes per feature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.errors import ShapeError, expect
from remanence.ops import steps
from remanence.ops.decay import recurrent_dtype, second_order
from remanence.ops.taps import tapped
from remanence.state import State

kernels = steps.Kernels("complex_scan_kernels")


def complex_scan_reference(a: Tensor, b: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """The definition: h_t = a_t ⊙ h_{t−1} + b_t."""
    h = _start(b, state)
    out = []
    for t in range(b.shape[1]):
        h = (a if a.ndim == 1 else a[:, t]) * h + b[:, t]
        out.append(h)
    return (torch.stack(out, 1) if out else b), {"h": torch.view_as_real(h) if h.is_complex() else h}


@tapped
def complex_scan(a: Tensor, b: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """h_t = a_t ⊙ h_{t−1} + b_t for every feature by itself, with coefficients that may turn or change sign.

    The coefficients are given as they are: a product of many of them may vanish, and does so without harm, while a
    logarithm would lose signs and zeros. Where all decays are real and positive, `scan` takes their logarithms.

    Shapes: `b` and h [B, T, D], any T ≥ 0; `a` [B, T, D], or [D] when it does not change; both complex, or both real,
    float32 or wider. State {"h": [B, D, 2]} (real and imaginary parts) when complex, {"h": [B, D]} when real.
    Raises: `ShapeError`; `TypeError` when one is complex and the other is not.
    Source: Orvieto et al., Resurrecting Recurrent Neural Networks for Long Sequences, arXiv:2303.06349 (2023).
    """
    expect("complex_scan", "b", b, "batch time features")
    B, T, D = b.shape
    if a.shape not in ((B, T, D), (D,)):
        raise ShapeError(f"complex_scan: a must be {[B, T, D]}, or {[D]} for all tokens, got {list(a.shape)}.")
    if a.dtype != b.dtype:
        raise TypeError(f"complex_scan: a and b must be of one type, got {a.dtype} and {b.dtype}.")
    if T <= 1:
        return complex_scan_reference(a, b, state)
    start = _start(b, state)
    h = (_Scan.apply if b.device.type == "cpu" else by_doubling)(a, b, start)
    last = h[:, -1]
    return h, {"h": torch.view_as_real(last) if last.is_complex() else last}


def complex_scan_carry(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(M, N), both [B, D], with h_end = M ⊙ h_start + N for every state h_start."""
    M = (a ** b.shape[1]).expand_as(b[:, 0]) if a.ndim == 1 else a.prod(1)
    N = complex_scan(a, b)[1]["h"]
    return M, torch.view_as_complex(N.contiguous()) if b.is_complex() else N


def by_doubling(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """The same with tensor operations only, on any device: after step s, h_t has read s tokens back.

    Shapes: a and b [B, T, ...], or a [...]; start [B, ...].
    """
    a = a.expand_as(b)
    h = torch.cat([b[:, :1] + a[:, :1] * start[:, None], b[:, 1:]], 1)
    step = 1
    while step < h.shape[1]:
        h = torch.cat([h[:, :step], h[:, step:] + a[:, step:] * h[:, :-step]], 1)
        a = torch.cat([a[:, :step], a[:, step:] * a[:, :-step]], 1)
        step *= 2
    return h


def _start(b: Tensor, state: State | None) -> Tensor:
    if state is None:
        return b.new_zeros(b.shape[0], b.shape[2])
    return torch.view_as_complex(state["h"].contiguous()).to(b.dtype) if b.is_complex() else state["h"].to(b.dtype)


class _Scan(torch.autograd.Function):
    """Compiled loops over time, forwards for h and backwards for the gradients."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, start: Tensor) -> Tensor:
        a, b, start = (x.resolve_conj().contiguous() for x in (a, b, start))
        h = torch.empty_like(b)
        _over_bands("forward", a, b, start, h)
        ctx.save_for_backward(a, b, start, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, start, h = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return second_order(ctx.needs_input_grad, by_doubling, (a, b, start), grads)
        d_a, d_b, d_start = torch.zeros_like(a), torch.empty_like(b), torch.empty_like(start)
        _over_bands("backward", a, start, h, grads[0].resolve_conj().contiguous(), d_a, d_b, d_start)
        return d_a, d_b, d_start


def _over_bands(name: str, a: Tensor, *tensors: Tensor) -> None:
    # here, because Numba takes half a second that most programs need not pay
    from remanence.ops import compiled, complex_scan_kernels

    kernel = getattr(complex_scan_kernels, name)
    D, size = a.shape[-1], tensors[-2].numel()
    # d_a has the form of a
    given = (x.detach()[None, None] if x.ndim == 1 else x for x in (a, *tensors))
    compiled.spread_bands(kernel, D, size, a.ndim == 1, *given)


def diagonal_ssm_reference(u: Tensor, a: Tensor, read: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """The definition: h_t = a ⊙ h_{t−1} + u_t, y_t = Re Σ_n read_n h_{t,n}, for every feature."""
    x = u.to(recurrent_dtype(u))
    h = a.new_zeros(u.shape[0], *a.shape) if state is None else torch.view_as_complex(state["h"].contiguous())
    y = []
    for t in range(u.shape[1]):
        h = a * h + x[:, t, :, None]
        y.append((read * h).real.sum(-1))
    return (torch.stack(y, 1).to(u.dtype) if y else u), {"h": torch.view_as_real(h)}


def shared_token(
    u: Tensor, a: Tensor, scale: Tensor, B: Tensor, C: Tensor, skip: Tensor, start: Tensor, times: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token without gradients, in one compiled call: h = a ⊙ h + scale ⊙ (B u), y = times · Re(C h) + skip ⊙ u.

    Shapes: u and y [batch, 1, D]; a, scale complex [N] or [batch, 1, N]; B [N, 2, D] and C [D, N, 2], real and
    imaginary parts; skip [D]; start and h [batch, N, 2].
    """
    batch, N, _ = start.shape
    y, h, rows = torch.empty_like(u), steps.blank(start), a.numel() // N
    pairs = (torch.view_as_real(x.resolve_conj()) for x in (a, scale))
    given = u, *pairs, B, C, skip, start, start.new_empty(2 * N), y, h
    steps.run(kernels.shared_token, given, batch, u.shape[2], N, rows, times)
    return y, h


def diagonal_token(u: Tensor, a: Tensor, read: Tensor, skip: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of one token of `diagonal_ssm` and skip ⊙ u, without gradients: u, y [B, 1, D], start and h [B, D, N, 2]."""
    y, h = torch.empty_like(u), steps.blank(start)
    given = u, torch.view_as_real(a), torch.view_as_real(read), skip, start, y, h
    steps.run(kernels.diagonal_token, given, *start.shape[:3])
    return y, h


def chosen_token(steered: Tensor, codes: Tensor, written: Tensor, base: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """One token of S7 without gradients: what is read, code by code [B, 1, R·N], and the next h, start being [B, N].

    Λ = base + moved; steered [B, 1, ≥ 2N] begins with moved and β; codes [B, 1, 2R] are those of writing and of
    reading; written [B, 1, R·N].
    """
    (B, N), R = start.shape, codes.shape[2] // 2
    seen, h = start.new_empty(B, 1, R * N), steps.blank(start)
    steps.run(kernels.chosen_token, (steered, codes, written, base, start, seen, h), B, N, R, steered.shape[2])
    return seen, h


@tapped
def diagonal_ssm(
    u: Tensor, a: Tensor, read: Tensor, state: State | None = None, *, chunk_size: int = 64
) -> tuple[Tensor, State]:
    """h_t = a ⊙ h_{t−1} + u_t and y_t = Re Σ_n read_n h_{t,n}: N complex modes for every feature by itself.

    A convolution with K_l = Re Σ_n read_n aₙˡ, done within chunks by a matrix and between them by `complex_scan`, so
    that the modes are held once per chunk, the cost per token does not grow, and any cut gives the same.
    `chunk_size` changes speed, never the result.

    Shapes: `u` and y [B, T, D], any T ≥ 0; `a`, `read` complex [D, N]; state {"h": [B, D, N, 2]}, float32 or wider.
    Raises: `ShapeError`; `ValueError` when `chunk_size` < 1.
    Source: Gu et al., On the Parameterization and Initialization of Diagonal State Space Models,
    arXiv:2206.11893 (2022), whose FFT this replaces.
    """
    if chunk_size < 1:
        raise ValueError(f"diagonal_ssm: chunk_size must be at least 1, got {chunk_size}.")
    expect("diagonal_ssm", "u", u, "batch time features")
    expect("diagonal_ssm", "a", a, "features modes", features=u.shape[2])
    expect("diagonal_ssm", "read", read, "features modes", features=u.shape[2], modes=a.shape[1])
    B, T, _ = u.shape
    if T <= 1:
        return diagonal_ssm_reference(u, a, read, state)
    h = a.new_zeros(B, *a.shape) if state is None else torch.view_as_complex(state["h"].contiguous()).to(a.dtype)
    x = u.to(recurrent_dtype(u))
    size = min(chunk_size, T)
    powers = _powers(a, size)
    whole = T // size * size
    y, h = _by_chunks(x[:, :whole], powers, read, h, size)
    if whole < T:
        rest, h = _by_chunks(x[:, whole:], powers, read, h, T - whole)
        y = torch.cat([y, rest], 1)
    return y.to(u.dtype), {"h": torch.view_as_real(h)}


def _powers(a: Tensor, most: int) -> Tensor:
    """a⁰ to a^most along a new last axis, by products: exp(l · log a) would lose the phase's digits as l grows."""
    powers = torch.stack([torch.ones_like(a), a], -1)
    while powers.shape[-1] <= most:
        powers = torch.cat([powers, powers[..., 1:] * powers[..., -1:]], -1)
    return powers[..., : most + 1]


def _by_chunks(u: Tensor, powers: Tensor, read: Tensor, h: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Whole chunks of `size` tokens: y [B, T, D] and the last h [B, D, N]."""
    B, T, D = u.shape
    kernel = torch.einsum("dn,dnl->dl", read, powers[..., :size]).real
    inside = F.pad(kernel.flip(-1), (0, size - 1)).unfold(-1, size, 1).flip(1)  # [D, size, size], K_{i−j} at i ≥ j
    chunks = u.reshape(B * (T // size), size, D).permute(2, 1, 0)  # [D, size, B·n]
    write = torch.view_as_real(powers[..., :size].flip(-1)).transpose(-1, -2).flatten(1, 2)  # [D, 2N, size]
    new = (write @ chunks).unflatten(1, (-1, 2)).permute(3, 0, 1, 2).reshape(B, T // size, -1, 2)
    after, _ = complex_scan(
        powers[..., size].flatten(), torch.view_as_complex(new.contiguous()), {"h": torch.view_as_real(h.flatten(1))}
    )
    before = torch.cat([h.flatten(1)[:, None], after[:, :-1]], 1)
    seen = torch.view_as_real(before).reshape(-1, D, 2 * h.shape[2]).permute(1, 2, 0)  # [D, 2N, B·n]
    turned = (read[..., None] * powers[..., 1 : size + 1]).conj().resolve_conj()  # Re(c h) = Re c Re h − Im c Im h
    out = torch.view_as_real(turned).permute(0, 2, 1, 3).flatten(2)  # [D, size, 2N]
    y = inside @ chunks + out @ seen
    return y.permute(2, 1, 0).reshape(B, T, D), after[:, -1].unflatten(-1, h.shape[1:])
