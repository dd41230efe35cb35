"""S5: one state space for all features, run by a scan, with steps that may differ from token to token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.errors import expect
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.lru import through_modes
from remanence.memory.parts import Derived, per_head, wide, zeros
from remanence.memory.reparameterise import rate, rate_weight
from remanence.state import State


def normal_hippo(size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues [size/2] and eigenvectors [size, size/2] of the normal part of HiPPO-LegS, A + ½BBᵀ, in float64.

    One of each conjugate pair, that with a positive imaginary part. HiPPO itself cannot be diagonalised in any
    floating-point arithmetic; its normal part can, to the last digits.
    """
    n = torch.arange(size, dtype=torch.float64)
    P = (2 * n + 1).sqrt()
    A = -(P[:, None] * P).tril() + torch.diag(n)
    skew = A + 0.5 * P[:, None] * P + 0.5 * torch.eye(size, dtype=torch.float64)
    frequencies, vectors = torch.linalg.eigh(-1j * skew)
    half = frequencies > 0
    return torch.complex(torch.full((size // 2,), -0.5, dtype=torch.float64), frequencies[half]), vectors[:, half]


def hold(A: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold: (e^{AΔ}, (e^{AΔ} − 1)/A), the share of the state left after Δ and that of a constant input."""
    z = A * step
    x, y = z.real, z.imag
    # e^z − 1 without the difference of two numbers near one
    less_one = torch.complex(torch.expm1(x) * y.cos() - 2 * (y / 2).sin().square(), x.exp() * y.sin())
    return less_one + 1, less_one / A


@card(
    "s5",
    kind="memory",
    says="One diagonal state space that reads and writes all features at once; its time steps may be irregular.",
    source="arXiv:2208.04933",
    small={"dim": 6},
)
class S5(Memory):
    r"""$h_t = \bar Λ h_{t-1} + \bar B x_t$, $g = \mathrm{GELU}(2\,\mathrm{Re}(\tilde C h) + D ⊙ x)$, out $g ⊙ σ(W g)$.

    $\bar Λ = e^{ΛΔ}$ and $\bar B = Λ^{-1}(\bar Λ - I)\tilde B$ (zero-order hold), with Λ from blocks of HiPPO's normal
    part, B and C rotated into its eigenvectors, and one Δ per mode, log-uniform in (10⁻³, 10⁻¹). Of each conjugate pair
    one mode is kept. Re Λ is kept negative by `stable`. Give Λ and Δ a smaller learning rate and no weight decay.

    Args:
        dim: features of input and output.
        states: numbers of the real state space (P), so P/2 complex modes; `dim` by default, a multiple of 2·blocks.
        blocks: HiPPO matrices along its diagonal.
        stable: how a weight becomes −Re Λ, one of `reparameterise.KINDS`.

    Shapes: x and y [batch, time, dim]; state {"h": [batch, states/2, 2]}, real and imaginary parts.
    `forward` also takes `gaps` [batch, time], the time since the token before in units of the usual step.
    Raises: `ValueError` if 2·blocks does not divide `states`; `UnknownName` for `stable`; `ShapeError`, `StateError`.
    Source: Smith et al., Simplified State Space Layers for Sequence Modeling (2022), arXiv:2208.04933.
    """

    def __init__(self, dim: int, *, states: int | None = None, blocks: int = 1, stable: str = "exp"):
        super().__init__()
        P = states or dim
        size = per_head("S5 (states for dim, blocks for heads)", P, blocks, multiple=2)
        self.dim, self.stable = dim, stable
        eigenvalues, vectors = normal_hippo(size)
        Lambda, V = eigenvalues.repeat(blocks), torch.block_diag(*[vectors] * blocks)
        B = torch.randn(P, dim, dtype=V.dtype).real * math.sqrt(2 / dim)
        C = torch.view_as_complex(torch.randn(dim, P, 2, dtype=B.dtype)) / math.sqrt(P)
        self.real = nn.Parameter(rate_weight(-Lambda.real, stable).float())
        self.imaginary = nn.Parameter(Lambda.imag.float())
        self.log_step = nn.Parameter(torch.empty(P // 2).uniform_(math.log(1e-3), math.log(1e-1)))
        self.B = nn.Parameter(torch.view_as_real(V.mH @ B.to(V.dtype)).mT.float().contiguous())
        self.C = nn.Parameter(torch.view_as_real(C @ V).float())
        self.D = nn.Parameter(torch.randn(dim))
        self.gate = Linear(dim, dim)
        self.system = Derived(self.modes)

    def modes(
        self, real: Tensor, imaginary: Tensor, log_step: Tensor, gaps: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What is left of each mode after a step, and how much of an input it holds, complex."""
        step = wide(log_step).exp()
        step = step if gaps is None else step * gaps.to(step)
        return hold(torch.complex(-rate(wide(real), self.stable), wide(imaginary)), step)

    def initial_state(self, batch: int) -> State:
        return {"h": zeros(self.real, batch, len(self.real), 2)}

    def forward(self, x: Tensor, state: State | None = None, gaps: Tensor | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if gaps is None:
            a, held = self.system(self.real, self.imaginary, self.log_step)
        else:
            expect("S5", "gaps", gaps, "batch time", batch=x.shape[0], time=x.shape[1])
            a, held = self.modes(self.real, self.imaginary, self.log_step, gaps[..., None])
        y, state = through_modes(wide(x), a, held, wide(self.B), wide(self.C), wide(self.D), state, times=2)
        g = F.gelu(y, approximate="tanh").to(x.dtype)
        return g * self.gate(g).sigmoid(), state
