"""GateLoop: a linear recurrence whose complex transition, magnitude and phase, is chosen by the input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import merge, per_head, project, split, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.ops.complex_scan import complex_scan
from remanence.state import State


@card(
    "gateloop",
    kind="memory",
    says="A recurrence with complex, input-chosen transitions: the magnitude forgets, the phase turns.",
    source="arXiv:2311.01927",
    small={"dim": 8, "heads": 2},
    parents=("linear-attention", "lru"),
    change="the complex decay depends on the input",
)
class GateLoop(Memory):
    r"""Complex decays: $S_t = a_t ⊙ S_{t-1} + k_t v_t^\top$, $y_t = q_t^\top \mathrm{Re}(S_t)$.

    The transition is $a = σ(|w|) e^{i∠w}$ with complex $w = W_a x + b$. Each key feature has a transition of its own;
    with one feature per head, as in the paper's models, the state is a vector. Matrices are run in a frame that turns
    with the phase: there the decay is real, and keys and queries carry cosines and sines. The state that is returned
    stands still again, so that no phase needs to be kept.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent memories of K = dim/heads features; `dim` (one feature each) by default.
        gate_gradient: how much of the gradient reaches $W_a$ and b: the paper lets them learn more slowly.

    Shapes: x and y [batch, time, dim]; state {"S": [batch, heads, 2K, K]}: the real parts of all rows, then the
        imaginary ones.
    Raises: `ValueError` if `heads` does not divide `dim`; `ShapeError`, `StateError` from `forward`.
    Source: GateLoop (2023), arXiv:2311.01927.
    """

    def __init__(self, dim: int, *, heads: int | None = None, gate_gradient: float = 0.9):
        super().__init__()
        self.dim, self.heads, self.gate_gradient = dim, heads or dim, gate_gradient
        self.head_dim = per_head("GateLoop", dim, self.heads)
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.transition = Linear(dim, 2 * dim)
        self.gate = Linear(dim, dim, bias=False)
        self.out = Linear(dim, dim, bias=False)

    def initial_state(self, batch: int) -> State:
        return {"S": zeros(self.out.weight, batch, self.heads, 2 * self.head_dim, self.head_dim)}

    def polar(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the transitions the log magnitude, below 0, and the angle: both [batch, heads, time, K]."""
        w = wide(self.transition(x))
        w = w * self.gate_gradient + w.detach() * (1 - self.gate_gradient)
        re, im = (split(part, self.heads) for part in w.chunk(2, dim=-1))
        size = re.square() + im.square()
        return F.logsigmoid((size + 1e-12).sqrt()), torch.atan2(im, torch.where(size == 0, 1.0, re))

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if x.shape[1] == self.head_dim == 1 and steps.worth(state["S"], x):
            qkv, gate = project(self.qkv, x), project(self.gate, x)
            y, S = layer_steps.turning_token(qkv, project(self.transition, x), gate, state["S"])
            return project(self.out, y), {"S": S}
        q, k, v = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        y, S = gate_loop(q, k, v, *self.polar(x), state["S"])
        return self.out(merge(y).to(x.dtype) * F.silu(self.gate(x))), {"S": S}


def gate_loop(q: Tensor, k: Tensor, v: Tensor, log_size: Tensor, angle: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t + iφ_t) ⊙ S_{t−1} + k_t v_tᵀ,  y_t = q_tᵀ Re(S_t).

    Shapes: q, k, log_size (≤ 0) and angle [B, H, T, K]; v and y [B, H, T, V]; S [B, H, 2K, V], real over imaginary.
    """
    if k.shape[-1] == v.shape[-1] == 1:  # a vector of heads: no matrices to multiply
        a, written = (x[..., 0].transpose(1, 2) for x in (torch.polar(log_size.exp(), angle), k * v))
        h, after = complex_scan(a, torch.complex(written, torch.zeros_like(written)), {"h": S[..., 0]})
        return q * h.real.transpose(1, 2)[..., None], after["h"][..., None]
    turn = angle.double().cumsum(2)  # from zero in each piece: a stream's total turn would lose its digits
    cos, sin = turn.cos().to(k.dtype), turn.sin().to(k.dtype)
    keys, queries = torch.cat([k * cos, -k * sin], -1), torch.cat([q * cos, -q * sin], -1)
    y, after = ops.linear_attention(queries, keys, v, torch.cat([log_size, log_size], -1), {"S": S})
    if k.shape[2] == 0:
        return y, S
    re, im = after["S"].chunk(2, dim=2)
    cos, sin = cos[:, :, -1, :, None], sin[:, :, -1, :, None]
    return y, torch.cat([cos * re - sin * im, sin * re + cos * im], 2)
