"""Running the proofs of the catalogue."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from remanence.catalogue import proofs
from remanence.errors import unknown


def prove(ids: Iterable[str] | None = None) -> Iterator[dict[str, Any]]:
    """Run the proofs named, or all of them: `id, claim, passed, evidence, control, seconds` of each.

    A proof passes when the check holds for the system and fails for its control.
    Raises: `UnknownName` before anything is run, when an id has no proof.
    """
    known = proofs()
    chosen = list(ids) if ids is not None else list(known)
    for id in chosen:
        if id not in known:
            raise unknown("proof", id, known)
    return (_run(id) for id in chosen)


def _run(id: str) -> dict[str, Any]:
    proof = proofs()[id]
    began = time.perf_counter()
    check, control = proof.run()
    return {
        "id": id,
        "claim": proof.claim,
        "passed": check.holds and not control.holds,
        "evidence": check.says,
        "control": control.says,
        "seconds": round(time.perf_counter() - began, 3),
    }
