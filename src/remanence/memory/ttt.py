"""Test-time training: a linear map or a perceptron per head that learns to undo a corruption of what it reads."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.bare import bare
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import ShortConv, merge, per_head, split, wide
from remanence.ops.decay import second_order
from remanence.ops.linear import input_gradient, weight_gradient
from remanence.ops.phases import joined
from remanence.ops.ttt import ttt, ttt_state
from remanence.state import State, tree_map

SOURCE = "arXiv:2407.04620"
LONG = 4096
"""Tokens, of all rows together, from which training spares memory: fewer need too little to be worth smaller pieces."""


@card(
    "ttt",
    kind="memory",
    says="TTT-Linear: a normalised linear map, trained by mini-batch gradient descent on what it reads.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "chunk_size": 4},
)
class TTTLinear(Memory):
    r"""$y = q + \mathrm{LN}(W_t q + b_t)$, where W and b learn to map keys to values less keys (`ops.ttt`).

    The step is $θ = \mathrm{base}·σ(w_h x + b_h) / \mathrm{head\_dim}$; what the tokens of a chunk ask for is averaged,
    with weights $\max(0, 1/(t+1) + c_t)$, c learned. Queries and keys are turned (rotary) by their position in the
    chunk. What the heads read is joined, normalised, gated by GELU(W_g x) if so chosen, and projected.

    Args:
        dim: features of input and output; a multiple of 2·heads.
        heads: independent networks.
        layers: of each network: 1 in TTT-Linear, 2 in TTT-MLP.
        expand: hidden features, as a multiple of dim/heads.
        chunk_size: tokens that share an anchor. It belongs to the model: train and read with the same.
        base: the inner learning rate; the authors warm TTT-MLP's up from 0.01 in the first tenth of training.
        conv: tokens of two short convolutions, one for queries and one for keys, which then share their projection
            (the authors' "Mamba backbone"); 0 for neither, with projections of their own.
        gate: whether there is a gate, as in the Mamba backbone.
        checkpoint: chunks that training makes again for the gradient instead of keeping them (the authors take 4); 0
            keeps all.

    Shapes: x and y [batch, time, dim]; state {"net": {"anchor", "sum": {"0": [batch, heads, out, in + 1], ...}, "pos":
        int64 [batch]}}, and with `conv` {"conv": {"tail": [batch, conv - 1, 2·dim]}}.
    Raises: `ValueError` on sizes below 1, a `dim` that is no multiple of 2·heads; `ShapeError`, `StateError`.
    Source: Learning to (Learn at Test Time): RNNs with Expressive Hidden States (2024), arXiv:2407.04620.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        layers: int = 1,
        expand: int = 4,
        chunk_size: int = 16,
        base: float = 1.0,
        conv: int = 0,
        gate: bool = False,
        checkpoint: int = 0,
    ):
        super().__init__()
        name = type(self).__name__
        K = per_head(name, dim, heads, multiple=2)
        if min(layers, expand, chunk_size) < 1 or min(conv, checkpoint) < 0:
            given = f"layers={layers}, expand={expand}, chunk_size={chunk_size}, conv={conv}"
            raise ValueError(f"{name}: layers, expand and chunk_size must be at least 1, conv at least 0, got {given}.")
        self.dim, self.heads, self.head_dim, self.chunk_size, self.base = dim, heads, K, chunk_size, base
        self.checkpoint = checkpoint
        self.qkv = Linear(dim, (2 if conv else 3) * dim, bias=False)
        self.conv = ShortConv(2 * dim, conv, bias=True) if conv else None
        self.step = Linear(dim, heads)
        nn.init.normal_(self.step.weight, std=0.02)
        nn.init.zeros_(self.step.bias)
        self.average = nn.Parameter(torch.zeros(chunk_size))
        self.scale, self.shift = nn.Parameter(torch.ones(heads, K)), nn.Parameter(torch.zeros(heads, K))
        widths = [K] + [expand * K] * (layers - 1) + [K]
        self.start = nn.ParameterList(
            F.pad(0.02 * torch.randn(heads, widths[i + 1], widths[i]), (0, 1)) for i in range(layers)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.gate = Linear(dim, dim, bias=False) if gate else None
        self.out = Linear(dim, dim, bias=False)

    def initial_state(self, batch: int) -> State:
        state: State = {"net": ttt_state(list(self.start), batch)}
        return state if self.conv is None else {**state, "conv": self.conv.initial_state(batch)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        after: State = {}
        if self.conv is None:
            vectors = self.project(x)
        else:
            both, v = self.qkv(x).chunk(2, -1)
            both, after["conv"] = self.conv(torch.cat([both, both], -1), state["conv"])
            vectors = [(*both.chunk(2, -1), v)]
        step = self.base / self.head_dim * wide(self.step(x)).sigmoid().transpose(1, 2)
        count = torch.arange(1, self.chunk_size + 1, device=x.device)
        average = (1 / count + wide(self.average)).clamp(min=0)
        gates = step, average, wide(self.scale), wide(self.shift)
        y, after["net"] = self.recall(vectors, *gates, state["net"])
        if self.gate is None and self.lean(y, self.norm, self.out):
            norm, out = self.norm, self.out
            return _Readout.apply(y.to(x.dtype), norm.weight, norm.bias, out.weight, norm.eps), after
        y = self.norm(y.to(x.dtype))
        y = y if self.gate is None else F.gelu(self.gate(x), approximate="tanh") * y
        return self.out(y), after

    def recall(
        self,
        vectors: list[tuple[Tensor, ...]],
        step: Tensor,
        average: Tensor,
        scale: Tensor,
        shift: Tensor,
        net: State,
    ) -> tuple[Tensor, State]:
        """What the queries read [batch, time, dim], a group of heads at a time, and the networks' state."""
        turn, y, n = self.turn(step.device), [], len(vectors)
        nets = [net] if n == 1 else [_group(net, i, n) for i in range(n)]
        for i, each in enumerate(vectors):
            q, k, v = (split(part, self.heads // n) for part in each)
            gates = step.chunk(n, 1)[i], average, scale.chunk(n)[i], shift.chunk(n)[i]
            out, nets[i] = ttt(q, k, v, *gates, nets[i], turn=turn, checkpoint=self.checkpoint)
            y.append(merge(out))
        return joined(y, -1), nets[0] if n == 1 else tree_map(_together, *nets)

    def lean(self, x: Tensor, *modules: nn.Module) -> bool:
        """Whether to be sparing with memory: in training, at length, with modules whose call would do no more."""
        plain = bare(*modules) and not torch.is_autocast_enabled(x.device.type)
        return plain and x.shape[0] * x.shape[1] >= LONG and torch.is_grad_enabled()

    def project(self, x: Tensor) -> list[tuple[Tensor, ...]]:
        """Queries, keys and values [batch, time, features]: of all heads, or apart, of the first and the last half.

        Apart, those of the last half are gone before the gradients of the first need room.
        """
        if self.heads % 2 or not self.lean(x, self.qkv):
            return [self.qkv(x).chunk(3, -1)]
        halves = self.qkv.weight.unflatten(0, (6, -1)).unbind()
        return [tuple(ops.linear(x, W) for W in halves[i::2]) for i in range(2)]

    def turn(self, device: torch.device) -> Tensor:
        """Cosines and sines of the rotary angles at every place in a chunk [chunk, 2, K/2], in float64."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device) / self.head_dim
        angle = torch.arange(self.chunk_size, device=device)[:, None] * 10000.0**-pairs
        return torch.stack([angle.cos(), angle.sin()], 1)


def _group(net: State, i: int, groups: int) -> State:
    """The state of the i-th group of heads."""
    return tree_map(lambda t: t if t.ndim == 1 else t.chunk(groups, 1)[i], net)


def _together(*parts: Tensor) -> Tensor:
    return parts[0] if parts[0].ndim == 1 else torch.cat(parts, 1)


class _Readout(torch.autograd.Function):
    """A layer norm and a projection; what is between is made again for the gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(y, scale, shift, weight)
        ctx.eps = eps
        return _readout(y, scale, shift, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, scale, shift, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            plain = partial(_readout, eps=ctx.eps)
            return *second_order(ctx.needs_input_grad[:4], plain, ctx.saved_tensors, grads), None
        grad = grads[0]
        normed, mean, inverse = torch.native_layer_norm(y, scale.shape, scale, shift, ctx.eps)
        d_weight = weight_gradient(grad.flatten(0, 1), normed.flatten(0, 1))
        del normed
        backward = torch.ops.aten.native_layer_norm_backward
        d_normed = input_gradient(grad.flatten(0, 1), weight).view_as(y)
        found = backward(d_normed, y, scale.shape, mean, inverse, scale, shift, [True] * 3)
        return *found, d_weight, None


def _readout(y: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.linear(F.layer_norm(y, scale.shape, scale, shift, eps), weight)


@card(
    "ttt-mlp",
    covers="ttt",
    kind="memory",
    says="TTT-MLP: a normalised two-layer perceptron, trained by mini-batch gradient descent on what it reads.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "chunk_size": 4, "conv": 4, "gate": True},
)
class TTTMLP(TTTLinear):
    """`TTTLinear` with two layers, four times as wide between them, and a tenth of the inner learning rate."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        layers: int = 2,
        expand: int = 4,
        chunk_size: int = 16,
        base: float = 0.1,
        **others: Any,
    ):
        super().__init__(dim, heads=heads, layers=layers, expand=expand, chunk_size=chunk_size, base=base, **others)
