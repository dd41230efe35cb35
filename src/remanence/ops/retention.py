"""What a memory's weights are of the sum that it keeps: retentions that are not quadratic.

Most are *links* of a sum. The memory accumulates A linearly, A_t = a_t A_{t−1} − θ_t u_t (with momentum where there is
one), and its weights are W = link(A). With no retention but the decay a, the link is the identity. Gradients are taken
at the link of what A was when the chunk began. A *frozen* link is a factor, taken from that same A; another is applied
to every token's own A, which costs weights for every token of a chunk unless what is read are the weights at the
chunk's start.

*Sequential* ones keep W itself, W_t = move(W_{t−1}, a_t, S_t, θ_t) with S_t the step that a plain memory would add:
what they forget depends on what they hold, token by token, so a chunk is a loop.

Source: It's All Connected (Miras, 2025), arXiv:2504.13173, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def _size(A: Tensor, q: float) -> Tensor:
    """‖A‖_q over a whole matrix, [..., out, in] -> [..., 1, 1]; never 0."""
    return (A.abs() + 1e-12).pow(q).sum((-2, -1), keepdim=True).pow(1 / q)


@dataclass(frozen=True)
class Lq:
    """ℓq stability. form "printed": W = A / ‖A‖_q^{q−2}, a frozen factor; form "mirror": W = sign(A)|A|^{q−1} /
    ‖A‖_q^{q−2}, the textbook link. Norms are over a whole matrix.

    As printed ‖W‖_q = ‖A‖_q^{3−q}: with q = 4 a larger sum gives a smaller memory, and one that decays a larger: a step
    that is to make the weights smaller makes them larger, without end. So norms below `floor` count as `floor`, and
    ‖W‖_q stays below floor^{3−q}. Both forms are the identity for q = 2.
    """

    q: float = 4.0
    form: str = "printed"
    floor: float = 0.1

    def __post_init__(self) -> None:
        if self.form not in ("printed", "mirror") or not self.q >= 2 or (self.q == 3 and self.form == "printed"):
            raise ValueError(
                "Lq: q must be at least 2 (and as printed not 3, where no sum gives weights of most norms) "
                f"and form 'printed' or 'mirror', got q={self.q}, form={self.form!r}."
            )
        if not self.floor >= 0:
            raise ValueError(f"Lq: floor must be at least 0, got {self.floor}.")

    @property
    def frozen(self) -> bool:
        return self.form == "printed"

    def factor(self, A: Tensor) -> Tensor:
        size = _size(A, self.q)
        return (size.clamp(min=self.floor) if self.frozen else size).pow(2 - self.q)

    def link(self, A: Tensor) -> Tensor:
        power = A if self.form == "printed" else A.sign() * (A.abs() + 1e-12).pow(self.q - 1)
        return power * self.factor(A)

    def gain(self, A: Tensor) -> Tensor:
        """At most how far W moves where A moves by one, [..., out, in] -> [...]."""
        if self.form == "printed":
            return self.factor(A)[..., 0, 0]
        return (self.q - 1) * ((A.abs() + 1e-12).pow(self.q - 2) * self.factor(A)).amax((-2, -1))

    def start(self, W: Tensor) -> Tensor:
        """The sum A at which the weights are W."""
        if self.form == "printed":
            return W * _size(W, self.q).pow((self.q - 2) / (3 - self.q))
        dual = self.q / (self.q - 1)
        return W.sign() * (W.abs() + 1e-12).pow(dual - 1) * _size(W, dual).pow(2 - dual)


@dataclass(frozen=True)
class Elastic:
    """Elastic net, by follow-the-regularised-leader: W = S_γ(A) = sign(A)·max(0, |A| − γ), so that small sums are 0.

    smooth: |A|·arctan(A/γ)/(π/2) in its place, whose gradient is nowhere zero.
    """

    gamma: float = 1e-3
    smooth: bool = False
    frozen = False

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"Elastic: gamma must be above 0, got {self.gamma}.")

    def factor(self, A: Tensor) -> Tensor:
        raise TypeError("Elastic has no frozen factor.")

    def link(self, A: Tensor) -> Tensor:
        if self.smooth:
            return A.abs() * (A / self.gamma).arctan() * (2 / torch.pi)
        return F.softshrink(A, self.gamma)

    def gain(self, A: Tensor) -> Tensor:
        return A.new_full(A.shape[:-2], 1.2 if self.smooth else 1.0)

    def start(self, W: Tensor) -> Tensor:
        return W if self.smooth else W + self.gamma * W.sign()


@dataclass(frozen=True)
class Softmax:
    """KL retention with entropy: W = c·softmax(A) row by row, A = log W; positive weights whose rows sum to c.

    The weights given as a start are taken as A. A is kept, never W, whose entries may be too small for a float.
    """

    c: float = 1.0
    frozen = False

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"Softmax: c must be above 0, got {self.c}.")

    def factor(self, A: Tensor) -> Tensor:
        raise TypeError("Softmax has no frozen factor.")

    def link(self, A: Tensor) -> Tensor:
        return self.c * A.softmax(-1)

    def gain(self, A: Tensor) -> Tensor:
        return self.c * A.softmax(-1).amax((-2, -1))

    def start(self, W: Tensor) -> Tensor:
        return W


@dataclass(frozen=True)
class Sigmoid:
    """Bregman retention of the bit entropy: W = σ(A), every weight in (0, 1). A start is taken as A."""

    frozen = False

    def factor(self, A: Tensor) -> Tensor:
        raise TypeError("Sigmoid has no frozen factor.")

    def link(self, A: Tensor) -> Tensor:
        return A.sigmoid()

    def gain(self, A: Tensor) -> Tensor:
        return A.new_full(A.shape[:-2], 0.25)

    def start(self, W: Tensor) -> Tensor:
        return W


@dataclass(frozen=True)
class Bregman:
    """Bregman retention of your own, D_F(W, W'): W = link(A) entry by entry, with link the inverse of F′.

    `slope` is the link's largest. By default tanh: signed weights that never leave (−1, 1), near 0 as plain ones.
    A start is taken as A.
    """

    map: Callable[[Tensor], Tensor] = torch.tanh
    slope: float = 1.0
    frozen = False

    def __post_init__(self) -> None:
        if not 0 < self.slope < math.inf:
            raise ValueError(f"Bregman: slope must be above 0 and finite, got {self.slope}.")

    def factor(self, A: Tensor) -> Tensor:
        raise TypeError("Bregman has no frozen factor.")

    def link(self, A: Tensor) -> Tensor:
        return self.map(A)

    def gain(self, A: Tensor) -> Tensor:
        return A.new_full(A.shape[:-2], self.slope)

    def start(self, W: Tensor) -> Tensor:
        return W


class Sequential:
    """What is kept are the weights themselves."""

    frozen = False

    def move(self, W: Tensor, retain: Tensor, change: Tensor, step: Tensor) -> Tensor:
        """The weights after a token. W and change [..., out, in]; the factor a and the step θ in shapes that fit."""
        raise TypeError(f"{type(self).__name__} must define move.")

    def factor(self, W: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no frozen factor.")

    def link(self, W: Tensor) -> Tensor:
        return W


@dataclass(frozen=True)
class Shrink(Sequential):
    """Elastic net, held near the last weights: W_t = S_{γθ_t}(a_t W_{t−1} + S_t).

    Soft forgetting by a_t, hard by S, which takes γθ from every weight's size: what is not written again is soon 0, and
    stays it. Where nothing is written (θ = 0) nothing is forgotten so. γ is the paper's 1/α.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"Shrink: gamma must be above 0, got {self.gamma}.")

    def move(self, W: Tensor, retain: Tensor, change: Tensor, step: Tensor) -> Tensor:
        sum_ = retain * W + change
        return sum_.sign() * (sum_.abs() - self.gamma * step).relu()

    def gain(self, W: Tensor) -> Tensor:
        return W.new_ones(W.shape[:-2])

    def start(self, W: Tensor) -> Tensor:
        return W


@dataclass(frozen=True)
class Divergence(Sequential):
    """f-divergence to the last weights, on rows that are positive and sum to c: W_t = W ∘ g(S_t − ζ_t), g = (f′)⁻¹.

    f is of the power family, f′(τ) = (τ^{α−1} − 1)/(α − 1): Pearson's χ² for α = 2 (g is linear, so that weights reach
    0), KL for 1 (g = exp), Hellinger for ½, reverse KL for 0 (g = 1/(1 − x), so that small weights move
    further than by KL). ζ_t makes the row sum to c. W is a_t W_{t−1} + (1 − a_t) c/n: the paper's f-divergence forgets
    nothing by itself, and a weight of 0 would stay 0 for ever.

    The weights given as a start are taken as logits.
    """

    alpha: float = 2.0
    c: float = 1.0

    def __post_init__(self) -> None:
        if not -1 <= self.alpha <= 2:
            raise ValueError(f"Divergence: alpha must lie in [-1, 2], got {self.alpha}.")
        if not self.c > 0:
            raise ValueError(f"Divergence: c must be above 0, got {self.c}.")

    def move(self, W: Tensor, retain: Tensor, change: Tensor, step: Tensor) -> Tensor:
        W = (retain * W + (1 - retain) * (self.c / W.shape[-1])).clamp(min=1e-30)
        if self.alpha == 1:
            return self.c * (W.log() + change).softmax(-1)
        moved = W * self._tilt(W, change, self._level(W, change))[0]
        return moved * (self.c / moved.sum(-1, keepdim=True))  # no drift over many tokens

    def gain(self, W: Tensor) -> Tensor:
        return W.amax((-2, -1))

    def start(self, W: Tensor) -> Tensor:
        return self.c * W.softmax(-1)

    def _tilt(self, W: Tensor, x: Tensor, zeta: Tensor) -> tuple[Tensor, Tensor]:
        """g(x − ζ) and its slope there, g^{2−α}; no weight gets more than c."""
        base = 1 + (self.alpha - 1) * (x - zeta)
        if self.alpha > 1:
            inside = base > 0
            g = torch.where(inside, base, 1.0).pow(1 / (self.alpha - 1)) * inside
            return g, torch.where(inside, g, 1.0).pow(2 - self.alpha) * inside
        g = torch.maximum(base, (W / self.c).pow(1 - self.alpha)).pow(1 / (self.alpha - 1))
        return g, g.pow(2 - self.alpha)

    def _level(self, W: Tensor, x: Tensor) -> Tensor:
        """ζ [..., 1], by Newton's method from below, where one weight alone has the whole sum or none has lost.

        The sum is convex in ζ and falls, so that from there no step goes too far.
        """
        with torch.no_grad():
            alone = x - ((self.c / W).pow(self.alpha - 1) - 1) / (self.alpha - 1)
            zeta = torch.maximum(alone.amax(-1, keepdim=True), x.amin(-1, keepdim=True))
            for _ in range(60):
                move = self._newton(W, x, zeta)
                zeta = zeta + move
                if not (move > 4 * torch.finfo(x.dtype).eps * (1 + zeta.abs())).any():
                    break
        return zeta + self._newton(W, x, zeta)  # of size 0: it gives ζ its gradient

    def _newton(self, W: Tensor, x: Tensor, zeta: Tensor) -> Tensor:
        g, slope = self._tilt(W, x, zeta)
        return ((W * g).sum(-1, keepdim=True) - self.c) / (W * slope).sum(-1, keepdim=True)


Link = Lq | Elastic | Softmax | Sigmoid | Bregman
Retention = Link | Shrink | Divergence
RETENTIONS: dict[str, Retention] = {
    "lq": Lq(),
    "lq-mirror": Lq(4.0, "mirror"),
    "elastic": Elastic(),
    "softmax": Softmax(),
    "sigmoid": Sigmoid(),
    "tanh": Bregman(),
    "shrink": Shrink(),
    "chi-squared": Divergence(2.0),
    "hellinger": Divergence(0.5),
    "reverse-kl": Divergence(0.0),
}
