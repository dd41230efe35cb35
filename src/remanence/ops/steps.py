"""One token without gradients: what decoding asks of an op, in one compiled call each.

As operations of PyTorch a step is a dozen of them, and each costs more than its arithmetic. Shapes are those of the
op with a time axis of one; `worth` says whether a token is to be read so. What goes in is brought to the precision of
what comes out.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remanence.errors import ShapeError
from remanence.ops.taps import watched
from remanence.state import State

STEP_FROM = 512
"""Numbers in a token from which the compiled form is worth what it loads: some 40 MB of libraries and code."""


def worth(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a token is to take the compiled form: on the CPU, in one precision, no gradients asked for, unwatched."""
    if torch.is_grad_enabled() or not x.is_cpu or x.numel() < STEP_FROM or watched():
        return False
    dtype = x.dtype
    for other in others:
        if other is not None and other.dtype != dtype:
            return False
    return dtype == torch.float32 or dtype == torch.float64


class Kernels:
    """The compiled functions of a module here, loaded when one is first called: Numba takes half a second."""

    def __init__(self, module: str):
        self.module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module(f"remanence.ops.{self.module}"), name)
        setattr(self, name, found)
        return found


kernels = Kernels("step_kernels")
_ONE = {torch.float32: np.float32(1), torch.float64: np.float64(1)}


def run(kernel: Any, tensors: tuple[Tensor | None, ...], *how: Any) -> Any:
    """Call a kernel with where its tensors lie, in the precision of the last; an absent one lies nowhere."""
    dtype, addresses, copies = tensors[-1].dtype, [], []  # type: ignore[union-attr]
    for x in tensors:
        if x is None:
            addresses.append(0)
            continue
        if x.dtype is not dtype or not x.is_contiguous():
            x = x.to(dtype).contiguous()
            copies.append(x)  # which must live until the kernel has read it
        addresses.append(x.data_ptr())
    return kernel(_ONE[dtype], *addresses, *how)


def blank(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def fits(where: str, state: Tensor, *shape: int) -> None:
    """A kernel reads whatever lies where it is told: a state of another shape must not reach it."""
    if state.shape != shape:
        raise ShapeError(f"{where}: the state must be {list(shape)}, got {list(state.shape)}.")


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """y and the next tail."""
    (B, _, D), width = x.shape, weight.shape[1]
    fits("causal_conv", tail, B, width - 1, D)
    y, after = blank(x), blank(tail)
    run(kernels.causal_conv, (tail, x, weight, bias, y, after), B, D, width, silu)
    return y, after


_long_conv = Kernels("long_conv_step_kernels")


def dilated_residuals(
    x: Tensor, weight: Tensor, dilations: tuple[int, ...], tails: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """x + SiLU of `ops.long_conv.dilated_conv`, layer after layer, and the next tails: weight [layers, D, K]."""
    (B, _, D), K = x.shape, weight.shape[2]
    for tail, dilation in zip(tails, dilations, strict=True):
        fits("dilated_residuals", tail, B, (K - 1) * dilation, D)
    tails = [tail if tail.is_contiguous() else tail.contiguous() for tail in tails]
    y, afters = blank(x), [following(tail) for tail in tails]
    places = (tuple(part.data_ptr() for part in parts) for parts in (tails, afters))
    run(_long_conv.dilated_residuals, (x, weight, y), *places, dilations, B, D, K)
    return y, afters


def following(tail: Tensor) -> Tensor:
    """Where the tail after this one is to be written: the rows [1, L, D] of this from the second on, and one more.

    They stay where they are, if behind them is room that nobody has written to: a state is never altered, whoever reads
    on from it first takes the room, and others begin with rows of their own. So of L tokens only one moves the rows.
    """
    B, L, D = tail.shape
    if B != 1 or not L:
        return blank(tail)
    rows, first = tail.__dict__.pop("room", (None, 0))
    # a copy of the tensor may have brought the room of another along
    if rows is None or first == L or rows.data_ptr() + first * D * tail.itemsize != tail.data_ptr():
        rows, first = tail.new_empty(1, 2 * L, D), -1
    after = rows.narrow(1, first + 1, L)
    after.__dict__["room"] = rows, first + 1
    return after


PLAIN, SILU, SIGMOID, ELU, SOFTMAX = 0, 1, 2, 3, 4
"""What a gate's logits, or features, go through (ELU: elu + 1); `PLAIN` stands for no gate."""


def normalise(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    mean: bool = True,
    scale: float = 1.0,
    *,
    bias: Tensor | None = None,
    kind: int = SILU,
    centred: bool = False,
    heads: int = 1,
) -> Tensor:
    """`ops.normalise`, also of each of `heads` parts of the last axis, `centred` to mean 0, or with another gate."""
    width, y = x.shape[-1] // heads, blank(x)
    groups = 1 if weight is None else weight.numel() // width
    how = centred, kind if gate is not None else PLAIN, (1 / width if mean else 1.0) / scale**2, eps / scale**2
    run(kernels.normalise, (x, weight, bias, gate, y), x.numel() // width, width, groups, *how)
    return y


def glu(x: Tensor) -> Tensor:
    """The first half of the last axis ⊙ σ of the second."""
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    run(kernels.glu, (x, y), x.numel() // x.shape[-1], y.shape[-1])
    return y


def rotate(x: Tensor, start: Tensor, frequencies: Tensor) -> Tensor:
    """`memory.parts.rotate`: x [B, H, 1, K], start int64 [B], frequencies float64 [K/2]."""
    (B, H, _, K), y = x.shape, blank(x)
    start, frequencies = start.contiguous(), frequencies.contiguous()
    fits("rotate", start, B)
    run(kernels.rotate, (x, y), start.data_ptr(), frequencies.data_ptr(), B, H, K)
    return y


def scan(g: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """The next h [B, D]."""
    B, _, D = b.shape
    fits("scan", start, B, D)
    h = blank(start)
    run(kernels.scan, (g, b, start, h), B, D)
    return h


def linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor) -> tuple[Tensor, Tensor]:
    (B, H, _, K), V = k.shape, v.shape[3]
    fits("linear_attention", start, B, H, K, V)
    y, S = blank(v), blank(start)
    decays = 0 if g is None else 1 if g.ndim == 3 else K
    run(kernels.linear_attention, (q, k, v, g, start, y, S), B, H, K, V, decays)
    return y, S


def read_before_write(
    r: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """y = rᵀ (S + Diag(bonus) k vᵀ), and S = Diag(exp g) S + k vᵀ only then: r, k, g [B, H, 1, K], bonus [H, 1, K]."""
    (B, H, _, K), V = k.shape, v.shape[3]
    fits("read_before_write", start, B, H, K, V)
    y, S = blank(v), blank(start)
    run(kernels.read_before_write, (r, k, v, g, bonus, start, y, S), B, H, K, V)
    return y, S


def softmax_scan(
    score: Tensor, value: Tensor, log_decay: Tensor | None, bonus: Tensor | None, state: State
) -> tuple[Tensor, State]:
    B, _, D = score.shape
    w, u, m = state["w"], state["u"], state["m"].double().contiguous()
    for held in (w, u, m):
        fits("softmax_scan", held, B, D)
    y, new_w, new_u, top = blank(value), blank(w), blank(u), blank(m)
    given = score, value, log_decay, bonus, w, u, y, new_w, new_u
    run(kernels.softmax_scan, given, m.data_ptr(), top.data_ptr(), B, D)
    return y, {"w": new_w, "u": new_u, "m": top}


def token_shift(x: Tensor, last: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """x + (last − x) ⊙ mix [n, B, 1, D], and x as the next last token, from x [B, 1, D] and last [B, D].

    mix is [n, D], or one for each row, [n, B, 1, D].
    """
    (B, _, D), blends = x.shape, mix.shape[0]
    fits("token_shift", last, B, D)
    y, newest = x.new_empty(blends, B, 1, D), blank(last)
    run(kernels.token_shift, (x, last, mix, newest, y), blends, B, D, mix.numel() > blends * D)
    return y, newest


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, start: Tensor
) -> tuple[Tensor, Tensor]:
    (B, H, _, K), V = k.shape, v.shape[3]
    fits("gated_delta_rule", start, B, H, K, V)
    y, S = blank(v), blank(start)
    run(kernels.gated_delta_rule, (q, k, v, beta, g, start, y, S), B, H, K, V)
    return y, S


def dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, start: Tensor
) -> tuple[Tensor, Tensor]:
    (B, H, _, K), V = k.shape, v.shape[3]
    fits("dplr", start, B, H, K, V)
    y, S = blank(v), blank(start)
    run(kernels.dplr, (q, k, v, a, b, g, start, y, S), B, H, K, V)
    return y, S


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor | None, B: Tensor, C: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    (batch, _, D), N = x.shape, B.shape[2]
    fits("selective_scan", start, batch, D, N)
    y, h = blank(x), blank(start)
    run(kernels.selective_scan, (x, delta, A, B, C, start, y, h), batch, D, N)
    return y, h
