"""Slot memories: a fixed number of keys and values, read by softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.lightnet import running_logsumexp
from remanence.memory.linear import Linear
from remanence.memory.parts import RMSNorm, merge, per_head, project, split, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.ops.expgate import EMPTY
from remanence.ops.slots import slots
from remanence.state import State


@card(
    "gsa",
    kind="memory",
    says="Slots of keys and values that forget at input-chosen rates, read by softmax attention.",
    source="arXiv:2409.07146",
    small={"dim": 8, "heads": 2, "slots": 5},
    parents=("abc", "gla"),
    change="each slot keeps what it does not overwrite: w = 1 − α",
)
class GSA(Memory):
    r"""$K_t = \mathrm{Diag}(α_t) K_{t-1} + (1 - α_t) k_t^\top$, V alike; $y_t = V_t^\top \mathrm{softmax}(K_t q_t)$.

    $α = σ(W_f x)^{1/8}$, one per slot; q, k and v pass SiLU. The outputs of all heads together pass SiLU and RMSNorm.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: of queries, with dim/heads features.
        kv_heads: independent memories, each read by heads/kv_heads queries; as many as `heads` by default.
        slots: how many keys and values each head holds; 64 in the paper.
        sharpness: the root that is taken of the gate, 8 in the paper.

    Shapes: x and y [batch, time, dim]; state {"K", "V": [batch, kv_heads, slots, dim/heads]}.
    Raises: `ValueError` if `heads` does not divide `dim`, `kv_heads` does not divide `heads`, or `slots` < 1;
        `ShapeError`, `StateError` from `forward`.
    Source: Gated Slot Attention (2024), arXiv:2409.07146.
    """

    def __init__(
        self, dim: int, *, heads: int = 4, kv_heads: int | None = None, slots: int = 64, sharpness: float = 8.0
    ):
        super().__init__()
        if slots < 1:
            raise ValueError(f"{type(self).__name__}: slots must be at least 1, got {slots}.")
        self.dim, self.heads, self.slots, self.sharpness = dim, heads, slots, sharpness
        self.head_dim = per_head(type(self).__name__, dim, heads)
        self.kv_heads = kv_heads or heads
        if heads % self.kv_heads:
            raise ValueError(f"{type(self).__name__}: kv_heads must divide heads={heads}, got {kv_heads}.")
        self.widths = (dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim)
        self.qkv = Linear(dim, sum(self.widths), bias=False)
        self.gate = Linear(dim, self.kv_heads * slots, bias=False)
        self.norm = RMSNorm(dim, eps=1e-5)
        self.out = Linear(dim, dim, bias=False)

    def initial_state(self, batch: int) -> State:
        K = zeros(self.out.weight, batch, self.kv_heads, self.slots, self.head_dim)
        return {"K": K, "V": K.clone()}

    def write(self, logits: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """What each slot takes and keeps: (w, log α, both [batch, kv_heads, time, slots], the rest of the state)."""
        log_decay = F.logsigmoid(split(logits, self.kv_heads)) / self.sharpness
        return -torch.expm1(log_decay), log_decay, {}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        qkv, scores = project(self.qkv, x), wide(project(self.gate, x))
        if x.shape[1] == 1 and steps.worth(state["K"], x, state["V"], state.get("z")):
            y, state = layer_steps.slots_token(
                qkv, scores, state, self.norm.weight, self.norm.eps or 0.0, self.sharpness
            )
            return project(self.out, y), state
        parts, counts = F.silu(qkv).split(self.widths, dim=-1), (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (split(part, count) for part, count in zip(parts, counts, strict=True))
        w, log_decay, rest = self.write(scores, state)
        held, share = {"K": state["K"], "V": state["V"]}, self.heads // self.kv_heads
        if share > 1:
            k, v, w, log_decay, *kept = (t.repeat_interleave(share, 1) for t in (k, v, w, log_decay, *held.values()))
            held = dict(zip(held, kept, strict=True))
        y, after = slots(q, k, v, w, log_decay, held)
        after = {name: t[:, ::share] for name, t in after.items()}
        return self.out(self.norm(F.silu(merge(y).to(x.dtype)))), {**after, **rest}


@card(
    "abc",
    kind="memory",
    says="Attention with bounded memory: slots that hold running softmax averages of keys and values.",
    source="arXiv:2110.02488",
    small={"dim": 8, "heads": 2, "slots": 5},
    parents=("softmax",),
    change="keys and values are averaged into slots before they are attended to",
)
class ABC(GSA):
    r"""Each slot holds the average of all keys (and values) with weights $e^{s_j}$, $s = W_s x$ its score of a token.

    With $z_t = \log \sum_{j ≤ t} e^{s_j}$ a slot takes $w = e^{s_t - z_t}$ of what comes, and keeps
    $α = e^{z_{t-1} - z_t} = 1 - w$ of what it has. All else is `GSA`'s.

    Args: those of `GSA`, without `sharpness`.
    Shapes: x and y [batch, time, dim]; state {"K", "V": [batch, kv_heads, slots, dim/heads], "z": [batch,
        kv_heads·slots]}.
    Raises: as `GSA`.
    Source: ABC: Attention with Bounded-memory Control (2021), arXiv:2110.02488.
    """

    def __init__(self, dim: int, *, heads: int = 4, kv_heads: int | None = None, slots: int = 64):
        super().__init__(dim, heads=heads, kv_heads=kv_heads, slots=slots)

    def initial_state(self, batch: int) -> State:
        empty = zeros(self.out.weight, batch, self.kv_heads * self.slots).fill_(EMPTY)
        return {**super().initial_state(batch), "z": empty}

    def write(self, logits: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        z = torch.cat([state["z"][:, None], running_logsumexp(logits, state["z"])], 1)
        surplus = split(z[:, :-1] - logits, self.kv_heads)
        return (-surplus).sigmoid(), F.logsigmoid(surplus), {"z": z[:, -1]}
