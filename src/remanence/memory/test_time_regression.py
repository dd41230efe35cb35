"""Test-time regression: what to remember is a regression, and its answer is known in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.errors import unknown
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import GatedReadout, ShortConv, l2_norm, per_head, project, split, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.ops.least_squares import (
    ORDERS,
    local_regression,
    recursive_least_squares,
    recursive_least_squares_state,
)
from remanence.state import State

WEIGHTS = ("all", "window", "kernel")


@card(
    "test-time-regression",
    kind="memory",
    says="The best constant, linear or affine map over all it was told, a window, or what resembles the query.",
    source="arXiv:2501.12352",
    small={"dim": 8, "heads": 2, "window": 5},
)
class Regression(Memory):
    r"""$y_t = m_t(q_t)$ with $m_t = \arg\min_m \sum_{i ≤ t} γ_{ti} ‖v_i - m(k_i)‖^2$ (+ ridge), solved exactly.

    Two answers make a member: which pairs count (`weights`), and what m may be (`order`).

    | weights | constant | linear | affine |
    |---|---|---|---|
    | all | | recursive least squares | |
    | window | | least squares in a window | the same with an intercept |
    | kernel | softmax attention in a window | weighted least squares | local linear attention |

    Queries and keys pass a short convolution, which lets a token bind to the one before it, SiLU and L2 norm: so
    exp(q·k/τ) is a Gaussian in their distance. Values are projected only. `Mesa` is the member with decaying weights.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent regressions.
        weights: "all" (a constant state of K² + K·V numbers), or "window", or "kernel" in a window (of `window` pairs).
        order: "constant", "linear" or "affine" (around the query); the table says with what. Nothing but "linear" can
            be solved over all that was read from a constant state; a constant over a window ignores its keys.
        window: pairs that count, the token's own among them.
        bandwidth: τ > 0 of the kernel at first; learned, per head.
        ridge: > 0 at first; learned, per head. For "affine" it is relative to the spread of the keys.
        conv: tokens that the convolutions see.

    Shapes: x and y [batch, time, dim]; K = dim/heads; state {"conv": {"tail": [batch, conv - 1, 2·dim]}} and {"P", "W":
        [batch, heads, K, K]} for "all", else {"k", "v": [batch, heads, window - 1, K], "seen": int64 [batch]}.
    Raises: `UnknownName` for other weights or orders; `ValueError` on numbers out of range; `ShapeError`, `StateError`.
    Source: Test-time regression (2025), arXiv:2501.12352. What makes q, k and v is this library's choice.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        weights: str = "kernel",
        order: str = "affine",
        window: int = 64,
        bandwidth: float = 0.1,
        ridge: float = 0.1,
        conv: int = 4,
    ):
        super().__init__()
        for what, given, known in (("weights", weights, WEIGHTS), ("order", order, ORDERS)):
            if given not in known:
                raise unknown(f"{what} of a regression", given, known)
        if weights == "all" and order != "linear":
            raise ValueError(f"Regression: weights='all' need order='linear', got {order!r}; the others need a window.")
        if weights == "window" and order == "constant":
            raise ValueError("Regression: a constant over a window is a mean that ignores its keys; take 'kernel'.")
        if window < 1 or not bandwidth > 0 or not ridge > 0:
            given = f"window={window}, bandwidth={bandwidth}, ridge={ridge}"
            raise ValueError(f"Regression: window must be at least 1, bandwidth and ridge > 0, got {given}.")
        K = per_head("Regression", dim, heads)
        self.dim, self.heads, self.head_dim = dim, heads, K
        self.weights, self.order, self.window = weights, order, window
        self.qk = Linear(dim, 2 * dim, bias=False)
        self.v = Linear(dim, dim, bias=False)
        self.conv = ShortConv(2 * dim, conv)
        self.ridge = None if order == "constant" else nn.Parameter(torch.full((heads,), math.log(ridge)))
        self.bandwidth = nn.Parameter(torch.full((heads,), math.log(bandwidth))) if weights == "kernel" else None
        self.readout = GatedReadout(dim, heads, K, activation=F.silu)

    def initial_state(self, batch: int) -> State:
        state: State = {"conv": self.conv.initial_state(batch)}
        if self.weights == "all":
            assert self.ridge is not None
            ridge = wide(self.ridge).exp()[:, None].expand(-1, self.head_dim)
            return {**state, **recursive_least_squares_state(ridge, batch, self.head_dim)}
        k = zeros(self.v.weight, batch, self.heads, self.window - 1, self.head_dim)
        return {**state, "k": k, "v": k.clone(), "seen": k.new_zeros(batch, dtype=torch.int64)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if x.shape[1] == 1 and self.weights != "all" and steps.worth(x, state["k"], state["v"], state["conv"]["tail"]):
            y, state = layer_steps.regression_token(
                project(self.qk, x), project(self.v, x), self.conv.weight, state, self.readout.plan(x),
                order=ORDERS.index(self.order), bandwidth=self.bandwidth, ridge=self.ridge,
            )  # fmt: skip
            return project(self.readout.out, y), state
        mixed, conv = self.conv(self.qk(x), state["conv"], silu=True)
        q, k = (l2_norm(split(part, self.heads)) for part in mixed.chunk(2, -1))
        v = split(self.v(x), self.heads)
        if self.weights == "all":
            y, after = recursive_least_squares(q, k, v, state)
        else:
            bandwidth = None if self.bandwidth is None else wide(self.bandwidth).exp()
            ridge = 0.0 if self.ridge is None else wide(self.ridge).exp()[:, None, None, None]
            y, after = local_regression(
                q, k, v, window=self.window, order=self.order, bandwidth=bandwidth, ridge=ridge, state=state
            )
        return self.readout(y, x), {**after, "conv": conv}
