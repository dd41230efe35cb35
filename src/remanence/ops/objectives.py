"""What a memory may be trained on while it is read: losses of a prediction, with their slopes written out.

A slope is the loss's gradient at the prediction; `ops.fast_weight` passes it back through the memory by hand, and its
reference lets automatic differentiation find it from the loss. Losses are sums over the last axis, without means, so
that a step means the same whatever the width. All but `Dot` are functions of the error e = prediction − value.

Source: It's All Connected (Miras, 2025), arXiv:2504.13173, whose "attentional biases" these are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def _length(e: Tensor) -> Tensor:
    """‖e‖ over the last axis, kept; its gradient at zero is zero."""
    return torch.linalg.vector_norm(e, dim=-1, keepdim=True)


@dataclass(frozen=True)
class Squared:
    """½‖e‖²; the slope is e."""

    thresholds = False
    targets = True

    def loss(self, prediction: Tensor, value: Tensor, threshold: Tensor | None = None) -> Tensor:
        return 0.5 * (prediction - value).square().sum(-1)

    def slope(self, prediction: Tensor, value: Tensor, threshold: Tensor | None = None) -> Tensor:
        return prediction - value


@dataclass(frozen=True)
class Dot:
    """−⟨prediction, value⟩: Hebbian; writes the same whatever is already known."""

    thresholds = False
    targets = False

    def loss(self, prediction: Tensor, value: Tensor, threshold: Tensor | None = None) -> Tensor:
        return -(prediction * value).sum(-1)

    def slope(self, prediction: Tensor, value: Tensor, threshold: Tensor | None = None) -> Tensor:
        return -value


@dataclass(frozen=True)
class PNorm:
    """Σ|e|^p with |e| = √(e² + 10⁻⁶), p ≥ 1; p = 1 is the "value-less" memory, which sees only the sign of an error."""

    p: float = 3.0
    thresholds = False
    targets = True

    def __post_init__(self) -> None:
        if not 1 <= self.p < math.inf:
            raise ValueError(f"PNorm: p must be at least 1 and finite, got {self.p}.")

    def loss(self, prediction: Tensor, value: Tensor, threshold: Tensor | None = None) -> Tensor:
        return ((prediction - value).square() + 1e-6).pow(self.p / 2).sum(-1)

    def slope(self, prediction: Tensor, value: Tensor, threshold: Tensor | None = None) -> Tensor:
        e = prediction - value
        return self.p * e * (e.square() + 1e-6).pow(self.p / 2 - 1)


@dataclass(frozen=True)
class LogCosh:
    """Σ log cosh(se)/s, the "value-less" memory with a smooth sign: the slope is tanh(se), with s = 10 in the paper."""

    sharpness: float = 10.0
    thresholds = False
    targets = True

    def __post_init__(self) -> None:
        if not 0 < self.sharpness < math.inf:
            raise ValueError(f"LogCosh: sharpness must be above 0 and finite, got {self.sharpness}.")

    def loss(self, prediction: Tensor, value: Tensor, threshold: Tensor | None = None) -> Tensor:
        x = (self.sharpness * (prediction - value)).abs()
        return ((x + F.softplus(-2 * x) - math.log(2)) / self.sharpness).sum(-1)  # cosh itself overflows

    def slope(self, prediction: Tensor, value: Tensor, threshold: Tensor | None = None) -> Tensor:
        return (self.sharpness * (prediction - value)).tanh()


@dataclass(frozen=True)
class Huber:
    """½‖e‖² up to a threshold δ, linear beyond, so that an outlier pulls no harder than δ.

    Thresholds are [...], or of every channel [..., V], but for the first kind.

    kind: "norm" bends at ‖e‖ = δ (slope δe/‖e‖ beyond), "coordinate" at each |e_j| = δ, "mixture" is Yaad's: the
    slope is e up to ‖e‖ = δ and δ·sign(e) beyond, where it jumps.
    """

    kind: str = "norm"
    delta: float = 1.0
    thresholds = True
    targets = True

    def __post_init__(self) -> None:
        if self.kind not in ("norm", "coordinate", "mixture"):
            raise ValueError(f"Huber: kind must be 'norm', 'coordinate' or 'mixture', got {self.kind!r}.")
        if not self.delta > 0:
            raise ValueError(f"Huber: delta must be above 0, got {self.delta}.")

    def loss(self, prediction: Tensor, value: Tensor, threshold: Tensor | None = None) -> Tensor:
        e, delta = prediction - value, self._delta(prediction, threshold)
        if self.kind == "coordinate":
            size, half = e.abs(), 0.5 * e.square()
            return torch.where(size <= delta, half, delta * (size - 0.5 * delta)).sum(-1)
        size, half = _length(e), 0.5 * e.square().sum(-1, keepdim=True)
        if self.kind == "norm":
            return torch.where(size <= delta, half, delta * (size - 0.5 * delta))[..., 0]
        return torch.where(size <= delta, 0.5 * e.square(), delta * e.abs()).sum(-1)

    def slope(self, prediction: Tensor, value: Tensor, threshold: Tensor | None = None) -> Tensor:
        e, delta = prediction - value, self._delta(prediction, threshold)
        if self.kind == "coordinate":
            return torch.minimum(torch.maximum(e, -delta), delta)
        size = _length(e)
        beyond = delta * (F.normalize(e, dim=-1) if self.kind == "norm" else e.sign())
        return torch.where(size <= delta, e, beyond)

    def _delta(self, like: Tensor, threshold: Tensor | None) -> Tensor:
        if threshold is None:
            return like.new_tensor(self.delta)
        if threshold.ndim < like.ndim:
            return threshold[..., None]
        if self.kind == "norm":
            raise ValueError("Huber: kind 'norm' bends at one length; thresholds of every channel are for the others.")
        return threshold


@dataclass(frozen=True)
class Shifted:
    """½(‖e‖ + Δ)²: the worst case over values shifted by up to Δ; the slope is e + Δe/‖e‖."""

    shift: float = 0.1
    thresholds = False
    targets = True

    def __post_init__(self) -> None:
        if not self.shift >= 0:
            raise ValueError(f"Shifted: shift must be at least 0, got {self.shift}.")

    def loss(self, prediction: Tensor, value: Tensor, threshold: Tensor | None = None) -> Tensor:
        return 0.5 * (_length(prediction - value)[..., 0] + self.shift).square()

    def slope(self, prediction: Tensor, value: Tensor, threshold: Tensor | None = None) -> Tensor:
        e = prediction - value
        return e + self.shift * F.normalize(e, dim=-1)


Objective = Squared | Dot | PNorm | LogCosh | Huber | Shifted
OBJECTIVES: dict[str, Objective] = {
    "squared": Squared(),
    "dot": Dot(),
    "p-norm": PNorm(),
    "absolute": PNorm(1.0),
    "log-cosh": LogCosh(),
    "huber": Huber(),
    "huber-coordinate": Huber("coordinate"),
    "huber-mixture": Huber("mixture"),
    "shifted": Shifted(),
}
