"""What a memory's weights are of the sum that it keeps: retentions that are not quadratic.

The memory accumulates A linearly, A_t = a_t A_{t−1} − θ_t u_t (with momentum where there is one), and its weights are
W = link(A). With no retention but the decay a, the link is the identity. Gradients are taken at the link of what A was
when the chunk began. A *frozen* link is a factor, taken from that same A; another is applied to every token's own A,
which costs weights for every token of a chunk unless what is read are the weights at the chunk's start.

Source: It's All Connected (Miras, 2025), arXiv:2504.13173, section 5.
"""

from __future__ import annotations

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


Retention = Lq | Elastic | Softmax | Sigmoid
RETENTIONS: dict[str, Retention] = {
    "lq": Lq(),
    "lq-mirror": Lq(4.0, "mirror"),
    "elastic": Elastic(),
    "softmax": Softmax(),
    "sigmoid": Sigmoid(),
}
