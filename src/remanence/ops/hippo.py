"""Online projection of a history onto Legendre polynomials. Axes: B batch, T time, F features, N coefficients."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.errors import expect
from remanence.ops import steps
from remanence.ops.decay import recurrent_dtype, second_order
from remanence.ops.taps import tapped
from remanence.state import State

kernels = steps.Kernels("hippo_kernels")
CHUNK = 64
"""Tokens that one table of weights serves; tables are tokens × tokens × N numbers."""


def hippo_matrices(measure: str, order: int) -> tuple[Tensor, Tensor]:
    """(A [N, N], B [N]) in float64: `legs` weighs all of the history alike, `legt` a window of length 1.

    The dynamics are dc/dt = (A c + B f)/t for `legs` and dc/dt = A c + B f for `legt`.
    Raises: `ValueError` for another measure, or an order below 1. Source: HiPPO, arXiv:2008.07669 (2020).
    """
    if measure not in ("legs", "legt") or order < 1:
        raise ValueError(f"HiPPO: measure must be 'legs' or 'legt' and order at least 1, got {measure!r}, {order}.")
    n = torch.arange(order, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    outer = root[:, None] * root
    if measure == "legs":
        return -outer.tril(-1) - torch.diag(n + 1), root
    sign = torch.where(n[:, None] >= n, 1.0, (-1.0) ** (n[:, None] - n))
    return -outer * sign, root


def legs_reference(f: Tensor, order: int, state: State | None = None) -> tuple[Tensor, State]:
    """The definition: c_t = E c_{t−1} + A⁻¹(E − I) B f_t with E = exp(A ln(t/(t−1))), and E = 0 at t = 1."""
    A, B = hippo_matrices("legs", order)
    c, position = _start(f, order, state)
    out = []
    for i in range(f.shape[1]):
        t = (position + i + 1).double()
        step = torch.where(t > 1, (t / (t - 1)).log(), 0.0)
        E = torch.linalg.matrix_exp(A * step[:, None, None]) * (t > 1)[:, None, None]
        write = torch.linalg.solve_triangular(A, (E - torch.eye(order).double()) @ B[:, None], upper=False)
        c = c @ E.mT.to(c.dtype) + f[:, i, :, None] * write.mT.to(c.dtype)
        out.append(c)
    return (torch.stack(out, 1) if out else f[..., None].expand(*f.shape, order)), {
        "c": c,
        "position": position + f.shape[1],
    }


@tapped
def legs(f: Tensor, order: int, state: State | None = None) -> tuple[Tensor, State]:
    """Coefficients of the best polynomial fit to all of f_1..f_t, for every t (HiPPO-LegS), without any error of steps.

    f is held constant within each step; c_t is then its exact projection, and the part of the history already in c_{t0}
    is carried from [0, t0] to [0, t] by quadrature that is exact for polynomials: no matrix exponential, no inverse.
    The history is read back by `legs_read`.

    Shapes: `f` [B, T, F], any T ≥ 0; c [B, T, F, N] with N = `order`; state {"c": [B, F, N], "position": int64 [B]}:
    how many tokens were read. c has float32 or wider. Raises: `ShapeError`, `ValueError` for an order below 1.
    Source: HiPPO, arXiv:2008.07669 (2020).
    """
    expect("legs", "f", f, "batch time features")
    hippo_matrices("legs", order)
    c, position = _start(f, order, state)
    out = []
    for piece in f.to(c.dtype).split(CHUNK, 1):
        n = piece.shape[1]
        start, row = _distinct(position)
        edges = (start[:, None] + torch.arange(n + 1, device=f.device)).double()
        ratio = (edges[:, None, :] / edges[:, 1:, None]).clamp(max=1)  # of step borders j to times t: [rows, n, n + 1]
        from_new = _integrals(ratio, order).diff(dim=-1)  # [rows, n, N, n]: zero for what is still to come
        from_old = _stretch(edges[:, :1] / edges[:, 1:], order)  # [rows, n, N, N]
        weights = torch.cat([from_new, from_old], -1).to(c.dtype)[row]
        held = torch.cat([piece.mT, c @ _nodes(order)[2].mT.to(c)], -1)  # new values, and old ones at the nodes
        c_all = torch.einsum("btnj,bfj->btfn", weights, held)
        out.append(c_all)
        if n:
            c = c_all[:, -1]
        position = position + n
    return torch.cat(out, 1), {"c": c, "position": position}


def legs_carry(f: Tensor, order: int, position: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(M [B, N, N], L [B, F, N]) with c_end = c_start Mᵀ + L, for every c_start at `position` (int64 [B], else 0)."""
    empty, zero = _start(f, order, None)
    start = zero if position is None else position
    c = legs(f, order, {"c": empty, "position": start})[1]["c"]
    end = (start + f.shape[1]).double()
    ratio = torch.where(end > 0, start / end.clamp(min=1), 1.0)
    return (_stretch(ratio, order) @ _nodes(order)[2].to(ratio)).to(c.dtype), c


def projected_cell(
    x: Tensor, read: Tensor, write: Tensor, bias: Tensor, A: Tensor, b: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """A gated cell that reads the coefficients of what it wrote: every h_t, and the last c.

    [g, u] = x_t + R [h_{t−1}, c_{t−1}];  h_t = h_{t−1} + σ(g) ⊙ (tanh u − h_{t−1});
    c_t = A_t c_{t−1} + (W h_t + bias) b_t.

    Shapes: x [B, T, 2H], T ≥ 1; `read` R [2H, H + C·N], `write` W [C, H], `bias` [C]; `A` [B, T, N, N] and `b`
    [B, T, N], which have no gradients; h [B, H], c [B, C, N], all in one precision -> [B, T, H], [B, C, N].
    Source: the recurrent unit of HiPPO, arXiv:2008.07669 (2020), §2.4.
    """
    if x.shape[1] > 1 and x.device.type == "cpu":
        return _Cell.apply(x, read, write, bias, A, b, h, c)
    return _cell_by_tokens(x, read, write, bias, A, b, h, c)


def projected_token(
    x: Tensor,
    read: Tensor,
    write: Tensor,
    bias: Tensor,
    fixed: tuple[Tensor, Tensor] | None,
    position: Tensor,
    h: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor]:
    """One token of `projected_cell` without gradients, in one compiled call: the next h and c.

    The step is `fixed`, float64 [N, N] and [N], or else that of LegS after `position` tokens (int64 [B]).
    """
    (B, C, N), H = c.shape, h.shape[1]
    A, b = fixed or (None, None)
    exact, ends = (position.contiguous(), *_nodes(N), A, b), (steps.blank(h), steps.blank(c))
    addresses = [0 if p is None else p.data_ptr() for p in exact]
    steps.run(kernels.token, (x, read, write, bias, h, c, *ends), *addresses, B, H, C, N)
    return ends


def _cell_by_tokens(
    x: Tensor, read: Tensor, write: Tensor, bias: Tensor, A: Tensor, b: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, in differentiable operations on any device."""
    out = []
    for t in range(x.shape[1]):
        gate, candidate = (x[:, t] + torch.cat([h, c.flatten(1)], 1) @ read.mT).chunk(2, -1)
        h = torch.lerp(h, candidate.tanh(), gate.sigmoid())
        c = c @ A[:, t].mT + (h @ write.mT + bias)[..., None] * b[:, t, None]
        out.append(h)
    return torch.stack(out, 1), c


class _Cell(torch.autograd.Function):
    """The same compiled for the CPU; the gradients of the maps are single products over all tokens."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, read: Tensor, write: Tensor, bias: Tensor, A: Tensor, b: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        from remanence.ops import hippo_kernels as kernels  # here, because Numba takes half a second

        (B, T, _), H = x.shape, h.shape[1]
        end_h, end_c = (part.clone(memory_format=torch.contiguous_format) for part in (h, c))
        out, joints, gates = x.new_empty(B, T, H), x.new_empty(T, B, read.shape[1]), x.new_empty(T, B, 2 * H)
        inputs = (z.detach().contiguous() for z in (x, read, write, bias, A, b))
        kernels.forward(*(z.numpy() for z in (*inputs, end_h, end_c, out, joints, gates)))
        ctx.save_for_backward(x, read, write, bias, A, b, h, c, out, joints, gates)
        return out, end_c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from remanence.ops import hippo_kernels as kernels

        *inputs, out, joints, gates = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return second_order(ctx.needs_input_grad, _cell_by_tokens, inputs, grads)
        _, read, write, _, A, b, h, _ = inputs
        d_out, d_c = grads[0].contiguous(), grads[1].clone(memory_format=torch.contiguous_format)
        d_h, d_z, d_f = h.new_zeros(h.shape), torch.empty_like(gates), gates.new_empty(*gates.shape[:2], len(write))
        given = (z.detach().contiguous() for z in (read, write, A, b, joints, gates, d_out))
        kernels.backward(*(z.numpy() for z in (*given, d_h, d_c, d_z, d_f)))
        d_read = d_z.flatten(0, 1).mT @ joints.flatten(0, 1)
        d_write = d_f.flatten(0, 1).mT @ out.transpose(0, 1).flatten(0, 1)
        return d_z.transpose(0, 1), d_read, d_write, d_f.sum((0, 1)), None, None, d_h, d_c


def legs_transitions(position: Tensor, count: int, order: int) -> tuple[Tensor, Tensor]:
    """The exact steps c_t = A_t c_{t−1} + b_t f_t for the `count` tokens after `position` (int64 [B]), in float64.

    Shapes: A [B, count, N, N], b [B, count, N].
    """
    start, row = _distinct(position)
    t = (start[:, None] + torch.arange(1, count + 1, device=position.device)).double()
    ratio = (t - 1) / t
    ends = torch.stack([ratio, torch.ones_like(ratio)], -1)
    return (_stretch(ratio, order) @ _nodes(order)[2].to(ratio))[row], _integrals(ends, order).diff(dim=-1)[..., 0][row]


def legs_read(c: Tensor, at: Tensor) -> Tensor:
    """The history that the coefficients hold, at fractions `at` of the time passed (0 its beginning, 1 now).

    Shapes: c [..., N], at [points] in [0, 1] -> [..., points].
    """
    return c @ _basis(at.double(), c.shape[-1]).to(c.dtype)


def _basis(u: Tensor, order: int) -> Tensor:
    """√(2n + 1) P_n(2u − 1), the orthonormal polynomials on [0, 1], n < order: [..., points] -> [..., N, points]."""
    x = 2 * u - 1
    P = [torch.ones_like(x), x]
    for n in range(1, order - 1):
        P.append(torch.addcmul(P[n - 1] * (-n / (n + 1)), x, P[n], value=(2 * n + 1) / (n + 1)))
    root = (2 * torch.arange(order, dtype=u.dtype, device=u.device) + 1).sqrt()
    return root[:, None] * torch.stack(P[:order], -2)


def _integrals(u: Tensor, order: int) -> Tensor:
    """The integrals of the basis from 0 to u: [..., points] -> [..., N, points]."""
    x, n = 2 * u - 1, torch.arange(order, dtype=u.dtype, device=u.device)
    P = _basis(u, order + 1) / (2 * torch.arange(order + 1, dtype=u.dtype, device=u.device) + 1).sqrt()[:, None]
    before = torch.cat([-torch.ones_like(x)[..., None, :], P[..., :-2, :]], -2)
    return (P[..., 1:, :] - before) / (2 * (2 * n + 1).sqrt())[:, None]


def _stretch(ratio: Tensor, order: int) -> Tensor:
    """From a history's values at the nodes to its coefficients when it fills only [0, ratio]: [...] -> [..., N, N]."""
    at, weight, _ = _nodes(order)
    return ratio[..., None, None] * _basis(ratio[..., None] * at.to(ratio.device), order) * weight.to(ratio.device)


@functools.cache
def _nodes(order: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gauss–Legendre nodes and weights on [0, 1], and the matrix from coefficients to values at the nodes."""
    x, w = np.polynomial.legendre.leggauss(order)
    at = torch.from_numpy((x + 1) / 2)
    return at, torch.from_numpy(w / 2), _basis(at, order).mT.contiguous()


def _distinct(position: Tensor) -> tuple[Tensor, Tensor]:
    """The different positions, and which of them each row has: rows that go in step share their tables."""
    return position.unique(return_inverse=True)


def _start(f: Tensor, order: int, state: State | None) -> tuple[Tensor, Tensor]:
    if state is not None:
        return state["c"], state["position"]
    c = f.new_zeros(f.shape[0], f.shape[2], order, dtype=recurrent_dtype(f))
    return c, c.new_zeros(f.shape[0], dtype=torch.int64)
