"""TNT: one memory of the far past that moves slowly, and quick ones of the near past that start anew at every shard."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from remanence import ops
from remanence.catalogue import card
from remanence.errors import unknown
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import GatedReadout, ShortConv, l2_norm, per_head, split, zeros
from remanence.ops.fast_weight import fast_weight, fast_weight_state
from remanence.ops.phases import by_phase
from remanence.state import State

PROJECTIONS = ("sum", "delta", "none")


@card(
    "tnt",
    kind="memory",
    says="A slow global memory beside quick local ones that restart at every shard, so that shards train in parallel.",
    source="arXiv:2511.07343",
    small={"dim": 8, "heads": 2, "expand": 2, "global_chunk": 5, "local_chunks": (2, 4), "shard": 8},
    parents=("titans",),
    change="a global memory read as its chunk began, local ones reset by a clock of their own",
)
class TNT(Memory):
    r"""$y_t = f(V_ξ, q_t) + \sum_i f(W^i_t, Π_t q_t)$, each f trained by gradient descent to answer $v_t$ to $k_t$.

    The global network V takes gradients at the weights with which its long chunk began, and is read there. Each local
    network $W^i$ has its own short chunk, and returns to a learned start at every shard, so that shards do not wait
    for one another. $Π_t = \sum k_τ k_τ^\top$ over the shard's tokens so far turns queries towards the keys that were
    written.

    Two stages: train with long local chunks, then call `refine` to halve them and train on for a twentieth of the
    steps, again until they are 1, which is how one token at a time is best read.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent networks of every kind.
        layers: depth of each network; `expand`: hidden features, as a multiple of dim/heads.
        global_chunk: tokens between two changes of the global network.
        local_chunks: tokens per anchor, for each local network; each divides `shard`.
        shard: tokens between two resets of the local networks.
        projection: "sum" as in the paper, a projector where keys are orthonormal, and as large as the shard is long
            where they are alike; "delta", which corrects instead of adding, and keeps each new key as it is; or "none".
        max_step: the largest inner step; steps also stay within the bound of `ops.fast_weight`.
        conv: tokens that the convolutions see.

    Shapes: x and y [batch, time, dim]; state {"global", "local": {"0", ...}: each as `fast_weight_state`, without
        momentum, "projection": {"S": [batch, heads, K, K]}, "conv": {"tail"}}, K = dim/heads.
    Raises: `ValueError` on sizes below 1, a `dim` that is no multiple of `heads`, a local chunk that does not divide
        `shard`; `UnknownName` for a projection; `ShapeError`, `StateError`.
    Source: TNT: Improving Chunkwise Training for Test-Time Memorization (2025), arXiv:2511.07343. The resets of the
        projection follow its appendix (the shard, not the chunk).
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        layers: int = 2,
        expand: int = 4,
        global_chunk: int = 2048,
        local_chunks: Sequence[int] = (8, 16),
        shard: int = 2048,
        projection: str = "sum",
        max_step: float = 0.1,
        conv: int = 4,
    ):
        super().__init__()
        K = per_head("TNT", dim, heads)
        if min(layers, expand, global_chunk, shard, *local_chunks) < 1:
            given = f"{layers=}, {expand=}, {global_chunk=}, {shard=}, local_chunks={tuple(local_chunks)}"
            raise ValueError(f"TNT: all sizes must be at least 1, got {given}.")
        if any(shard % c for c in local_chunks):
            raise ValueError(f"TNT: local chunks must divide the shard of {shard}, got {tuple(local_chunks)}.")
        if projection not in PROJECTIONS:
            raise unknown("projection", projection, PROJECTIONS)
        self.dim, self.heads, self.max_step, self.projection = dim, heads, max_step, projection
        self.global_chunk, self.local_chunks, self.shard = global_chunk, tuple(local_chunks), shard
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConv(3 * dim, conv)
        widths = [K] + [expand * K] * (layers - 1) + [K]
        self.starts = nn.ModuleList(
            nn.ParameterList(torch.randn(heads, after, before) * before**-0.5 for before, after in pairwise(widths))
            for _ in range(1 + len(self.local_chunks))
        )
        self.step = Linear(dim, len(self.starts) * heads)
        nn.init.normal_(self.step.weight, std=0.02)
        nn.init.zeros_(self.step.bias)
        self.readout = GatedReadout(dim, heads, K)

    def initial_state(self, batch: int) -> State:
        far = fast_weight_state(list(self.starts[0].parameters()), batch, momentum=False)
        return {"global": far, **self.fresh(batch), "conv": self.conv.initial_state(batch)}

    def fresh(self, batch: int) -> State:
        """What every shard begins with."""
        starts = (list(start.parameters()) for start in self.starts[1:])
        local = {str(i): fast_weight_state(start, batch, momentum=False) for i, start in enumerate(starts)}
        K = self.dim // self.heads
        return {"local": local, "projection": {"S": zeros(self.qkv.weight, batch, self.heads, K, K)}}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if x.shape[1] == 0:
            return x, state
        mixed, conv = self.conv(self.qkv(x), state["conv"], silu=True)
        q, k, v = (split(part, self.heads) for part in mixed.chunk(3, dim=-1))
        q, k = l2_norm(q), l2_norm(k)
        steps = self.max_step * split(self.step(x), len(self.starts)).sigmoid().mT  # [batch, memories, heads, time]
        first, *rest = steps.unbind(1)
        far, moved = fast_weight(
            q, k, v, first, state["global"], chunk_size=self.global_chunk, residual=True, read="anchor", bound=0.5
        )
        pos, near_state = state["global"]["pos"], {"local": state["local"], "projection": state["projection"]}
        near, near_state = by_phase(self.shards, [q, k, v, *rest], near_state, pos, self.shard)
        return self.readout(far + near, x), {"global": moved, **near_state, "conv": conv}

    def shards(self, inputs: list[Tensor], state: State, phase: int) -> tuple[Tensor, State]:
        """The local memories over tokens, the first of them at `phase` in its shard; whole shards side by side."""
        B, _, T, _ = inputs[0].shape
        first = min(T, self.shard - phase)
        n, last = divmod(T - first, self.shard)
        head, body, tail = zip(*(x.split([first, n * self.shard, last], 2) for x in inputs), strict=True)
        y, state = self.near(list(head), state)
        out = [y]
        if n:
            rows = [x.unflatten(2, (n, self.shard)).transpose(1, 2).flatten(0, 1) for x in body]
            y, _ = self.near(rows, self.fresh(B * n))
            out.append(y.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3))
        if phase + first == self.shard:  # a shard that has ended has left nothing
            state = self.fresh(B)
        if last:
            y, state = self.near(list(tail), state)
            out.append(y)
        return torch.cat(out, 2), state

    def near(self, inputs: list[Tensor], state: State) -> tuple[Tensor, State]:
        """The local memories within one shard: the sum of what they read, and their state."""
        q, k, v, *steps = inputs
        projected = state["projection"]
        if self.projection == "sum":
            q, projected = ops.linear_attention(q, k, k, state=projected)
        elif self.projection == "delta":
            q, projected = ops.gated_delta_rule(q, k, k, torch.ones_like(steps[0]), state=projected)
        y, local = torch.zeros_like(v), {}
        for i, (chunk, step) in enumerate(zip(self.local_chunks, steps, strict=True)):
            read, local[str(i)] = fast_weight(
                q, k, v, step, state["local"][str(i)], chunk_size=chunk, residual=True, bound=0.5
            )
            y = y + read
        return y, {"local": local, "projection": projected}


def refine(model: nn.Module) -> list[tuple[int, ...]]:
    """The second stage: halve the local chunks of every TNT layer in a model (down to 1), and say what they are now.

    Parameters stay as they are; train on for about a twentieth of the first stage's steps.
    """
    layers = [m for m in model.modules() if isinstance(m, TNT)]
    for layer in layers:
        layer.local_chunks = tuple(max(1, c // 2) if c % 2 == 0 else 1 for c in layer.local_chunks)
    return [layer.local_chunks for layer in layers]
