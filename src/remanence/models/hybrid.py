"""Hybrids: which layers of a stack are recurrent and which attend to everything."""

from __future__ import annotations

import re

from remanence.catalogue import card, find

PLACEMENTS = ("last-of-group", "first-of-group", "bottom", "middle", "top")


@card(
    "hybrid-analysis",
    kind="tool",
    says="Patterns that mix two memories at a ratio: three recurrent layers, then one of full attention, and so on.",
    source="arXiv:2507.06457",
)
def hybrid_stack(
    linear: str = "gated-deltanet",
    full: str = "softmax",
    ratio: str = "3:1",
    placement: str = "last-of-group",
    *,
    layers: int = 4,
) -> str:
    """A pattern for `LanguageModel` in which `ratio` of the layers is `linear` and the rest `full`.

    Args:
        linear, full: any two memories of the catalogue.
        ratio: `a:b`, a layers of `linear` to b of `full`; `1:0` and `0:1` are the pure stacks.
        placement: `last-of-group` (the paper's) and `first-of-group` repeat groups of a + b layers; `bottom`, `middle`
            and `top` put as many full layers side by side.
        layers: length of the stack. With whole groups the ratio is exact; what is left over is `linear`.

    Raises: `ValueError` for a ratio that is none, an unknown placement, or a stack too short for a single group;
        `UnknownName` for a memory that nothing goes by.
    Source: A Systematic Analysis of Hybrid Linear Attention (2025), arXiv:2507.06457. Best there: hgrn2 or
        gated-deltanet, between 3:1 and 6:1.

    >>> hybrid_stack("gla", "sliding-window", "3:1", layers=8)
    'gla, gla, gla, sliding-window, gla, gla, gla, sliding-window'
    """
    for name in (linear, full):
        find(name, "memory")
    found = re.fullmatch(r"(\d+):(\d+)", ratio)
    a, b = (int(found[1]), int(found[2])) if found else (0, 0)
    if a + b == 0:
        raise ValueError(f"hybrid_stack: ratio reads like '3:1', linear to full layers, got {ratio!r}.")
    if placement not in PLACEMENTS:
        raise ValueError(f"hybrid_stack: placement must be one of {', '.join(PLACEMENTS)}, got {placement!r}.")
    a, b = (1, 0) if not b else (0, 1) if not a else (a, b)
    groups = layers // (a + b)
    if groups < 1:
        raise ValueError(f"hybrid_stack: a ratio of {ratio} needs at least {a + b} layers, got {layers}.")
    rest = layers - groups * (a + b)
    if placement == "last-of-group":
        stack = groups * (a * [linear] + b * [full]) + rest * [linear]
    elif placement == "first-of-group":
        stack = groups * (b * [full] + a * [linear]) + rest * [linear]
    else:
        below = {"bottom": 0, "middle": (groups * a + rest) // 2, "top": groups * a + rest}[placement]
        stack = below * [linear] + groups * b * [full] + (groups * a + rest - below) * [linear]
    return ", ".join(stack)
