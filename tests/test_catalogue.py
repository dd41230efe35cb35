"""The catalogue: cards and proofs belong together, and its page is true."""

from __future__ import annotations

from pathlib import Path

import pytest

from remanence import catalogue
from remanence.errors import UnknownName


def test_every_card_has_a_proof_and_every_proof_a_card() -> None:
    covered = {card.system.id for card in catalogue.cards().values()}
    assert covered == set(catalogue.proofs())


def test_the_page_of_the_docs_is_what_is_registered() -> None:
    page = Path(__file__).parent.parent / "docs" / "catalogue.md"
    assert page.read_text(encoding="utf-8") == catalogue.page() + "\n", (
        "run: remanence systems --markdown > docs/catalogue.md"
    )


def test_an_unknown_member_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="retnet"):
        catalogue.find("rentet", "memory")
    with pytest.raises(UnknownName, match="mamba"):
        catalogue.card("mambaa", kind="memory", says="", source="")


def test_finding_a_memory_does_not_load_the_house() -> None:
    import subprocess
    import sys

    program = "import sys; from remanence.memory import GLA; print([m for m in sys.modules if 'evaluation' in m])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"
