"""The continuum memory system: a chain of channel mixers, each of which learns at its own pace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.memory.linear import Linear
from remanence.memory.parts import RMSNorm


class Perceptron(nn.Module):
    """z + W₂ GELU(W₁ norm(z)). Shapes: [..., dim] to [..., dim]; `expand` is the hidden width over `dim`."""

    def __init__(self, dim: int, expand: float = 4.0):
        super().__init__()
        hidden = max(1, int(dim * expand))
        self.norm = RMSNorm(dim)
        self.inner = Linear(dim, hidden, bias=False)
        self.out = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.gelu(self.inner(self.norm(x))))


@card(
    "continuum-memory",
    covers="nested-learning",
    kind="tool",
    says="Channel mixers in a chain, each with its own update period: from quick memories to slow ones.",
    source="arXiv:2512.24695",
    small={"dim": 8, "periods": (1, 4)},
)
class ContinuumMemory(nn.Module):
    r"""$y = M^{(k)}(… M^{(1)}(x))$, where level ℓ changes once in $C^{(ℓ)}$ steps, by all gradients of that time.

    The levels are ordinary modules. What makes them a memory is the optimiser that `remanence.optim.clocked` builds of
    their periods: it gathers the gradients of the outer loss, also while the model serves and learns. One level and
    an endless period is the usual mixer of a transformer; levels with a rate of 0 are the frozen model.

    Args:
        dim: features of input and output.
        periods: $C^{(1)}, …, C^{(k)}$ in optimiser steps.
        combine: `"sequential"`, or `"independent"`: $Σ_ℓ w_ℓ M^{(ℓ)}(x)$ with learned $w$, 1/k each at first.
        nested: let each update of a level restart the one before it, which needs increasing periods.
        follow: in [0, 1]: at a restart a level's start moves by this share to where the level ended, so that it is
            learned at the slower pace; 0 keeps the first start.
        level: makes one level. A trained mixer's copies retrofit a model: `level=lambda: copy.deepcopy(mixer)`.

    Shapes: x and y [..., dim].
    Raises: `ValueError` for no period, one below 1, nested ones that do not increase, or an unknown `combine`.
    Source: Nested Learning (2025), arXiv:2512.24695, whose periods are counted in tokens; a step here is one segment.
    """

    def __init__(
        self,
        dim: int,
        periods: Sequence[int] = (1, 4, 16),
        *,
        combine: Literal["sequential", "independent"] = "sequential",
        nested: bool = False,
        follow: float = 0.0,
        level: Callable[[], nn.Module] | None = None,
    ):
        super().__init__()
        if not periods or min(periods) < 1:
            raise ValueError(f"ContinuumMemory: periods must be counts of steps of at least 1, got {tuple(periods)}.")
        if nested and list(periods) != sorted(set(periods)):
            raise ValueError(f"ContinuumMemory: nested periods must increase, got {tuple(periods)}.")
        if combine not in ("sequential", "independent"):
            raise ValueError(f"ContinuumMemory: combine must be 'sequential' or 'independent', got {combine!r}.")
        self.dim, self.periods, self.combine = dim, tuple(periods), combine
        self.levels = nn.ModuleList(level() if level else Perceptron(dim) for _ in periods)
        for i, made in enumerate(self.levels):
            made.update_period = periods[i]  # type: ignore[assignment]
            if nested and i + 1 < len(periods):
                made.restart_period = periods[i + 1]  # type: ignore[assignment]
                made.restart_follow = follow  # type: ignore[assignment]
        if combine == "independent":
            self.weights = nn.Parameter(torch.full((len(periods),), 1 / len(periods)))

    def forward(self, x: Tensor) -> Tensor:
        if self.combine == "independent":
            return torch.stack([level(x) for level in self.levels], -1) @ self.weights
        for level in self.levels:
            x = level(x)
        return x
