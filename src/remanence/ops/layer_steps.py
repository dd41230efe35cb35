"""One token of a whole layer between its projections, without gradients: one compiled call each.

What `steps` does for an op, these do for all that a layer does to what it projects, before it projects back: a short
convolution, activations, the recurrence, and the norm and gate of what was read. `steps.worth` says when.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from remanence.ops.steps import PLAIN, Kernels, blank, fits, run


class Readout(NamedTuple):
    """How what was read is normalised (by its root mean square) and gated: what `steps.normalise` asks for."""

    weight: Tensor | None
    gate: Tensor | None
    eps: float
    kind: int
    """What the gate's logits pass."""

    @property
    def how(self) -> tuple[int, float]:
        return PLAIN if self.gate is None else self.kind, self.eps


_delta = Kernels("delta_step_kernels")


class Decay(NamedTuple):
    """−exp(`rate`)·softplus(`step` + `bias`), or `bound`·σ(exp(`rate`)·(`step` + `bias`)), a log decay.

    Shapes: step [B, 1, M] or [B, 1, M·K], bias alike, rate [M].
    """

    step: Tensor
    rate: Tensor
    bias: Tensor
    bound: float | None = None


def delta_token(
    q: Tensor,
    kv: Tensor,
    beta: Tensor,
    taps: Tensor,
    tail: Tensor,
    start: Tensor,
    heads: int,
    most: float,
    decay: Decay | None = None,
    readout: Readout | None = None,
    *,
    exact: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gated delta rule, n writes per token: y, the next state and the next tail.

    Queries, keys and values pass a convolution and SiLU, queries and keys are brought to unit length, and queries
    scaled by K^{-1/2}; β is `most`·σ of its logits. `exact` solves for the error instead (EFLA), with keys of any
    length. Heads of queries and keys serve several values.

    Shapes: q [B, 1, heads·K], kv [B, 1, n·(heads·K + M·V)], beta [B, 1, n·M], taps [features of q and kv, width],
    tail [B, width − 1, these features], start [B, M, K, V]; y [B, 1, M·V].
    """
    (B, M, K, V), (D, width), writes = start.shape, taps.shape, beta.shape[2] // start.shape[1]
    fits("delta_token", tail, B, width - 1, D)
    y, after, S = start.new_empty(B, 1, M * V), blank(tail), blank(start)
    step, rate, bias, bound = decay or (None, None, None, None)
    decays = 0 if step is None else step.shape[2] // M
    weight, gate = (None, None) if readout is None else readout[:2]
    given = q, kv, taps, tail, beta, step, rate, bias, weight, gate, start, y, after, S
    kind, small = (PLAIN, 0.0) if readout is None else readout.how
    how = width, writes, decays, float(bound or 0), float(most), exact, eps, readout is not None, kind, small
    run(_delta.delta_token, given, B, heads, M, K, V, *how)
    return y, S, after
