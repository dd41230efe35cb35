"""Newton–Schulz iteration: a matrix's singular values are brought near one, its directions kept."""

from __future__ import annotations

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


def newton_schulz(x: Tensor, steps: int = 5, eps: float = EPS) -> Tensor:
    r"""$X ← x / ‖x‖_F$, then `steps` times $X ← aX + (bB + cB^2)X$, $B = XX^\top$: about $UV^\top$ of $x = UΣV^\top$.

    The coefficients are chosen for speed: singular values that were not tiny end within about (0.6, 1.2), not at one.
    The zero matrix stays zero. In the precision of `x`; its gradient runs through every step.

    Shapes: [..., rows, columns], any batch of matrices; the result has the same shape.
    Raises: `ValueError` for fewer than two axes or `steps` below 1.
    Source: Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024).

    >>> newton_schulz(torch.diag(torch.tensor([4.0, 1.0])), steps=5).diagonal().min() > 0.6
    tensor(True)
    """
    if x.ndim < 2 or steps < 1:
        raise ValueError(f"newton_schulz: a matrix and at least one step are needed, got {list(x.shape)}, {steps=}.")
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    X = x.mT if tall else x
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + eps)
    for _ in range(steps):
        B = X @ X.mT
        X = a * X + (b * B + c * B @ B) @ X
    return X.mT if tall else X
