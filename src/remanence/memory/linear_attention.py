"""Linear attention: the running sum that softmax attention becomes under a positive feature map."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import merge, per_head, project, split, zeros
from remanence.ops import layer_steps, steps
from remanence.state import State


@card(
    "linear-attention",
    kind="memory",
    says="Softmax attention with a positive feature map: a running matrix and a running normaliser.",
    source="arXiv:2006.16236",
    small={"dim": 8, "heads": 2},
)
class LinearAttention(Memory):
    r"""Attention whose past is a sum: $S_t = S_{t-1} + φ(k_t) [v_t, 1]^\top$, read as a weighted mean of values.

    $o_t = φ(q_t)^\top S_t / (φ(q_t)^\top z_t + ε)$ with φ = elu + 1, where $z$ is the last column of $S$. It
    forgets nothing, has no positions, and cannot tell the newest binding of a key from an older one.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent memories of dim/heads × (dim/heads + 1) numbers.

    Shapes: x and y [batch, time, dim]; state {"S": [batch, heads, K, K + 1]}.
    Raises: `ValueError` if `heads` does not divide `dim`; `ShapeError`, `StateError` from `forward`.
    Source: Transformers are RNNs (2020), arXiv:2006.16236.
    """

    def __init__(self, dim: int, *, heads: int = 4):
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, per_head("LinearAttention", dim, heads)
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.out = Linear(dim, dim, bias=False)

    def initial_state(self, batch: int) -> State:
        return {"S": zeros(self.out.weight, batch, self.heads, self.head_dim, self.head_dim + 1)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        qkv = project(self.qkv, x)
        if x.shape[1] == 1 and steps.worth(state["S"], x):
            y, S, _ = layer_steps.outer_token(qkv, state["S"], features=steps.ELU, mean=1e-6)
            return project(self.out, y), {"S": S}
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = (F.elu(split(part, self.heads)) + 1 for part in (q, k))
        y, state = ops.linear_attention(q, k, F.pad(split(v, self.heads), (0, 1), value=1.0), state=state)
        mean = y[..., :-1] / (y[..., -1:] + 1e-6)
        return self.out(merge(mean).to(x.dtype)), state
