"""Linear differential equations driven by a path. Axes: B batch, T time, D channels of the path, N state features."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.errors import ShapeError, expect
from remanence.ops.decay import recurrent_dtype
from remanence.ops.taps import tapped
from remanence.state import State


def linear_cde_reference(
    dX: Tensor, A: Tensor, B: Tensor | None = None, state: State | None = None
) -> tuple[Tensor, State]:
    """The definition: h solves dh = Σ_i A_i h dX^i + B dX along the straight line of each step."""
    h = _start(dX, A, state)
    out = []
    for t in range(dX.shape[1]):
        P, u = _steps(dX[:, t : t + 1], A, B)
        h = _times(P[:, 0], h, A) + u[:, 0]
        out.append(h)
    return (torch.stack(out, 1) if out else h[:, None][:, :0]), {"h": h}


@tapped
def linear_cde(
    dX: Tensor, A: Tensor, B: Tensor | None = None, state: State | None = None, *, chunk_size: int = 64
) -> tuple[Tensor, State]:
    """h_t = e^{M_t} h_{t−1} + φ(M_t) B dX_t with M_t = Σ_i A_i dX_t^i and φ(M) = (e^M − 1)/M.

    This is dh = Σ_i A_i h dX^i + B dX solved exactly along straight steps: a recurrence whose transition the input
    controls. Add time as a channel of the path if its speed is to matter.

    Shapes: `dX`, increments of the path, [B, T, D], any T ≥ 0; `A` [D, N] (diagonal) or [D, N, N]; `B` None or [N, D];
    h [B, T, N], state {"h": [B, N]} (zero where none is given), float32 or wider. Raises: `ShapeError`.
    Source: Cirone et al., Theoretical Foundations of Deep Selective State-Space Models, arXiv:2402.19047 (2024).
    """
    expect("linear_cde", "dX", dX, "batch time channels")
    D, N = dX.shape[2], A.shape[1] if A.ndim > 1 else 0
    if A.shape not in ((D, N), (D, N, N)):
        raise ShapeError(f"linear_cde: A must be [{D}, N] (diagonal) or [{D}, N, N], got {list(A.shape)}.")
    if B is not None:
        expect("linear_cde", "B", B, "features channels", features=N, channels=D)
    h = _start(dX, A, state)
    out = [h[:, None][:, :0]]
    for piece in dX.split(chunk_size, 1):
        P, u = _prefixes(piece, A, B)
        out.append(_times(P, h[:, None], A) + u)
        h = out[-1][:, -1] if piece.shape[1] else h
    return torch.cat(out, 1), {"h": h}


def linear_cde_carry(dX: Tensor, A: Tensor, B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(M, n) with h_end = M h_start + n: M [B, N] where A is diagonal, else [B, N, N]; n [B, N]."""
    zero = _start(dX, A, None)
    n = linear_cde(dX, A, B)[1]["h"]
    if A.ndim == 2:
        return linear_cde(dX, A, None, {"h": zero + 1})[1]["h"], n
    columns = torch.eye(A.shape[1], dtype=zero.dtype, device=zero.device)
    ends = [linear_cde(dX, A, None, {"h": c.expand_as(zero)})[1]["h"] for c in columns]
    return torch.stack(ends, -1), n


def _start(dX: Tensor, A: Tensor, state: State | None) -> Tensor:
    dtype = recurrent_dtype(dX)
    return dX.new_zeros(dX.shape[0], A.shape[1], dtype=dtype) if state is None else state["h"].to(dtype)


def _times(P: Tensor, h: Tensor, A: Tensor) -> Tensor:
    return P * h if A.ndim == 2 else (P @ h[..., None])[..., 0]


def _steps(dX: Tensor, A: Tensor, B: Tensor | None) -> tuple[Tensor, Tensor]:
    """e^{M_t} and φ(M_t) B dX_t of each step."""
    dX, A = dX.to(recurrent_dtype(dX)), A.to(recurrent_dtype(dX))
    M = torch.einsum("btd,d...->bt...", dX, A)
    drive = None if B is None else dX @ B.to(dX).mT
    if A.ndim == 2:
        small = M.abs() < 1e-4
        safe = torch.where(small, 1.0, M)
        phi = torch.where(small, 1 + M / 2 + M * M / 6 + M**3 / 24, torch.expm1(safe) / safe)
        return M.exp(), torch.zeros_like(M) if drive is None else phi * drive
    if drive is None:
        return torch.linalg.matrix_exp(M), torch.zeros_like(M[..., 0])
    # exp [[M, c], [0, 0]] = [[e^M, φ(M) c], [0, 1]], also where M is singular
    wide = torch.nn.functional.pad(torch.cat([M, drive[..., None]], -1), (0, 0, 0, 1))
    whole = torch.linalg.matrix_exp(wide)
    return whole[..., :-1, :-1], whole[..., :-1, -1]


def _prefixes(dX: Tensor, A: Tensor, B: Tensor | None) -> tuple[Tensor, Tensor]:
    """(P, u) of each prefix of the piece, h_t = P_t h_0 + u_t, by doubling."""
    P, u = _steps(dX, A, B)
    step = 1
    while step < dX.shape[1]:
        late = P[:, step:]
        u = torch.cat([u[:, :step], _times(late, u[:, :-step], A) + u[:, step:]], 1)
        P = torch.cat([P[:, :step], late * P[:, :-step] if A.ndim == 2 else late @ P[:, :-step]], 1)
        step *= 2
    return P, u
