"""The delta rule as a differential equation that is solved exactly over each step."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.catalogue import card
from remanence.memory.deltanet import DeltaNet


@card(
    "efla",
    kind="memory",
    says="A delta rule that cannot overshoot: its differential equation is solved exactly over each step.",
    source="arXiv:2512.12602",
    small={"dim": 8, "heads": 2},
    parents=("deltanet",),
    change="the exact step in place of Euler's, with keys of any length",
)
class EFLA(DeltaNet):
    r"""$\dot S = k (v - S^\top k)^\top$ over a time β: a delta rule with $\tilde β = (1 - e^{-β‖k‖²}) / ‖k‖²$.

    The longer a key, the more of the old value goes; keys are therefore not normalised, and no key makes the state
    grow. The transition's eigenvalue $e^{-β‖k‖²}$ is positive: it cannot reflect.

    Args: as `DeltaNet`.

    Shapes: as `DeltaNet`.
    Raises: as `GatedDeltaNet`.
    Source: Error-Free Linear Attention is a Free Lunch (2025), arXiv:2512.12602.
    """

    exact = True

    def write(self, k: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        square = k.square().sum(-1).clamp(min=1e-12)  # as the key vanishes, the exact strength becomes β
        return k, -torch.expm1(-beta * square) / square
