"""Mamba: a diagonal state space whose step size, input and output maps are chosen by the token."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.memory.bare import bare
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import Derived, ShortConv, wide, zeros
from remanence.ops import steps
from remanence.ops.selective_scan import selective_scan, selective_token
from remanence.state import State


def rates(logarithms: Tensor) -> Tensor:
    """How fast each state decays, per unit of Δ: below 0."""
    return -wide(logarithms).exp()


@card(
    "mamba",
    kind="memory",
    says="A diagonal state space that chooses, per token and feature, how much to forget, write and read.",
    source="arXiv:2312.00752",
    small={"dim": 6, "states": 3},
)
class Mamba(Memory):
    r"""Mamba-1's block: $h_t = e^{Δ_t A} h_{t-1} + Δ_t B_t x_t$ and $y_t = C_t · h_t + D x_t$, for every feature of x.

    $x, z = W_{in} u$, and the output is $W_{out}(y ⊙ \mathrm{SiLU}(z))$. x passes a short convolution and SiLU; then
    $(δ, B, C) = W_x x$, $Δ = \mathrm{softplus}(W_Δ δ + b_Δ)$, and $A = -e^{A_{log}}$. The decay is exact and the write
    Euler's, as published. Parameters have the names of the checkpoints known as `mamba`, and `norm_eps` gives
    `falcon_mamba`. Give `A_log`, `D` and `dt_proj.bias` no weight decay.

    A forward hook on `step_size` sees every Δ [batch, time, width], and may replace it: Δ = 0 skips a token.

    Args:
        dim: features of input and output.
        width: features of the recurrence; 2·dim by default.
        states: numbers that each of them keeps (N).
        rank: of the step sizes' projection; dim/16 by default, rounded up.
        conv: tokens that the convolution sees.
        bias: of the projections in and out; `conv_bias`: of the convolution.
        norm_eps: normalise δ, B and C by their root mean square, with this eps (arXiv:2410.05355); None: do not.

    Shapes: x and y [batch, time, dim]; state {"h": [batch, width, states], "conv": {"tail": [batch, conv - 1, width]}}.
    Raises: `ValueError` for sizes below 1; `ShapeError`, `StateError` from `forward`.
    Source: Gu & Dao, Mamba (2023), arXiv:2312.00752.
    """

    step_size: nn.Module
    A_log: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        width: int | None = None,
        states: int = 16,
        rank: int | None = None,
        conv: int = 4,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float | None = None,
    ):
        super().__init__()
        self.dim, self.states, self.norm_eps = dim, states, norm_eps
        self.width = 2 * dim if width is None else width
        self.rank = -(-dim // 16) if rank is None else rank
        if min(dim, self.width, states, self.rank) < 1:
            raise ValueError(
                f"{type(self).__name__}: dim, width, states and rank must be at least 1, "
                f"got {dim}, {self.width}, {states}, {self.rank}."
            )
        self.in_proj = Linear(dim, 2 * self.width, bias=bias)
        self.conv = ShortConv(self.width, conv, bias=conv_bias)
        self.x_proj = Linear(self.width, self.rank + 2 * states, bias=False)
        self.dt_proj = Linear(self.rank, self.width)
        self.D = nn.Parameter(torch.ones(self.width))
        self.out_proj = Linear(self.width, dim, bias=bias)
        self._init_decay()

    def _init_decay(self) -> None:
        self.step_size = nn.Softplus()
        self._rates = Derived(rates)
        self.A_log = nn.Parameter(torch.arange(1.0, self.states + 1).log().repeat(self.width, 1))
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        step = torch.empty(self.width).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        self.dt_proj.bias.data = step + torch.log(-torch.expm1(-step))  # the inverse of softplus

    def _steps(self, raw: Tensor, B: Tensor) -> Tensor:
        """Step sizes [batch, time, width]."""
        return self.step_size(raw)

    def initial_state(self, batch: int) -> State:
        return {"h": zeros(self.D, batch, self.width, self.states), "conv": self.conv.initial_state(batch)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        mixed = self.in_proj(x)
        h, tail, parts = state["h"], state["conv"]["tail"], (self.x_proj, self.dt_proj, self.step_size)
        if x.shape[1] == 1 and steps.worth(mixed, h, tail) and bare(*parts):
            conv = tail, self.conv.weight, self.conv.bias
            step = self.dt_proj.weight, self.dt_proj.bias
            given = conv, self.x_proj.weight, step, self.A_log, self.D, h, self.norm_eps
            y, h, tail = selective_token(mixed, *given)
            return self.out_proj(y), {"h": h, "conv": {"tail": tail}}
        u, z = mixed.chunk(2, dim=-1)
        u, conv = self.conv(u, state["conv"], silu=True)
        chosen = self.x_proj(u.to(x.dtype)).split([self.rank, self.states, self.states], dim=-1)
        if self.norm_eps is not None:
            chosen = tuple(F.rms_norm(s, s.shape[-1:], eps=self.norm_eps) for s in chosen)
        dt, B, C = chosen
        delta = self._steps(wide(self.dt_proj(dt)), B)
        A = None if self.A_log is None else self._rates(self.A_log)
        y, after = selective_scan(u, delta, A, B, C, {"h": h})
        y = torch.addcmul(y, u, wide(self.D)).to(x.dtype)
        return self.out_proj(y * F.silu(z)), {**after, "conv": conv}
