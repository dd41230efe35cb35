"""Which form of an op runs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

COMPILED_FROM = 2**15
"""Numbers in a tensor from which the compiled form is worth what it loads: some 40 MB of libraries and code."""

_everywhere: ContextVar[bool] = ContextVar("everywhere", default=False)


def compiled(x: Tensor) -> bool:
    """Whether the form that is compiled for the CPU is to read x."""
    return x.device.type == "cpu" and x.numel() >= COMPILED_FROM


def triton(x: Tensor) -> bool:
    """Whether the Triton kernels are to read x: on a GPU, where Triton is installed, but not in float64."""
    return _everywhere.get() or (x.is_cuda and x.dtype != torch.float64 and _triton_is_installed())


@contextmanager
def triton_everywhere() -> Iterator[None]:
    """In this block the Triton kernels read every tensor: on the CPU through Triton's interpreter, to test them.

    For that TRITON_INTERPRET=1 must be set before Triton is imported.
    """
    token = _everywhere.set(True)
    try:
        yield
    finally:
        _everywhere.reset(token)


@cache
def _triton_is_installed() -> bool:
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 4)  # with the compilers before it the kernels do not build
