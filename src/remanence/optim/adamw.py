"""AdamW without the weight of a compiler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from remanence.errors import CheckpointError


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).

    The arithmetic is PyTorch's fused kernel. `torch.optim.AdamW` computes the same, but loads PyTorch's compiler
    when it is made: about 70 MB of memory and a second of start, dear to a program that stays small for ever.

    Args:
        parameters: what to update; those whose gradient is None are left alone.
        lr: step size, > 0. Schedules change `param_groups[0]["lr"]`.
        betas: decays of the two running means, in [0, 1).
        weight_decay: share of `lr` by which weights shrink at each step; vectors (norms, biases) do not.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        if not lr > 0:
            raise ValueError(f"AdamW: lr must be > 0, got {lr!r}.")
        given = [p for p in parameters if p.requires_grad]
        decays = [p for p in given if p.ndim > 1], [p for p in given if p.ndim <= 1]
        self.betas, self.eps = betas, eps
        self.param_groups: list[dict[str, Any]] = [
            {"params": params, "lr": lr, "weight_decay": decay}
            for params, decay in zip(decays, (weight_decay, 0.0), strict=True)
        ]
        self.state = {p: (torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())) for p in given}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for p in self.state:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            firsts, seconds, steps = (list(column) for column in zip(*(self.state[p] for p in params), strict=True))
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                firsts,
                seconds,
                [],
                steps,
                lr=group["lr"],
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=group["weight_decay"],
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )

    def state_dict(self) -> dict[str, Any]:
        """The running means and step counts, in the order of the parameters."""
        state = {str(i): dict(zip(("first", "second", "step"), s, strict=True)) for i, s in enumerate(self._ordered())}
        return {"state": state, "lr": [group["lr"] for group in self.param_groups]}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises: `CheckpointError`, changing nothing, when it does not fit."""
        own = list(self._ordered())
        given = [tree["state"].get(str(i), {}) for i in range(len(own))]
        pairs: list[tuple[Tensor, Tensor]] = []
        for i, (mine, theirs) in enumerate(zip(own, given, strict=True)):
            for name, tensor in zip(("first", "second", "step"), mine, strict=True):
                if name not in theirs or theirs[name].shape != tensor.shape:
                    raise CheckpointError(f"The optimiser's state is of another model: tensor {i} ({name!r}) differs.")
                pairs.append((tensor, theirs[name]))
        for tensor, value in pairs:
            tensor.copy_(value)
        for group, lr in zip(self.param_groups, tree["lr"], strict=True):
            group["lr"] = lr

    def _ordered(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        return list(self.state.values())
