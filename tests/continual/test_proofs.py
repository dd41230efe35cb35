"""The proofs of this room hold, and their controls do not."""

import pytest

from remanence.evaluation.proofs import continual


@pytest.mark.parametrize("name", ["replay", "ewc", "infinite_lr"])
def test_proof(name):
    system, control = getattr(continual, name)()
    assert system.holds, system.says
    assert not control.holds, control.says
