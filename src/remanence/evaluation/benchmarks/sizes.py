"""Recall against the bytes of state, and hybrids by their ratio: each memory takes part at several sizes."""

from __future__ import annotations

from collections.abc import Sequence

from remanence.catalogue import card
from remanence.evaluation.benchmarks import Suite
from remanence.evaluation.benchmarks.tasks import Recall
from remanence.evaluation.benchmarks.training import Entry
from remanence.models.hybrid import hybrid_stack


@card(
    "recall-at-bytes",
    kind="benchmark",
    says="Multi-query recall by each memory at several widths: what a byte of state buys.",
    source="arXiv:2312.04927",
    covers="mqar",
)
def recall_at_bytes(pairs: int = 8, pause: int = 16, symbols: int = 16, widths: Sequence[int] = (16, 32, 64)) -> Suite:
    def entries(memories: Sequence[str]) -> list[Entry]:
        return [Entry(f"{name} dim={dim}", name, dim=dim) for name in memories for dim in widths]

    return Suite({"mqar": Recall(pairs, pause, symbols)}, entries)


@card(
    "hybrid",
    kind="benchmark",
    says="Each recurrent memory beside full attention at several ratios: recall, and the bytes that it takes.",
    source="arXiv:2507.06457",
    covers="hybrid-analysis",
)
def hybrid(
    ratios: Sequence[str] = ("0:1", "1:1", "3:1", "1:0"),
    full: str = "softmax",
    placement: str = "last-of-group",
    depth: int = 4,
    pairs: int = 8,
    pause: int = 16,
    symbols: int = 16,
) -> Suite:
    """The paper's ratios are 3:1, 6:1, 12:1 and 24:1 between the pure stacks; deep ratios need `depth` to match."""

    def entries(memories: Sequence[str]) -> list[Entry]:
        pure = [Entry(f"{full} 0:1", hybrid_stack(memories[0], full, "0:1", placement, layers=depth))]
        mixed = [
            Entry(f"{name} {ratio}", hybrid_stack(name, full, ratio, placement, layers=depth))
            for name in memories
            if name != full
            for ratio in ratios
            if ratio != "0:1"
        ]
        return [*(pure if "0:1" in ratios else []), *mixed]

    return Suite({"mqar": Recall(pairs, pause, symbols)}, entries, {"dim": 32})
