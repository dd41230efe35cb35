"""Self-modifying Titans: the networks that make keys, values and rates are memories too, and rewrite themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import GatedReadout, ShortConv, l2_norm, per_head, split, wide
from remanence.ops.delta_network import delta_network
from remanence.ops.fast_weight import fast_weight_state
from remanence.ops.inner_network import fast_weight_read
from remanence.ops.phases import by_phase, piece_sizes
from remanence.state import State

SOURCE = "arXiv:2512.24695"
GROUPS = {"memory": 1, "makers": 2, "gates": 2}
"""Networks that share a clock and a width: the memory; the makers of keys and of values; those of steps and decays."""


@card(
    "self-modifying-titans",
    covers="nested-learning",
    kind="memory",
    says="A network memory whose keys, values, steps and decays come from further memories that rewrite themselves.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "expand": 2, "chunk_size": 3, "maker_chunk_size": 4},
)
class SelfModifyingTitans(Memory):
    r"""Five networks per head, M_□ for □ in {mem, k, v, η, α}, each of which writes its own targets and learns them.

    $x ← \mathrm{conv}(x)$; $q = W_q x$, $k = M_{k,ξ}(x)$ and $v = M_{v,ξ}(x)$, all of unit length;
    $θ_t = s·\mathrm{softplus}(M_{η,ξ}(x) + b_η)$, $a_t = σ(M_{α,ξ}(x) + b_α)$; the answer is $M_{mem,t-1}(q_t)$, read
    before the token is written. Then every network steps towards its own word on the value, $\hat v_□ = M_{□,ξ}(v_t)$:

    $W_{□,t} = W_{□,t-1}(a_t I - θ_t k_t k_t^\top) - θ_t ∇\tfrac12‖M_{□,ξ}(k_t) - \hat v_{□,t}‖^2$

    (no inner gradient flows into the target; the right factor acts on the layer that receives k, the other decays by
    $a_t$ alone). $M(z) = z + W_2\,\mathrm{GELU}(W_1 z)$; for η and α without the skip and with one output. $W_ξ$ are
    the weights as the chunk began. The starts of all networks are learned by the outer loss.

    The factor $-θkk^\top$ biases what is learned towards less than its target; it also keeps the loop of self-made
    targets from growing without end.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent sets of five networks.
        expand: hidden features, as a multiple of dim/heads.
        chunk_size: tokens that share an anchor of the memory; it belongs to the model.
        maker_chunk_size: the same for the other four.
        scale: s, > 0; a step is at most 1, and at most the share of Polyak's that keeps a stream of equal tokens from
            diverging (`bound` in `delta_network`).
        conv: tokens that the convolution sees.

    Shapes: x and y [batch, time, dim]; state {"memory", "makers" and "gates": {"anchor", "weight": {"0", "1": [batch,
        heads · networks of the group, out, in]}}, "pos": int64 [batch], "conv": {"tail": [batch, conv - 1, dim]}}.
    Raises: `ValueError` on sizes below 1, a `dim` that is no multiple of `heads`, a `scale` of 0; `ShapeError`,
        `StateError` from `forward`.
    Source: Nested Learning (2025), arXiv:2512.24695, equations 83 to 93. Open there, and chosen here: the biases of
        the gates (a from 0.98 to 0.999 at the start), the rule of the second layers, s (a re-implementation has 10⁻³,
        at which little is learned from short texts), and the bound. Values of unit length are not in the paper:
        without them, at this s, targets that untrained networks make for themselves overflow within 2,000 tokens.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        expand: int = 4,
        chunk_size: int = 16,
        maker_chunk_size: int = 64,
        scale: float = 0.1,
        conv: int = 4,
    ):
        super().__init__()
        K = per_head("SelfModifyingTitans", dim, heads)
        if min(expand, chunk_size, maker_chunk_size) < 1 or not scale > 0:
            given = f"{expand=}, {chunk_size=}, {maker_chunk_size=}, {scale=}"
            raise ValueError(f"SelfModifyingTitans: sizes must be at least 1 and scale above 0, got {given}.")
        self.dim, self.heads, self.scale = dim, heads, scale
        self.clocks = {"memory": chunk_size, "makers": maker_chunk_size, "gates": maker_chunk_size}
        self.conv = ShortConv(dim, conv)
        self.query = Linear(dim, dim, bias=False)
        self.start = nn.ModuleDict()
        for name, networks in GROUPS.items():
            hidden, out = expand * K, 1 if name == "gates" else K
            first = torch.randn(heads * networks, hidden, K) * K**-0.5
            second = torch.randn(heads * networks, out, hidden) * hidden**-0.5
            self.start[name] = nn.ParameterList([first, second])
        self.bias = nn.Parameter(torch.stack([torch.zeros(heads), torch.linspace(4, 7, heads)]))
        self.readout = GatedReadout(dim, heads, K)

    def initial_state(self, batch: int) -> State:
        state: State = {"conv": self.conv.initial_state(batch)}
        for name in GROUPS:
            start = list(self.start[name].parameters())
            state[name] = fast_weight_state(start, batch, momentum=False)
            state["pos"] = state[name].pop("pos")
        return state

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        mixed, conv = self.conv(x, state["conv"])
        z, q = split(mixed, self.heads), l2_norm(split(self.query(mixed.to(x.dtype)), self.heads))
        if not x.shape[1]:
            return x, state
        pos, T = state["pos"], x.shape[1]
        makers = {name: state[name] for name in ("makers", "gates")}
        made, makers = by_phase(self._make, [z], makers, pos, self.clocks["makers"])
        k, v, gates = made.split([q.shape[3], q.shape[3], 2], -1)
        tokens = [q, k, v, *gates.unbind(-1)]
        y, memory = by_phase(self._recall, tokens, {"memory": state["memory"]}, pos, self.clocks["memory"])
        return self.readout(y, x), {**memory, **makers, "pos": pos + T, "conv": conv}

    def _make(self, tensors: list[Tensor], state: State, phase: int) -> tuple[Tensor, State]:
        """Keys, values, steps and log decays side by side, [B, H, T, 2K + 2], from networks that learn as they go."""
        made = []
        for x in tensors[0].split(piece_sizes(tensors[0].shape[2], phase, self.clocks["makers"]), 2):
            k, v = _say(x, state["makers"], residual=True).chunk(2, 1)
            k, v = l2_norm(k), l2_norm(v)
            eta, alpha = (_say(x, state["gates"])[..., 0] + wide(self.bias).flatten()[:, None]).chunk(2, 1)
            step, retain_log = (self.scale * F.softplus(eta)).clamp(max=1), F.logsigmoid(alpha.clamp(min=-4))
            phase += x.shape[2]
            state = {
                name: self._learn(name, net, None, k, v, step, retain_log, phase)[1] for name, net in state.items()
            }
            made.append(torch.cat([k, v, torch.stack([step, retain_log], -1)], -1))
        return torch.cat(made, 2), state

    def _recall(self, tensors: list[Tensor], state: State, phase: int) -> tuple[Tensor, State]:
        y, net, sizes = [], state["memory"], piece_sizes(tensors[0].shape[2], phase, self.clocks["memory"])
        for q, k, v, step, retain_log in zip(*(t.split(sizes, 2) for t in tensors), strict=True):
            phase += q.shape[2]
            out, net = self._learn("memory", net, q, k, v, step, retain_log, phase)
            y.append(out)
        return torch.cat(y, 2), {"memory": net}

    def _learn(
        self, name: str, net: State, q: Tensor | None, k: Tensor, v: Tensor, step: Tensor, retain_log: Tensor, end: int
    ) -> tuple[Any, State]:
        """What a group's networks say to q, and they after tokens that share an anchor; `end` is the phase then."""
        anchors, residual, chunk = list(net["anchor"].values()), name != "gates", self.clocks[name]
        k, v, step, retain_log = (t.repeat(1, GROUPS[name], *[1] * (t.ndim - 2)) for t in (k, v, step, retain_log))
        out, weights = delta_network(
            q, k, fast_weight_read(v, anchors, residual=residual), step, retain_log, anchors,
            list(net["weight"].values()), residual=residual, bound=0.5 / chunk,
        )  # fmt: skip
        weight = {str(i): W for i, W in enumerate(weights)}
        return out, {"anchor": net["anchor"] if end % chunk else weight, "weight": weight}


def _say(x: Tensor, net: State, residual: bool = False) -> Tensor:
    """What several networks per head say to the same tokens: x [B, H, T, K] -> [B, networks · H, T, out]."""
    weights = list(net["anchor"].values())
    return fast_weight_read(x.repeat(1, weights[0].shape[1] // x.shape[1], 1, 1), weights, residual=residual)
