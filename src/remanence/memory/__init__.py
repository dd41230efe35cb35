"""Layers that carry a state along a sequence, all behind one interface."""

from __future__ import annotations

from typing import Any

from remanence import catalogue
from remanence.memory.attention import WindowAttention
from remanence.memory.base import Memory, ragged
from remanence.memory.gated_deltanet import GatedDeltaNet
from remanence.memory.gla import GLA
from remanence.memory.griffin import Griffin
from remanence.memory.hgrn import HGRN, LowerBounds
from remanence.memory.linear_attention import LinearAttention
from remanence.memory.min_lstm_gru import MinGRU, MinLSTM
from remanence.memory.retnet import RetNet
from remanence.memory.titans import Titans, TitansMAC, TitansMAG, TitansMAL

__all__ = [
    "GLA",
    "HGRN",
    "GatedDeltaNet",
    "Griffin",
    "LinearAttention",
    "LowerBounds",
    "Memory",
    "MinGRU",
    "MinLSTM",
    "RetNet",
    "Titans",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "WindowAttention",
    "make",
    "ragged",
]


def make(name: str, dim: int, **arguments: Any) -> Memory:
    """The memory that goes by `name` in the catalogue, of width `dim`.

    Raises: `UnknownName`, with the nearest name, if there is none.

    >>> make("retnet", 16, heads=2).dim
    16
    """
    return catalogue.find(name, "memory").make(dim, **arguments)
