"""Layers that carry a state along a sequence, all behind one interface.

Every memory of the package can be imported from here by the name of its class; the modules are read when one is
asked for.
"""

from __future__ import annotations

import sys
from typing import Any

from remanence import catalogue
from remanence.memory.base import Memory, ragged
from remanence.memory.pieces import in_pieces

__all__ = ["Memory", "in_pieces", "make", "ragged"]


def make(name: str, dim: int, **arguments: Any) -> Memory:
    """The memory that goes by `name` in the catalogue, of width `dim`.

    Raises: `UnknownName`, with the nearest name, if there is none.

    >>> make("retnet", 16, heads=2).dim
    16
    """
    return catalogue.find(name, "memory").make(dim, **arguments)


def _classes() -> dict[str, type[Memory]]:
    catalogue.load(("memory",))
    rooms = [module for name, module in sys.modules.items() if name.startswith(f"{__name__}.")]
    found = {x for room in rooms for x in vars(room).values() if isinstance(x, type) and issubclass(x, Memory)}
    return {x.__name__: x for x in found}


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and name in (classes := _classes()):
        return classes[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_classes()})
