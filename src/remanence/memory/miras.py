"""Miras: three test-time memories that are neither Hebbian nor least squares, as rows of answers.

Step, retention and threshold are of every channel, through a low rank, as in the paper (`gates="head"` has one each per
head, for less time). Which channels it does not say: here those that the last layer gives and the first reads.
"""

from __future__ import annotations

from typing import Any

from remanence.catalogue import card
from remanence.memory.fast_weight import FastWeightMemory
from remanence.ops.objectives import Huber, PNorm
from remanence.ops.retention import Lq, Softmax

SOURCE = "arXiv:2504.13173"
SMALL = {"dim": 8, "heads": 2, "expand": 2, "chunk_size": 4}


@card(
    "moneta",
    covers="miras",
    kind="memory",
    says="A network memory trained on the p-norm of its errors, its weights held by a q-norm.",
    source=SOURCE,
    small=SMALL,
)
class Moneta(FastWeightMemory):
    r"""$A_t = a_t A_{t-1} - θ_t ∇‖f(W_ξ, k_t) - v_t‖_p^p$, $W_t = A_t / ‖A_ξ‖_q^{q-2}$.

    f is $x + \mathrm{LN}(W_2 σ(W_1 x))$, as in all three layers of the paper.

    Args:
        dim: features of input and output; a multiple of `heads`.
        p: of the objective, at least 1; 3 in the paper.
        q: of the retention, at least 2 and not 3; 4 in the paper.
        answers: further arguments of `FastWeightMemory`.

    Shapes: as `FastWeightMemory`.
    Raises: as `FastWeightMemory`; `ValueError` for p or q.
    Source: It's All Connected (2025), arXiv:2504.13173. It does not say over what the q-norm runs: here over each
        matrix; inside a chunk the norm is that of the chunk's start.
    """

    def __init__(self, dim: int, *, p: float = 3.0, q: float = 4.0, **answers: Any):
        given: dict[str, Any] = {"objective": PNorm(p), "retention": Lq(q), "norm": True, "gates": "channel"}
        super().__init__(dim, **(given | answers))


@card(
    "yaad",
    covers="miras",
    kind="memory",
    says="A network memory trained on a Huber loss, whose threshold each token sets: outliers pull no harder.",
    source=SOURCE,
    small=SMALL,
)
class Yaad(FastWeightMemory):
    r"""$W_t = a_t W_{t-1} - θ_t u_t$; the slope of u's loss is e for $‖e‖ ≤ δ_t$ and $δ_t \mathrm{sign}(e)$ beyond.

    a, θ and δ are of every channel: each keeps, learns and shrugs off at a rate of its own.

    Args:
        dim: features of input and output; a multiple of `heads`.
        delta: δ at the start; a gate moves it between 0 and twice that.
        answers: further arguments of `FastWeightMemory`.

    Shapes: as `FastWeightMemory`.
    Raises: as `FastWeightMemory`; `ValueError` for a `delta` that is not above 0.
    Source: It's All Connected (2025), arXiv:2504.13173. The slope jumps by up to √width at the threshold, as printed;
        `objective="huber"` is the loss without the jump.
    """

    def __init__(self, dim: int, *, delta: float = 1.0, **answers: Any):
        given: dict[str, Any] = {"objective": Huber("mixture", delta), "norm": True, "gates": "channel"}
        super().__init__(dim, **(given | answers))


@card(
    "memora",
    covers="miras",
    kind="memory",
    says="A network memory whose weights are probabilities, held by their KL divergence.",
    source=SOURCE,
    small=SMALL,
)
class Memora(FastWeightMemory):
    r"""$W_t = \mathrm{softmax}(a_t \log W_{t-1} - θ_t u_t)$ row by row, u the gradient of the squared error at $W_ξ$.

    Kept is log W up to a constant per row, which is linear in the gradients: so W_t is exact for every token, though
    its reading makes the weights of a chunk's tokens. `read="anchor"` reads the chunk's start instead, for less.

    Args:
        dim: features of input and output; a multiple of `heads`.
        answers: further arguments of `FastWeightMemory`.

    Shapes: as `FastWeightMemory`.
    Raises: as `FastWeightMemory`.
    Source: It's All Connected (2025), arXiv:2504.13173, which takes the softmax at the start of a chunk and after its
        first token only. Steps act on logarithms, so they are larger: up to 10, under the same bound.
    """

    def __init__(self, dim: int, **answers: Any):
        given: dict[str, Any] = {"retention": Softmax(), "norm": True, "max_step": 10.0, "gates": "channel"}
        super().__init__(dim, **(given | answers))
