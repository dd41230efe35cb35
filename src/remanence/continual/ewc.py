"""Elastic weight consolidation, online: weights that mattered are held near where they were."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.continual.base import Context, Strategy
from remanence.errors import ShapeError, StateError


@card(
    "ewc",
    kind="strategy",
    says="Holds each weight near its last consolidated value, by the size of its gradients until then.",
    source="arXiv:1612.00796; arXiv:1805.06370",
    small={"strength": 10.0, "every": 3},
)
class EWC(Strategy):
    r"""Online EWC (Kirkpatrick et al. 2017; one running importance: Schwarz et al. 2018).

    Adds $\tfrac12 \lambda \sum_i F_i (\theta_i - \theta_i^*)^2$ to the loss. At each boundary
    $F \leftarrow \gamma F + \bar{g^2}$ and $\theta^* \leftarrow \theta$, where $\bar{g^2}$ is the exponential mean,
    since the last boundary, of the squared gradients of training, without this penalty's own part.

    That is not the papers' Fisher information, a mean over samples of squared gradients: squaring comes after
    the mean over a batch, so for N independent samples near an optimum it is N times smaller (raise `strength`
    accordingly), it uses the stream's targets in place of ones drawn from the model, and it is gathered along
    the way in place of a pass at the end. It costs no gradient beyond those of training. Loss terms of other
    strategies count as data; list EWC before strategies that alter gradients.

    Args:
        strength: λ ≥ 0, finite; 0 changes nothing. A step η with η·λ·F > 2 overshoots and diverges.
        decay: γ in [0, 1], what remains of the old importance at a boundary.
        every: steps after which to consolidate without being told; None waits for `on_boundary`.
        average: weight in [0, 1) of the past in the exponential mean; 0.99 looks back about 100 steps.

    Keeps three tensors per trained parameter, in float32 at least, from the first boundary on.
    Raises: `ValueError` for arguments out of range; `ShapeError` for a parameter that changed its shape.
    """

    def __init__(self, strength: float = 100.0, *, decay: float = 0.9, every: int | None = None, average: float = 0.99):
        if not 0 <= strength < math.inf:
            raise ValueError(f"ewc: strength must be a finite number of at least 0, got {strength}.")
        if not 0 <= decay <= 1:
            raise ValueError(f"ewc: decay must be between 0 and 1, got {decay}.")
        if not 0 <= average < 1:
            raise ValueError(f"ewc: average must be at least 0 and below 1, got {average}.")
        if every is not None and every < 1:
            raise ValueError(f"ewc: every must be at least 1 step, got {every}.")
        self.strength, self.decay, self.every, self.average = strength, decay, every, average
        self.needs = frozenset() if every else frozenset({"boundaries"})
        self.model: nn.Module | None = None
        self.steps = 0
        self.squares: dict[str, Tensor] = {}
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def attach(self, model: nn.Module) -> None:
        self.model = model

    def on_boundary(self, task: str | int | None = None) -> None:
        if self.model is None:
            raise StateError("ewc: attach it to a model before the first boundary.")
        self._consolidate(dict(self.model.named_parameters()))

    def loss(self, context: Context) -> Tensor | None:
        if not self.anchor or not self.strength:
            return None
        parameters = dict(context.model.named_parameters())
        terms = [(self.importance[n] * self._moved(n, parameters[n]).square()).sum() for n in self.anchor]
        return 0.5 * self.strength * torch.stack(terms).sum()

    @torch.no_grad()
    def transform_grad(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.steps += 1
        for name, p in parameters.items():
            if p.grad is None:
                continue
            g = p.grad.to(_wide(p))
            if name in self.anchor and self.strength:
                g = g - self.strength * self.importance[name] * self._moved(name, p)
            mean = self.squares.setdefault(name, torch.zeros_like(g))
            mean.mul_(self.average).addcmul_(g, g, value=1 - self.average)

    def after_step(self, parameters: Mapping[str, nn.Parameter]) -> None:
        if self.every and self.steps >= self.every:
            self._consolidate(parameters)

    def state_dict(self) -> dict[str, Any]:
        held = {"squares": self.squares, "importance": self.importance, "anchor": self.anchor}
        return {"steps": self.steps} | {f"{k}.{n}": x.clone() for k, v in held.items() for n, x in v.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])
        for group in ("squares", "importance", "anchor"):
            prefix = f"{group}."
            held = {n.removeprefix(prefix): x.clone() for n, x in state.items() if n.startswith(prefix)}
            setattr(self, group, held)

    @torch.no_grad()
    def _consolidate(self, parameters: Mapping[str, nn.Parameter]) -> None:
        if not self.steps:
            return
        unbiased = 1 / (1 - self.average**self.steps)
        for name, mean in self.squares.items():
            fresh = mean * unbiased
            held = self.importance.get(name)
            self.importance[name] = fresh if held is None else fresh.add_(held, alpha=self.decay)
            self.anchor[name] = parameters[name].detach().to(_wide(mean)).clone()
            mean.zero_()
        self.steps = 0

    def _moved(self, name: str, parameter: nn.Parameter) -> Tensor:
        anchor = self.anchor[name]
        if parameter.shape != anchor.shape:
            raise ShapeError(f"ewc: {name} was {list(anchor.shape)} at the last boundary, now {list(parameter.shape)}.")
        return parameter - anchor


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
