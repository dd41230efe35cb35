"""TCNCA: Mega's gated attention in chunks, fed by a dilated convolution network instead of a moving average."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.errors import unknown
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import project, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.ops.chunk_attention import chunk_attention
from remanence.ops.dense_ssm import dense_ssm
from remanence.ops.long_conv import dilated_conv
from remanence.state import State


class DilatedConvolutions(nn.Module):
    r"""Residual layers $x + \mathrm{SiLU}(w * x)$ of dilations 1, b, b², ...: they see `receptive_field` tokens.

    Shapes: x and y [batch, time, dim]; state {"0": {"tail": [batch, (kernel - 1)·b^0, dim]}, "1": ...}.
    """

    def __init__(self, dim: int, *, kernel: int = 8, dilation: int = 8, layers: int = 3):
        super().__init__()
        if min(kernel, dilation, layers) < 1:
            given = f"{kernel}, {dilation}, {layers}"
            raise ValueError(f"DilatedConvolutions: kernel, dilation and layers must be at least 1, got {given}.")
        self.dilations = tuple(dilation**i for i in range(layers))
        self.receptive_field = 1 + (kernel - 1) * sum(self.dilations)
        bound = 1 / math.sqrt(kernel)
        self.weight = nn.Parameter(torch.empty(layers, dim, kernel).uniform_(-bound, bound))

    def initial_state(self, batch: int) -> State:
        _, dim, kernel = self.weight.shape
        return {
            str(i): {"tail": zeros(self.weight, batch, (kernel - 1) * d, dim)} for i, d in enumerate(self.dilations)
        }

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        tails = [state[str(i)]["tail"] for i in range(len(self.dilations))]
        if x.shape[1] == 1 and steps.worth(x, *tails):
            y, tails = steps.dilated_residuals(x, self.weight, self.dilations, tails)
            return y, {str(i): {"tail": tail} for i, tail in enumerate(tails)}
        after = {}
        for i, (weight, dilation) in enumerate(zip(wide(self.weight), self.dilations, strict=True)):
            y, after[str(i)] = dilated_conv(x, weight, dilation, state[str(i)])
            x = x + F.silu(y)
        return x, after


class MovingAverage(nn.Module):
    r"""Mega's damped moving average: $h_t = (1 - p α) h_{t-1} + p β x_t$, $y = \mathrm{SiLU}(γ·h / \sqrt N + ω x)$.

    Shapes: x and y [batch, time, dim]; state {"h": [batch, dim, order]}. Source: arXiv:2209.10655 (2022).
    """

    def __init__(self, dim: int, *, order: int = 16):
        super().__init__()
        self.delta, self.alpha = (nn.Parameter(0.2 * torch.randn(dim, order)) for _ in range(2))
        self.beta = nn.Parameter(0.02 * torch.randn(dim, order) + (-1.0) ** torch.arange(order))
        self.gamma = nn.Parameter(torch.randn(dim, order))
        self.omega = nn.Parameter(torch.randn(dim))

    def initial_state(self, batch: int) -> State:
        return {"h": zeros(self.gamma, batch, *self.gamma.shape)}

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Decay [dim, order], write [dim, order] and read [dim, order] of each feature's averages."""
        p = wide(self.delta).sigmoid()
        return (
            1 - p * wide(self.alpha).sigmoid(),
            p * wide(self.beta),
            wide(self.gamma) / math.sqrt(self.gamma.shape[1]),
        )

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        decay, write, read = self.system()
        y, state = dense_ssm(x, torch.diag_embed(decay), write, read[:, None], state)
        return F.silu(y[..., 0] + wide(self.omega) * x), state


MOVES = {"tcn": DilatedConvolutions, "ema": MovingAverage}


@card(
    "tcnca",
    kind="memory",
    says="A dilated convolution network that gates attention inside chunks (Mega without its moving average).",
    source="arXiv:2312.05605",
    small={"dim": 4, "chunk": 5, "kernel": 2, "dilation": 3, "layers": 2},
)
class TCNCA(Memory):
    r"""$y = x + u ⊙ (\mathrm{SiLU}(h + W_h(a ⊙ r)) - x)$, all gates and keys from $m$, the convolved input.

    With $[u, z, r, h] = W m$: $u ← σ(u)$, $z, r ← \mathrm{SiLU}$; $q, k = γ_{1,2} ⊙ z + β_{1,2}$; $a$ is softmax
    attention with a learned bias per distance over the values $\mathrm{SiLU}(W_v x)$ of the open chunk. The layer holds
    its own gated residual. Depth, kernel and dilation of the network are choices made here; `move="ema"` is Mega.

    Args:
        dim: features of input and output.
        chunk: tokens per chunk of attention, counted from the beginning of the stream.
        key_dim: features of q and k; dim/4 by default.
        value_dim: features of the values; 2·dim by default.
        move: `tcn` or `ema`; further arguments go to it (`kernel`, `dilation`, `layers`; or `order`).

    Shapes: x and y [batch, time, dim]; state {"move": ..., "chunk": {"k": [batch, chunk, key_dim],
        "v": [batch, chunk, value_dim], "position": int64 [batch]}}.
    Raises: `ValueError` for arguments below 1; `UnknownName` for another move; `ShapeError`, `StateError` from
        `forward`.
    Source: TCNCA (2023), arXiv:2312.05605; the wiring is Mega's (2022), arXiv:2209.10655.
    """

    def __init__(
        self,
        dim: int,
        *,
        chunk: int = 128,
        key_dim: int | None = None,
        value_dim: int | None = None,
        move: str = "tcn",
        **arguments: int,
    ):
        super().__init__()
        K, V = key_dim or max(dim // 4, 1), value_dim or 2 * dim
        if chunk < 1 or min(K, V) < 1:
            raise ValueError(f"TCNCA: chunk, key_dim and value_dim must be at least 1, got {chunk}, {K}, {V}.")
        if move not in MOVES:
            raise unknown("move", move, MOVES)
        self.dim, self.widths = dim, (dim, K, V, dim)
        self.move = MOVES[move](dim, **arguments)
        self.value = Linear(dim, V)
        self.mixed = Linear(dim, sum(self.widths))
        self.attended = Linear(V, dim)
        self.gamma = nn.Parameter(0.02 * torch.randn(2, K))
        self.beta = nn.Parameter(torch.zeros(2, K))
        self.bias = nn.Parameter(0.02 * torch.randn(chunk))
        for layer in (self.value, self.mixed, self.attended):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def initial_state(self, batch: int) -> State:
        _, K, V, _ = self.widths
        k = zeros(self.gamma, batch, len(self.bias), K)
        chunk = {"k": k, "v": k.new_zeros(*k.shape[:2], V), "position": k.new_zeros(batch, dtype=torch.int64)}
        return {"move": self.move.initial_state(batch), "chunk": chunk}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        m, move = self.move(wide(x), state["move"])
        if x.shape[1] == 1 and steps.worth(x, state["chunk"]["k"], state["chunk"]["v"]):
            mixed, learnt = project(self.mixed, m), (self.gamma, self.beta, self.bias)
            a, chunk = layer_steps.chunk_token(mixed, project(self.value, x), *learnt, state["chunk"])
            y = layer_steps.update_token(x, mixed, project(self.attended, a))
            return y, {"move": move, "chunk": chunk}
        u, z, r, h = self.mixed(m.to(x.dtype)).split(self.widths, dim=-1)
        q, k = wide(F.silu(z)[..., None, :] * self.gamma + self.beta).unbind(-2)
        a, chunk = chunk_attention(q, k, wide(F.silu(self.value(x))), wide(self.bias), state["chunk"])
        new = F.silu(h + self.attended(a.to(x.dtype) * F.silu(r)))
        return torch.lerp(x, new, u.sigmoid()), {"move": move, "chunk": chunk}
