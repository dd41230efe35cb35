"""Adam that leaves alone what was not fetched."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from remanence.optim.gradient_memory import Remembering, check_rate


class BlockAdam(Remembering):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) for tables of blocks, of which each step touches few.

    A row (along the first axis) whose gradient is zero throughout stays as it is, bit for bit, and so do its moments
    and its own count of steps: what was learned in a block neither decays nor drifts while others are in use. Dense
    and sparse gradients are the same to it.

    Args:
        parameters: tables, one block per row.
        lr: > 0; schedules change `param_groups[0]["lr"]`.
        betas: decays of the two running means, in [0, 1).
        eps: > 0.

    Raises: `ValueError` for numbers out of range.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 3e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
    ):
        check_rate("BlockAdam", eps=eps)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"BlockAdam: betas must lie in [0, 1), got {betas}.")
        self.betas, self.eps = betas, eps
        super().__init__(parameters, lr)

    def memory(self, p: Tensor) -> dict[str, Tensor]:
        return {"first": torch.zeros_like(p), "second": torch.zeros_like(p), "count": p.new_zeros(p.shape[:1])}

    def update(self, p: Tensor, gradient: Tensor, memory: dict[str, Tensor], lr: float) -> None:
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            touched, g = gradient.indices()[0], gradient.values()
            real = g.reshape(len(g), -1).any(1)
            touched, g = touched[real], g[real]
        else:
            touched = gradient.reshape(len(gradient), -1).any(1).nonzero()[:, 0]
            g = gradient[touched]
        if not len(touched):
            return
        memory["count"][touched] += 1
        steps = memory["count"][touched].view(-1, *[1] * (p.ndim - 1))
        moments = []
        for name, value, beta in zip(("first", "second"), (g, g.square()), self.betas, strict=True):
            moment = memory[name][touched].lerp(value, 1 - beta)
            memory[name][touched] = moment
            moments.append(moment / (1 - beta**steps))
        p[touched] -= lr * moments[0] / (moments[1].sqrt() + self.eps)
