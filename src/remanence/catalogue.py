"""What is implemented: a card per system, and the table of all that is to come.

A class or function is registered by its card. The card takes title, year and family from `systems.tsv`,
so a published system has one entry, and one spelling, everywhere.
"""

from __future__ import annotations

import csv
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, TypeVar

from remanence.errors import unknown

ROOMS = (
    "ops",
    "memory",
    "continual",
    "optim",
    "models",
    "learning",
    "streams",
    "evaluation.benchmarks",
    "evaluation.diagnostics",
    "evaluation.proofs",
)
"""The packages whose members carry cards and proofs."""
HOMES = {"memory": ("memory",), "strategy": ("continual",)}
"""Where all members of a kind live, so that finding one need not import the whole house."""


@dataclass(frozen=True)
class System:
    """A published system: `kind` is S system, B benchmark, A analysis, T theory, V survey, or baseline."""

    id: str
    family: str
    kind: str
    year: str
    title: str


@dataclass(frozen=True)
class Card:
    """What the registry, the laws, the docs and the command line know of a member."""

    id: str
    kind: str
    says: str
    make: Callable[..., Any]
    source: str
    small: Mapping[str, Any] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)
    covers: str = ""
    parents: tuple[str, ...] = ()
    change: str = ""

    @property
    def system(self) -> System:
        """The published system that this member makes work (several members may share one)."""
        return systems()[self.covers or self.id]


@dataclass(frozen=True)
class Check:
    """One measured statement: does it hold, and the figures that say so."""

    holds: bool
    says: str


@dataclass(frozen=True)
class Proof:
    """A runnable claim. `run` returns the check on the system and the same check on its control."""

    id: str
    claim: str
    run: Callable[[], tuple[Check, Check]]


_cards: dict[str, Card] = {}
_proofs: dict[str, Proof] = {}
T = TypeVar("T", bound=Callable[..., Any])


@functools.cache
def systems() -> Mapping[str, System]:
    """Every system of the project's table by id, implemented or not."""
    with files("remanence").joinpath("systems.tsv").open(encoding="utf-8") as f:
        return {row["id"]: System(**row) for row in csv.DictReader(f, delimiter="\t")}


def card(
    id: str,
    *,
    kind: str,
    says: str,
    source: str,
    small: Mapping[str, Any] | None = None,
    exempt: Mapping[str, str] | None = None,
    covers: str = "",
    parents: Sequence[str] = (),
    change: str = "",
) -> Callable[[T], T]:
    """Register a member under its catalogue id.

    Args:
        id: the name it goes by; `covers` names the catalogue entry when that is another (a variant).
        kind: `memory`, `strategy`, `benchmark`, `optimizer`, ...
        says: one sentence for the tables.
        source: the paper (arXiv id or full reference).
        small: arguments with which the shared tests build a small member.
        exempt: law -> the reason why this member does not obey it.
        parents: catalogue ids of what it was made from; `change` is the one thing done to them. Where a card names
            none, `evaluation.diagnostics.family_tree` may.
    """
    if (covers or id) not in systems():
        raise unknown("system", covers or id, systems())
    if id in _cards:
        raise ValueError(f"The card {id!r} is taken by {_cards[id].make.__qualname__}.")

    def register(make: T) -> T:
        _cards[id] = Card(id, kind, says, make, source, small or {}, exempt or {}, covers, tuple(parents), change)
        return make

    return register


def proof(id: str, claim: str) -> Callable[[T], T]:
    """Register the proof of a system: a function that returns `(check of the system, check of the control)`.

    It passes when the first holds and the second does not: a claim that its control also meets shows nothing.
    """
    if id not in systems():
        raise unknown("system", id, systems())
    if id in _proofs:
        raise ValueError(f"The proof of {id!r} is already registered.")

    def register(run: T) -> T:
        _proofs[id] = Proof(id, claim, run)
        return run

    return register


@functools.cache
def load(rooms: tuple[str, ...] = ROOMS) -> None:
    """Import rooms, so that their cards and proofs are registered."""
    for room in rooms:
        package = importlib.import_module(f"remanence.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def cards(kind: str | None = None) -> Mapping[str, Card]:
    """All registered members, or those of one kind."""
    load(HOMES.get(kind, ROOMS) if kind else ROOMS)
    return {i: c for i, c in sorted(_cards.items()) if kind in (None, c.kind)}


def proofs() -> Mapping[str, Proof]:
    """All registered proofs by system id."""
    load()
    return dict(sorted(_proofs.items()))


def find(id: str, kind: str) -> Card:
    """The card of one member; raises `UnknownName` with the nearest name."""
    known = cards(kind)
    if id not in known:
        raise unknown(kind, id, known)
    return known[id]


def working() -> set[str]:
    """The systems that have a member and a proof."""
    return {c.system.id for c in cards().values()} & proofs().keys()


def tally() -> str:
    """How many published systems work, in a sentence."""
    published = {s.id for s in systems().values() if s.kind != "baseline"}
    count = len(working() & published)
    return f"{count} of {len(published)} published systems work, each with a proof; the rest are to come."


def page() -> str:
    """All members by kind, as Markdown."""
    lines = ["# Catalogue", "", "What `remanence systems --markdown` prints.", "", tally(), ""]
    for kind in sorted({c.kind for c in cards().values()}):
        lines += [f"## {kind.capitalize()}", "", "| id | what it is | source |", "|---|---|---|"]
        for c in cards(kind).values():
            lines.append(f"| `{c.id}` | {c.says} | {c.system.title} ({c.system.year}), {c.source} |")
        lines.append("")
    to_come = sorted(s.id for s in systems().values() if s.kind != "baseline" and s.id not in working())
    return "\n".join([*lines, "## To come", "", ", ".join(f"`{i}`" for i in to_come) or "Nothing."])
