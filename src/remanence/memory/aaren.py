"""Attention as a recurrent network: one learnt query for all times."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import per_head, project, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.ops.expgate import EMPTY
from remanence.ops.softmax_scan import softmax_scan
from remanence.state import State


@card(
    "aaren",
    kind="memory",
    says="Softmax attention over all that was read, with one learnt query: so it needs no cache.",
    source="arXiv:2405.13956",
    small={"dim": 6, "heads": 2},
    parents=("softmax",),
    change="the query is a learnt constant",
)
class Aaren(Memory):
    r"""$y_t = W_o \sum_{j ≤ t} \mathrm{softmax}_j(\bar q · k_j / \sqrt K) v_j$ with a learnt query $\bar q$ per head.

    Since all tokens ask the same, a running softmax does it; and for the same reason it cannot look up what a token
    asks for.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: queries.

    Shapes: x and y [batch, time, dim]; state {"w": [batch, dim], "u": [batch, heads], "m": float64 [batch, heads]}:
        the weighted sums of values and of ones, and the exponent taken out of both.
    Raises: `ValueError` if `heads` does not divide `dim`; `ShapeError`, `StateError` from `forward`.
    Source: Attention as an RNN (2024), arXiv:2405.13956.
    """

    def __init__(self, dim: int, *, heads: int = 4):
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, per_head("Aaren", dim, heads)
        self.query = nn.Parameter(torch.randn(heads, self.head_dim) / dim**0.5)
        self.key, self.value, self.out = (Linear(dim, dim, bias=False) for _ in range(3))

    def initial_state(self, batch: int) -> State:
        u = zeros(self.query, batch, self.heads)
        return {"w": zeros(self.query, batch, self.dim), "u": u, "m": torch.full_like(u, EMPTY, dtype=torch.float64)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if x.shape[1] == 1 and steps.worth(x, state["w"], state["u"]):
            y, state = layer_steps.one_query_token(project(self.key, x), project(self.value, x), self.query, state)
            return project(self.out, y), state
        # q̄·W_k x = (W_kᵀ q̄)·x: one vector per head, in place of a key per token
        asks = torch.einsum("hk,hkd->hd", self.query, self.key.weight.view(self.heads, self.head_dim, -1))
        score = wide(x @ asks.mT) * self.head_dim**-0.5
        each = {"w": state["w"], **{name: self._spread(state[name]) for name in ("u", "m")}}
        y, after = softmax_scan(self._spread(score), wide(self.value(x)), state=each)
        shared = {name: after[name][:, :: self.head_dim] for name in ("u", "m")}
        return self.out(y.to(x.dtype)), {"w": after["w"], **shared}

    def _spread(self, x: Tensor) -> Tensor:
        """[..., heads] to [..., dim], the same number for all features of a head."""
        return x.repeat_interleave(self.head_dim, -1)
