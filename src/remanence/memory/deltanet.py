"""The delta rule: linear attention that replaces the value bound to a key."""

from __future__ import annotations

from typing import Any

from remanence.catalogue import card
from remanence.memory.gated_deltanet import GatedDeltaNet


@card(
    "deltanet",
    kind="memory",
    says="Linear attention that replaces the value bound to a key instead of adding to it.",
    source="arXiv:2406.06484",
    small={"dim": 8, "heads": 2},
    parents=("linear-attention",),
    change="a write first takes away what the key held",
)
class DeltaNet(GatedDeltaNet):
    r"""Correct: $S ← S + β k (v - S^\top k)^\top$, one gradient step on $½‖v - S^\top k‖²$; read as $S^\top q$.

    `GatedDeltaNet` without decay, with values as wide as keys, and without a gate on what was read.

    Args: as `GatedDeltaNet`; `negative` lets β reach 2, which makes writes reflections and parity possible.

    Shapes: x and y [batch, time, dim]; with K = dim/heads:
        state {"S": [batch, heads, K, K], "conv": {"tail": [batch, conv - 1, 3·dim]}}.
    Raises: as `GatedDeltaNet`.
    Source: Yang et al., Parallelizing Linear Transformers with the Delta Rule (2024), arXiv:2406.06484.
    """

    def __init__(self, dim: int, *, expand_v: int = 1, decay: bool = False, gate: bool = False, **arguments: Any):
        super().__init__(dim, expand_v=expand_v, decay=decay, gate=gate, **arguments)
