"""Slots of memory that only learn what they do not already contain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.errors import unknown
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import GatedReadout, ShortConv, l2_norm, per_head, project, split, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.ops.lattice import lattice
from remanence.state import State

OBJECTIVES = ("decode", "encode", "dot")


@card(
    "lattice",
    kind="memory",
    says="Slots that a write moves only at right angles to what they hold: nothing known is stored twice.",
    source="arXiv:2504.05646",
    small={"dim": 8, "heads": 2, "slots": 3},
    parents=("deltanet",),
    change="a gradient step through slots of unit length",
)
class Lattice(Memory):
    r"""$s_i ← s_i + γ c_i (I - φ_i φ_i^\top) e / ‖s_i‖$ with directions $φ_i = s_i / ‖s_i‖$ and error $e$.

    One gradient step on the online loss, through the normalisation of the slots. It is nonlinear in the state, so
    tokens are read one by one. A slot that grows learns more slowly.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent memories.
        slots: per head, as many as a head has features (dim/heads) by default.
        conv: tokens that the convolutions see.
        objective: "decode": $½‖v - \sum_i φ_i k_i‖²$, so $c = k, e = v - Φk$, read as $Φq$; "dot": $-v^\top Φk$, so
            $e = v$; "encode" reconstructs keys from values, $c = v, e = k - Φv$, read as $Φ^\top q$.
        renormalise: bring slots back to unit length after each write.

    Shapes: x and y [batch, time, dim]; with the w convolved features of queries, keys and values:
        state {"S": [batch, heads, slots, dim/heads], "conv": {"tail": [batch, conv - 1, w]}}.
    Raises: `ValueError` if `heads` does not divide `dim` or `slots` is below 1; `UnknownName` for an objective that
        there is not; `ShapeError`, `StateError` from `forward`.
    Source: Lattice (2025), arXiv:2504.05646. The paper's gates, key nonlinearity and head layout are not settled
        here from its code, of which there is none: projections, convolution and readout are those of `GatedDeltaNet`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        slots: int | None = None,
        conv: int = 4,
        objective: str = "decode",
        renormalise: bool = False,
    ):
        super().__init__()
        width = per_head("Lattice", dim, heads)
        slots = width if slots is None else slots
        if slots < 1:
            raise ValueError(f"Lattice: slots must be at least 1, got {slots}.")
        if objective not in OBJECTIVES:
            raise unknown("objective of Lattice", objective, OBJECTIVES)
        self.dim, self.heads, self.objective, self.renormalise = dim, heads, objective, renormalise
        K, V = (width, slots) if objective == "encode" else (slots, width)
        self.widths = heads * K, heads * K, heads * V
        self.qkv = Linear(dim, sum(self.widths), bias=False)
        self.conv = ShortConv(sum(self.widths), conv)
        self.step = Linear(dim, heads)
        self.slots = nn.Parameter(F.normalize(torch.randn(heads, slots, width), dim=-1))
        self.readout = GatedReadout(dim, heads, V)

    def initial_state(self, batch: int) -> State:
        start = wide(self.slots).expand(batch, *self.slots.shape)
        return {"S": start + zeros(self.slots, *start.shape), "conv": self.conv.initial_state(batch)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        encode, how = self.objective == "encode", {"correct": self.objective != "dot", "renormalise": self.renormalise}
        if x.shape[1] == 1 and steps.worth(state["S"], x, state["conv"]["tail"]):
            y, S, tail = layer_steps.lattice_token(
                project(self.qkv, x), project(self.step, x), self.conv.weight, state["conv"]["tail"], state["S"],
                self.readout.plan(x), by_slot=encode, **how,
            )  # fmt: skip
            return project(self.readout.out, y), {"S": S, "conv": {"tail": tail}}
        mixed, conv = self.conv(self.qkv(x), state["conv"], silu=True)
        q, k, v = (split(p, self.heads) for p in mixed.split(self.widths, -1))
        q, k, step = l2_norm(q), l2_norm(k), wide(self.step(x)).sigmoid().transpose(1, 2)
        code, target = (v, k) if encode else (k, v)
        y, after = lattice(q, code, target, step, {"S": state["S"]}, by_slot=encode, **how)
        return self.readout(y, x), {**after, "conv": conv}
