"""The product of every projection: x Wᵀ + b."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b. Shapes: x [..., in], weight [out, in], bias [out] -> [..., out]."""
    return F.linear(x, weight, bias)
