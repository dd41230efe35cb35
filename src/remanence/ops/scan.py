"""The diagonal linear recurrence. Axes: B batch, T time, D features."""

from __future__ import annotations

import torch
from torch import Tensor

from remanence.errors import expect
from remanence.ops.decay import floored, recurrent_dtype
from remanence.state import State


def scan_reference(log_decay: Tensor, b: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """The definition: h_t = exp(g_t) ⊙ h_{t−1} + b_t."""
    dtype = recurrent_dtype(b)
    decay = floored(log_decay.to(dtype)).exp()
    h = b.new_zeros(b.shape[0], b.shape[2], dtype=dtype) if state is None else state["h"]
    out = []
    for t in range(b.shape[1]):
        h = decay[:, t] * h + b[:, t]
        out.append(h)
    return (torch.stack(out, 1) if out else b.to(dtype)), {"h": h}


def scan(log_decay: Tensor, b: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """h_t = exp(g_t) ⊙ h_{t−1} + b_t for every feature by itself.

    Shapes: `log_decay` (≤ 0, clamped at −60), `b` and h [B, T, D], any T ≥ 0; state {"h": [B, D]}.
    h has float32 or wider. Raises: `ShapeError`.
    Source: Martin & Cundy, Parallelizing Linear Recurrent Neural Nets over Sequence Length (2018).
    """
    expect("scan", "b", b, "batch time features")
    expect(
        "scan", "log_decay", log_decay, "batch time features", batch=b.shape[0], time=b.shape[1], features=b.shape[2]
    )
    return scan_reference(log_decay, b, state)


def scan_carry(log_decay: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(M, N), both [B, D], with h_end = M ⊙ h_start + N for every state h_start."""
    decay = floored(log_decay.to(recurrent_dtype(b))).sum(1).exp()
    return decay, scan(log_decay, b)[1]["h"]
