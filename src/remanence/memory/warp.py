"""WARP: a linear recurrence over the weights of a small network, driven by how the input changes."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.errors import unknown
from remanence.memory.base import Memory
from remanence.memory.parts import wide
from remanence.state import State

TRANSITIONS = ("diagonal", "dense")
STARTS = ("learned", "network")
PIECE = 32
"""Tokens over which a diagonal transition goes at once, by doubling."""


@card(
    "warp",
    kind="memory",
    says="A linear recurrence whose state is the weights of a small network, which is asked for the next value.",
    source="arXiv:2506.01153",
    small={"dim": 3, "width": 4, "depth": 2},
)
class WARP(Memory):
    r"""$θ_t = A θ_{t-1} + B (x_t - x_{t-1})$, $y_t = f_{θ_t}((t + 1)/T)$: θ are the weights of the network f.

    A starts as the identity and B as zero, so that the start is f with its own first weights, whatever comes. y_t is
    meant as the next value; `forecast` feeds it back. θ_0 is learned, or a network of the first input.

    Args:
        dim: features of input and output.
        width, depth: of the hidden ReLU layers of f.
        transition: `diagonal` (one number per weight, in parallel over time) or `dense` (the paper's; its size is the
            square of the number of weights P, and it goes token by token, since powers of it cost more than they save).
        start: `learned` or `network` (the paper's models; about P² further parameters).
        horizon: T, the tokens in which f's time goes from 0 to 1.
        clip: hold every weight within ±clip (0.5 in the paper's unstable cases); then token by token as well.
        see: f also reads x_t.
        deviation: f also gives a standard deviation, through softplus: see `predict`.

    Shapes: x and y [batch, time, dim];
        state {"theta": [batch, P], "x": [batch, dim], the last input, "position": int64 [batch]}.
    Raises: `ValueError` for numbers out of range; `UnknownName` for a transition or start; `ShapeError`, `StateError`
        from `forward`.
    Source: Weight-Space Linear Recurrent Neural Networks (2025), arXiv:2506.01153.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int = 24,
        depth: int = 3,
        transition: str = "diagonal",
        start: str = "learned",
        horizon: int = 1000,
        clip: float | None = None,
        see: bool = False,
        deviation: bool = False,
    ):
        super().__init__()
        if min(width, depth, horizon) < 1 or (clip is not None and not clip > 0):
            raise ValueError(
                "WARP: width, depth and horizon must be at least 1 and clip above 0, "
                f"got {width}, {depth}, {horizon}, {clip}."
            )
        for what, name, known in (("transition", transition, TRANSITIONS), ("start", start, STARTS)):
            if name not in known:
                raise unknown(what, name, known)
        self.dim, self.horizon, self.clip, self.see, self.deviation = dim, horizon, clip, see, deviation
        sizes = [1 + dim * see, *[width] * depth, dim * (1 + deviation)]
        self.layers = list(itertools.pairwise(sizes))
        weights = [torch.empty((i + 1) * o).uniform_(-(i**-0.5), i**-0.5) for i, o in self.layers]
        P = sum(len(w) for w in weights)
        self.A = nn.Parameter(torch.eye(P) if transition == "dense" else torch.ones(P))
        self.B = nn.Parameter(torch.zeros(P, dim))
        self.start: nn.Module | None = None
        if start == "learned":
            self.theta = nn.Parameter(torch.cat(weights))
        else:
            near, far = (2 * dim + P) // 3, (dim + 2 * P) // 3
            self.start = nn.Sequential(
                nn.Linear(dim, near), nn.ReLU(), nn.Linear(near, far), nn.ReLU(), nn.Linear(far, P)
            )

    def initial_state(self, batch: int) -> State:
        B = wide(self.B)
        theta = B.new_zeros(batch, len(B)) if self.start else wide(self.theta).repeat(batch, 1)
        return {"theta": theta, "x": B.new_zeros(batch, self.dim), "position": B.new_zeros(batch, dtype=torch.int64)}

    def read(self, theta: Tensor, position: Tensor, x: Tensor) -> Tensor:
        """What f with weights `theta` [batch, time, P] says of time `position` [batch, time]; x the last inputs."""
        at = (position.to(theta.dtype) / self.horizon)[..., None]
        y = torch.cat([at, x], -1) if self.see else at
        parts = theta.split([(i + 1) * o for i, o in self.layers], -1)
        for n, (part, (i, o)) in enumerate(zip(parts, self.layers, strict=True)):
            weight, bias = part.split([i * o, o], -1)
            y = (weight.unflatten(-1, (o, i)) * (F.relu(y) if n else y)[..., None, :]).sum(-1) + bias
        return y

    def predict(self, x: Tensor, state: State | None = None) -> tuple[Tensor, Tensor | None, State]:
        """(mean, standard deviation or None, state) of each next value."""
        state = self.begin(x, state)
        T, new, wide_x = x.shape[1], (state["position"] == 0)[:, None], wide(x)
        last, theta = state["x"], state["theta"]
        if T:
            last = torch.where(new, wide_x[:, 0], last)
            if self.start:
                theta = torch.where(new, wide(self.start(x[:, 0])), theta)
        inputs = torch.cat([last[:, None], wide_x], 1)
        thetas = self.evolve(inputs.diff(dim=1) @ wide(self.B).mT, theta)
        position = state["position"][:, None] + torch.arange(1, T + 1, device=x.device)
        out = self.read(thetas, position, wide_x)
        after = {"theta": thetas[:, -1] if T else theta, "x": inputs[:, -1], "position": state["position"] + T}
        mean, *rest = out.chunk(2, -1) if self.deviation else (out,)
        return mean.to(x.dtype), F.softplus(rest[0]).to(x.dtype) if rest else None, after

    def evolve(self, b: Tensor, theta: Tensor) -> Tensor:
        """θ_t = A θ_{t−1} + b_t for all t, from θ_0: [batch, time, P]."""
        A, out = wide(self.A), [b[:, :0]]
        if A.ndim == 1 and self.clip is None:
            for piece in b.split(PIECE, 1) if b.shape[1] else ():
                h = torch.cat([piece[:, :1] + (A * theta)[:, None], piece[:, 1:]], 1)
                reach, power = 1, A
                while reach < h.shape[1]:  # h_t has read `reach` tokens back
                    h = torch.cat([h[:, :reach], h[:, reach:] + power * h[:, :-reach]], 1)
                    reach, power = 2 * reach, power * power
                theta = h[:, -1]
                out.append(h)
            return torch.cat(out, 1)
        for change in b.unbind(1):
            theta = (theta @ A.mT if A.ndim == 2 else theta * A) + change
            theta = theta if self.clip is None else theta.clamp(-self.clip, self.clip)
            out.append(theta[:, None])
        return torch.cat(out, 1)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        y, _, state = self.predict(x, state)
        return y, state

    def forecast(self, state: State, steps: int) -> tuple[Tensor, State]:
        """The next values, each read back in before the next is asked for: [batch, steps, dim], and the state then."""
        out = []
        for _ in range(steps):
            y = self.read(state["theta"][:, None], state["position"][:, None], state["x"][:, None])[..., : self.dim]
            out.append(y)
            _, state = self(y.to(self.B.dtype), state)
        return torch.cat(out, 1).to(self.B.dtype) if out else state["x"][:, None][:, :0].to(self.B.dtype), state
