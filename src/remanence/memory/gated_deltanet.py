"""The gated delta rule: a memory that can replace one thing, or forget everything."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import (
    DecayGate,
    FeatureDecay,
    GatedReadout,
    ShortConv,
    l2_norm,
    per_head,
    project,
    split,
    wide,
    zeros,
)
from remanence.ops import layer_steps, steps
from remanence.ops.layer_steps import Readout
from remanence.state import State


@card(
    "gated-deltanet",
    kind="memory",
    says="A matrix memory that overwrites what a key held, and can forget everything at once.",
    source="arXiv:2412.06464",
    small={"dim": 8, "heads": 2},
    parents=("deltanet", "mamba2"),
    change="a decay per head, chosen by the input, before each write",
)
class GatedDeltaNet(Memory):
    r"""Decay, then correct: $S ← e^{g} S$, then $S ← S + β k (v - S^\top k)^\top$; read as $S^\top q$.

    Queries and keys pass a short convolution, SiLU and L2 norm, values the first two; $β = σ(W_b x)$ is how much
    of the old value is replaced, $g ≤ 0$ the log decay per head (`DecayGate`). The other delta rules differ from it
    by an argument, by `write` or by `rule`.

    Args:
        dim: features of input and output; a multiple of `heads` unless `head_dim` is given.
        heads: of keys; as many memories, unless `value_heads` is given.
        value_heads: independent memories, a multiple of `heads`: neighbours share their queries and keys.
        head_dim: features per key; dim/heads by default (the paper's models have 256).
        expand_v: features per value, as a multiple of `head_dim`; 2 in the paper.
        value_dim: features per value, where they are no such multiple.
        conv: tokens that the convolutions see.
        negative: let β reach 2, so that a write may reflect a key's content (arXiv:2411.12537).
        decay, gate: whether there is a decay, and a gate on what was read.
        writes: delta steps per token, each with its own key, value and β; decay comes before the first, reading
            after the last.
        eps: of the norm before the gate.

    Shapes: x and y [batch, time, dim]; with K = head_dim, V = value_dim, n = writes:
        state {"S": [batch, value_heads, K, V], "conv": {"tail": [batch, conv - 1, heads·(1 + n)·K + value_heads·n·V]}}.
    Raises: `ValueError` if `heads` does not divide `dim` or `value_heads`, or for `writes` below 1; `ShapeError`,
        `StateError` from `forward`.
    Source: Gated Delta Networks (2024), arXiv:2412.06464.
    """

    exact = False
    """Whether `write` is that of `EFLA`, for the compiled step."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        value_heads: int | None = None,
        head_dim: int | None = None,
        expand_v: int = 2,
        value_dim: int | None = None,
        conv: int = 4,
        negative: bool = False,
        decay: bool = True,
        gate: bool = True,
        writes: int = 1,
        eps: float = 1e-5,
    ):
        super().__init__()
        name = type(self).__name__
        K = head_dim or per_head(name, dim, heads)
        V = value_dim or expand_v * K
        memories = value_heads or heads
        if memories % heads:
            raise ValueError(f"{name}: value_heads must be a multiple of heads, got {memories} and heads={heads}.")
        if writes < 1:
            raise ValueError(f"{name}: writes must be at least 1, got {writes}.")
        self.dim, self.heads, self.value_heads, self.writes = dim, heads, memories, writes
        self.head_dim, self.value_dim, self.most = K, V, 2.0 if negative else 1.0
        self.widths = heads * K, writes * heads * K, writes * memories * V
        self.q = Linear(dim, self.widths[0], bias=False)
        self.kv = Linear(dim, sum(self.widths[1:]), bias=False)
        self.conv = ShortConv(sum(self.widths), conv)
        self.beta = Linear(dim, writes * memories, bias=False)
        self.decay: DecayGate | FeatureDecay | None = DecayGate(dim, memories) if decay else None
        self.readout = GatedReadout(dim, memories, V, eps=eps, activation=F.silu if gate else None)

    def initial_state(self, batch: int) -> State:
        S = zeros(self.kv.weight, batch, self.value_heads, self.head_dim, self.value_dim)
        return {"S": S, "conv": self.conv.initial_state(batch)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if self._steps(x, state):
            y, state = self._token(x, state, self.readout.plan(x))
            return project(self.readout.out, y), state
        y, state = self._read(x, state)
        return self.readout(y, x), state

    def recall(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the memories answer, before the readout: [batch, value_heads, time, V]."""
        state = self.begin(x, state)
        if self._steps(x, state):
            y, state = self._token(x, state)
            return split(y, self.value_heads), state
        return self._read(x, state)

    def _read(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        (q, k, v), conv = self.conv.apart([self.q(x), self.kv(x)], state["conv"], self.widths, silu=True)
        k, v, beta = (p.unflatten(-1, (self.writes, -1)).flatten(1, 2) for p in (k, v, self.beta(x)))
        k, beta = self.write(split(k, self.heads), self.most * wide(beta).sigmoid().transpose(1, 2))
        q = split(q, self.heads)
        if self.value_heads > self.heads:
            q, k = (p.repeat_interleave(self.value_heads // self.heads, 1) for p in (q, k))
        g = None if self.decay is None else self.decay(x)
        if self.writes > 1:
            q, g = spread(q, self.writes, -1), None if g is None else spread(g, self.writes, 0)
        y, S = self.rule(q, k, split(v, self.value_heads), beta, g, state["S"])
        y = y if self.writes == 1 else y[:, :, self.writes - 1 :: self.writes]
        return y, {"S": S, "conv": conv}

    def _steps(self, x: Tensor, state: State) -> bool:
        """Whether a token of this rule is to take the compiled form; a variant with a rule of its own has none."""
        plain = type(self).rule is GatedDeltaNet.rule and (self.exact or type(self).write is GatedDeltaNet.write)
        return x.shape[1] == 1 and plain and steps.worth(state["S"], x, state["conv"]["tail"])

    def _token(self, x: Tensor, state: State, readout: Readout | None = None) -> tuple[Tensor, State]:
        decay = None if self.decay is None else self.decay.logits(x)
        y, S, tail = layer_steps.delta_token(
            project(self.q, x), project(self.kv, x), project(self.beta, x), self.conv.weight, state["conv"]["tail"],
            state["S"], self.heads, self.most, decay, readout, exact=self.exact,
        )  # fmt: skip
        return y, {"S": S, "conv": {"tail": tail}}

    def write(self, k: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and strengths that the rule takes, from those projected: [B, H, T, K] and [B, H, T]."""
        return k, beta

    def rule(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrence, with a decay per head or per key feature: what each query reads, and the last state.

        Queries and keys are as projected; the former are brought to length K^{-1/2}, the latter to 1 unless `exact`.
        """
        scale = self.head_dim**-0.5
        if not self.exact and (g is None or g.ndim == 3):
            y, state = ops.gated_delta_rule(q, k, v, beta, g, {"S": S}, unit=True, scale=scale)
            return y, state["S"]
        q, k = l2_norm(q, scale=scale), k if self.exact else l2_norm(k)
        if g is None or g.ndim == 3:
            y, state = ops.gated_delta_rule(q, k, v, beta, g, {"S": S})
        else:
            written = beta[..., None] * k
            y, state = ops.dplr(q, written, v, -g.exp() * k, written, g, {"S": S})
        return y, state["S"]


def spread(x: Tensor, steps: int, at: int) -> Tensor:
    """[B, H, T, ...] -> [B, H, T·steps, ...]: each token becomes `steps`, all zero but the one `at`."""
    out = x.new_zeros(*x.shape[:3], steps, *x.shape[3:])
    out[:, :, :, at] = x
    return out.flatten(2, 3)
