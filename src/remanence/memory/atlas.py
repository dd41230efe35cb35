"""ATLAS: memories that fit a window of what they read, with lifted keys and orthogonal writes."""

from __future__ import annotations

import math
from collections import Counter
from functools import cached_property
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.memory.fast_weight import FastWeightMemory
from remanence.memory.linear import Linear
from remanence.memory.parts import ShortConv, project
from remanence.ops import layer_steps, steps
from remanence.ops.layer_steps import Lift
from remanence.ops.objectives import Dot
from remanence.ops.omega import omega_delta
from remanence.state import State

SOURCE = "arXiv:2505.23735"
SMALL = {"dim": 8, "heads": 2, "window": 3, "expand": 2, "chunk_size": 4}


class PolynomialFeatures(nn.Module):
    r"""All monomials up to a degree, weighted so that $φ(q)·φ(k) = \sum_{i ≤ p} a_i (q·k)^i$.

    $a_i = r_i^2 / i!$ with r learned, 1 at first, so that the kernel begins as the head of exp(q·k).

    Args:
        width: features of the input.
        degree: p, at least 1; the output has C(width + p, p) features, the first of which is constant.

    Shapes: x [..., width] -> [..., features].
    Source: ATLAS (2025), arXiv:2505.23735.

    >>> PolynomialFeatures(8, 2)(torch.ones(3, 8)).shape
    torch.Size([3, 45])
    """

    pick: Tensor
    factors: Tensor
    degree: Tensor
    share: Tensor

    def __init__(self, width: int, degree: int = 2):
        super().__init__()
        if min(width, degree) < 1:
            raise ValueError(f"PolynomialFeatures: width and degree must be at least 1, got {width} and {degree}.")
        self.features = math.comb(width + degree, degree)
        self.root = nn.Parameter(torch.ones(degree + 1))
        factors: list[Tensor] = []
        degrees, shares = [0], [1.0]
        for i in range(1, degree + 1):
            rows = list(combinations_with_replacement(range(width), i))
            factors += F.one_hot(torch.tensor(rows), width).unbind(1)
            degrees += [i] * len(rows)
            shares += [1 / math.prod(map(math.factorial, Counter(row).values())) for row in rows]  # how often, over i!
        self.sizes = [len(factor) for factor in factors]
        # one product with ones and zeros, where an index would take an operation for every factor
        # as products, for the compiled step: of the features of x, and of a 1 behind them
        rows = [(), *(row for i in range(1, degree + 1) for row in combinations_with_replacement(range(width), i))]
        self.register_buffer(
            "factors", torch.tensor([(*row, *[width] * (degree - len(row))) for row in rows]), persistent=False
        )
        self.register_buffer("pick", torch.cat(factors).mT.to(self.root.dtype), persistent=False)
        self.register_buffer("degree", torch.tensor(degrees), persistent=False)
        self.register_buffer("share", torch.tensor(shares, dtype=torch.float64).sqrt(), persistent=False)

    def products(self) -> Lift:
        """The same for the compiled steps. Buffers by their names: to look them up in the module takes longer."""
        own = self._buffers
        return Lift(own["factors"], own["degree"], own["share"], self.root)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        factors = iter((x @ self.pick.to(x.dtype)).split(self.sizes, -1))
        blocks = [torch.ones_like(x[..., :1])]
        for i in range(1, len(self.root)):
            blocks.append(next(factors))
            for _ in range(i - 1):
                blocks[-1] = blocks[-1] * next(factors)
        return torch.cat(blocks, -1) * (self.root.to(x.dtype)[self.degree] * self.share.to(x.dtype))


@card(
    "omeganet",
    covers="atlas",
    kind="memory",
    says="A network memory whose every write improves its answers to a window of recent tokens, over lifted keys.",
    source=SOURCE,
    small=SMALL,
    parents=("titans",),
    change="a gated window of tokens in the loss, and polynomial features of the keys",
)
class OmegaNet(FastWeightMemory):
    r"""The Omega rule: $W_t = a_t W_{t-1} - θ_t \sum_{j<c} γ_{tj} ∇\tfrac12‖f(W_ξ, φ(k_{t-j})) - v_{t-j}‖^2$.

    Read as $f(W_t, φ(q_t))$; $W_ξ$ are the weights as the token's chunk began, and a, θ, γ depend on the token. It is
    `FastWeightMemory` with a window, over lifted keys.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent memories.
        window: c, the tokens that each write fits; 1 is the rule of Titans.
        degree: of the polynomial features; None leaves queries and keys as they are, and adds a skip to a network.
        feature_dim: features per query and key before they are lifted to C(feature_dim + degree, degree); dim/heads by
            default, but at most 16.
        answers: further arguments of `FastWeightMemory`; its structure cannot be "vector".

    Shapes: x and y [batch, time, dim]; state {"net": that of `ops.fast_weight_state`, "conv": {"tail"}}.
    Raises: `ValueError` for a degree or feature_dim below 1, and as `FastWeightMemory`.
    Source: ATLAS (2025), arXiv:2505.23735. Window, degree and the makers of the gates are not given there; a skip
        cannot join lifted keys to values of another width, and is left out.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        window: int = 8,
        degree: int | None = 2,
        feature_dim: int | None = None,
        structure: str = "mlp",
        conv: int = 4,
        **answers: Any,
    ):
        if structure == "vector":
            raise ValueError(f"{type(self).__name__}: a vector has no lifted keys; use FastWeightMemory.")
        if degree is not None and structure != "matrix" and answers.get("gates") == "channel":
            raise ValueError(
                f"{type(self).__name__}: gates 'channel' are of the values' features, lifted keys have others: take "
                "degree=None, or structure 'matrix', whose channels are its outputs."
            )
        if degree is not None:
            answers = {"residual": False, **answers}
        super().__init__(dim, heads=heads, window=window, structure=structure, conv=conv, **answers)
        K = dim // heads if degree is None else feature_dim if feature_dim is not None else min(dim // heads, 16)
        self.widths = (heads * K, heads * K, dim)
        self.features = None if degree is None else PolynomialFeatures(K, degree)
        if self.features is not None:
            self.qkv, self.conv = Linear(dim, sum(self.widths), bias=False), ShortConv(sum(self.widths), conv)
            wider = self.features.features
            for i in range(1 + self.gated):  # the layers that read keys
                rows = self.start[i].shape[1]
                self.start[i] = nn.Parameter(torch.randn(heads, rows, wider) * wider**-0.5)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        if x.shape[1] == 1 and self.linear:
            net = state["net"]
            held = [part for name in ("momentum", "window") if name in net for part in net[name].values()]
            if steps.worth(x, state["conv"]["tail"], net["weight"]["0"], *held):
                return self._token(x, state)
        return super().forward(x, state)

    @cached_property
    def linear(self) -> bool:
        """Whether a token's write is one of a matrix that the compiled step knows."""
        plain = self.spread == 1 and len(self.start) == 1 and self.retention is None and self.norm is None
        plain = plain and not (self.returns or self.each or self.residual or self.orthogonal or self.momenta > 1)
        known = isinstance(self, OmegaDelta) or isinstance(self.objective, Dot)
        own = type(self).lift is OmegaNet.lift and type(self).write in (OmegaDelta.write, FastWeightMemory.write)
        return plain and known and own and self.read == "after"

    def _token(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        net, exact, lift = state["net"], isinstance(self, OmegaDelta), None
        if self.features is not None:
            lift = self.features.products()
        y, after, tail, finite = layer_steps.window_token(
            project(self.qkv, x), project(self.gates, x), self.conv.weight, state["conv"]["tail"], net,
            self.readout.plan(x), lift, decays="retain" in self.names, squared=exact, most=self.max_step,
            bound=self.bound if exact else None,
        )  # fmt: skip
        if not finite:
            self.diverged(after)
        after["anchor"] = after["weight"]
        if self.chunk_size > 1:
            ended, old = after["pos"] % self.chunk_size == 0, net["anchor"]
            if ended.any():
                old = {"0": torch.where(ended[:, None, None, None], after["weight"]["0"], old["0"])}
            after["anchor"] = old
        return project(self.readout.out, y), {"net": after, "conv": {"tail": tail}}

    def lift(self, *vectors: Tensor) -> list[Tensor]:
        """Unit queries and keys, and their features."""
        unit = super().lift(*vectors)
        return unit if self.features is None else list(self.features(torch.stack(unit)))


@card(
    "atlas",
    kind="memory",
    says="OmegaNet with momentum, whose every write has its singular values made equal: the direction is learned.",
    source=SOURCE,
    small=SMALL,
    parents=("omeganet", "titans"),
    change="momentum is orthogonalised (Newton–Schulz) before it is written",
)
class Atlas(OmegaNet):
    r"""$S_t = η_t S_{t-1} - ∇ℓ_t(W_ξ)$, $W_t = a_t W_{t-1} + θ_t \mathrm{NS}_5(S_t)$, with the window's loss $ℓ_t$.

    Since no step depends on a gradient's size, none can diverge; each changes W by about θ. The weights of every token
    are made (and made again for the gradient): the dearest of the family.

    Args: as `OmegaNet`; θ reaches 0.2·(1 - η).
    Source: ATLAS (2025), arXiv:2505.23735.
    """

    def __init__(self, dim: int, *, optimizer: str = "muon", max_step: float = 0.2, **answers: Any):
        super().__init__(dim, optimizer=optimizer, max_step=max_step, **answers)


@card(
    "atlas++",
    covers="atlas",
    kind="memory",
    says="Atlas whose network is gated, W₃(σ(W₁z) ⊙ W₂z).",
    source=SOURCE,
    small=SMALL,
    parents=("atlas",),
    change="a gated network as the memory",
)
class AtlasPlus(Atlas):
    """Atlas++: `Atlas` over a gated network, all of whose matrices are written. Args: as `OmegaNet`."""

    def __init__(self, dim: int, *, structure: str = "gated", **answers: Any):
        super().__init__(dim, structure=structure, **answers)


@card(
    "dla",
    covers="atlas",
    kind="memory",
    says="Deep linear attention: linear attention whose memory is a network, written by Hebb's rule.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "expand": 2, "chunk_size": 4},
    parents=("linear-attention",),
    change="a network instead of a matrix, trained on −⟨f(k), v⟩",
)
class DLA(OmegaNet):
    r"""$W_t = a_t W_{t-1} + θ_t ∇⟨f(W_ξ, φ(k_t)), v_t⟩$.

    Two layers that feed each other's growth: the bound of `ops.fast_weight` keeps it below what the decay undoes.

    Args: as `OmegaNet`.
    Source: ATLAS (2025), arXiv:2505.23735.
    """

    def __init__(self, dim: int, *, window: int = 1, objective: str = "dot", degree: int | None = None, **answers: Any):
        super().__init__(dim, window=window, objective=objective, degree=degree, **answers)


@card(
    "swla",
    covers="atlas",
    kind="memory",
    says="Sliding-window linear attention: every token writes the last few again, each with a weight it chooses.",
    source=SOURCE,
    small={"dim": 8, "heads": 2},
    parents=("linear-attention",),
    change="a gated window of tokens in every write",
)
class SWLA(DLA):
    r"""$W_t = a_t W_{t-1} + θ_t \sum_{j<c} γ_{tj} v_{t-j} φ(k_{t-j})^\top$: a matrix, so the chunk changes only speed.

    Args: as `OmegaNet`; θ reaches 1.
    Source: ATLAS (2025), arXiv:2505.23735, whose baseline has c = 2.
    """

    def __init__(
        self,
        dim: int,
        *,
        window: int = 2,
        structure: str = "matrix",
        chunk_size: int = 64,
        max_step: float = 1.0,
        **answers: Any,
    ):
        answers |= {"structure": structure, "chunk_size": chunk_size, "max_step": max_step}
        super().__init__(dim, window=window, **answers)


@card(
    "omega-delta",
    covers="atlas",
    kind="memory",
    says="The Omega rule on a matrix, exact at every token: a delta rule that corrects a window of tokens at once.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "window": 3, "optimizer": "momentum"},
    parents=("gated-deltanet", "omeganet"),
    change="each write corrects the memory's answers to a window of tokens",
)
class OmegaDelta(OmegaNet):
    r"""$W_t = a_t W_{t-1} - θ_t \sum_{j<c} γ_{tj} (W_{t-1} φ(k_{t-j}) - v_{t-j}) φ(k_{t-j})^\top$.

    No anchor: every error is the error before its own write. Trained in parallel by a triangular solve.

    Args: as `OmegaNet`, of which it has `window`, `degree`, `feature_dim` and `conv`;
        optimizer: "gradient" or "momentum".
        max_step: the largest θ; each θγ is also at most `bound`/(c‖φ(k)‖²).
    Raises: `ValueError` for another optimizer, objective, retention, read time or gates of channels.
    Source: ATLAS (2025), arXiv:2505.23735; the parallel form is derived here.
    """

    def __init__(self, dim: int, *, heads: int = 4, optimizer: str = "gradient", max_step: float = 1.0, **answers: Any):
        if optimizer not in ("gradient", "momentum"):
            raise ValueError(f"OmegaDelta: optimizer must be 'gradient' or 'momentum', got {optimizer!r}.")
        fixed = {"objective": ("squared",), "retention": ("none", "decay"), "read": ("after",), "gates": ("head",)}
        for question, known in fixed.items():
            if question in answers and answers[question] not in known:
                takes = " or ".join(map(repr, known))
                raise ValueError(
                    f"OmegaDelta: {question} must be {takes}, for which its errors are one triangular system, got "
                    f"{answers[question]!r}; OmegaNet with structure='matrix' takes others."
                )
        answers = {"optimizer": optimizer, "max_step": max_step, **answers}
        super().__init__(dim, heads=heads, structure="matrix", chunk_size=1, residual=False, **answers)

    def write(self, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Any], net: State) -> tuple[Tensor, State]:
        gate = gates.pop("window", None)
        gate = torch.ones_like(gates["step"])[..., None] if gate is None else gate
        return omega_delta(q, k, v, gate=gate, state=net, bound=self.bound, **gates)
