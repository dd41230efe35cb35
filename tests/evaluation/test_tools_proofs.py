"""Every tool on layers has a card, and a proof that its control fails."""

from __future__ import annotations

import pytest

from remanence import catalogue
from remanence.evaluation.proofs import tools

TOOLS = {
    "statex": tools.statex,
    "simba": tools.simba,
    "longmamba": tools.longmamba,
    "length-generalization": tools.length_generalization,
    "oprm": tools.oprm,
    "resona": tools.resona,
    "quamba": tools.quamba,
    "lasp2": tools.lasp2,
}


@pytest.mark.parametrize("id", TOOLS)
def test_the_proof_holds_and_its_control_fails(id: str) -> None:
    check, control = TOOLS[id]()
    assert check.holds, check.says
    assert not control.holds, control.says


def test_every_tool_is_in_the_catalogue() -> None:
    cards, proofs = catalogue.cards(), catalogue.proofs()
    assert set(TOOLS) <= set(cards)
    assert all(proofs[id].run is TOOLS[id] for id in TOOLS)
