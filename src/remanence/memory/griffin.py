"""Griffin's recurrent block: a real gated linear recurrence behind a short convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import ShortConv, per_head, project, wide, zeros
from remanence.ops import dispatch, layer_steps, steps, taps
from remanence.ops.rg_lru import by_scan, rg_lru
from remanence.state import State


class BlockLinear(nn.Module):
    """A linear map that mixes features only within each of `blocks` equal groups. [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, blocks: int):
        super().__init__()
        size = dim // blocks
        self.weight = nn.Parameter(torch.randn(blocks, size, size) / math.sqrt(size))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        blocks, size, _ = self.weight.shape
        parts = x.reshape(-1, blocks, size).transpose(0, 1)
        y = torch.baddbmm(self.bias.view(blocks, 1, size), parts, self.weight)
        return y.transpose(0, 1).reshape(x.shape)


@card(
    "griffin",
    kind="memory",
    says="Griffin's recurrent block: a gated diagonal recurrence of bounded variance behind a short convolution.",
    source="arXiv:2402.19427",
    small={"dim": 6, "heads": 2},
)
class Griffin(Memory):
    r"""RG-LRU in its block: $y = W_o(\mathrm{GeLU}(W_1 x) ⊙ h)$, $h_t = a_t ⊙ h_{t-1} + \sqrt{1 - a_t^2} i_t ⊙ u_t$.

    $u$ is W_2 x after the convolution, $\log a_t = -8 r_t \mathrm{softplus}(Λ)$, and both gates $r, i$ are sigmoids of
    block-diagonal maps of $u$. A stream's very first token is written with factor 1: `state["empty"]` says whether
    it is still to come. GeLU is its tanh approximation, as in the published models; `RecurrentGemma` is their pattern
    of two such blocks and one of local attention.

    Args:
        dim: features of input and output.
        width: features of the recurrence; `dim` by default, a multiple of `heads`.
        heads: blocks of the gates' maps.
        conv: tokens that the convolution sees.

    Shapes: x and y [batch, time, dim];
        state {"h": [batch, width], "empty": bool [batch], "conv": {"tail": [batch, conv - 1, width]}}.
    Raises: `ValueError` if `heads` does not divide `width`; `ShapeError`, `StateError` from `forward`.
    Source: Griffin (2024), arXiv:2402.19427.
    """

    def __init__(self, dim: int, *, width: int | None = None, heads: int = 4, conv: int = 4):
        super().__init__()
        self.dim, self.width = dim, width or dim
        per_head("Griffin", self.width, heads)
        self.inward = Linear(dim, 2 * self.width)
        self.conv = ShortConv(self.width, conv, bias=True)
        self.input_gate = BlockLinear(self.width, heads)
        self.decay_gate = BlockLinear(self.width, heads)
        radius = torch.empty(self.width).uniform_(0.9**2, 0.999**2).sqrt()
        self.base = nn.Parameter((1 / radius - 1).log())  # exp(-softplus(base)) = radius
        self.out = Linear(self.width, dim)

    def initial_state(self, batch: int) -> State:
        h = zeros(self.base, batch, self.width)
        return {"h": h, "empty": h.new_ones(batch, dtype=torch.bool), "conv": self.conv.initial_state(batch)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        mixed = project(self.inward, x)
        if x.shape[1] == 1 and steps.worth(mixed, x, state["h"], state["conv"]["tail"]):
            conv = self.conv.weight, self.conv.bias, state["conv"]["tail"]
            slow, take = ((gate.weight, gate.bias) for gate in (self.decay_gate, self.input_gate))
            y, h, tail = layer_steps.rg_lru_token(mixed, conv, slow, take, self.base, state["empty"], state["h"])
            return project(self.out, y), {"h": h, "empty": torch.zeros_like(state["empty"]), "conv": {"tail": tail}}
        branch, u = mixed.chunk(2, dim=-1)
        u, kept = self.conv(u, state["conv"])
        gated, rate = u.to(x.dtype), F.softplus(wide(self.base))
        decay, into = wide(self.decay_gate(gated)), wide(self.input_gate(gated))
        run = rg_lru if x.shape[1] > 1 and dispatch.compiled(u) and not taps.watched() else by_scan
        h, after = run(u, decay, into, rate, state["empty"], state["h"].to(u.dtype))
        empty = state["empty"] & (x.shape[1] == 0)
        y = self.out(F.gelu(branch, approximate="tanh") * h.to(x.dtype))
        return y, {**after, "empty": empty, "conv": kept}
