"""What exact regression at test time finds that a step or a sum does not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import Check, proof
from remanence.ops.least_squares import least_squares, least_squares_reference

PAIRS, WIDTH = 64, 16


def normals(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alike() -> tuple[Tensor, Tensor]:
    """64 unit keys that share a direction twice as strong as what tells them apart, and a linear map's values."""
    key = F.normalize(normals(0, PAIRS, WIDTH) + 2 * normals(1, WIDTH), dim=-1)
    return key[None, None], (key @ normals(2, WIDTH, WIDTH))[None, None]


@proof(
    "mesa",
    "Told 64 pairs of a linear map under keys that resemble each other, it recalls them to 1e-6 of their size, and 16 "
    "steps of its solver in 16 features are exact; its control, a delta rule, misses 1e-3.",
)
def mesa() -> tuple[Check, Check]:
    key, value = alike()
    one = torch.ones(1, 1, PAIRS, dtype=torch.float64)
    nothing = torch.zeros(1, 1, WIDTH, WIDTH, dtype=torch.float64)

    def recall(G: Tensor, H: Tensor, ridge: Tensor) -> float:
        read = key @ torch.linalg.solve(H + torch.diag_embed(ridge), G)
        return float((read - value).norm() / value.norm())

    ridge = torch.full((1, WIDTH), 1e-9, dtype=torch.float64)
    _, told = least_squares(key, key, value, one, ridge)
    wide = torch.ones(1, WIDTH, dtype=torch.float64)
    decay = torch.full_like(one, -0.05)
    exact = least_squares_reference(key, key, value, one, wide, decay)[0]
    solved = least_squares(key, key, value, one, wide, decay, steps=WIDTH)[0]
    gap = float((solved - exact).norm() / exact.norm())
    error = recall(told["G"], told["H"], ridge)
    _, state = ops.gated_delta_rule(key, key, value, one)
    control = recall(state["S"], nothing, torch.ones_like(ridge))
    return (
        Check(error <= 1e-6 and gap <= 1e-8, f"error {error:.0e}; 16 steps are off by {gap:.0e}"),
        Check(control <= 1e-3, f"error {control:.3f} with a step per token"),
    )
