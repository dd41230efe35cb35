"""Diagonal S4: every feature has its own sum of decaying oscillations as a memory kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.errors import unknown
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import Derived, project, wide, zeros
from remanence.memory.reparameterise import rate, rate_weight
from remanence.memory.s5 import hold, normal_hippo
from remanence.ops import steps
from remanence.ops.complex_scan import diagonal_ssm, diagonal_token
from remanence.state import State


def _linear(modes: int) -> Tensor:
    return torch.complex(torch.full((modes,), -0.5), math.pi * torch.arange(modes, dtype=torch.float32))


def _inverse(modes: int) -> Tensor:
    n = torch.arange(modes, dtype=torch.float32)
    return torch.complex(torch.full((modes,), -0.5), 2 * modes / math.pi * (2 * modes / (2 * n + 1) - 1))


STARTS = {"lin": _linear, "inv": _inverse, "legs": lambda modes: normal_hippo(2 * modes)[0]}


@card(
    "s4d",
    kind="memory",
    says="A state space per feature whose kernel is a sum of decaying oscillations; runs as convolution or recurrence.",
    source="arXiv:2206.11893",
    small={"dim": 4, "states": 6},
)
class S4D(Memory):
    r"""$y = K * x + D ⊙ x$ with $K_l = 2\,\mathrm{Re} \sum_n C_n \frac{e^{ΔA_n} - 1}{A_n} e^{l Δ A_n}$; GELU; GLU.

    The state holds the modes $h_t = e^{ΔA} h_{t-1} + x_t$, and the rest is read out of it. Of each conjugate pair one
    mode is kept, hence the factor 2. Give A and Δ a learning rate of at most 10⁻³ and no weight decay.

    Args:
        dim: features of input and output.
        states: numbers of the real state space of each feature (N), so N/2 complex modes; even.
        start: of A: "lin" is −½ + iπn, "inv" −½ + i(N/π)(N/(2n + 1) − 1), "legs" the normal part of HiPPO-LegS.
        stable: how a weight becomes −Re A, one of `reparameterise.KINDS`.

    Shapes: x and y [batch, time, dim]; state {"h": [batch, dim, states/2, 2]}, real and imaginary parts.
    Raises: `ValueError` for odd `states`; `UnknownName` for `start`, `stable`; `ShapeError`, `StateError`.
    Source: Gu et al., On the Parameterization and Initialization of Diagonal State Space Models (2022),
    arXiv:2206.11893.
    """

    def __init__(self, dim: int, *, states: int = 64, start: str = "lin", stable: str = "exp"):
        super().__init__()
        if states < 2 or states % 2:
            raise ValueError(f"{type(self).__name__}: states must be a positive even number, got {states}.")
        if start not in STARTS:
            raise unknown("start of S4D", start, STARTS)
        self.dim, self.stable = dim, stable
        A = STARTS[start](states // 2)
        self.real = nn.Parameter(rate_weight(-A.real, stable).float().repeat(dim, 1))
        self.imaginary = nn.Parameter(A.imag.float().repeat(dim, 1))
        self.log_step = nn.Parameter(torch.empty(dim, 1).uniform_(math.log(1e-3), math.log(1e-1)))
        self.C = nn.Parameter(torch.randn(dim, states // 2, 2) / math.sqrt(2))
        self.D = nn.Parameter(torch.randn(dim))
        self.out = Linear(dim, 2 * dim)
        self.system = Derived(self.modes)

    def kernel(self) -> tuple[Tensor, Tensor]:
        """(a, c), complex [dim, states/2], of the kernel K_l = Re Σ_n c_n aₙˡ."""
        return self.system(self.real, self.imaginary, self.log_step, self.C)

    def modes(self, real: Tensor, imaginary: Tensor, log_step: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        A = torch.complex(-rate(wide(real), self.stable), wide(imaginary))
        a, held = hold(A, wide(log_step).exp())
        return a, 2 * torch.view_as_complex(wide(C)) * held

    def initial_state(self, batch: int) -> State:
        return {"h": zeros(self.C, batch, *self.C.shape)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        u, D = wide(x), wide(self.D)
        if x.shape[1] == 1 and steps.worth(x, state["h"]):
            y, h = diagonal_token(u, *self.kernel(), D, state["h"])
            return steps.glu(project(self.out, y)), {"h": h}
        y, state = diagonal_ssm(u, *self.kernel(), state)
        y = F.gelu(torch.addcmul(y, D, u)).to(x.dtype)
        return F.glu(self.out(y), dim=-1), state
