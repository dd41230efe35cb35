"""The gated delta rule with one decay per key feature."""

from __future__ import annotations

import torch

from remanence.catalogue import card
from remanence.memory.gated_deltanet import GatedDeltaNet
from remanence.memory.parts import FeatureDecay, GatedReadout


@card(
    "kimi-delta",
    kind="memory",
    says="A gated delta rule whose key features each forget at a rate of their own.",
    source="arXiv:2510.26692",
    small={"dim": 8, "heads": 2},
    parents=("gated-deltanet", "gla"),
    change="a decay per key feature",
)
class KimiDelta(GatedDeltaNet):
    r"""Decay each feature, then correct: $S ← \mathrm{Diag}(e^{g}) S$, then $S ← S + β k (v - S^\top k)^\top$.

    The decay is that of Mamba-2 per feature and of low rank (`FeatureDecay`); what was read is normalised per head
    and gated by a sigmoid of low rank.

    Args: `dim`, `heads`, `value_heads`, `head_dim`, `conv`, `negative`, `eps`: as `GatedDeltaNet`.
        value_dim: features per value, and the rank of both gates; as many as per key by default (128 in the paper).
        bound: when given, log decays lie in (`bound`, 0); −5 in the authors' fast kernels.

    Shapes: x and y [batch, time, dim]; with K = head_dim, V = value_dim:
        state {"S": [batch, value_heads, K, V], "conv": {"tail": [batch, conv - 1, 2·heads·K + value_heads·V]}}.
    Raises: as `GatedDeltaNet`; `ValueError` for a bound that is not negative.
    Source: Kimi Linear (2025), arXiv:2510.26692.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        value_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        conv: int = 4,
        negative: bool = False,
        bound: float | None = None,
        eps: float = 1e-5,
    ):
        super().__init__(
            dim, heads=heads, value_heads=value_heads, head_dim=head_dim, expand_v=1, value_dim=value_dim, conv=conv,
            negative=negative, decay=False, gate=False,
        )  # fmt: skip
        V = self.value_dim
        self.decay = FeatureDecay(dim, self.value_heads, self.head_dim, V, bound)
        self.readout = GatedReadout(dim, self.value_heads, V, eps=eps, activation=torch.sigmoid, rank=V)
