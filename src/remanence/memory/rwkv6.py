"""RWKV-6: a matrix memory with input-chosen decays per key feature and input-chosen token shifts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import HeadNorm, merge, per_head, split, token_shift, wide, zeros
from remanence.ops import steps
from remanence.ops.recurrence_steps import rwkv6, rwkv6_blends
from remanence.ops.taps import watched
from remanence.state import State


@card(
    "rwkv6",
    kind="memory",
    says="A matrix memory that is read before it is written, with input-chosen decays and token shifts (Finch).",
    source="arXiv:2404.05892",
    small={"dim": 8, "heads": 2, "mix_rank": 3, "decay_rank": 3, "layers": 2},
    parents=("rwkv",),
    change="the state becomes a matrix; decays and token shifts depend on the input",
)
class RWKV6(Memory):
    r"""Finch's time mixing: $y_t = r_t^\top (S_{t-1} + \mathrm{Diag}(u) k_t v_t^\top)$.

    Only then $S_t = \mathrm{Diag}(e^{g_t}) S_{t-1} + k_t v_t^\top$. Each of w, k, v, r, g sees its own blend of the
    token and the one before, $x + (x' - x) ⊙ (μ + \tanh((x + (x' - x) ⊙ μ_x) A) B)$. The log decay is $-\exp(w_0 +
    \tanh(x_w A_w) B_w)$. Each head is normalised, then gated by SiLU.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent memories (the published models have 64 features per head).
        mix_rank, decay_rank: ranks of the maps that choose the blends and the decay.
        layer, layers: place in the stack, counted from 0, which sets the initial blends, decays and bonuses.
        eps: of the norm; 64·10⁻⁵ in the published models.

    Shapes: x and y [batch, time, dim]; state {"S": [batch, heads, K, K], "shift": [batch, dim]}, K = dim/heads.
    Raises: `ValueError` if `heads` does not divide `dim`; `ShapeError`, `StateError` from `forward`.
    Source: Eagle and Finch (2024), arXiv:2404.05892.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        mix_rank: int = 32,
        decay_rank: int = 64,
        layer: int = 0,
        layers: int = 1,
        eps: float = 64e-5,
    ):
        super().__init__()
        self.dim, self.heads = dim, heads
        self.head_dim = per_head("RWKV6", dim, heads)
        depth, height = layer / max(layers - 1, 1), 1 - layer / layers
        ramp = torch.arange(dim) / dim
        slow, fast = 1 - ramp**height, 1 - ramp ** (0.5 * height)
        self.mix_all = nn.Parameter(slow.clone())
        self.mix = nn.Parameter(torch.stack([slow, slow, slow - 0.3 * depth, fast, fast]))  # of w, k, v, r, g
        self.mix_down = nn.Parameter(torch.zeros(dim, 5 * mix_rank))
        self.mix_up = nn.Parameter(torch.empty(5, mix_rank, dim).uniform_(-0.01, 0.01))
        channel = torch.arange(dim) / max(dim - 1, 1)
        self.decay_base = nn.Parameter(-6 + 5 * channel ** (0.7 + 1.3 * depth))
        self.decay_down = nn.Parameter(torch.zeros(dim, decay_rank))
        self.decay_up = nn.Parameter(torch.empty(decay_rank, dim).uniform_(-0.01, 0.01))
        zigzag = 0.1 * ((torch.arange(dim) + 1) % 3 - 1)
        self.bonus = nn.Parameter((depth * (1 - channel) + zigzag).view(heads, 1, -1))
        self.key, self.value, self.receptance, self.gate, self.out = (Linear(dim, dim, bias=False) for _ in range(5))
        self.norm = HeadNorm(heads, dim, eps=eps)

    def initial_state(self, batch: int) -> State:
        S = zeros(self.out.weight, batch, self.heads, self.head_dim, self.head_dim)
        return {"S": S, "shift": zeros(self.out.weight, batch, self.dim)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if x.shape[1] == 1 and steps.worth(state["S"], state["shift"], x):
            return self._token(x, state)
        (rough,), last = token_shift(x, state["shift"], self.mix_all[None])
        chosen = torch.tanh(rough @ self.mix_down).view(x.shape[:2].numel(), *self.mix_up.shape[:2]).transpose(0, 1)
        blends = torch.baddbmm(self.mix[:, None], chosen, self.mix_up).view(len(self.mix), *x.shape)
        (w, k, v, r, g), _ = token_shift(x, state["shift"], blends)
        decay = -torch.exp(wide(self.decay_base) + wide(torch.tanh(w @ self.decay_down) @ self.decay_up))
        r, k, v = (split(part, self.heads) for part in (self.receptance(r), self.key(k), self.value(v)))
        y, S = read_before_write(r, k, v, split(decay, self.heads), wide(self.bonus), state["S"])
        return self.out(self.norm(merge(y).to(x.dtype), self.gate(g), F.silu)), {"S": S, "shift": last}

    def _token(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token without gradients: what lies between the projections takes two compiled calls."""
        blends = x, state["shift"], self.mix_all, self.mix_down, self.mix, self.mix_up
        (w, k, v, r, g), last = rwkv6_blends(*blends)
        projected = self.receptance(r), self.key(k), self.value(v), self.gate(g)
        decay, norm = (self.decay_down, self.decay_up), (self.norm.weight, self.norm.bias)
        y, S = rwkv6(w, decay, self.decay_base, projected, self.bonus, norm, self.norm.eps, state["S"])
        return self.out(y), {"S": S, "shift": last}


def read_before_write(
    r: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """y_t = r_tᵀ (S_{t−1} + Diag(u) k_t v_tᵀ),  S_t = Diag(exp g_t) S_{t−1} + k_t v_tᵀ.

    What a token reads before it is written, the token before it reads after: the queries are moved up by one, and the
    first reads after an empty token. All that is read of S goes through the op, so a sequence may be split over ranks.
    Shapes: r, k, log_decay [B, H, T, K], v and y [B, H, T, V], bonus u [H, 1, K], S [B, H, K, V].
    """
    if k.shape[2] == 1 and steps.worth(S, r, k, v, log_decay, bonus):
        return steps.read_before_write(r, k, v, log_decay, bonus, S)
    present = (r * bonus * k).sum(-1, keepdim=True) * v
    if k.shape[2] == 1 and not watched():  # one token alone is decoded in fewer operations
        return r.to(S.dtype) @ S + present, ops.linear_attention(r, k, v, log_decay, {"S": S})[1]["S"]
    k, v, log_decay = (F.pad(x, (0, 0, 1, 0)) for x in (k, v, log_decay))  # the empty token
    y, after = ops.linear_attention(F.pad(r, (0, 0, 0, 1)), k, v, log_decay, {"S": S})
    return y[:, :, :-1] + present, after["S"]
