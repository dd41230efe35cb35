"""Strategies against forgetting: what they change of a learning step, and how they compose."""

from __future__ import annotations

from typing import Any

from remanence.catalogue import find
from remanence.continual.base import Batch, Context, Strategies, Strategy
from remanence.continual.ewc import EWC
from remanence.continual.replay import Replay, parse_bytes

__all__ = ["EWC", "Batch", "Context", "Replay", "Strategies", "Strategy", "make", "parse_bytes"]


def make(name: str, **arguments: Any) -> Strategy:
    """The strategy that goes by this catalogue id; `"none"` is the empty list, which changes nothing.

    Raises: `UnknownName` with the nearest name; `TypeError` for arguments that the strategy does not take.
    """
    return Strategies() if name == "none" and not arguments else find(name, "strategy").make(**arguments)
