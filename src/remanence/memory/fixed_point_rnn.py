"""The fixed-point RNN: a dense linear recurrence found by repeating a diagonal one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.errors import unknown
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import RMSNorm, wide, zeros
from remanence.state import State

MIXERS = ("householder", "dplr")
SOLVERS = ("iterate", "exact")


def shifted(h: Tensor, start: Tensor) -> Tensor:
    """h_{t−1} for every t: [batch, time, width], with `start` [batch, width] before the first."""
    return torch.cat([start[:, None], h], 1)[:, : h.shape[1]]


class Mixer(nn.Module):
    r"""The matrices $Q_t = \prod_r (I - 2 α_r u_r u_r^\top)$ or, `dplr`, $I - 2 \sum_r α_r u_r u_r^\top$.

    Both are $I - U^\top K U$ with rows U = u_r and a small K: [.., rank, rank]. u and α are maps of $[x_t, h_{t-1}]$.
    """

    def __init__(self, width: int, rank: int, kind: str, most: float):
        super().__init__()
        self.rank, self.kind, self.most = rank, kind, most
        norm = nn.utils.parametrizations.weight_norm
        self.u = norm(Linear(2 * width, rank * width, bias=False))
        self.alpha = norm(Linear(2 * width, rank))

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """(U [..., rank, width], K [..., rank, rank]) from x and h_{t−1}, [..., width]."""
        seen = torch.cat([x, before], -1)
        u = _normed(self.u, seen).unflatten(-1, (self.rank, -1))
        alpha = (_normed(self.alpha, seen) + wide(self.alpha.bias)).sigmoid()
        # a hair below `most`, which a float32 sigmoid may reach, and at which the transition may be singular
        alpha = self.most * (1 - 1e-6) * alpha
        U, twice = F.normalize(F.silu(u), dim=-1, eps=1e-5), torch.diag_embed(2 * alpha)
        if self.rank == 1 or self.kind == "dplr":
            return U, twice
        after = twice @ (U @ U.mT).tril(-1)  # a later factor acts on what the earlier ones left
        return U, torch.linalg.solve_triangular(after, twice, upper=False, unitriangular=True)


def _normed(linear: nn.Module, x: Tensor) -> Tensor:
    """W x with weight norm's W = g v / ‖v‖, which takes no matrix of its own: for a token, most of the time."""
    parts: Any = linear.parametrizations["weight"]  # type: ignore[index]
    length, v = wide(parts.original0), wide(parts.original1)
    return F.linear(x, v) * (length / torch.linalg.vector_norm(v, dim=1, keepdim=True))[:, 0]


def mixed(mixer: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Q x. Shapes: [..., width]."""
    U, K = mixer
    return x - (U.mT @ (K @ (U @ x[..., None])))[..., 0]


@card(
    "fixed-point-rnn",
    kind="memory",
    says="A recurrence with a dense, input-dependent transition, found as the fixed point of a repeated diagonal scan.",
    source="arXiv:2503.10799",
    small={"dim": 4, "expand": 1, "rank": 2},
)
class FixedPointRNN(Memory):
    r"""$(Λ_t + (I - Λ_t) Q_t) h_t = Λ_t h_{t-1} + (I - Λ_t) Q_t (b_t ⊙ x_t)$, read as $\mathrm{SiLU}(z) ⊙ c ⊙ h$.

    h is the fixed point of $h ← \mathrm{scan}(Λ, (1 - Λ) ⊙ (Q (b ⊙ x - h) + h))$. $Λ = σ(W x)$; b, c are SiLUs of maps
    of x and of $[x, h_{t-1}]$; $Q_t$ reads $[x_t, h_{t-1}]$, so the recurrence is not linear, but each step is: solved
    in closed form (rank × rank), it is what decoding does, and what training falls back on if the iteration stalls.
    What was read is RMS-normed and projected.

    The gradient is that of one step at the fixed point, the paper's; `exact` differentiates the closed form.

    Args:
        dim: features of input and output.
        expand: width of the recurrence over `dim`.
        rank: of I - Q.
        mixer: `householder` or `dplr`.
        most: the largest α. The iteration contracts where 2α(1 - λ) < 1; the paper lets α reach 1, where it may
            diverge, and I - (I - Λ)(I - Q) be singular.
        solver: `iterate`, or `exact`: token after token in closed form, also for the gradient.
        tolerance: relative change at which the iteration ends; rounding error by default. The paper trains with 0.1,
            which no longer gives the same result for every cut.
        iterations: at most so many.

    Shapes: x and y [batch, time, dim]; state {"h": [batch, expand·dim]}.
    Raises: `ValueError` for numbers out of range; `UnknownName` for a mixer or solver; `ShapeError`, `StateError` from
        `forward`.
    Source: Fixed-Point RNNs (2025), arXiv:2503.10799.
    """

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        rank: int = 1,
        mixer: str = "householder",
        most: float = 0.5,
        solver: str = "iterate",
        tolerance: float | None = None,
        iterations: int = 100,
    ):
        super().__init__()
        if min(expand, rank, iterations) < 1 or not 0 < most <= 1:
            raise ValueError(
                "FixedPointRNN: expand, rank and iterations must be at least 1 and most in (0, 1], "
                f"got {expand}, {rank}, {iterations}, {most}."
            )
        for what, name, known in (("mixer", mixer, MIXERS), ("solver", solver, SOLVERS)):
            if name not in known:
                raise unknown(what, name, known)
        self.dim, self.width, self.solver = dim, expand * dim, solver
        self.tolerance, self.iterations = tolerance, iterations
        self.inward = Linear(dim, 2 * self.width, bias=False)
        self.decay = Linear(self.width, self.width)
        self.b = Linear(self.width, self.width, bias=False)
        self.c = Linear(2 * self.width, self.width, bias=False)
        self.mixer = Mixer(self.width, rank, mixer, most)
        self.norm = RMSNorm(self.width, eps=1e-5)
        self.out = Linear(self.width, dim, bias=False)

    def initial_state(self, batch: int) -> State:
        return {"h": zeros(self.out.weight, batch, self.width)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        start = self.begin(x, state)["h"]
        u, z = self.inward(x).chunk(2, -1)
        log_decay, bx = F.logsigmoid(wide(self.decay(u))), wide(F.silu(self.b(u)) * u)
        u = wide(u)
        if self.solver == "exact" or (x.shape[1] == 1 and not torch.is_grad_enabled()):
            h = self.solve(u, bx, log_decay, start)
        else:
            with torch.no_grad():
                fixed = self.iterate(u, bx, log_decay, start)
            h = self.step(u, bx, log_decay, start, fixed)
        c = F.silu(self.c(torch.cat([u, shifted(h, start)], -1).to(x.dtype)))
        y = self.out(self.norm(F.silu(z) * c * h.to(x.dtype)))
        return y, {"h": h[:, -1] if x.shape[1] else start}

    def step(self, u: Tensor, bx: Tensor, log_decay: Tensor, start: Tensor, h: Tensor) -> Tensor:
        """One more repetition of the scan, with the mixers read off `h`."""
        mixer = self.mixer(u, shifted(h, start.detach()))
        return ops.scan(log_decay, -torch.expm1(log_decay) * (mixed(mixer, bx - h) + h), {"h": start})[0]

    def iterate(self, u: Tensor, bx: Tensor, log_decay: Tensor, start: Tensor) -> Tensor:
        """The fixed point [batch, time, width], by repetition, or in closed form where that does not settle."""
        tolerance = self.tolerance or 64 * torch.finfo(bx.dtype).eps
        h = torch.zeros_like(bx)
        for _ in range(self.iterations if bx.shape[1] > 1 else 0):
            h, last = self.step(u, bx, log_decay, start, h), h
            if not h.isfinite().all():
                break
            if ((h - last).abs().amax(-1) <= tolerance * h.abs().amax(-1)).all():
                return h
        return self.solve(u, bx, log_decay, start)

    def solve(self, u: Tensor, bx: Tensor, log_decay: Tensor, h: Tensor) -> Tensor:
        """The recurrence, token after token: M = I - (I - Λ) UᵀKU is inverted through its rank × rank part."""
        out = [bx[:, :0]]
        keep, write = log_decay.exp(), -torch.expm1(log_decay)
        one = torch.eye(self.mixer.rank, dtype=bx.dtype, device=bx.device)
        for t in range(bx.shape[1]):
            U, K = mixer = self.mixer(u[:, t], h)
            right = keep[:, t] * h + write[:, t] * mixed(mixer, bx[:, t])
            small = one - K @ ((U * write[:, t, None]) @ U.mT)
            z = torch.linalg.solve(small, K @ (U @ right[..., None]))
            h = right + write[:, t] * (U.mT @ z)[..., 0]
            out.append(h[:, None])
        return torch.cat(out, 1)
