"""Lightning attention: linear attention with one fixed decay per head, read tile by tile."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import RMSNorm, merge, per_head, project, split, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.ops.joint import parts
from remanence.state import State


@card(
    "lightning-attention-2",
    kind="tool",
    says="Causal linear attention in tiles: scores within a tile, the state between tiles; cost per token is constant.",
    source="arXiv:2401.04658",
)
def lightning_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    state: State | None = None,
    *,
    tile: int = 64,
    silu: bool = False,
) -> tuple[Tensor, State]:
    r"""$S_t = e^{-s} S_{t-1} + k_t v_t^\top$, $y_t = S_t^\top q_t$, `tile` tokens at a time.

    With $M_{ij} = e^{-s(i-j)}$ for $j ≤ i$ and $i = 1, ..., C$ within a tile, which begins with the state $S$:
    $Y = (QK^\top ⊙ M) V + e^{-si} ⊙ QS$ and $S ← e^{-sC} S + (e^{-s(C-i)} ⊙ K)^\top V$. Backward walks the
    tiles from right to left and keeps their states only. `tile` changes speed, never the result. With `silu`, queries,
    keys and values are SiLU of what is given.

    Shapes: query, key [B, H, T, K], value and y [B, H, T, V], any T ≥ 0; slopes [H], at least 0;
        state {"S": [B, H, K, V]}.
    Raises: `ShapeError`; `ValueError` if `tile` < 1.
    Source: Lightning Attention-2 (2024), arXiv:2401.04658.
    """
    if tile < 1:
        raise ValueError(f"lightning_attention: tile must be at least 1, got {tile}.")
    decay = -slopes.to(key)[:, None].expand(key.shape[:3])
    return ops.linear_attention(query, key, value, decay, state, silu=silu, chunk_size=tile)


def head_slopes(heads: int) -> Tensor:
    """[heads] in float64: 2^{−8h/heads} for h = 1, 2, ..., and between two powers of two, as ALiBi interleaves them."""
    full = 2 ** math.floor(math.log2(heads))
    geometric = [2 ** (-8 * h / full) for h in range(1, full + 1)]
    between = [2 ** (-4 * h / full) for h in range(1, 2 * full + 1, 2)]
    return torch.tensor(geometric + between[: heads - full], dtype=torch.float64)


@card(
    "lightning-attention-tnl",
    kind="memory",
    says="Linear attention whose fixed decays slow down from head to head and vanish towards the top layer.",
    source="arXiv:2405.17381",
    small={"dim": 8, "heads": 2, "layers": 3, "lrpe": True},
    parents=("linear-attention", "retnet"),
    change="decays set by head and layer; learned phases; SiLU on queries, keys and values",
)
class LightningAttention(Memory):
    r"""TransNormerLLM's mixer: $y = W_o(σ(W_2 W_1 x) ⊙ \mathrm{RMSNorm}(o))$ with $o_t = S_t^\top q_t$.

    $S_t = e^{-s} S_{t-1} + k_t v_t^\top$; q, k, v = SiLU(W x), unscaled; $s = s_h (1 - l/(L-1) + 10^{-5})$ falls with
    the head h (`head_slopes`) and the layer l of L. The norm runs over all heads together.

    Args:
        dim: features of input and output.
        heads: independent memories.
        layer, layers: l, counted from 0, and L. A top layer (also one alone) remembers all, but for the 10⁻⁵.
        slopes: s of each head, instead of the schedule: papers and codes differ (see docs/outer-products.md).
        head_dim: features per head; dim/heads by default, which must then be whole.
        lrpe: cosine phases with learned frequencies on queries and keys, which doubles the state: the published
            models have them in layer 0 only.
        gate_rank: rank of the output gate's map; `head_dim` by default, 0 for a full matrix.
        affine: whether the norm scales.
        tile: tokens read at a time; changes speed, never the result.

    Shapes: x and y [batch, time, dim]; state {"S": [batch, heads, K, V]} with V = head_dim, K = V; with `lrpe`
        K = 2V, and "position" int64 [batch].
    Raises: `ValueError` on arguments out of range; `ShapeError`, `StateError` from `forward`.
    Source: Various Lengths, Constant Speed (2024), arXiv:2405.17381. MiniMax's layers are the same with `slopes`,
        `gate_rank=0` and `affine=True`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        layer: int = 0,
        layers: int = 1,
        slopes: Sequence[float] | None = None,
        head_dim: int | None = None,
        lrpe: bool = False,
        gate_rank: int | None = None,
        affine: bool = False,
        tile: int = 64,
    ):
        super().__init__()
        if not 0 <= layer < layers:
            raise ValueError(f"LightningAttention: layer must be in [0, layers), got layer={layer}, layers={layers}.")
        self.head_dim = head_dim or per_head("LightningAttention", dim, heads)
        self.dim, self.heads, self.lrpe, self.tile = dim, heads, lrpe, tile
        height = layer / (layers - 1) if layers > 1 else 1.0
        self.slopes = head_slopes(heads) * (1 - height + 1e-5)  # a constant, not a buffer: `.float()` would round it
        if slopes is not None:
            self.slopes = torch.tensor(slopes, dtype=torch.float64)
            if self.slopes.shape != (heads,) or not (self.slopes >= 0).all():
                raise ValueError(f"LightningAttention: slopes must be {heads} numbers of at least 0, got {slopes}.")
        inner = heads * self.head_dim
        self.qkv = Linear(dim, 3 * inner, bias=False)
        rank = self.head_dim if gate_rank is None else gate_rank
        low_rank = [Linear(dim, rank, bias=False), Linear(rank, inner, bias=False)] if rank else []
        self.gate = nn.Sequential(*(low_rank or [Linear(dim, inner, bias=False)]))
        self.norm = RMSNorm(inner, eps=1e-6, elementwise_affine=affine)
        self.out = Linear(inner, dim, bias=False)
        if lrpe:
            self.frequencies = nn.Parameter(10000 ** (-2 / inner * torch.arange(inner)).view(heads, 1, -1))

    def initial_state(self, batch: int) -> State:
        K = self.head_dim * (2 if self.lrpe else 1)
        S = zeros(self.out.weight, batch, self.heads, K, self.head_dim)
        return {"S": S, "position": S.new_zeros(batch, dtype=torch.int64)} if self.lrpe else {"S": S}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        qkv = project(self.qkv, x)
        if x.shape[1] == 1 and not self.lrpe and steps.worth(state["S"], x):
            y, S, _ = layer_steps.outer_token(
                qkv, state["S"], features=steps.SILU, value_features=steps.SILU, fixed=-self.slopes,
                readout=self.norm.plan(project(self.gate, x), torch.sigmoid),
            )  # fmt: skip
            return project(self.out, y), {"S": S}
        qkv = F.silu(qkv) if self.lrpe else qkv
        q, k, v = (split(part, self.heads) for part in parts(qkv, [qkv.shape[-1] // 3] * 3))
        after = {}
        if self.lrpe:
            position = state["position"][:, None] + torch.arange(x.shape[1], device=x.device)
            q, k = (phases(part, position[:, None, :, None] * wide(self.frequencies).double()) for part in (q, k))
            after["position"] = state["position"] + x.shape[1]
        y, written = lightning_attention(q, k, v, self.slopes, {"S": state["S"]}, tile=self.tile, silu=not self.lrpe)
        return self._read(merge(y).to(x.dtype), x), {**written, **after}

    def _read(self, y: Tensor, x: Tensor) -> Tensor:
        return self.out(self.norm(y, self.gate(x), torch.sigmoid))


def phases(x: Tensor, angle: Tensor) -> Tensor:
    """[x cos θ, x sin θ]: products of two such vectors weigh each feature by the cosine of their angles' difference."""
    return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], dim=-1)
