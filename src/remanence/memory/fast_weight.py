"""The design space of memories that learn at test time, as one layer: six answers make a memory."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.errors import RemanenceError, unknown
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import GatedReadout, ShortConv, l2_norm, per_head, split, wide
from remanence.ops.fast_weight import READS, fast_weight, fast_weight_state
from remanence.ops.inner_network import fast_weight_read
from remanence.ops.objectives import OBJECTIVES, Huber, Objective, PNorm
from remanence.ops.retention import RETENTIONS, Divergence, Lq, Retention, Softmax
from remanence.state import State, flatten

STRUCTURES = ("vector", "matrix", "mlp", "gated")
KEPT = ("none", "decay", "start")
"""The retentions without a link."""
GATES = ("head", "channel")
OPTIMIZERS = {"gradient": 0, "momentum": 1, "momentum2": 2, "muon": 1}
"""The inner optimisers, and how many momenta each carries."""
ROWS: dict[str, dict[str, Any]] = {
    "linear-attention": {"structure": "matrix", "objective": "dot", "retention": "none"},
    "swla": {"structure": "matrix", "objective": "dot", "window": 2},
    "delta-rule": {"structure": "matrix", "retention": "none", "max_step": 1.0, "chunk_size": 1, "bound": 1.0},
    "titans": {"optimizer": "momentum", "chunk_size": 64},
    "moneta": {"objective": PNorm(3.0), "retention": Lq(4.0), "norm": True},
    "yaad": {"objective": Huber("mixture"), "norm": True},
    "memora": {"retention": "softmax", "norm": True, "max_step": 10.0},
    "dla": {"objective": "dot"},
    "omeganet": {"window": 4},
    "atlas": {"window": 4, "optimizer": "muon"},
    "atlas++": {"structure": "gated", "window": 4, "optimizer": "muon"},
}
"""Published memories as answers: `FastWeightMemory(dim, **ROWS["yaad"])`. What they have besides (kernels, lifted keys)
is in the layers of their names."""


@card(
    "fast-weight",
    covers="miras",
    kind="memory",
    says="The design space of test-time memories: structure, objective, retention, optimiser, clock and read time.",
    source="arXiv:2504.13173",
    small={"dim": 8, "heads": 2, "expand": 2, "chunk_size": 4, "optimizer": "momentum2", "window": 2, "norm": True},
)
class FastWeightMemory(Memory):
    r"""A memory per head that learns, token by token, to map keys to values; what it is, six arguments say.

    $S_t = η_t S_{t-1} - θ_t ∇ℓ(f(W_ξ, k_t), v_t)$, $A_t = a_t A_{t-1} + S_t$, $W_t = \mathrm{link}(A_t)$, read as
    $f(W_t, q_t)$; $W_ξ$ are the weights as the token's chunk began. Queries, keys and values are SiLU(conv(W x)), the
    first two of unit length; $a, η, θ$ (and thresholds, and the weights of a window) depend on the token, one of each
    per head or, of some, per channel.

    Args:
        dim: features of input and output; a multiple of `heads`.
        structure: of f. "vector": elementwise product; "matrix"; "mlp": `layers` matrices with GELU between, 1 to 4 in
            the papers; "gated": $W_3(σ(W_1 x) ∘ W_2 x)$.
        objective: ℓ, "squared", "dot", "p-norm", "absolute", "log-cosh", "huber", "huber-coordinate", "huber-mixture"
            or "shifted", or one of `ops.objectives` with numbers of its own.
        retention: "none", "decay" ($a_t$ alone), "start" (what $a_t$ forgets turns into the learned start, not zero),
            or $a_t$ and a link: "lq", "lq-mirror", "elastic", "softmax", "sigmoid", "tanh", or $a_t$ and a move from
            the last weights: "shrink", "chi-squared", "hellinger", "reverse-kl"; or one of `ops.retention`.
        optimizer: "gradient", "momentum", "momentum2" (a momentum of the momentum), or "muon": momentum, then five
            Newton–Schulz steps for every token.
        chunk_size: tokens that share an anchor. It belongs to the model: train and read with the same.
        read: "after" the token's own write, "before" it, or the "anchor": the weights as the chunk began.
        heads: independent memories.
        layers, expand: depth of an "mlp"; hidden features as a multiple of dim/heads.
        window: tokens whose losses each step sums (the Omega rule).
        residual: add the query to what is read; by default where f is a network.
        norm: a layer norm with learned scale and shift on f's output, inside the residual.
        max_step: θ is at most `max_step` · (1 - η), so that η does not change how much is learned in all.
        bound: and at most this share of the step that would mend a chunk of equal tokens at once, so that no stream
            diverges (see `ops.fast_weight`); None leaves θ as it is. The steps of "muon" are of size θ whatever it is.
        conv: tokens that the convolutions see; of 1 only a learned scale is left, 1 at first.
        gate: whether SiLU(W_g x) gates what is read, after its norm.
        gates: "head", or "channel": a step, a retention and (but for "huber") a threshold of every channel: of what the
            last layer gives and the first reads.
        rank: of the map that makes the gates of channels.
        remake: in training keep of every chunk its state only, and make the rest again for the gradient: the same
            result for a fraction of the memory and about a third more time.

    Shapes: x and y [batch, time, dim]; state {"net": that of `ops.fast_weight_state`, "conv": {"tail": [batch,
        conv - 1, 3·dim]}}. A vector has dim heads of width 1.
    Raises: `ValueError` for sizes below 1, what cannot be combined (with the reason), and a `max_step` that diverges;
        `UnknownName` for an answer that there is none of; `RemanenceError` when the memory diverges; `ShapeError`,
        `StateError` from `forward`.
    Source: It's All Connected (Miras, 2025), arXiv:2504.13173; the window and "muon": ATLAS (2025), arXiv:2505.23735.

    >>> FastWeightMemory(16, structure="matrix", objective="huber", retention="elastic", read="anchor").dim
    16
    """

    def __init__(
        self,
        dim: int,
        *,
        structure: str = "mlp",
        objective: str | Objective = "squared",
        retention: str | Retention = "decay",
        optimizer: str = "gradient",
        chunk_size: int = 16,
        read: str = "after",
        heads: int = 4,
        layers: int = 2,
        expand: int = 4,
        window: int = 1,
        residual: bool | None = None,
        norm: bool = False,
        max_step: float = 0.1,
        bound: float | None = 0.5,
        conv: int = 4,
        gate: bool = True,
        remake: bool = False,
        gates: str = "head",
        rank: int = 32,
    ):
        super().__init__()
        name = type(self).__name__
        K = per_head(name, dim, heads)
        known(name, structure=(structure, STRUCTURES), optimizer=(optimizer, OPTIMIZERS), read=(read, READS))
        known(name, gates=(gates, GATES))
        self.objective = chosen("objective", objective, OBJECTIVES)
        self.retention: Retention | None = chosen("retention", retention, dict.fromkeys(KEPT) | RETENTIONS)
        self.returns = retention == "start"
        if min(layers, expand, chunk_size, window, rank) < 1:
            given = f"layers={layers}, expand={expand}, chunk_size={chunk_size}"
            given += f", window={window}" if window < 1 else f", rank={rank}" if rank < 1 else ""
            raise ValueError(f"{name}: layers, expand and chunk_size must be at least 1, got {given}.")
        residual = structure in ("mlp", "gated") if residual is None else residual
        self.orthogonal = 5 if optimizer == "muon" else 0
        self.bound = None if self.orthogonal else bound
        deep = structure == "gated" or (structure == "mlp" and layers > 1)
        if deep and not self.objective.targets and retention == "none" and not self.orthogonal:
            growth = "outgrows all numbers unless a retention forgets: with retention 'none' it has no bound."
            raise ValueError(f"{name}: in a network of several layers objective 'dot' {growth}")
        if structure == "mlp" and layers > 2 and gates == "channel":
            raise ValueError(
                f"{name}: gates 'channel' have no side of a matrix between hidden features, structure 'mlp' with "
                f"layers={layers} has such; take at most 2."
            )
        if reason := misfit(structure, self.retention, self.orthogonal, norm, max_step, self.bound):
            raise ValueError(f"{name}: {reason}")
        self.dim, self.heads, self.chunk_size, self.max_step = dim, heads, chunk_size, max_step
        self.read, self.window, self.residual, self.gated = read, window, residual, structure == "gated"
        self.remake = remake
        self.spread = K if structure == "vector" else 1
        self.widths = (dim, dim, dim)
        self.qkv = Linear(dim, 3 * dim, bias=False)
        self.conv = ShortConv(3 * dim, conv)
        self.start = nn.ParameterList(self._start(structure, K, layers, expand * K))
        self.momenta = OPTIMIZERS[optimizer]
        self.each = {"step", "retain", "threshold"} if gates == "channel" else set()
        if getattr(self.objective, "kind", "") == "norm":
            self.each -= {"threshold"}
        # retain 0.993 to 0.9999 from head to head; a step of half its bound; momentum 0.9
        starts = {"retain": torch.linspace(5, 9, heads)} if retention != "none" else {}
        starts |= {"step": torch.zeros(heads)}
        starts |= {order: torch.full((heads,), 2.2) for order in ("momentum", "second")[: self.momenta]}
        starts |= {"threshold": torch.zeros(heads)} if self.objective.thresholds else {}
        starts |= {"window": torch.full((heads * window,), 2.2)} if window > 1 else {}
        starts = {gate: bias.repeat_interleave(K if gate in self.each else 1) for gate, bias in starts.items()}
        self.names, self.sizes = list(starts), [len(bias) for bias in starts.values()]
        self.gates = LowRank(dim, rank, sum(self.sizes)) if self.each else Linear(dim, sum(self.sizes))
        nn.init.normal_(self.gates.weight, std=0.02)
        with torch.no_grad():
            self.gates.bias.copy_(torch.cat(list(starts.values())))
        self.norm = nn.ParameterList([torch.ones(heads, K), torch.zeros(heads, K)]) if norm else None
        self.readout = GatedReadout(dim, heads, K, activation=F.silu if gate else None)

    def _start(self, structure: str, K: int, layers: int, hidden: int) -> list[Tensor]:
        sizes = {
            "vector": [(1, 1)],
            "matrix": [(K, K)],
            "gated": [(hidden, K), (hidden, K), (K, hidden)],
            "mlp": [(K if i == layers - 1 else hidden, hidden if i else K) for i in range(layers)],
        }
        return [torch.randn(self.heads * self.spread, o, i) * i**-0.5 for o, i in sizes[structure]]

    def initial_state(self, batch: int) -> State:
        wide = self.objective.thresholds and "threshold" in self.each and self.spread == 1
        net = fast_weight_state(
            [torch.zeros_like(W) for W in self.start] if self.returns else list(self.start),
            batch,
            momentum=self.momenta,
            window=self.window,
            thresholds=self.dim // self.heads if wide else self.objective.thresholds,
            retention=self.retention,
        )
        return {"net": net, "conv": self.conv.initial_state(batch)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        mixed, conv = self.conv(self.qkv(x), state["conv"], silu=True, widths=self.widths)
        q, k, v = (split(part, self.heads) for part in mixed)
        q, k = self.lift(q, k)
        gates = self.gate(x)
        if self.spread > 1:
            q, k, v = (p.mT.flatten(1, 2)[..., None] for p in (q, k, v))
            gates = {name: self._apart(name, g) for name, g in gates.items()}
        y, net = self.write(q, k, v, gates, state["net"])
        if not y.detach().sum().isfinite() and not y.detach().isfinite().all():
            self.diverged(net)
        if self.spread > 1:
            y = y[..., 0].unflatten(1, (self.heads, -1)).mT
        return self.readout(y, x), {"net": net, "conv": conv}

    def lift(self, *vectors: Tensor) -> list[Tensor]:
        """Queries, or queries and keys, [batch, heads, time, features], as the memory reads them: of unit length."""
        return [l2_norm(x) for x in vectors]

    def write(self, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Any], net: State) -> tuple[Tensor, State]:
        """The recurrence: what each query reads, and the last state."""
        return fast_weight(
            q,
            k,
            v,
            state=net,
            **gates,
            chunk_size=self.chunk_size,
            objective=self.objective,
            retention=self.retention,
            orthogonal=self.orthogonal,
            read=self.read,
            bound=self.bound,
            toward=list(self.start) if self.returns else None,
            remake=self.remake,
            **self.form(),
        )

    def _apart(self, name: str, gate: Tensor) -> Tensor:
        """The gates of a vector's features, which are heads of their own."""
        own = name.removesuffix("_log") in self.each
        return gate.mT.flatten(1, 2) if own else gate.repeat_interleave(self.spread, 1)

    def gate(self, x: Tensor) -> dict[str, Any]:
        """What each token asks for, by the name that `ops.fast_weight` has for it.

        Shapes: [batch, heads, time], or with one more axis of channels, or of a window's tokens.
        """
        raw = dict(zip(self.names, wide(self.gates(x)).transpose(1, 2).split(self.sizes, 1), strict=True))
        raw |= {name: raw[name].unflatten(1, (self.heads, -1)).mT for name in self.each if name in raw}
        gates = {"step": self.max_step * raw["step"].sigmoid()}
        for name in ("momentum", "second"):
            if name in raw:
                left = raw[name].neg().sigmoid()
                gates["step"] = gates["step"] * (left[..., None] if self.each else left)
        gates |= {f"{name}_log": F.logsigmoid(raw[name]) for name in ("retain", "momentum", "second") if name in raw}
        if "threshold" in raw:
            gates["threshold"] = 2 * getattr(self.objective, "delta", 1.0) * raw["threshold"].sigmoid()
        if "window" in raw:
            gates["window"] = raw["window"].sigmoid().unflatten(1, (self.heads, -1)).mT
        return gates

    def form(self) -> dict[str, Any]:
        """What f is besides its weights."""
        norm = None if self.norm is None else (self.norm[0], self.norm[1])
        return {"residual": self.residual, "gated": self.gated, "norm": norm}

    def recall(self, query: Tensor, state: State) -> Tensor:
        """What the memory held when the open chunk began; queries [batch, heads, time, dim/heads] of unit length."""
        anchor = list(state["net"]["anchor"].values())
        if self.returns:
            anchor = [A + W for A, W in zip(anchor, self.start, strict=True)]
        if self.retention is not None:
            anchor = [self.retention.link(A) for A in anchor]
        if self.spread > 1:
            y = fast_weight_read(query.mT.flatten(1, 2)[..., None], anchor, **self.form())
            return y[..., 0].unflatten(1, (self.heads, -1)).mT
        return fast_weight_read(query, anchor, **self.form())

    def diverged(self, net: State) -> NoReturn:
        """Say which part of the memory is no longer finite, where in the stream, and what would hold it."""
        parts: State = {name: net[name] for name in ("weight", "momentum", "second") if name in net}
        bad = [(path, t) for path, t in flatten(parts).items() if not t.isfinite().all()]
        token = int(net["pos"].max())
        where = "what it read"
        if bad:
            path, t = bad[0]
            row, head = (int(i) for i in (~t.isfinite()).nonzero()[0][:2])
            where = f"{path.replace('.', ' of layer ')} (row {row}, head {head})"
        raise RemanenceError(
            f"{type(self).__name__}: by token {token} {where} stopped being finite: its input is not finite, or its "
            f"steps are too large (max_step={self.max_step:g}; a chunk of {self.chunk_size} equal keys of unit length "
            f"is stable for steps below {2 / self.chunk_size:g}, and with bound=0.5 for any)."
        )


class LowRank(Linear):
    """A linear map through `rank` features."""

    def __init__(self, width: int, rank: int, out: int):
        super().__init__(rank, out)
        self.down = Linear(width, rank, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.down(x))


def known(where: str, **answers: tuple[str, Any]) -> None:
    """Raise `UnknownName` for the first answer that is not among those there are."""
    for what, (given, names) in answers.items():
        if given not in names:
            raise unknown(f"{what} of {where}", given, names)


def chosen(what: str, given: Any, table: dict[str, Any]) -> Any:
    """One of a table by name, or the one given."""
    if not isinstance(given, str):
        return given
    if given not in table:
        raise unknown(what, given, table)
    return table[given]


def misfit(
    structure: str,
    retention: Retention | None,
    orthogonal: int,
    norm: bool,
    max_step: float,
    bound: float | None,
) -> str | None:
    """Why these answers make no memory, or None where they do."""
    if structure == "vector" and orthogonal:
        return "optimizer 'muon' needs a matrix: of the single numbers of structure 'vector' it keeps the sign alone."
    if structure == "vector" and retention is not None and isinstance(retention, Lq | Softmax | Divergence):
        named = next((name for name, each in RETENTIONS.items() if each == retention), type(retention).__name__)
        shared = "shares a norm or a sum among the weights of a matrix; those of structure 'vector' are single."
        return f"retention {named!r} {shared}"
    if structure == "vector" and norm:
        return "norm needs outputs of several features; each weight of a vector has one."
    if not 0 < max_step < float("inf"):
        return f"max_step must be above 0 and finite, got {max_step}."
    if bound is not None and not 0 < bound <= 2:
        return f"bound must be above 0 and at most 2, beyond which equal tokens diverge, got {bound}."
    if bound is None and not orthogonal and max_step > 2:
        return (
            f"max_step must be at most 2, beyond which a key of unit length diverges, got {max_step}; or give a bound."
        )
    return None
