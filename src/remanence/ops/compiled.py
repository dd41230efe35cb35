"""What the compiled CPU kernels share: how they are compiled, their exponential, and the threads that they run on.

Only kernels import this, since Numba takes half a second that most programs need not pay.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.extending import intrinsic, overload
from numba.np.linalg import _BLAS
from threadpoolctl import ThreadpoolController
from torch import Tensor

from remanence.ops.decay import FLOOR
from remanence.ops.threads import share

_HOW: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}, "_nrt": True}
jit = numba.njit(**_HOW)
summing = numba.njit(**_HOW | {"fastmath": {"contract", "reassoc", "nsz"}})
"""Like `jit`, for sums along a vector: in which order is left to the compiler, so that it can vectorise them."""
borrowing = numba.njit(**_HOW | {"_nrt": False})
"""Like `jit`, for what neither makes nor returns an array: it counts no references to those that it is given or takes
parts of, which would cost as much as a row of 64 numbers. What it calls must not return arrays either, since nobody
would count them down again."""
within = numba.njit(inline="always")
"""For what `borrowing` functions call to have a part of an array."""

_FLOOR, _LOG2E, _ONE, _HALF = np.float32(FLOOR), np.float32(1 / math.log(2)), np.float32(1), np.float32(0.5)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
# exp r ≈ 1 + r + c₂r² + … + c₇r⁷ on |r| ≤ ln 2 / 2, to float32's last digit
_C2, _C3, _C4 = np.float32(5.0000001201e-1), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
_C5, _C6, _C7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)


@intrinsic
def _float_with_bits(typing, x):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return numba.types.float32(numba.types.int32), generate


def decay(g: float) -> float:
    """exp(max(g, FLOOR)): in float32 as 2ⁿ times a polynomial, which vectorises where libm's exp does not."""
    raise TypeError("decay is for compiled code.")


@overload(decay, inline="always", jit_options={"fastmath": {"contract"}, "error_model": "numpy"})
def _decay(g):
    def wide(g):
        return math.exp(max(g, FLOOR))

    def single(g):
        x = max(g, _FLOOR)
        n = np.floor(x * _LOG2E + _HALF)
        r = x - n * _LN2_HIGH - n * _LN2_LOW
        p = ((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _C2
        power = (np.int32(n) + np.int32(127)) << np.int32(23)
        return (p * r * r + r + _ONE) * _float_with_bits(power)  # type: ignore[call-arg]

    return single if g == numba.types.float32 else wide


def sigmoid_and_silu(x: float) -> tuple[float, float]:
    """(σ(x), x σ(x)), in the precision of x."""
    raise TypeError("sigmoid_and_silu is for compiled code.")


@overload(sigmoid_and_silu, inline="always", jit_options={"fastmath": {"contract"}, "error_model": "numpy"})
def _sigmoid_and_silu(x):
    one = np.float32(1) if x == numba.types.float32 else 1.0

    def run(x):
        e = decay(-abs(x))
        s = (one if x >= 0 else e) / (one + e)
        return s, s * x

    return run


def gemm(sign: float, x: Any, x_turned: bool, y: Any, y_turned: bool, keep: float, out: Any) -> None:
    """out = keep · out + sign · x y, of matrices whose rows are contiguous, each turned first where it says so."""
    raise TypeError("gemm is for compiled code.")


@overload(gemm)
def _gemm(sign, x, x_turned, y, y_turned, keep, out):
    call = _BLAS().numba_xxgemm(out.dtype)
    kind, plain, turned = ord("s" if out.dtype == numba.types.float32 else "d"), ord("n"), ord("t")
    size = out.dtype.bitwidth // 8

    def run(sign, x, x_turned, y, y_turned, keep, out):
        factors = np.empty(2, out.dtype)
        factors[0], factors[1] = sign, keep
        # BLAS counts columns first, and so sees every matrix turned: xy is the turned product of y and x
        call(
            kind, turned if y_turned else plain, turned if x_turned else plain,
            out.shape[1], out.shape[0], x.shape[0] if x_turned else x.shape[1],
            factors.ctypes, y.ctypes, y.strides[0] // size, x.ctypes, x.strides[0] // size,
            factors[1:].ctypes, out.ctypes, out.strides[0] // size,
        )  # fmt: skip

    return run


Flat = tuple[np.ndarray, tuple[int, ...]]


def flat(x: Tensor, axes: int) -> Flat:
    """The numbers of x as one flat array from its first on, and the strides of its first `axes` axes.

    What comes after these axes is contiguous. So a kernel can read [B, H, T, K] also where it is a view of
    [B, T, H, K], and still loop over contiguous features.
    """
    if not _rows_are_contiguous(x, axes):
        x = x.contiguous()
    strides = x.stride()
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) if x.numel() else 0
    return x.detach().as_strided((span,), (1,)).numpy(), strides[:axes]


def blank(x: Tensor, axes: int) -> Tensor:
    """An empty tensor for `flat` to write to: laid out like x where that can be."""
    y = torch.empty_like(x)
    return y if _rows_are_contiguous(y, axes) else torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows_are_contiguous(x: Tensor, axes: int) -> bool:
    step = 1
    for size, stride in zip(reversed(x.shape[axes:]), reversed(x.stride()[axes:]), strict=True):
        if stride != step and size > 1:
            return False
        step *= size
    return True


def flat_or_none(x: Tensor | None, axes: int, like: Tensor) -> Flat:
    """The same of a tensor that may be absent: then an array without numbers, of the dtype of `like`."""
    return flat(like.new_empty((0,) * (axes + 1)) if x is None else x, axes)


def rows(x: Tensor) -> np.ndarray:
    """[B, H, ...] as [B·H, ...]; of a contiguous tensor it is a view, into which a kernel can write."""
    return x.detach().flatten(0, 1).contiguous().numpy()


@cache
def _blas() -> ThreadpoolController:
    importlib.import_module("scipy.linalg.cython_blas")  # what compiled products call: only what is loaded is found
    return ThreadpoolController()


def spread(kernel: Callable[..., Any], parts: int, size: int, *arguments: Any) -> None:
    """Call `kernel(first, last, *arguments)` for 0 … `parts` − 1, which know nothing of each other.

    On as many threads as PyTorch uses, where there is work (`size`, in numbers touched) for more than one.
    """
    share(kernel, parts, min(torch.get_num_threads(), parts) if size >= 2**16 else 1, *arguments)


def spread_products(kernel: Callable[..., Any], parts: int, size: int, *arguments: Any) -> None:
    """`spread` for kernels that multiply small matrices, for which one thread each is best."""
    with _blas().limit(limits=1, user_api="blas"):
        spread(kernel, parts, size, *arguments)


BAND = 128
"""Features that a thread takes at once: long enough to vectorise, short enough to share out."""


def spread_bands(kernel: Callable[..., Any], features: int, size: int, *arguments: Any) -> None:
    """Call `kernel(first, last, *arguments)` over bands of features; tensors are passed as arrays."""
    given = [x.detach().numpy() if isinstance(x, Tensor) else x for x in arguments]

    def run(first: int, last: int) -> None:
        kernel(first * BAND, min(last * BAND, features), *given)

    spread(run, -(-features // BAND), size)
