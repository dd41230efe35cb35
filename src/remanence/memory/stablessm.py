"""StableSSM: the state space whose weights are kept in proportion to its memory."""

from __future__ import annotations

from typing import Any

from remanence.catalogue import card
from remanence.memory.s4d import S4D


@card(
    "stablessm",
    kind="memory",
    says="S4D whose decay rates are 1/(w² + ½), so that slow memories can be learnt without leaps.",
    source="arXiv:2311.14495",
    small={"dim": 4, "states": 6},
)
class StableSSM(S4D):
    r"""`S4D` with $-\mathrm{Re}\,A = 1/(w^2 + ½)$, the paper's "best" reparameterisation.

    The slope of the memory kernel in w is then proportional to w itself: $|f'(w)| / f(w)^2 = 2|w|$. The same choice is
    an argument (`stable`) of `S4D`, `S5` and `LRU`, and `reparameterise` has it for any decay. Arguments, shapes and
    errors are those of `S4D`.

    Source: Wang & Li, StableSSM (2023), arXiv:2311.14495.
    """

    def __init__(self, dim: int, *, stable: str = "best", **arguments: Any):
        super().__init__(dim, stable=stable, **arguments)
