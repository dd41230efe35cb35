"""What a network learns at test time that a matrix cannot."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.catalogue import Check, proof
from remanence.ops.fast_weight import fast_weight, fast_weight_state

TOKENS, LAST = 4000, 500


@proof(
    "titans",
    "Reading 4000 pairs of a quadratic map once, a network memory ends with a prequential error of at most 0.35 of the "
    "target's variance; its control, a matrix under the same rule, stays above 0.95.",
)
def titans() -> tuple[Check, Check]:
    g = torch.Generator().manual_seed(0)
    key = F.normalize(torch.randn(TOKENS, 8, generator=g, dtype=torch.float64), dim=-1)
    A, B = (F.normalize(torch.randn(8, 8, generator=g, dtype=torch.float64), dim=-1) for _ in range(2))
    value = (key @ A.mT) * (key @ B.mT)
    value = (value - value.mean(0)) / value.std(0)
    network = [torch.randn(64, 8, generator=g, dtype=torch.float64), torch.zeros(8, 64, dtype=torch.float64)]
    matrix = [torch.zeros(8, 8, dtype=torch.float64)]
    errors = _prequential(network, 3 * key, value, 0.005), _prequential(matrix, key, value, 0.1)
    deep, flat = (Check(e <= 0.35, f"error {e:.3f} of the variance") for e in errors)
    return deep, Check(flat.holds or errors[1] < 0.95, flat.says)


@torch.no_grad()
def _prequential(weights: list[Tensor], key: Tensor, value: Tensor, step: float) -> float:
    """Mean squared error of each token's prediction before it was written, over the last tokens."""
    state = fast_weight_state([W[None] for W in weights], 1, momentum=False)
    k, v = key[None, None], value[None, None]
    theta = k.new_full(k.shape[:3], step)
    # A read comes after the write of its own token: asked for the key to come, it has not yet seen that key's value.
    y, _ = fast_weight(k[:, :, 1:], k[:, :, :-1], v[:, :, :-1], theta[:, :, 1:], state, chunk_size=1)
    return (y - v[:, :, 1:])[:, :, -LAST:].square().mean().item()
