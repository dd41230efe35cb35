"""DeepTransformers and Dot: the memories of ATLAS over exponential features, which keep every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.errors import StateError, expect
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import GatedReadout, ShortConv, l2_norm, per_head, project, split, wide, zeros
from remanence.ops import layer_steps, steps
from remanence.ops.exponential import deep_exponential, exponential_memory
from remanence.state import Form, State, check_state, fits, form

SOURCE = "arXiv:2505.23735"
EXEMPT = {"constant state": "exponential features have no finite form: every key is kept, with what it holds"}
BLOCK = 64
"""Tokens by which the state grows, so that rows of different lengths can lie side by side."""
GROWING = ("keys", "values", "logs")


class _Growing(Memory):
    """A memory whose state holds places for all that was read: each row's tokens at the end, zeros before them.

    Queries and keys are SiLU(conv(W x)) of a learned length per head, its square the sharpness of the kernel.
    """

    def __init__(self, dim: int, heads: int, gates: int, conv: int):
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, per_head(type(self).__name__, dim, heads)
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConv(3 * dim, conv)
        self.length = nn.Parameter(torch.full((heads,), 2.0))
        self.gates = Linear(dim, gates * heads)
        nn.init.normal_(self.gates.weight, std=0.02)
        self.readout = GatedReadout(dim, heads, self.head_dim)

    def begin(self, x: Tensor, state: State | None) -> State:
        name, keys = type(self).__name__, None if state is None else state.get("keys")
        room = keys.shape[2] if isinstance(keys, Tensor) and keys.ndim == 4 else 0
        if state is None or x.ndim != 3 or x.shape[2] != self.dim or not fits(state, self.places(room), x.shape[0]):
            fresh = self.initial_state(x.shape[0])
            expect(name, "x", x, "batch time dim", dim=self.dim, hint="One token per row? Pass x[:, None].")
            self._form = form(fresh)
            if state is None:
                return fresh
            check_state(name, state, _with_room(fresh, room))
        if state["position"].numel() and state["position"].max() > room:
            raise StateError(f"{name}: a state of {room} tokens cannot be at position {int(state['position'].max())}.")
        return state

    def places(self, room: int) -> Form:
        """The form of a state with so many places."""
        known: Form = self._form or {}
        return {n: ((part[0][0], room, part[0][2]), part[1]) if n in GROWING else part for n, part in known.items()}

    def project(self, x: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, State]:
        mixed, conv = self.conv(self.qkv(x), state["conv"], silu=True)
        q, k, v = (split(part, self.heads) for part in mixed.chunk(3, dim=-1))
        length = wide(self.length)[:, None, None]
        return length * l2_norm(q), length * l2_norm(k), v, conv

    def settle(self, after: State, before: State) -> State:
        """The op's state, with as many places as its longest row needs, in blocks."""
        return _with_room(after, self.room({**after, "keys": before["keys"]}, 0))

    def room(self, state: State, more: int) -> int:
        """Places for so many more tokens, and no fewer than there are."""
        longest = int(state["position"].max()) + more if len(state["position"]) else 0
        return max(state["keys"].shape[2], -(-longest // BLOCK) * BLOCK)

    def level(self, states: Sequence[State]) -> Sequence[State]:
        most = max(s["keys"].shape[2] for s in states)
        return [_with_room(s, most) for s in states]


def _with_room(state: State, room: int) -> State:
    """The last `room` places of a state, with empty ones before them where there are fewer."""
    grown = {}
    for name in GROWING:
        if name in state:
            x = state[name]
            grown[name] = F.pad(x, (0, 0, max(0, room - x.shape[2]), 0))[:, :, -room:] if room else x[:, :, :0]
    return {**state, **grown}


@card(
    "dot",
    covers="atlas",
    kind="memory",
    says="Attention with the delta rule: each token stores only what exponential attention to the past gets wrong.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "window": 2},
    exempt=EXEMPT,
    parents=("softmax", "omeganet"),
    change="the Omega rule over exponential features instead of a sum over all values",
)
class Dot(_Growing):
    r"""$W_t = W_{t-1} + \sum_{j<c} γ_{tj} (v_{t-j} - W_{t-1} φ^*(k_{t-j})) φ^*(k_{t-j})^\top$, read as $W_t φ^*(q_t)$.

    At c = 1: $ṽ_t = γ_t (v_t - \sum_{i<t} ṽ_i κ(k_t, k_i))$, $y_t = \sum_{i ≤ t} ṽ_i κ(q_t, k_i)$. A step of 1 on the
    paper's exp(k·k') diverges where unit keys repeat, since $‖φ^*(k)‖^2 = e > 2$; here features have unit length.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent memories.
        window: c, the tokens that each write corrects; γ is σ(w·x + b_j)/c.
        objective: "squared", or "dot" to add values as they are (`SWDT`).
        conv: tokens that the convolutions see.

    Shapes: x and y [batch, time, dim]; state {"keys", "values" (coefficients): [batch, heads, room, dim/heads],
        "recent": [batch, heads, window - 1, dim/heads], "position": int64 [batch], "conv": {"tail"}}, where `room` is
        the longest row's tokens, rounded up to a multiple of 64: it grows, and so does the time per token.
    Raises: `ValueError` for `window` below 1 or a `dim` that is no multiple of `heads`; `ShapeError`, `StateError`.
    Source: ATLAS (2025), arXiv:2505.23735.
    """

    def __init__(self, dim: int, *, heads: int = 4, window: int = 1, objective: str = "squared", conv: int = 4):
        if window < 1:
            raise ValueError(f"{type(self).__name__}: window must be at least 1, got {window}.")
        super().__init__(dim, heads, window, conv)
        self.window, self.objective = window, objective
        nn.init.constant_(self.gates.bias, 2.2)

    def initial_state(self, batch: int) -> State:
        like, D = self.qkv.weight, self.head_dim
        keys, recent = zeros(like, batch, self.heads, 0, D), zeros(like, batch, self.heads, self.window - 1, D)
        position = torch.zeros(batch, dtype=torch.int64, device=like.device)
        held = {"keys": keys, "values": keys.clone(), "recent": recent, "position": position}
        return {**held, "conv": self.conv.initial_state(batch)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if x.shape[1] == 0:
            return x, state
        if x.shape[1] == 1 and steps.worth(x, *(state[n] for n in ("keys", "values", "recent")), state["conv"]["tail"]):
            y, state = layer_steps.coefficients_token(
                project(self.qkv, x), project(self.gates, x), self.conv.weight, self.length, state,
                self.room(state, 1), self.readout.plan(x), squared=self.objective == "squared",
            )  # fmt: skip
            return project(self.readout.out, y), state
        q, k, v, conv = self.project(x, state)
        gate = split(self.gates(x), self.heads).sigmoid() / self.window
        y, after = exponential_memory(q, k, v, gate, state, objective=self.objective)
        return self.readout(y, x), {**self.settle(after, state), "conv": conv}


@card(
    "swdt",
    covers="atlas",
    kind="memory",
    says="Exponential attention without its division, every token writing the last few again with weights it chooses.",
    source=SOURCE,
    small={"dim": 8, "heads": 2},
    exempt=EXEMPT,
    parents=("softmax", "swla"),
    change="a gated window of tokens in every write, and no division",
)
class SWDT(Dot):
    """The sliding-window DeepTransformer with a matrix as its memory: `SWLA` over exponential features.

    Args: as `Dot`; at `window=1` it is softmax attention before its division, gated.
    Source: ATLAS (2025), arXiv:2505.23735.
    """

    def __init__(self, dim: int, *, window: int = 2, objective: str = "dot", **arguments: Any):
        super().__init__(dim, window=window, objective=objective, **arguments)


@card(
    "deep-transformer",
    covers="atlas",
    kind="memory",
    says="Exponential attention whose memory is a network: attention to hidden features, and a matrix over them.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "expand": 2, "chunk_size": 4},
    exempt=EXEMPT,
    parents=("dla", "softmax"),
    change="exponential features of the keys, so that the first layer is an attention to everything read",
)
class DeepTransformer(_Growing):
    r"""DLA over φ*: $f(q) = W_2 σ(W_1 φ^*(q))$, $W_t = a_t W_{t-1} + θ_t ∇⟨f(W_ξ, k_t), v_t⟩$.

    The paper's rule has no decay; but its layers feed each other's growth without end, so here θ is a share of
    (1 - a)/2 and values have at most unit length, which bounds both layers for streams of any length. $W_2$ decays
    towards its learned start: at zero both layers would stay zero.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent memories.
        expand: hidden features, as a multiple of dim/heads.
        chunk_size: tokens that share an anchor; it belongs to the model.
        conv: tokens that the convolutions see.

    Shapes: x and y [batch, time, dim]; state as `ops.exponential.deep_exponential`, "keys" and the like with room for
        the longest row's tokens, rounded up to a multiple of 64, and "conv": {"tail"}.
    Raises: `ValueError` on sizes below 1 or a `dim` that is no multiple of `heads`; `ShapeError`, `StateError`.
    Source: ATLAS (2025), arXiv:2505.23735.
    """

    def __init__(self, dim: int, *, heads: int = 4, expand: int = 4, chunk_size: int = 16, conv: int = 4):
        if min(expand, chunk_size) < 1:
            raise ValueError(f"DeepTransformer: all sizes must be at least 1, got {expand=}, {chunk_size=}.")
        super().__init__(dim, heads, 2, conv)
        self.chunk_size, hidden = chunk_size, expand * self.head_dim
        self.start = nn.Parameter(torch.randn(heads, self.head_dim, hidden) * hidden**-0.5)
        with torch.no_grad():
            self.gates.bias.copy_(torch.cat([torch.linspace(3, 7, heads), torch.full((heads,), 2.2)]))

    def initial_state(self, batch: int) -> State:
        like, H = self.qkv.weight, self.heads
        moved = zeros(like, batch, *self.start.shape)
        return {
            "keys": zeros(like, batch, H, 0, self.head_dim),
            "values": zeros(like, batch, H, 0, self.start.shape[2]),
            "logs": zeros(like, batch, H, 0, 1),
            "weight": moved,
            "anchor": moved.clone(),
            "since": zeros(like, batch, H),
            "position": torch.zeros(batch, dtype=torch.int64, device=like.device),
            "conv": self.conv.initial_state(batch),
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if x.shape[1] == 0:
            return x, state
        q, k, v, conv = self.project(x, state)
        v = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp(min=1)
        retain, step = wide(self.gates(x)).transpose(1, 2).chunk(2, dim=1)
        step = 0.5 * retain.neg().sigmoid() * step.sigmoid()
        memory = {name: part for name, part in state.items() if name != "conv"}
        decay = F.logsigmoid(retain)
        y, after = deep_exponential(q, k, v, step, decay, self.start, memory, chunk_size=self.chunk_size)
        return self.readout(y, x), {**self.settle(after, state), "conv": conv}
