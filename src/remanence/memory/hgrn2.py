"""HGRN2: the bounded forget gate of HGRN, on the rows of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.hgrn import LowerBounds, bounded_decay, check_bound, least_share
from remanence.memory.linear import Linear
from remanence.memory.parts import RMSNorm, merge, per_head, project, split, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.state import State


@card(
    "hgrn2",
    kind="memory",
    says="Linear attention whose key is what its forget gate lets go, with bounds that rise with depth.",
    source="arXiv:2404.07904",
    small={"dim": 8, "heads": 2, "lower_bound": 0.3},
    parents=("hgrn", "gla"),
    change="the vector state becomes a matrix by an outer product with the input, at no new parameters",
)
class HGRN2(Memory):
    r"""$S_t = \mathrm{Diag}(α_t) S_{t-1} + (1 - α_t) v_t^\top$ with $α_t = γ + (1 - γ) σ(W_f x_t)$.

    It is read by SiLU(W_q x) / √K. The key is tied to the gate, so each row of S is a running mean of values. Read
    through a norm over all heads.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent memories of dim/heads rows (the paper's models have 128 rows per head).
        lower_bound: γ, either one number in [0, 1) or the model's `LowerBounds`.
        layer: which row of `LowerBounds` is this layer's; unused with a number.

    Shapes: x and y [batch, time, dim]; state {"S": [batch, heads, K, K]}, K = dim/heads.
    Raises: `ValueError` on a bound outside [0, 1) or heads that do not divide; `ShapeError`, `StateError`.
    Source: HGRN2: Gated Linear RNNs with State Expansion (2024), arXiv:2404.07904.
    """

    def __init__(self, dim: int, *, heads: int = 4, lower_bound: float | LowerBounds = 0.0, layer: int = 0):
        super().__init__()
        check_bound("HGRN2", lower_bound)
        self.dim, self.heads, self.lower_bound, self.layer = dim, heads, lower_bound, layer
        self.head_dim = per_head("HGRN2", dim, heads)
        self.qfv = Linear(dim, 3 * dim, bias=False)
        self.norm = RMSNorm(dim, eps=1e-5)
        self.out = Linear(dim, dim, bias=False)

    def initial_state(self, batch: int) -> State:
        return {"S": zeros(self.out.weight, batch, self.heads, self.head_dim, self.head_dim)}

    def log_decay(self, f: Tensor) -> Tensor:
        """log α [batch, time, dim] of the gate's logits, never below log γ."""
        return bounded_decay(f, self.lower_bound, self.layer)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        qfv = project(self.qfv, x)
        if x.shape[1] == 1 and steps.worth(state["S"], x):
            y, S, _ = layer_steps.outer_token(
                qfv, state["S"], features=steps.SILU, scale=self.head_dim**-0.5,
                least=least_share(self.lower_bound, self.layer), readout=self.norm.plan(),
            )  # fmt: skip
            return project(self.out, y), {"S": S}
        q, f, v = qfv.chunk(3, dim=-1)
        decay = split(self.log_decay(wide(f)), self.heads)
        q = split(F.silu(q), self.heads) * self.head_dim**-0.5
        y, state = ops.linear_attention(q, -torch.expm1(decay), split(v, self.heads), decay, state)
        return self.out(self.norm(merge(y).to(x.dtype))), state
