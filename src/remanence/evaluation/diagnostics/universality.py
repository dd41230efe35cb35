"""What a state still knows of its input: recovery by least squares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.state import flatten

Reader = Callable[[Tensor], Tensor]
"""From inputs [batch, time, dim] to final states [batch, numbers], real or complex."""


@dataclass(frozen=True)
class Reconstruction:
    """How well the input is recovered: relative `error`, the same with `noisy_error` when the state is disturbed,
    the `condition` number of the map from inputs to states, and its `rank` of `unknowns` at the working precision."""

    error: float
    noisy_error: float
    condition: float
    rank: int
    unknowns: int


@card(
    "linear-rnn-universality",
    kind="diagnostic",
    says="Recovers the whole input from the final state by least squares, and says how well that is conditioned.",
    source="arXiv:2307.11888",
)
def reconstruct(
    memory: Memory | Reader, T: int, *, dim: int | None = None, noise: float = 1e-6, seed: int = 0
) -> Reconstruction:
    """Read a random sequence of `T` tokens, then recover it from the final state alone.

    The map from inputs to states is measured by impulses, so it must be affine: true of memories whose gates do not
    look at the input. A recurrence that keeps its input without loss is all the recurrence that universality needs:
    the maps between positions do the rest. It needs at least as many numbers of state as the input has, and in
    finite precision the condition number is what limits it.

    Args:
        memory: a layer, or any function from inputs [batch, T, dim] to final states [batch, numbers].
        dim: features of the input; those of the layer, or 1.
        noise: standard deviation of what is added to the state for `noisy_error`.

    Raises: `ValueError` if the final state is not an affine function of the input.
    Source: On the Universality of Linear Recurrences Followed by Nonlinear Projections (2023), arXiv:2307.11888.
    """
    width = dim or (memory.dim if isinstance(memory, Memory) else 1)
    dtype = next((p.dtype for p in memory.parameters()), None) if isinstance(memory, Memory) else torch.float64
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(1, T, width, generator=draw, dtype=torch.float64).to(dtype)
    impulses = torch.eye(T * width, dtype=x.dtype).view(-1, T, width)
    with torch.no_grad():
        ends = _read(memory, torch.cat([torch.zeros_like(x), x, impulses]))
    rest, state, columns = ends[0], ends[1], (ends[2:] - ends[0]).mT
    flat = x.flatten()
    if not torch.allclose(columns @ flat + rest, state, rtol=1e-4, atol=1e-4 * float(state.abs().max())):
        raise ValueError(
            "reconstruct: the final state is not an affine function of the input, so no matrix gives it back."
        )
    values = torch.linalg.svdvals(columns)
    small = float(values[0]) * max(columns.shape) * torch.finfo(columns.dtype).eps
    disturbed = state + noise * torch.randn(state.shape, generator=draw, dtype=torch.float64).to(state)

    def error(of: Tensor) -> float:
        found = torch.linalg.lstsq(columns, (of - rest)[:, None], driver="gelsd").solution[:, 0]
        return float((found - flat).norm() / flat.norm())

    least = float(values[-1]) if columns.shape[0] >= columns.shape[1] else 0.0
    condition = float(values[0]) / least if least else float("inf")
    return Reconstruction(error(state), error(disturbed), condition, int((values > small).sum()), columns.shape[1])


def _read(memory: Memory | Reader, x: Tensor) -> Tensor:
    if isinstance(memory, Memory):
        state = flatten(memory(x)[1])
        end = torch.cat([_real(v).flatten(1) for v in state.values() if v.dtype not in (torch.int64, torch.bool)], 1)
    else:
        end = _real(memory(x)).flatten(1)
    return end


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def diagonal(eigenvalues: Tensor) -> Reader:
    """The linear recurrence h ← λ ⊙ h + x of one-feature inputs, with these complex eigenvalues."""

    def read(x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], len(eigenvalues), dtype=eigenvalues.dtype)
        for t in range(x.shape[1]):
            h = eigenvalues * h + x[:, t]
        return h

    return read
