"""One token of a whole layer between its projections, without gradients: one compiled call each.

What `steps` does for an op, these do for all that a layer does to what it projects, before it projects back: a short
convolution, activations, the recurrence, and the norm and gate of what was read. `steps.worth` says when.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from remanence.ops.steps import PLAIN, Kernels, blank, fits, run


class Readout(NamedTuple):
    """How what was read is normalised (by its root mean square) and gated: what `steps.normalise` asks for.

    `kind` is what the gate's logits pass; `whole` says that all heads are normalised together.
    """

    weight: Tensor | None
    gate: Tensor | None
    eps: float
    kind: int
    whole: bool = False

    def how(self, heads: int) -> tuple[int, int, float]:
        return 1 if self.whole else heads, PLAIN if self.gate is None else self.kind, self.eps


NOT_NORMALISED = 0, PLAIN, 0.0

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
    finish = NOT_NORMALISED if readout is None else readout.how(M)
    how = width, writes, decays, float(bound or 0), float(most), exact, eps, *finish
    run(_delta.delta_token, given, B, heads, M, K, V, *how)
    return y, S, after


_outer = Kernels("outer_step_kernels")
ALL, FIXED, CHOSEN, TIED, RUNNING = 0, 1, 2, 3, 4


def outer_token(
    mixed: Tensor,
    start: Tensor,
    v: Tensor | None = None,
    *,
    features: int = PLAIN,
    value_features: int = PLAIN,
    scale: float = 1.0,
    key_scale: float = 1.0,
    fixed: Tensor | None = None,
    chosen: Tensor | None = None,
    temper: float = 1.0,
    least: Tensor | float | None = None,
    top: Tensor | None = None,
    mean: float | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    readout: Readout | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`linear_attention` from what a layer projects: y, the next state, and the next `top` where there is one.

    Queries and keys pass `features`, then queries are scaled by `scale` and keys by `key_scale`, and both are turned as
    `steps.rotate` does by `positions` (start and frequencies) where these are given. Log decays are none, or `fixed`
    [H], or log σ of the logits `chosen` [B, 1, H·K] over `temper`. With `least` (a number or [H·K]) keys are logits f
    of what is kept, least + (1 − least) σ(f), and what is not kept is the key. With `top` [B, H·K], the logarithm of
    the running sum of exp k, keys are e^{k − top'} and e^{top − top'} is kept. With `mean` each answer is divided by
    its last column, that of a value of 1, + `mean`.

    Shapes: mixed [B, 1, H·(2K + V)], queries, keys and values; or [B, 1, 2·H·K] and v [B, 1, H·V]; start [B, H, K, V]
    (V + 1 with `mean`) -> y [B, 1, H·V].
    """
    B, H, K, columns = start.shape
    V = columns if mean is None else columns - 1
    y, S, highest = mixed.new_empty(B, 1, H * V), blank(start), None if top is None else blank(top)
    forget, g = ALL, fixed
    if fixed is not None:
        forget = FIXED
    elif chosen is not None:
        forget, g = CHOSEN, chosen
    elif least is not None:
        forget, g = TIED, least if isinstance(least, Tensor) else None
    elif top is not None:
        forget = RUNNING
    bound = least if isinstance(least, float | int) else 0
    turning = () if positions is None else (positions[0].contiguous(), positions[1].contiguous())
    where = [x.data_ptr() for x in turning] or [0, 0]
    weight, gate = (None, None) if readout is None else readout[:2]
    finish = NOT_NORMALISED if readout is None else readout.how(H)
    how = features, value_features, float(scale), float(key_scale), forget, float(temper), float(bound)
    given = mixed, v, g, top, weight, gate, start, y, highest, S
    run(_outer.outer_token, given, *where, B, H, K, V, *how, -1.0 if mean is None else mean, *finish)
    return y, S, highest


_attention = Kernels("attention_step_kernels")


class Seen(NamedTuple):
    """What a token of attention finds: `y` [B, 1, H·K], the next keys and values, and how many were read [B]."""

    y: Tensor
    keys: Tensor
    values: Tensor
    position: Tensor


def attention_token(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    frequencies: Tensor,
    *,
    room: int | None = None,
    reach: int | None = None,
    stride: int = 1,
    prefix: tuple[Tensor, Tensor] | None = None,
    logsumexp: Tensor | None = None,
) -> Seen:
    """Softmax attention from what a layer projects to the token itself and the `reach` nearest (all) before it.

    Those seen lie multiples of `stride` back; a `prefix` (two [G, P, K]) is seen always. Queries and keys are turned by
    their position as `steps.rotate` does, as many feature pairs as there are frequencies. Of the keys and values
    `room` are kept, latest last, as many as before by default. `logsumexp` [B, H] is written to, where given.

    Shapes: qkv [B, 1, (H + 2G)·K], keys and values [B, G, before, K], position int64 [B], frequencies float64.
    """
    B, G, before, K = keys.shape
    H, room = qkv.shape[2] // K - 2 * G, before if room is None else room
    y, new_k, new_v = keys.new_empty(B, 1, H * K), keys.new_empty(B, G, room, K), keys.new_empty(B, G, room, K)
    position, rates, after = position.contiguous(), frequencies.contiguous(), blank(position)
    first, second = prefix or (None, None)
    where = position.data_ptr(), after.data_ptr(), rates.data_ptr()
    how = B, H, G, K, len(rates), before, room, before if reach is None else reach, stride
    given = qkv, keys, values, first, second, new_k, new_v, logsumexp, y
    run(_attention.attention_token, given, *where, *how, 0 if first is None else first.shape[-2])
    return Seen(y, new_k, new_v, after)
