"""RWKV-4: a softmax-like average over the past, per feature, in token-shifted blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import token_shift, wide, zeros
from remanence.ops import steps
from remanence.ops.expgate import EMPTY
from remanence.ops.recurrence_steps import rwkv, rwkv_blends
from remanence.ops.softmax_scan import softmax_scan
from remanence.state import State


class TokenShift(nn.Module):
    """Blends of each token with the one before it: μ x_t + (1 − μ) x_{t−1}, one for each row of `mix`.

    Shapes: x [batch, time, dim] and state [batch, dim], the last token -> (as many blends as rows, state).
    """

    def __init__(self, mix: Tensor):
        super().__init__()
        self.mix = nn.Parameter(mix)

    def forward(self, x: Tensor, last: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        if x.shape[1] == 1 and steps.worth(x, last, mix := self.mix):
            blends, newest = rwkv_blends(x, last, mix)
            return blends.unbind(), newest
        return token_shift(x, last, 1 - self.mix)


@card(
    "rwkv",
    kind="memory",
    says="RWKV-4's time mixing: each feature's running softmax average, with a decay and a bonus for the present.",
    source="arXiv:2305.13048",
    small={"dim": 6, "layers": 2},
    parents=("linear-attention",),
    change="the exponential of the key weighs each feature's values, which decay at a learnt rate",
)
class RWKV(Memory):
    r"""$y = W_o(σ(r) ⊙ wkv)$, wkv_t the average of v_j with weights $e^{k_j - (t-1-j) e^{ω}}$, and $e^{u + k_t}$ for t.

    r, k and v are linear in blends of the token with the one before it. The paper's block has a `ChannelMix` besides.

    Args:
        dim: features of input and output.
        width: features of the recurrence; `dim` by default.
        layer, layers: place in the stack, counted from 0, which sets the initial decays and blends.

    Shapes: x and y [batch, time, dim]; state {"shift": [batch, dim], "w", "u": [batch, width], "m": float64 [batch,
        width]}: the last token, the weighted sums of values and of ones, and the exponent taken out of both.
    Raises: `ValueError` for a `layer` outside of the stack; `ShapeError`, `StateError` from `forward`.
    Source: RWKV (2023), arXiv:2305.13048.
    """

    def __init__(self, dim: int, *, width: int | None = None, layer: int = 0, layers: int = 1):
        super().__init__()
        self.dim, self.width = dim, width or dim
        depth, ramp = _depth("RWKV", layer, layers), torch.arange(dim) / dim
        slow, fast = ramp ** (1 - layer / layers), ramp ** (0.5 * (1 - layer / layers))
        self.shift = TokenShift(torch.stack([slow, slow + 0.3 * depth, fast]))  # of key, value and receptance
        self.key, self.value, self.receptance = (Linear(dim, self.width, bias=False) for _ in range(3))
        self.out = Linear(self.width, dim, bias=False)
        channel = torch.arange(self.width)
        self.decay = nn.Parameter(-5 + 8 * (channel / max(self.width - 1, 1)) ** (0.7 + 1.3 * depth))
        self.bonus = nn.Parameter(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1.0))

    def initial_state(self, batch: int) -> State:
        w = zeros(self.decay, batch, self.width)
        m = torch.full_like(w, EMPTY, dtype=torch.float64)
        return {"shift": zeros(self.decay, batch, self.dim), "w": w, "u": w.clone(), "m": m}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        (k, v, r), last = self.shift(x, state["shift"])
        sums = {name: state[name] for name in ("w", "u", "m")}
        k, v = wide(self.key(k)), wide(self.value(v))
        if x.shape[1] == 1 and steps.worth(state["w"], state["u"], k):
            y, after = rwkv(k, v, self.receptance(r), self.decay, self.bonus, sums)
            return self.out(y), {"shift": last, **after}
        y, after = softmax_scan(k, v, -wide(self.decay).exp(), wide(self.bonus), sums)
        return self.out(self.receptance(r).sigmoid() * y.to(x.dtype)), {"shift": last, **after}


@card(
    "rwkv-channel-mix",
    kind="memory",
    says="RWKV-4's channel mixing: a gated squared-ReLU network that also sees the token before.",
    source="arXiv:2305.13048",
    covers="rwkv",
    small={"dim": 6, "layers": 2},
)
class ChannelMix(Memory):
    r"""$y = σ(W_r x^r) ⊙ W_v \mathrm{ReLU}(W_k x^k)^2$, $x^r$ and $x^k$ being blends with the token before.

    Args:
        dim: features of input and output.
        hidden: width of the network; 4·dim by default.
        layer, layers: place in the stack, counted from 0, which sets the initial blends.

    Shapes: x and y [batch, time, dim]; state {"shift": [batch, dim]}, the last token.
    Raises: `ValueError` for a `layer` outside of the stack; `ShapeError`, `StateError` from `forward`.
    Source: RWKV (2023), arXiv:2305.13048.
    """

    def __init__(self, dim: int, *, hidden: int | None = None, layer: int = 0, layers: int = 1):
        super().__init__()
        self.dim, hidden = dim, hidden or 4 * dim
        _depth("ChannelMix", layer, layers)
        self.shift = TokenShift((torch.arange(dim) / dim).pow(1 - layer / layers).expand(2, dim).clone())
        self.key = Linear(dim, hidden, bias=False)
        self.receptance = Linear(dim, dim, bias=False)
        self.value = Linear(hidden, dim, bias=False)

    def initial_state(self, batch: int) -> State:
        return {"shift": zeros(self.value.weight, batch, self.dim)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        (k, r), last = self.shift(x, self.begin(x, state)["shift"])
        y = self.value(self.key(k).relu().square())
        return self.receptance(r).sigmoid() * y, {"shift": last}


def _depth(where: str, layer: int, layers: int) -> float:
    """From 0 for the first layer to 1 for the last one."""
    if not 0 <= layer < layers:
        raise ValueError(f"{where}: layer must be one of 0 to layers - 1, got layer={layer}, layers={layers}.")
    return layer / max(layers - 1, 1)
