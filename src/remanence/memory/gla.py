"""Gated linear attention: every key feature forgets at a rate that the input chooses."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import GatedReadout, per_head, project, split, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.state import State


@card(
    "gla",
    kind="memory",
    says="Linear attention whose key features each forget at an input-chosen rate.",
    source="arXiv:2312.06635",
    small={"dim": 8, "heads": 2, "rank": 3},
)
class GLA(Memory):
    r"""Outer-product memory with a decay per key feature: $S_t = \mathrm{Diag}(e^{g_t}) S_{t-1} + k_t v_t^\top$.

    $g_t = \log σ(W_2 W_1 x_t + b) / 16$, in natural logarithms per token: at the start a token keeps about 0.96.

    Args:
        dim: features of input and output; a multiple of 2·heads.
        heads: independent memories, with keys of dim/2/heads and values of dim/heads features.
        rank: of the gate's projection.

    Shapes: x and y [batch, time, dim]; state {"S": [batch, heads, dim/2/heads, dim/heads]}.
    Raises: `ValueError` if 2·heads does not divide `dim`; `ShapeError`, `StateError` from `forward`.
    Source: Gated Linear Attention (2023), arXiv:2312.06635.
    """

    def __init__(self, dim: int, *, heads: int = 4, rank: int = 16):
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, per_head("GLA", dim, heads, multiple=2)
        self.qk = Linear(dim, dim, bias=False)
        self.v = Linear(dim, dim, bias=False)
        self.decay = nn.Sequential(Linear(dim, rank, bias=False), Linear(rank, dim // 2))
        self.readout = GatedReadout(dim, heads, self.head_dim)

    def initial_state(self, batch: int) -> State:
        return {"S": zeros(self.v.weight, batch, self.heads, self.head_dim // 2, self.head_dim)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        qk, v, decay = (project(map_, x) for map_ in (self.qk, self.v, self.decay))
        scale = (self.head_dim // 2) ** -0.5
        if x.shape[1] == 1 and steps.worth(state["S"], x):
            how = {"scale": scale, "chosen": decay, "temper": 16.0, "readout": self.readout.plan(x)}
            y, S, _ = layer_steps.outer_token(qk, state["S"], v, **how)
            return project(self.readout.out, y), {"S": S}
        q, k = qk.chunk(2, dim=-1)
        q, k, v, decay = (split(part, self.heads) for part in (scale * q, k, v, wide(decay)))
        y, state = ops.linear_attention(q, k, v, F.logsigmoid(decay) / 16, state)
        return self.readout(y, x), state
