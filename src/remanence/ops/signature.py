"""The signature of a path: all its iterated integrals up to a depth. Axes: B batch, T time, D channels."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.errors import expect
from remanence.ops.decay import recurrent_dtype
from remanence.ops.taps import tapped
from remanence.state import State


def signature_reference(dX: Tensor, depth: int, state: State | None = None) -> tuple[Tensor, State]:
    """The definition by Chen's rule: S_t = S_{t−1} ⊗ exp(dX_t), exp(x) = (x, x⊗x/2!, x⊗x⊗x/3!, ...)."""
    S = _start(dX, depth, state)
    out = []
    for t in range(dX.shape[1]):
        S = chen(S, _straight(dX[:, t].to(S.dtype), depth), dX.shape[2])
        out.append(S)
    return (torch.stack(out, 1) if out else S[:, None][:, :0]), {"S": S}


@tapped
def signature(dX: Tensor, depth: int, state: State | None = None, *, chunk_size: int = 64) -> tuple[Tensor, State]:
    """Signatures of all prefixes of the piecewise straight path with increments `dX`.

    Level k, k = 1 .. depth, holds the D^k iterated integrals ∫dX^{i₁} … dX^{i_k} in order of i₁, then i₂, ...; the
    levels stand one after the other (level 0 is always 1 and left out). Signatures of pieces are joined by `chen`.

    Shapes: `dX` [B, T, D], any T ≥ 0; S [B, T, D + D² + … + D^depth]; state {"S": [B, the same]}, float32 or wider.
    Raises: `ShapeError`; `ValueError` for a depth below 1.
    Source: Chen 1957, Integration of paths; its place in recurrences: arXiv:2402.19047 (2024).
    """
    expect("signature", "dX", dX, "batch time channels")
    if depth < 1:
        raise ValueError(f"signature: depth must be at least 1, got {depth}.")
    S = _start(dX, depth, state)
    out = [S[:, None][:, :0]]
    for piece in dX.to(S.dtype).split(chunk_size, 1):
        prefix = _straight(piece, depth)
        step = 1
        while step < piece.shape[1]:
            prefix = torch.cat([prefix[:, :step], chen(prefix[:, :-step], prefix[:, step:], dX.shape[2])], 1)
            step *= 2
        out.append(chen(S[:, None].expand_as(prefix), prefix, dX.shape[2]))
        S = out[-1][:, -1] if piece.shape[1] else S
    return torch.cat(out, 1), {"S": S}


def chen(first: Tensor, second: Tensor, channels: int) -> Tensor:
    """The signature of two paths, one after the other: level n is Σ_k first_k ⊗ second_{n−k}. [..., size] each."""
    a, b = levels(first, channels), levels(second, channels)
    out = []
    for n in range(len(a)):
        level = a[n] + b[n]
        for k in range(n):
            level = level + (a[k][..., :, None] * b[n - 1 - k][..., None, :]).flatten(-2)
        out.append(level)
    return torch.cat(out, -1)


def levels(S: Tensor, channels: int) -> list[Tensor]:
    """The levels of a signature: [..., D], [..., D²], ..."""
    sizes = [channels]
    while sum(sizes) < S.shape[-1]:
        sizes.append(channels * sizes[-1])
    return list(S.split(sizes, -1))


def _straight(dX: Tensor, depth: int) -> Tensor:
    """exp(x): the signature of a straight line."""
    parts = [dX]
    for k in range(2, depth + 1):
        parts.append((parts[-1][..., :, None] * dX[..., None, :]).flatten(-2) / k)
    return torch.cat(parts, -1)


def _start(dX: Tensor, depth: int, state: State | None) -> Tensor:
    dtype, D = recurrent_dtype(dX), dX.shape[2]
    size = sum(D**k for k in range(1, depth + 1))
    return dX.new_zeros(dX.shape[0], size, dtype=dtype) if state is None else state["S"].to(dtype)
