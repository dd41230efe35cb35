"""Which form of an op runs."""

from __future__ import annotations

from torch import Tensor

COMPILED_FROM = 2**15
"""Numbers in a tensor from which the compiled form is worth what it loads: some 40 MB of libraries and code."""


def compiled(x: Tensor) -> bool:
    """Whether the form that is compiled for the CPU is to read x."""
    return x.device.type == "cpu" and x.numel() >= COMPILED_FROM
