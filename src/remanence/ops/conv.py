"""A short causal convolution, each feature by itself. Axes: B batch, T time, D features."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.errors import expect
from remanence.ops.decay import recurrent_dtype
from remanence.state import State


def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: State | None = None
) -> tuple[Tensor, State]:
    """The definition: y_t = bias + Σ_j w_j ⊙ x_{t−width+1+j}: the last column of `weight` meets the present."""
    tail = _tail(x, weight, state)
    y = []
    for t in range(x.shape[1]):
        seen = torch.cat([tail, x[:, t : t + 1]], 1)
        now = (seen * weight.mT).sum(1)
        y.append(now if bias is None else now + bias)
        tail = seen[:, 1:]
    return (torch.stack(y, 1).to(x.dtype) if y else x), {"tail": tail}


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: State | None = None
) -> tuple[Tensor, State]:
    """y_t = bias + Σ_{j < width} w_j ⊙ x_{t−width+1+j}; no activation.

    Shapes: `x` and y [B, T, D], any T ≥ 0; `weight` [D, width], its last column meeting the present token;
    `bias` None or [D]; state {"tail": [B, width − 1, D]}, the last raw inputs, float32 or wider.
    Raises: `ShapeError`.
    """
    expect("causal_conv", "x", x, "batch time features", features=weight.shape[0])
    expect("causal_conv", "weight", weight, "features width")
    T, width = x.shape[1], weight.shape[1]
    seen = torch.cat([_tail(x, weight, state), x], 1)
    # Shifted products: several times faster on a CPU than a depthwise conv1d, which wants time last.
    y = seen[:, :T] * weight[:, 0]
    for j in range(1, width):
        y = y + seen[:, j : j + T] * weight[:, j]
    y = y if bias is None else y + bias
    return y.to(x.dtype), {"tail": seen[:, T:]}


def _tail(x: Tensor, weight: Tensor, state: State | None) -> Tensor:
    if state is not None:
        return state["tail"]
    return x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2], dtype=recurrent_dtype(x))
