"""ATLAS: memories that fit a window of what they read, with lifted keys and orthogonal writes."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.memory.parts import GatedReadout, ShortConv, l2_norm, per_head, split, wide
from remanence.ops.omega import omega, omega_read, omega_state
from remanence.state import State

SOURCE = "arXiv:2505.23735"
SMALL = {"dim": 8, "heads": 2, "window": 3, "expand": 2, "chunk_size": 4}


class PolynomialFeatures(nn.Module):
    r"""All monomials up to a degree, weighted so that $φ(q)·φ(k) = \sum_{i ≤ p} a_i (q·k)^i$.

    The $a_i ≥ 0$ are learned, from 1/i! at first, so that the kernel begins as the head of exp(q·k).

    Args:
        width: features of the input.
        degree: p, at least 1; the output has C(width + p, p) features, the first of which is constant.

    Shapes: x [..., width] -> [..., features].
    Source: ATLAS (2025), arXiv:2505.23735.

    >>> PolynomialFeatures(8, 2)(torch.ones(3, 8)).shape
    torch.Size([3, 45])
    """

    def __init__(self, width: int, degree: int = 2):
        super().__init__()
        if min(width, degree) < 1:
            raise ValueError(f"PolynomialFeatures: width and degree must be at least 1, got {width} and {degree}.")
        self.features = math.comb(width + degree, degree)
        self.root = nn.Parameter(torch.tensor([math.factorial(i) ** -0.5 for i in range(degree + 1)]))
        for i in range(1, degree + 1):
            rows = list(combinations_with_replacement(range(width), i))
            counts = [math.factorial(i) / math.prod(map(math.factorial, Counter(row).values())) for row in rows]
            self.register_buffer(f"index{i}", torch.tensor(rows), persistent=False)
            self.register_buffer(f"share{i}", torch.tensor(counts, dtype=torch.float64).sqrt(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        root = self.root.to(x.dtype)
        blocks = [root[0].expand(*x.shape[:-1], 1)]
        for i in range(1, len(root)):
            monomials = x[..., getattr(self, f"index{i}")].prod(-1)
            blocks.append(root[i] * getattr(self, f"share{i}").to(x.dtype) * monomials)
        return torch.cat(blocks, -1)


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
class OmegaNet(Memory):
    r"""The Omega rule: $W_t = a_t W_{t-1} - θ_t \sum_{j<c} γ_{tj} ∇\tfrac12‖f(W_ξ, φ(k_{t-j})) - v_{t-j}‖^2$.

    Read as $f(W_t, φ(q_t))$. $W_ξ$ are the weights as the token's chunk began; queries, keys and values are
    SiLU(conv(W x)), the first two of unit length; $γ_{tj} = σ(w·x_t + b_j)$, $a$ and $θ$ depend on the token, one of
    each per head. Every other memory of the paper that does not grow is this one with other arguments.

    Args:
        dim: features of input and output; a multiple of `heads`.
        heads: independent networks.
        window: c, the tokens that each write fits; 1 is the rule of Titans.
        degree: of the polynomial features; None leaves queries and keys as they are, and adds a skip to the network.
        feature_dim: features per query and key before they are lifted to C(feature_dim + degree, degree); at most 16 by
            default, dim/heads without features.
        layers: depth of each network (1 is a matrix); `gated` makes it $W_3(σ(W_1 z) ⊙ W_2 z)$ instead.
        expand: hidden features, as a multiple of dim/heads.
        chunk_size: tokens that share an anchor; it belongs to the model. A matrix at 1 is trained in parallel all the
            same, by a triangular solve.
        objective: "squared", or "dot" for $-⟨f(φ(k)), v⟩$, which writes the same whatever is known (2 layers at most).
        momentum, orthogonal: $S_t = η_t S_{t-1} - ∇ℓ_t$, and $W_t = a_t W_{t-1} + θ_t \mathrm{NS}(S_t)$.
        max_step: the largest θ; gradient steps also stay within the bound of `ops.omega`.
        conv: tokens that the convolutions see.

    Shapes: x and y [batch, time, dim]; state {"net": {"anchor", "weight"(, "momentum"): {"0": [batch, heads, out, in],
        ...}, "pos": int64 [batch], "window": {"key", "value": [batch, heads, window - 1, features]}}, "conv": {...}}.
    Raises: `ValueError` on sizes below 1, a `dim` that is no multiple of `heads`, or a "dot" network that is deeper
        than 2; `UnknownName` for an objective; `ShapeError`, `StateError`.
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
        layers: int = 2,
        gated: bool = False,
        expand: int = 4,
        chunk_size: int = 16,
        objective: str = "squared",
        momentum: bool = False,
        orthogonal: bool = False,
        max_step: float = 0.1,
        conv: int = 4,
    ):
        super().__init__()
        name = type(self).__name__
        V = per_head(name, dim, heads)
        K = V if degree is None else feature_dim or min(V, 16)
        if min(window, layers, expand, chunk_size, K) < 1:
            given = f"{window=}, {layers=}, {expand=}, {chunk_size=}, feature_dim={K}"
            raise ValueError(f"{name}: all sizes must be at least 1, got {given}.")
        if objective == "dot" and (layers > 2 or gated):
            raise ValueError(f"{name}: under the dot objective deeper networks than two layers diverge, got {layers=}.")
        self.dim, self.heads, self.max_step, self.momentum = dim, heads, max_step, momentum
        self.window, self.widths = window, (heads * K, heads * K, dim)
        self.rule: dict[str, Any] = {
            "chunk_size": chunk_size,
            "objective": objective,
            "orthogonal": orthogonal,
            "residual": degree is None,
            "gated": gated,
        }
        self.qkv = nn.Linear(dim, sum(self.widths), bias=False)
        self.conv = ShortConv(sum(self.widths), conv)
        self.features = None if degree is None else PolynomialFeatures(K, degree)
        first, hidden = K if self.features is None else self.features.features, expand * V
        shapes = [(hidden, first), (hidden, first), (V, hidden)] if gated else []
        widths = [first] + [hidden] * (layers - 1) + [V]
        shapes = shapes or list(zip(widths[1:], widths[:-1], strict=True))
        self.start = nn.ParameterList(torch.randn(heads, *shape) * shape[1] ** -0.5 for shape in shapes)
        self.gates = nn.Linear(dim, 4 * heads)
        nn.init.normal_(self.gates.weight, std=0.02)
        with torch.no_grad():  # retain 0.993 to 0.9999 from head to head; half the largest step; momentum 0.9; γ 0.9
            parts = torch.linspace(5, 9, heads), torch.zeros(heads), torch.full((2 * heads,), 2.2)
            self.gates.bias.copy_(torch.cat(parts))
        self.places = nn.Parameter(torch.zeros(heads, window))
        self.readout = GatedReadout(dim, heads, V)

    def initial_state(self, batch: int) -> State:
        net = omega_state(list(self.start), batch, window=self.window, momentum=self.momentum)
        return {"net": net, "conv": self.conv.initial_state(batch)}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        mixed, conv = self.conv(self.qkv(x), state["conv"], silu=True)
        q, k, v = (split(part, self.heads) for part in mixed.split(self.widths, -1))
        retain, step, momentum, gate = wide(self.gates(x)).transpose(1, 2).chunk(4, dim=1)
        step = self.max_step * step.sigmoid()
        y, net = omega(
            self.lift(q),
            self.lift(k),
            v,
            step,
            (gate[..., None] + wide(self.places)[:, None]).sigmoid(),
            state["net"],
            retain_log=F.logsigmoid(retain),
            momentum_log=F.logsigmoid(momentum) if self.momentum else None,
            bound=0.5,
            **self.rule,
        )
        return self.readout(y, x), {"net": net, "conv": conv}

    def lift(self, x: Tensor) -> Tensor:
        """Unit queries or keys, and their features."""
        x = l2_norm(x)
        return x if self.features is None else self.features(x)

    def recall(self, query: Tensor, state: State) -> Tensor:
        """What the memory held when the open chunk began; queries [batch, heads, time, features] as `lift` gives."""
        weights = list(state["net"]["anchor"].values())
        return omega_read(query, weights, residual=self.rule["residual"], gated=self.rule["gated"])


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
    are made (and made again for the gradient): the dearest of the family, by the heads' 2·expand·V² per token.

    Args: as `OmegaNet`.
    Source: ATLAS (2025), arXiv:2505.23735.
    """

    def __init__(
        self, dim: int, *, momentum: bool = True, orthogonal: bool = True, max_step: float = 0.02, **arguments: Any
    ):
        super().__init__(dim, momentum=momentum, orthogonal=orthogonal, max_step=max_step, **arguments)


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

    def __init__(self, dim: int, *, gated: bool = True, **arguments: Any):
        super().__init__(dim, gated=gated, **arguments)


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
    r"""$W_t = a_t W_{t-1} + θ_t ∇⟨f(W_ξ, φ(k_t)), v_t⟩$: two layers that feed each other's growth, so θ stays below
    a share of 1 - a (the bound of `ops.omega`).

    Args: as `OmegaNet`; `layers` is 1 or 2.
    Source: ATLAS (2025), arXiv:2505.23735.
    """

    def __init__(
        self, dim: int, *, window: int = 1, objective: str = "dot", degree: int | None = None, **arguments: Any
    ):
        super().__init__(dim, window=window, objective=objective, degree=degree, **arguments)


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
class SWLA(OmegaNet):
    r"""$W_t = a_t W_{t-1} + θ_t \sum_{j<c} γ_{tj} v_{t-j} φ(k_{t-j})^\top$: a matrix, so the chunk changes only speed.

    Args: as `OmegaNet`; θ reaches 1 by default.
    Source: ATLAS (2025), arXiv:2505.23735, whose baseline has c = 2.
    """

    def __init__(
        self,
        dim: int,
        *,
        window: int = 2,
        objective: str = "dot",
        degree: int | None = None,
        layers: int = 1,
        chunk_size: int = 64,
        max_step: float = 1.0,
        **arguments: Any,
    ):
        arguments |= {"degree": degree, "layers": layers, "chunk_size": chunk_size, "max_step": max_step}
        super().__init__(dim, window=window, objective=objective, **arguments)


@card(
    "omega-delta",
    covers="atlas",
    kind="memory",
    says="The Omega rule on a matrix, exact at every token: a delta rule that corrects a window of tokens at once.",
    source=SOURCE,
    small={"dim": 8, "heads": 2, "window": 3},
    parents=("gated-deltanet", "omeganet"),
    change="each write corrects the memory's answers to a window of tokens",
)
class OmegaDelta(OmegaNet):
    r"""$W_t = a_t W_{t-1} - θ_t \sum_{j<c} γ_{tj} (W_{t-1} φ(k_{t-j}) - v_{t-j}) φ(k_{t-j})^\top$.

    No anchor: every error is the error before its own write. Trained in parallel by a triangular solve over (token,
    place in the window).

    Args: as `OmegaNet`; θ reaches 1 by default, and θγ half of 1/(c‖φ(k)‖²).
    Source: ATLAS (2025), arXiv:2505.23735; the parallel form is derived here.
    """

    def __init__(self, dim: int, *, layers: int = 1, chunk_size: int = 1, max_step: float = 1.0, **arguments: Any):
        super().__init__(dim, layers=layers, chunk_size=chunk_size, max_step=max_step, **arguments)
