"""The linear recurrent unit: a complex diagonal recurrence that initialisation and normalisation make train."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import Derived, wide, zeros
from remanence.memory.reparameterise import decay, decay_weight
from remanence.ops import steps
from remanence.ops.complex_scan import complex_scan, shared_token
from remanence.state import State


def through_modes(
    x: Tensor, a: Tensor, scale: Tensor, B: Tensor, C: Tensor, D: Tensor, state: State, times: float = 1.0
) -> tuple[Tensor, State]:
    """h_t = a ⊙ h_{t−1} + scale ⊙ (B x_t), read as times · Re(C h_t) + D ⊙ x_t: all features share N complex modes.

    Shapes: x and y [batch, time, dim]; a, scale complex [N] or [batch, time, N]; B [N, 2, dim] and C [dim, N, 2],
    real and imaginary parts; D [dim]; state {"h": [batch, N, 2]}.
    """
    if x.shape[1] == 1 and steps.worth(x, state["h"]):
        y, now = shared_token(x, a, scale, B, C, D, state["h"], times)
        return y, {"h": now}
    u = torch.view_as_complex(ops.linear(x, B.flatten(0, 1)).unflatten(-1, (-1, 2)))
    h, state = complex_scan(a, scale * u, state)
    y = ops.linear(torch.view_as_real(h).flatten(-2), (C * C.new_tensor([times, -times])).flatten(-2))
    return torch.addcmul(y, D, x), state


@card(
    "lru",
    kind="memory",
    says="A complex diagonal recurrence on a ring of eigenvalues, normalised so that its states start at variance one.",
    source="arXiv:2303.06349",
    small={"dim": 4},
)
class LRU(Memory):
    r"""$h_t = λ ⊙ h_{t-1} + γ ⊙ (B x_t)$, $y = \mathrm{Re}(C h) + D ⊙ x$; then GELU and a gated linear unit.

    $λ = e^{-e^ν + i e^θ}$ starts uniform on the ring $r_{min} ≤ |λ| ≤ r_{max}$ with phases up to `max_phase`, and
    $γ$ at $\sqrt{1 - |λ|^2}$, so that white noise leaves states of variance one. For tasks with long memory the paper
    takes r_min = 0.9, r_max = 0.999, max_phase = π/10. Give ν, θ and γ a smaller learning rate and no weight decay.

    Args:
        dim: features of input and output.
        states: complex modes (N); `dim` by default.
        r_min, r_max: the ring, 0 ≤ r_min < r_max ≤ 1.
        max_phase: largest phase at the start, in radians.
        stable: how ν becomes |λ|, one of `reparameterise.KINDS`; "exp" is the paper's.

    Shapes: x and y [batch, time, dim]; state {"h": [batch, states, 2]}, real and imaginary parts.
    Raises: `ValueError` for an impossible ring; `UnknownName` for `stable`; `ShapeError`, `StateError` from `forward`.
    Source: Orvieto et al., Resurrecting Recurrent Neural Networks for Long Sequences (2023), arXiv:2303.06349.
    """

    def __init__(
        self,
        dim: int,
        *,
        states: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        stable: str = "exp",
    ):
        super().__init__()
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"LRU: the ring must have 0 ≤ r_min < r_max ≤ 1, got {r_min} and {r_max}.")
        N = states or dim
        self.dim, self.stable = dim, stable
        radius = torch.empty(N).uniform_(r_min**2, r_max**2).clamp(1e-6, 1 - 1e-6).sqrt()
        self.nu = nn.Parameter(decay_weight(radius, stable))
        self.theta = nn.Parameter((max_phase * torch.rand(N).clamp(min=1e-6)).log())
        self.gamma = nn.Parameter(0.5 * torch.log1p(-decay(self.nu.detach(), stable).square()))
        self.B = nn.Parameter(torch.randn(N, 2, dim) / math.sqrt(2 * dim))
        self.C = nn.Parameter(torch.randn(dim, N, 2) / math.sqrt(N))
        self.D = nn.Parameter(torch.randn(dim))
        self.out = Linear(dim, 2 * dim)
        self.system = Derived(self.modes)

    def modes(self, nu: Tensor, theta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """λ and γ, complex [states]."""
        phase = wide(theta).exp()
        a = decay(wide(nu), self.stable) * torch.complex(phase.cos(), phase.sin())
        return a, wide(gamma).exp().to(a.dtype)

    def initial_state(self, batch: int) -> State:
        return {"h": zeros(self.nu, batch, len(self.nu), 2)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        a, scale = self.system(self.nu, self.theta, self.gamma)
        y, state = through_modes(wide(x), a, scale, wide(self.B), wide(self.C), wide(self.D), state)
        y = F.gelu(y, approximate="tanh").to(x.dtype)
        return F.glu(self.out(y), dim=-1), state
