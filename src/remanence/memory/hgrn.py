"""Hierarchically gated recurrence: forget gates with lower bounds that rise with depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import RMSNorm, project, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.state import State


class LowerBounds(nn.Module):
    """The least share that each layer keeps per token, learnt for a whole model, never falling with depth.

    Layer l keeps at least the sum of the first l rows of a softmax over layers, so layer 0 may forget all.
    One instance belongs to a model and is handed to each of its `HGRN` layers. Returns [layers, dim] in [0, 1).
    """

    def __init__(self, layers: int, dim: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(layers, dim))

    def forward(self) -> Tensor:
        shares = wide(self.logits).softmax(dim=0)
        return (shares.cumsum(dim=0) - shares).clamp(min=0)


def check_bound(where: str, bound: float | LowerBounds) -> None:
    """Raise `ValueError` unless a bound is learnt, or a number in [0, 1)."""
    if not isinstance(bound, LowerBounds) and not 0 <= bound < 1:
        raise ValueError(f"{where}: lower_bound must be in [0, 1), got {bound!r}.")


def least_share(bound: float | LowerBounds, layer: int) -> Tensor | float:
    """γ of this layer, a number or [dim]."""
    if isinstance(bound, LowerBounds):
        return bound()[layer].clamp(min=1e-30)  # log 0 has no usable gradient
    return bound


def bounded_decay(logits: Tensor, bound: float | LowerBounds, layer: int) -> Tensor:
    """log(γ + (1 − γ) σ(logits)) [batch, time, dim], never below log γ, the bound of this layer."""
    f, least = F.logsigmoid(logits), least_share(bound, layer)
    if not isinstance(least, Tensor):
        if least == 0:
            return f
        least = f.new_tensor(least)
    return torch.logaddexp(least.log(), torch.log1p(-least) + f)


@card(
    "hgrn",
    kind="memory",
    says="A gated diagonal recurrence whose forget gate has a lower bound, higher in deeper layers.",
    source="arXiv:2311.04823",
    small={"dim": 6, "lower_bound": 0.3},
)
class HGRN(Memory):
    r"""$h_t = λ_t ⊙ h_{t-1} + (1 - λ_t) ⊙ \mathrm{SiLU}(W_c x_t)$ with $λ_t = γ + (1 - γ) σ(W_f x_t + b)$.

    The real form that the paper's language models use, read through RMSNorm ⊙ SiLU(W_g x) and an output projection.

    Args:
        dim: features of input, state and output.
        lower_bound: γ, either one number in [0, 1) or the model's `LowerBounds`.
        layer: which row of `LowerBounds` is this layer's; unused with a number.

    Shapes: x and y [batch, time, dim]; state {"h": [batch, dim]}.
    Raises: `ValueError` on a bound outside [0, 1); `ShapeError`, `StateError` from `forward`.
    Source: Hierarchically Gated Recurrent Neural Network (2023), arXiv:2311.04823.
    """

    def __init__(self, dim: int, *, lower_bound: float | LowerBounds = 0.0, layer: int = 0):
        super().__init__()
        check_bound("HGRN", lower_bound)
        self.dim, self.lower_bound, self.layer = dim, lower_bound, layer
        self.forget = Linear(dim, dim)
        self.candidate = Linear(dim, dim, bias=False)
        self.norm = RMSNorm(dim, eps=1e-5)
        self.gate = Linear(dim, dim, bias=False)
        self.out = Linear(dim, dim, bias=False)

    def initial_state(self, batch: int) -> State:
        return {"h": zeros(self.out.weight, batch, self.dim)}

    def log_decay(self, x: Tensor) -> Tensor:
        """log λ [batch, time, dim], never below log γ."""
        return bounded_decay(wide(self.forget(x)), self.lower_bound, self.layer)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if x.shape[1] == 1 and steps.worth(x, state["h"]):
            y, h = layer_steps.tied_token(
                project(self.forget, x), project(self.candidate, x), state["h"],
                least_share(self.lower_bound, self.layer), self.norm.weight, project(self.gate, x),
                self.norm.eps or 0.0,
            )  # fmt: skip
            return project(self.out, y), {"h": h}
        log_decay = self.log_decay(x)
        h, state = ops.scan(log_decay, -torch.expm1(log_decay) * F.silu(wide(self.candidate(x))), state)
        return self.out(self.norm(h.to(x.dtype), self.gate(x))), state
