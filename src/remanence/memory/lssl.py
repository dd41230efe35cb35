"""The linear state-space layer: one trainable continuous-time system per feature, run as recurrence or convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import Derived, wide, zeros
from remanence.ops.dense_ssm import dense_ssm, inverses, krylov, squarings
from remanence.ops.hippo import hippo_matrices
from remanence.state import State


def bilinear(A: Tensor, B: Tensor, log_step: Tensor) -> tuple[Tensor, Tensor]:
    r"""$\bar A = (I - ΔA/2)^{-1}(I + ΔA/2)$, $\bar B = (I - ΔA/2)^{-1} ΔB$ for each step Δ = exp(log_step).

    Shapes: A [N, N], B [N], log_step [D] -> [D, N, N], [D, N].
    """
    step = log_step.exp()
    one = torch.eye(len(B), dtype=A.dtype, device=A.device)
    inverse = inverses(one - step[:, None, None] / 2 * A)
    return 2 * inverse - one, step[:, None] * (inverse @ B)


@card(
    "lssl",
    kind="memory",
    says="A continuous-time linear system per feature, with trainable dynamics and step size.",
    source="arXiv:2110.13985",
    small={"dim": 4, "order": 5, "outputs": 2},
)
class LSSL(Memory):
    r"""$\dot h = A h + B u$, $y = C h + D u$ per feature, by the bilinear step Δ; then GELU and a mix of features.

    A is dense, shared by all features, and starts as a HiPPO matrix; each feature has its step Δ, log-uniform at the
    start, so a time scale of its own. The paper keeps A in a structured (quasiseparable) form, which is a dense A too.

    Args:
        dim: features of input and output.
        order: N, the state's size per feature (256 in the paper; its cost per token and feature is about 4·order).
        outputs: M, channels that each feature's state is read into.
        measure: `legs` or `legt`: where A and B start.
        trainable: train A, B and Δ; else C and D only, the paper's fixed variant.

    Shapes: x and y [batch, time, dim]; state {"h": [batch, dim, order]}.
    Raises: `ValueError` for an unknown measure or an order below 1; `ShapeError`, `StateError` from `forward`.
    Source: Linear State-Space Layers (2021), arXiv:2110.13985.
    """

    def __init__(self, dim: int, *, order: int = 64, outputs: int = 1, measure: str = "legs", trainable: bool = True):
        super().__init__()
        self.dim, self.order = dim, order
        A, B = (part.to(torch.get_default_dtype()) for part in hippo_matrices(measure, order))
        log_step = torch.empty(dim).uniform_(math.log(1e-3), math.log(1e-1))
        self.A, self.B, self.log_step = (nn.Parameter(p, requires_grad=trainable) for p in (A, B, log_step))
        self.C = nn.Parameter(torch.randn(dim, outputs, order) / math.sqrt(order))
        self.D = nn.Parameter(torch.randn(dim, outputs))
        self.out = Linear(dim * outputs, dim)
        self.discrete = Derived(bilinear)

    def initial_state(self, batch: int) -> State:
        return {"h": zeros(self.C, batch, self.dim, self.order)}

    def system(self) -> tuple[Tensor, Tensor]:
        """The discrete transition [dim, order, order] and write vector [dim, order] of each feature."""
        return self.discrete(wide(self.A), wide(self.B), wide(self.log_step))

    def kernel(self, length: int) -> Tensor:
        """The response to an impulse, C Ā^l B̄ for l < length: [dim, outputs, length]; without D."""
        transition, write = self.system()
        return wide(self.C) @ krylov(squarings(transition, length), write[..., None], length)[..., 0, :]

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        u = wide(x)
        y, state = dense_ssm(u, *self.system(), wide(self.C), state)
        y = F.gelu(y + u[..., None] * wide(self.D))
        return self.out(y.flatten(2).to(x.dtype)), state
