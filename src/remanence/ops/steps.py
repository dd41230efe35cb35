"""One token without gradients: what decoding asks of an op, in one compiled call each.

As operations of PyTorch a step is a dozen of them, and each costs more than its arithmetic. Shapes are those of the
op with a time axis of one; all tensors have one precision, and `worth` says whether that is so.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

STEP_FROM = 512
"""Numbers in a token from which the compiled form is worth what it loads: some 40 MB of libraries and code."""


def worth(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a token is to take the compiled form: on the CPU, in one precision, no gradients asked for."""
    if torch.is_grad_enabled() or not x.is_cpu or x.numel() < STEP_FROM:
        return False
    dtype = x.dtype
    for other in others:
        if other is not None and other.dtype != dtype:
            return False
    return dtype == torch.float32 or dtype == torch.float64


class _Kernels:
    """The compiled functions, loaded when one is first called: Numba takes half a second."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module("remanence.ops.step_kernels"), name)
        setattr(self, name, found)
        return found


kernels = _Kernels()


@cache
def _nothing(dtype: torch.dtype, axes: int) -> Any:
    return np.empty((0,) * axes, str(dtype).removeprefix("torch."))


def _array(x: Tensor) -> Any:
    return (x.detach() if x.requires_grad else x).contiguous().numpy()


def _maybe(x: Tensor | None, like: Tensor, axes: int) -> Any:
    return _nothing(like.dtype, axes) if x is None else _array(x)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """y and the next tail."""
    y, after = x.new_empty(x.shape), x.new_empty(tail.shape)
    b = _maybe(bias, x, 1)
    kernels.conv(_array(tail), _array(x), _array(weight), b, bias is not None, silu, y.numpy(), after.numpy())
    return y, after


def normalise(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, mean: bool, scale: float = 1.0
) -> Tensor:
    width = x.shape[-1]
    y = x.new_empty(x.shape)
    w, g = _maybe(weight, x, 1), _nothing(x.dtype, 2) if gate is None else _array(gate).reshape(-1, width)
    rows, share = _array(x).reshape(-1, width), (1 / width if mean else 1.0) / scale**2
    eps = eps / scale**2
    kernels.normalise(rows, w, weight is not None, g, gate is not None, share, eps, y.numpy().reshape(-1, width))
    return y


def scan(g: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """The next h [B, D]."""
    h = start.new_empty(start.shape)
    kernels.scan(_array(g), _array(b), _array(start), h.numpy())
    return h


def min_gru(z: Tensor, gates: int, start: Tensor) -> Tensor:
    """The next h [B, D] of a GRU or LSTM whose gates see only the input: z [B, 1, (gates + 1)·D] are all logits."""
    h = start.new_empty(start.shape)
    kernels.min_gru(_array(z), gates, _array(start), h.numpy())
    return h


def rg_lru(u: Tensor, decay: Tensor, into: Tensor, rate: Tensor, empty: Tensor, start: Tensor) -> Tensor:
    """The next h [B, D] of the gated recurrence of bounded variance: logits `decay` and `into` [B, 1, D], rate [D]."""
    h = start.new_empty(start.shape)
    given = _array(u), _array(decay), _array(into), _array(rate), _array(empty), _array(start)
    kernels.rg_lru(*given, h.numpy())
    return h


def linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor) -> tuple[Tensor, Tensor]:
    y, S = v.new_empty(v.shape), start.new_empty(start.shape)
    decays = 0 if g is None else g.ndim - 2
    a = _maybe(g if g is None or decays == 2 else g[..., None], v, 4)
    kernels.linear_attention(_array(q), _array(k), _array(v), a, decays, _array(start), y.numpy(), S.numpy())
    return y, S


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, start: Tensor
) -> tuple[Tensor, Tensor]:
    y, S = v.new_empty(v.shape), start.new_empty(start.shape)
    given = _array(q), _array(k), _array(v), _array(beta), _maybe(g, v, 3), g is not None, _array(start)
    kernels.gated_delta_rule(*given, y.numpy(), S.numpy())
    return y, S


def gated_delta_token(
    mixed: Tensor,
    heads: int,
    beta: Tensor,
    most: float,
    start: Tensor,
    step: Tensor | None = None,
    rate: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule from what a layer projects, which saves the dozen operations in between.

    Queries and keys are brought to unit length, and queries scaled by K^{-1/2}; β is `most`·σ of its logits, the log
    decay −exp(`rate`)·softplus(`step` + `bias`) where there is one. Heads of queries and keys serve several values.

    Shapes: mixed [B, 1, 2·heads·K + M·V], beta and step [B, 1, M], rate and bias [M], start [B, M, K, V]
    -> y [B, M, 1, V] and the next state.
    """
    y, S = start.new_empty(*start.shape[:2], 1, start.shape[3]), start.new_empty(start.shape)
    decay = _maybe(step, start, 3), _maybe(rate, start, 1), _maybe(bias, start, 1), step is not None
    given = _array(mixed), heads, _array(beta), float(most), *decay, eps, _array(start)
    kernels.gated_delta_token(*given, y.numpy(), S.numpy())
    return y, S


def dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, start: Tensor
) -> tuple[Tensor, Tensor]:
    y, S = v.new_empty(v.shape), start.new_empty(start.shape)
    given = *(_array(x) for x in (q, k, v, a, b)), _maybe(g, v, 4), g is not None, _array(start)
    kernels.dplr(*given, y.numpy(), S.numpy())
    return y, S


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor | None, B: Tensor, C: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    y, h = x.new_empty(x.shape), start.new_empty(start.shape)
    given = _array(x), _array(delta), _maybe(A, x, 2), A is None, _array(B), _array(C), _array(start)
    kernels.selective_scan(*given, y.numpy(), h.numpy())
    return y, h
