"""Several delta steps per token: from one reflection towards any transition."""

from __future__ import annotations

from typing import Any

from remanence.catalogue import card
from remanence.memory.gated_deltanet import GatedDeltaNet


@card(
    "deltaproduct",
    kind="memory",
    says="Several delta steps per token, whose product of reflections can be any rotation or permutation.",
    source="arXiv:2502.10297",
    small={"dim": 8, "heads": 2},
    parents=("gated-deltanet",),
    change="several writes per token",
)
class DeltaProduct(GatedDeltaNet):
    r"""Per token $S ← e^{g} S$ once, then for $j = 1 … n$: $S ← S + β_j k_j (v_j - S^\top k_j)^\top$; then read.

    The transition of a token is a product of n generalised reflections $I - β_j k_j k_j^\top$ with β in (0, 2):
    n = 1 is `GatedDeltaNet`, n = K reaches every orthogonal matrix. The order of the writes is part of the definition.

    Args: as `GatedDeltaNet`; `writes` is n, 2 in the paper's models (it tries 1 to 4).

    Shapes: x and y [batch, time, dim]; with K = dim/heads, V = 2K:
        state {"S": [batch, heads, K, V], "conv": {"tail": [batch, conv - 1, heads·((1 + n)·K + n·V)]}}.
    Raises: as `GatedDeltaNet`.
    Source: Siems et al., DeltaProduct (2025), arXiv:2502.10297.
    """

    def __init__(self, dim: int, *, writes: int = 2, negative: bool = True, **arguments: Any):
        super().__init__(dim, writes=writes, negative=negative, **arguments)
