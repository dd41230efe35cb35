"""Remanence: models with memory that keep learning.

`learn` reads a stream and learns from it, `generate` continues from what was learned, `watch` points at
the surprising lines of a log. The parts are in the rooms: `remanence.memory`, `.ops`, `.models`,
`.learning`, `.continual`, `.evaluation`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from remanence.api import generate, learn
    from remanence.learning import Learner
    from remanence.watching import watch

# PyTorch then asks for huge pages for large tensors: on Linux, fresh memory costs it a third of the time. It reads this
# at its first tensor, and only if nobody has said otherwise.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# PyTorch's own threads then sleep soon after their work is done. By default they spin a hundred times as long, on the
# very cores that compiled kernels want next. It is read when PyTorch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__version__ = "0.1.0"
__all__ = ["Learner", "generate", "learn", "watch"]

_HOMES = {"learn": "api", "generate": "api", "watch": "watching", "Learner": "learning"}


def __getattr__(name: str) -> Any:
    # loaded on first use, so that `remanence --help` answers at once
    if name in _HOMES:
        return getattr(importlib.import_module(f"remanence.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'remanence' has no attribute {name!r}")
