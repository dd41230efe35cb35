"""Titans: a memory that is itself a network, trained while it reads; alone, and beside windowed attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import catalogue, ops
from remanence.catalogue import card
from remanence.errors import expect
from remanence.memory.atlas import OmegaDelta, OmegaNet
from remanence.memory.attention import WindowAttention
from remanence.memory.base import Memory
from remanence.memory.fast_weight import FastWeightMemory
from remanence.memory.linear import Linear
from remanence.memory.parts import RMSNorm, merge, per_head, rotate, split, zeros
from remanence.ops.phases import by_phase, piece_sizes
from remanence.state import State, check_state, tree_map

SOURCE = "arXiv:2501.00663"


@card(
    "titans",
    kind="memory",
    says="A memory that is a small network, trained by gradient descent with momentum on what it reads.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "expand": 2, "chunk_size": 4},
)
class Titans(FastWeightMemory):
    r"""The long-term memory module: a perceptron per head that learns, token by token, to map keys to values.

    $S_t = η_t S_{t-1} - θ_t ∇\tfrac12‖f(W_ξ, k_t) - v_t‖^2$, $W_t = a_t W_{t-1} + S_t$, read as $f(W_t, q_t)$, where
    $f(W, x) = x + W_L σ(… σ(W_1 x))$ and $W_ξ$ are the weights as the token's chunk began. It is `FastWeightMemory`
    with momentum and the squared error.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent networks.
        layers: depth of each network, 1 to 4 in the paper (1 is a matrix).
        chunk_size: tokens that share an anchor. It belongs to the model: train and read with the same.
        momentum: whether past surprise carries over (η > 0); without it the state is a third smaller.
        answers: further arguments of `FastWeightMemory`.

    Shapes: x and y [batch, time, dim]; state {"net": {"anchor", "weight", "momentum": {"0": [batch, heads, out, in],
        ...}, "pos": int64 [batch]}, "conv": {"tail": [batch, conv - 1, 3·dim]}}.
    Raises: as `FastWeightMemory`.
    Source: Titans: Learning to Memorize at Test Time (2025), arXiv:2501.00663. The skip, the width, GELU and the makers
        of the gates are not given there; the first three follow later papers of its authors.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        layers: int = 2,
        chunk_size: int = 64,
        momentum: bool = True,
        **answers: Any,
    ):
        optimizer = "momentum" if momentum else "gradient"
        given: dict[str, Any] = {"heads": heads, "layers": layers, "chunk_size": chunk_size, "optimizer": optimizer}
        super().__init__(dim, **(given | answers))


class _Blend(nn.Module):
    """Two branches, each normalised by learned vectors; one gates the other."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate, self.value = RMSNorm(dim, eps=1e-5), RMSNorm(dim, eps=1e-5)

    def forward(self, gate: Tensor, value: Tensor) -> Tensor:
        return self.gate(gate).sigmoid() * self.value(value)


class _Attention(nn.Module):
    """The projections of an attention that also sees persistent tokens.

    Half of the features are turned by position (rotary). Persistent keys are zero in that half, so what they say
    does not depend on how far the stream has come.
    """

    def __init__(self, where: str, dim: int, heads: int):
        super().__init__()
        self.heads, self.turned = heads, per_head(where, dim, heads, multiple=4) // 2
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.out = Linear(dim, dim, bias=False)
        self.frequencies = 10000.0 ** -(torch.arange(0, self.turned, 2, dtype=torch.float64) / self.turned)

    def turn(self, x: Tensor, start: Tensor) -> Tensor:
        return torch.cat([rotate(x[..., : self.turned], start, self.frequencies), x[..., self.turned :]], -1)

    def project(self, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [batch, heads, time, dim/heads] of tokens whose first stands at `start`."""
        q, k, v = (split(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.turn(q, start), self.turn(k, start), v

    def prefix(self, persistent: Tensor) -> tuple[Tensor, Tensor]:
        _, k, v = (split(part, self.heads) for part in self.qkv(persistent[None]).chunk(3, dim=-1))
        return F.pad(k[..., self.turned :], (self.turned, 0)), v


def _network(where: str, name: str, dim: int, segment: int | None = None, **answers: Any) -> FastWeightMemory:
    """The memory of a composition: one of the design space by its name in the catalogue."""
    kind = catalogue.find(name, "memory").make
    if not (isinstance(kind, type) and issubclass(kind, FastWeightMemory)):
        raise ValueError(f"{where}: inner must be a memory that is a FastWeightMemory, got {name!r}.")
    clock: dict[str, Any] = {} if segment is None else {"chunk_size": segment}
    if segment is not None and issubclass(kind, OmegaDelta):
        raise ValueError(f"{where}: a segment is a chunk of the inner memory, and {name!r} has no chunks.")
    memory: FastWeightMemory = kind(dim, **clock, **answers)
    return memory


class _Primed(Memory):
    """A composition whose initial state has already read its persistent tokens.

    A subclass writes `blank`, the state before them, and `prime`, the state of one row after them.
    """

    def blank(self, batch: int) -> State:
        raise TypeError(f"{type(self).__name__} must define blank.")

    def prime(self) -> State:
        raise TypeError(f"{type(self).__name__} must define prime.")

    def initial_state(self, batch: int) -> State:
        return tree_map(lambda t: t.expand(batch, *t.shape[1:]), self.prime())

    def begin(self, x: Tensor, state: State | None) -> State:
        if state is None:
            return super().begin(x, None)
        name = type(self).__name__
        expect(name, "x", x, "batch time dim", dim=self.dim, hint="One token per row? Pass x[:, None].")
        check_state(name, state, self.blank(x.shape[0]))  # not `initial_state`, which would read the tokens again
        return state


@card(
    "titans-mal",
    covers="titans",
    kind="memory",
    says="Titans, memory as a layer: a network memory, and windowed attention over what it read.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "window": 5, "persistent": 3, "expand": 2, "chunk_size": 4},
)
class TitansMAL(_Primed):
    r"""$y = \mathrm{LMM}([P ‖ x])$, $o = \mathrm{SWA}(y)$: the memory digests, the window attends.

    Args:
        dim: features of input and output; a multiple of 2·heads.
        heads: of the memory and of the attention.
        window: tokens that the attention sees.
        persistent: learned tokens P, read before the stream.
        inner: what the memory is: "titans", or another `FastWeightMemory` of the catalogue ("atlas", "yaad").
        memory: its further arguments.

    Shapes: x and y [batch, time, dim]; state {"memory": that of the memory, "attention": that of `WindowAttention`}.
    Raises: as `Titans` and `WindowAttention` do; `UnknownName`, `ValueError` for `inner`.
    Source: Titans (2025), arXiv:2501.00663, section 4.3.
    """

    def __init__(
        self, dim: int, *, heads: int = 4, window: int = 128, persistent: int = 16, inner: str = "titans", **memory: Any
    ):
        super().__init__()
        self.dim = dim
        self.persistent = nn.Parameter(torch.randn(persistent, dim))
        self.memory = _network("TitansMAL", inner, dim, heads=heads, **memory)
        self.attention = WindowAttention(dim, heads=heads, window=window)

    def blank(self, batch: int) -> State:
        return {"memory": self.memory.initial_state(batch), "attention": self.attention.initial_state(batch)}

    def prime(self) -> State:
        return self.forward(self.persistent[None], self.blank(1))[1]

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        y, memory = self.memory(x, state["memory"])
        y, attention = self.attention(y, state["attention"])
        return y, {"memory": memory, "attention": attention}


@card(
    "titans-mag",
    covers="titans",
    kind="memory",
    says="Titans, memory as a gate: windowed attention and a network memory side by side, one gating the other.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "window": 5, "persistent": 3, "expand": 2, "chunk_size": 4},
)
class TitansMAG(_Primed):
    r"""$y = \mathrm{SWA}^*([P ‖ x])$, $m = \mathrm{LMM}([P ‖ x])$, $o = σ(\mathrm{norm}_1 y) ⊙ \mathrm{norm}_2 m$.

    The attention sees its window and, always, the persistent tokens P; the memory reads P before the stream.

    Args:
        dim: features of input and output; a multiple of 4·heads.
        heads: of the memory and of the attention.
        window: tokens that the attention sees beside P.
        persistent: learned tokens P.
        inner: what the memory is: "titans", or another `FastWeightMemory` of the catalogue ("atlas", "yaad").
        memory: its further arguments.

    Shapes: x and y [batch, time, dim]; state {"memory": that of the memory, "attention": {"k", "v": [batch, heads,
        window - 1, dim/heads], "seen": int64 [batch]}}.
    Raises: `ValueError` on a `dim` that is no multiple of 4·heads or an `inner` that does not fit; `UnknownName` for
        one that nothing goes by; `ShapeError`, `StateError` from `forward`.
    Source: Titans (2025), arXiv:2501.00663, section 4.2, which leaves the gate's nonlinearity open.
    """

    def __init__(
        self, dim: int, *, heads: int = 4, window: int = 128, persistent: int = 16, inner: str = "titans", **memory: Any
    ):
        super().__init__()
        self.dim, self.window = dim, window
        self.persistent = nn.Parameter(torch.randn(persistent, dim))
        self.memory = _network("TitansMAG", inner, dim, heads=heads, **memory)
        self.attention = _Attention("TitansMAG", dim, heads)
        self.blend = _Blend(dim)

    def blank(self, batch: int) -> State:
        k = zeros(self.persistent, batch, self.attention.heads, self.window - 1, 2 * self.attention.turned)
        attention = {"k": k, "v": k.clone(), "seen": k.new_zeros(batch, dtype=torch.int64)}
        return {"memory": self.memory.initial_state(batch), "attention": attention}

    def prime(self) -> State:
        state = self.blank(1)
        return {**state, "memory": self.memory(self.persistent[None], state["memory"])[1]}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        q, k, v = self.attention.project(x, state["attention"]["seen"])
        prefix = self.attention.prefix(self.persistent)
        y, _, attention = ops.window_attention(q, k, v, window=self.window, state=state["attention"], prefix=prefix)
        m, memory = self.memory(x, state["memory"])
        return self.blend(self.attention.out(merge(y).to(x.dtype)), m), {"memory": memory, "attention": attention}


@card(
    "titans-mac",
    covers="titans",
    kind="memory",
    says="Titans, memory as context: attention over a segment beside what the memory recalls for it.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "segment": 4, "persistent": 3, "expand": 2},
)
class TitansMAC(Memory):
    r"""Recall, attend, write: $h_t = f(W_ξ, q_t)$, $y = \mathrm{Attn}([P ‖ h ‖ x])$, $o_t = y_t ⊗ f(W_t, y_t)$.

    The stream is cut into segments, counted from its start. $W_ξ$ is the memory as the segment began. The paper places
    all of a segment's $h$ before its tokens and reads the memory that the whole segment wrote, so that a token would
    learn of its successors. Here token t sees P, and $h_j$ and $x_j$ of its segment for j ≤ t only, and reads the
    memory as of its own write; a segment is a chunk of the memory. ⊗ is the gate of `TitansMAG`.

    Args:
        dim: features of input and output; a multiple of 4·heads.
        heads: of the memory and of the attention.
        segment: tokens per segment; the attention sees at most so many.
        persistent: learned tokens P, always visible.
        inner: what the memory is: "titans", or another `FastWeightMemory` of the catalogue ("atlas", "yaad").
        memory: its further arguments (but `chunk_size`, which is `segment`).

    Shapes: x and y [batch, time, dim]; state {"memory": that of the memory, "k" and "v": [batch, heads, segment - 1, 2,
        dim/heads], the open segment's (recalled, own) keys and values; zero where nothing was read yet}.
    Raises: `ValueError` on a `dim` that is no multiple of 4·heads or an `inner` that does not fit; `UnknownName` for
        one that nothing goes by; `ShapeError`, `StateError` from `forward`.
    Source: Titans (2025), arXiv:2501.00663, section 4.1.
    """

    def __init__(
        self, dim: int, *, heads: int = 4, segment: int = 64, persistent: int = 16, inner: str = "titans", **memory: Any
    ):
        super().__init__()
        self.dim, self.segment = dim, segment
        self.persistent = nn.Parameter(torch.randn(persistent, dim))
        self.memory = _network("TitansMAC", inner, dim, segment, heads=heads, **memory)
        keys = self.memory.widths[0] if isinstance(self.memory, OmegaNet) else dim
        self.query = Linear(dim, keys, bias=False)
        self.recalled = RMSNorm(dim, eps=1e-5)
        self.attention = _Attention("TitansMAC", dim, heads)
        self.blend = _Blend(dim)

    def initial_state(self, batch: int) -> State:
        k = zeros(self.persistent, batch, self.attention.heads, self.segment - 1, 2, 2 * self.attention.turned)
        return {"memory": self.memory.initial_state(batch), "k": k, "v": k.clone()}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if x.shape[1] == 0:
            return x, state

        def run(tensors: list[Tensor], state: State, phase: int) -> tuple[Tensor, State]:
            y = []
            for piece in tensors[0].split(piece_sizes(tensors[0].shape[1], phase, self.segment), 1):
                out, state = self.within(piece, state, phase)
                phase = (phase + piece.shape[1]) % self.segment
                y.append(out)
            return torch.cat(y, 1), state

        return by_phase(run, [x], state, state["memory"]["net"]["pos"], self.segment)

    def within(self, x: Tensor, state: State, phase: int) -> tuple[Tensor, State]:
        """Tokens of one segment, of which `phase` were read before."""
        start, stop = torch.full_like(state["memory"]["net"]["pos"], phase), phase + x.shape[1]
        q_h = split(self.query(x), self.attention.heads)
        (q_h,) = self.memory.lift(q_h)
        h = self.memory.recall(q_h, state["memory"])
        _, k_h, v_h = self.attention.project(self.recalled(merge(h).to(x.dtype)), start)
        q, k_x, v_x = self.attention.project(x, start)
        k = torch.cat([state["k"][:, :, :phase], torch.stack([k_h, k_x], 3)], 2)
        v = torch.cat([state["v"][:, :, :phase], torch.stack([v_h, v_x], 3)], 2)
        y = self.attend(q, k.flatten(2, 3), v.flatten(2, 3))
        m, memory = self.memory(y := self.attention.out(merge(y).to(x.dtype)), state["memory"])
        kept = (0, 0, 0, 0, 0, self.segment - 1 - stop)
        k, v = (F.pad(t, kept) if stop < self.segment else torch.zeros_like(t[:, :, 1:]) for t in (k, v))
        return self.blend(y, m), {"memory": memory, "k": k, "v": v}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each query sees the persistent tokens and, of the (recalled, own) pairs, those up to its own."""
        n, pairs = q.shape[2], k.shape[2] // 2
        p_k, p_v = (t.expand(q.shape[0], -1, -1, -1) for t in self.attention.prefix(self.persistent))
        own = torch.arange(pairs - n, pairs, device=q.device)[:, None]
        visible = torch.arange(k.shape[2], device=q.device) // 2 <= own
        mask = F.pad(visible, (p_k.shape[2], 0), value=True)
        return F.scaled_dot_product_attention(q, torch.cat([p_k, k], 2), torch.cat([p_v, v], 2), attn_mask=mask)
