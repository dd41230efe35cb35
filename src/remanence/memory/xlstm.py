"""The matrix LSTM: exponential input gates, and a normaliser that counts them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import HeadNorm, merge, per_head, project, split, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.ops.expgate import expgate
from remanence.state import State


@card(
    "xlstm-7b",
    kind="memory",
    says="The matrix LSTM: writes are weighted by exponential gates and averaged (xLSTM-7B's block).",
    source="arXiv:2503.13427",
    small={"dim": 8, "heads": 2},
    parents=("linear-attention",),
    change="exponential input gates, sigmoid forget gates, and a normaliser that counts both",
)
class MLSTM(Memory):
    r"""$C_t = σ(f_t) C_{t-1} + e^{i_t} k_t v_t^\top$, n alike without v; $y_t = C_t^\top q_t / \max(|n_t · q_t|, 1)$.

    Gates are linear in x, softly capped by $c \tanh(· / c)$; each head is normalised (LayerNorm), gated by σ(W_o x) and
    projected. Input gates start almost closed (bias −10), forget gates open (3 to 6 over the heads), as published.

    Args:
        dim: features of input and output.
        heads: independent memories; the 7B model has 8 at dim 4096.
        key_dim, value_dim: features of all heads' keys and values, multiples of `heads`; dim/2 and dim by default.
        cap: c, of the gates; None leaves them as they are.
        bias: whether projections and norm have biases (the gates always do).
        norm_eps, eps: of the norm, and of the quotient after its maximum.

    Shapes: x and y [batch, time, dim]; with K and V features per head:
        state {"C": [batch, heads, K, V], "n": float64 [batch, heads, K], "m": float64 [batch, heads]}, C and n times
        e^{-m}.
    Raises: `ValueError` if `heads` does not divide the widths; `ShapeError`, `StateError` from `forward`.
    Source: xLSTM-7B (2025), arXiv:2503.13427.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        cap: float | None = 15.0,
        bias: bool = False,
        norm_eps: float = 1e-6,
        eps: float = 1e-6,
    ):
        super().__init__()
        keys, values = key_dim or dim // 2, value_dim or dim
        self.dim, self.heads, self.cap, self.eps = dim, heads, cap, eps
        self.head_dims = (per_head("MLSTM", keys, heads), per_head("MLSTM", values, heads))
        self.widths = (keys, keys, values, values)
        self.qkvo = Linear(dim, sum(self.widths), bias=bias)
        self.gates = Linear(dim, 2 * heads)  # inputs, then forgets
        self.norm = HeadNorm(heads, values, eps=norm_eps)
        self.out = Linear(values, dim, bias=bias)
        if not bias:
            self.norm.register_parameter("bias", None)
        with torch.no_grad():
            self.gates.bias[:heads] = -10
            self.gates.bias[heads:] = torch.linspace(3, 6, heads)

    def initial_state(self, batch: int) -> State:
        C = zeros(self.out.weight, batch, self.heads, *self.head_dims)
        return {"C": C, "n": C[..., 0].double(), "m": C.new_zeros(batch, self.heads, dtype=torch.float64)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        mixed, gates = project(self.qkvo, x), wide(project(self.gates, x))
        if x.shape[1] == 1 and steps.worth(state["C"], x):
            norm = self.norm.weight, self.norm.bias, self.norm.eps
            y, state = layer_steps.exponential_token(mixed, gates, state, norm, self.cap, self.eps)
            return project(self.out, y), state
        q, k, v, o = mixed.split(self.widths, dim=-1)
        q, k, v = (split(part, self.heads) for part in (q, k, v))
        if self.cap is not None:
            gates = self.cap * torch.tanh(gates / self.cap)
        write, forget = gates.transpose(1, 2).split(self.heads, dim=1)
        forget, scale = F.logsigmoid(forget), self.head_dims[0] ** -0.5
        y, state = expgate(q, k, v, forget, write, state, scale=scale, eps=self.eps)
        return self.out(self.norm(merge(y).to(x.dtype), o)), state
