"""Selective recurrences as readers of a path's signature: the equations whose state is the signature itself."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.catalogue import card
from remanence.ops.linear_cde import linear_cde
from remanence.ops.signature import levels


@card(
    "selective-ssm-signature",
    kind="diagnostic",
    says="The dense input-driven recurrence whose state is the path's signature, and the areas that it encloses.",
    source="arXiv:2402.19047",
)
def signature_cde(channels: int, depth: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(A [channels, N, N], h_0 [N]) of the linear equation whose state is (1, the signature up to `depth`).

    Dense transitions are what it takes: A_i moves word w to word wi. With `ops.linear_cde` from h_0 it agrees with
    `ops.signature`. Diagonal transitions commute, so that one homogeneous diagonal layer knows the end point only; two
    of them with a linear map between recover the rest.

    Raises: `ValueError` for sizes below 1. Source: arXiv:2402.19047 (2024).
    """
    if channels < 1 or depth < 1:
        raise ValueError(f"signature_cde: channels and depth must be at least 1, got {channels}, {depth}.")
    sizes = [channels**k for k in range(depth + 1)]
    A = torch.zeros(channels, sum(sizes), sum(sizes), dtype=dtype)
    below = 0
    for k in range(depth):
        above = below + sizes[k]
        for word in range(sizes[k]):
            for i in range(channels):
                A[i, above + word * channels + i, below + word] = 1
        below = above
    start = torch.zeros(sum(sizes), dtype=dtype)
    start[0] = 1
    return A, start


def area(S: Tensor, channels: int = 2) -> Tensor:
    """The signed areas that a path encloses with its chord, from its signature: [..., channels, channels], skew."""
    two = levels(S, channels)[1].unflatten(-1, (channels, channels))
    return (two - two.mT) / 2


def stacked_area(dX: Tensor) -> Tensor:
    """The area of a two-dimensional path by two diagonal layers with a linear map between them. [B, T, 2] -> [B].

    The first adds up the path, which needs no transition at all; the second adds up x dy − y dx, whose driver is the
    first's output times the step: what a selective layer's input map does.
    """
    zero = dX.new_zeros(2, 2)
    path, _ = linear_cde(dX, zero, torch.eye(2, dtype=dX.dtype))
    middle = path - dX / 2
    return (middle[..., 0] * dX[..., 1] - middle[..., 1] * dX[..., 0]).sum(1) / 2
