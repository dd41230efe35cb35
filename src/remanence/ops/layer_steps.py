"""One token of a whole layer between its projections, without gradients: one compiled call each.

What `steps` does for an op, these do for all that a layer does to what it projects, before it projects back: a short
convolution, activations, the recurrence, and the norm and gate of what was read. `steps.worth` says when.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from remanence.ops.steps import PLAIN, Kernels, blank, fits, run
from remanence.state import State


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
    temper: float | None = None,
    least: Tensor | float | None = None,
    top: Tensor | None = None,
    mean: float | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    readout: Readout | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`linear_attention` from what a layer projects: y, the next state, and the next `top` where there is one.

    Queries and keys pass `features`, then queries are scaled by `scale` and keys by `key_scale`, and both are turned as
    `steps.rotate` does by `positions` (start and frequencies) where these are given. Log decays are none, or `fixed`
    [H], or over `temper` log σ of the logits `chosen` [B, 1, H·K], by default the keys. With `least` (a number or
    [H·K]) keys are logits f of what is kept, least + (1 − least) σ(f), and what is not kept is the key. With `top`
    [B, H·K], the logarithm of the running sum of exp k, keys are e^{k − top'} and e^{top − top'} is kept. With `mean`
    each answer is divided by its last column, that of a value of 1, + `mean`.

    Shapes: mixed [B, 1, H·(2K + V)], queries, keys and values; or [B, 1, 2·H·K] and v [B, 1, H·V]; start [B, H, K, V]
    (V + 1 with `mean`) -> y [B, 1, H·V].
    """
    B, H, K, columns = start.shape
    V = columns if mean is None else columns - 1
    y, S, highest = mixed.new_empty(B, 1, H * V), blank(start), None if top is None else blank(top)
    forget, g = ALL, fixed
    if fixed is not None:
        forget = FIXED
    elif temper is not None:
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
    how = features, value_features, float(scale), float(key_scale), forget, float(temper or 1), float(bound)
    given = mixed, v, g, top, weight, gate, start, y, highest, S
    run(_outer.outer_token, given, *where, B, H, K, V, *how, -1.0 if mean is None else mean, *finish)
    return y, S, highest


def exponential_token(
    mixed: Tensor,
    gates: Tensor,
    state: State,
    norm: tuple[Tensor, Tensor | None, float],
    cap: float | None,
    eps: float,
) -> tuple[Tensor, State]:
    """`expgate` from what a layer projects: queries to be scaled, gates [B, 1, 2H] (write, forget) to be capped.

    Shapes: mixed [B, 1, H·(2K + 2V)], queries, keys, values and the logits of what gates y [B, 1, H·V], after a layer
    norm of each head by weight, bias [H·V] and eps; the state that of `expgate`.
    """
    C, n, m = state["C"], state["n"].double().contiguous(), state["m"].double().contiguous()
    (B, H, K, V), count, top = C.shape, blank(n), blank(m)
    y, S, opening = C.new_empty(B, 1, H * V), blank(C), mixed[..., 2 * H * K + H * V :]
    exact = n.data_ptr(), count.data_ptr(), m.data_ptr(), top.data_ptr()
    given = mixed, gates, norm[0], norm[1], opening, C, y, S
    run(_outer.exponential_token, given, *exact, *C.shape, mixed.shape[2], float(cap or 0), eps, norm[2])
    return y, {"C": S, "n": count, "m": top}


def featured_token(
    qkv: Tensor, maps: tuple[Tensor, Tensor], forget: Tensor, state: State, near: Tensor, log_near: Tensor
) -> tuple[Tensor, State]:
    """`exponential_sums` of learnt features from what a layer projects, averaged with what was found near, and state.

    Features of queries and keys are e^u and e^{−u}, u their image by `maps` [H, K, F/2] each. `near` [B, 1, H·K] is an
    average over weights whose sum has the logarithm `log_near` [B, H].

    Shapes: qkv [B, 1, (H + 2G)·K], forget [B, 1, H] (logits of what is kept), the state "C", "n" and "m" that of
    `exponential_sums`.
    """
    C, n, m = state["C"], state["n"], state["m"].double().contiguous()
    (B, H, F, K), y, S, count, top = C.shape, blank(near), blank(C), blank(n), blank(m)
    given = qkv, *maps, forget, near, log_near, C, n, y, count, S
    run(_outer.featured_token, given, m.data_ptr(), top.data_ptr(), B, H, (qkv.shape[2] // K - H) // 2, F, K)
    return y, {"C": S, "n": count, "m": top}


_cells = Kernels("cell_step_kernels")


def tied_token(
    forget: Tensor, candidate: Tensor, start: Tensor, least: Tensor | float, weight: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """y = norm(h) ⊙ SiLU(gate) and the next h = a h + (1 − a) SiLU(candidate), a = least + (1 − least) σ(forget).

    Shapes: y, h and start [B, D], the others [B, 1, D] or [D].
    """
    h, y, (B, D) = blank(start), blank(candidate), start.shape
    lowest, bound = (least, 0.0) if isinstance(least, Tensor) else (None, float(least))
    run(_cells.tied_token, (forget, candidate, lowest, weight, gate, start, h, y), B, D, bound, eps)
    return y, h


def min_gru(z: Tensor, gates: int, start: Tensor) -> Tensor:
    """The next h [B, D] of a GRU or LSTM whose gates see only the input: z [B, 1, (gates + 1)·D] are all logits."""
    h = blank(start)
    run(_cells.min_gru, (z, start, h), *start.shape, gates)
    return h


Block = tuple[Tensor, Tensor]


def rg_lru_token(
    mixed: Tensor, conv: tuple[Tensor, Tensor | None, Tensor], decay: Block, into: Block, base: Tensor, empty: Tensor,
    start: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """GeLU(branch) ⊙ h, the next h and the next tail of the gated recurrence of bounded variance.

    Decay and input gates are given by their maps of the convolved u, block by block: weights [blocks, in, out] and
    biases [D]; the convolution by its taps [D, width], bias and tail.

    Shapes: mixed [B, 1, 2·D], branch and u; base [D], a softplus short of the rate; empty bool [B]; start [B, D].
    """
    (taps, offset, tail), (B, D), (blocks, size, _) = conv, start.shape, decay[0].shape
    y, h, after, empty = mixed.new_empty(B, 1, D), blank(start), blank(tail), empty.contiguous()
    given = mixed, taps, offset, tail, *decay, *into, base, start, after, y, h
    run(_cells.rg_lru_token, given, empty.data_ptr(), B, blocks, size, taps.shape[1])
    return y, h, after


def one_query_token(key: Tensor, value: Tensor, query: Tensor, state: State) -> tuple[Tensor, State]:
    """A running softmax with the same query [H, K] for all times: key, value and y [B, 1, H·K].

    State w [B, H·K], u [B, H], and m [B, H] in float64: the weighted sums of values and of ones, and the exponent taken
    out of both.
    """
    w, u, m = state["w"], state["u"], state["m"].double().contiguous()
    y, new_w, new_u, top = blank(value), blank(w), blank(u), blank(m)
    given = key, value, query, w, u, y, new_u, new_w
    run(_cells.one_query_token, given, m.data_ptr(), top.data_ptr(), len(w), *query.shape)
    return y, {"w": new_w, "u": new_u, "m": top}


def turning_token(mixed: Tensor, transition: Tensor, gate: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """h = a h + k v, y = q Re(h) ⊙ SiLU(gate), feature by feature, a = σ(|w|) e^{i∠w}: y and the next state.

    Shapes: mixed [B, 1, 3·D], queries, keys and values; transition [B, 1, 2·D], real and imaginary parts of w; gate
    and y [B, 1, D]; start [B, D, 2, 1], real and imaginary parts.
    """
    y, h = blank(gate), blank(start)
    run(_cells.turning_token, (mixed, transition, gate, start, y, h), *start.shape[:2])
    return y, h


_slots = Kernels("slot_step_kernels")


def slots_token(
    mixed: Tensor, scores: Tensor, state: State, weight: Tensor | None, eps: float, temper: float = 1.0
) -> tuple[Tensor, State]:
    """`slots` from what a layer projects, which passes SiLU: norm(SiLU(y)) [B, 1, H·K] of all heads, and the state.

    A slot keeps σ(score)^{1/temper} and takes the rest; or, where the state has a "z" [B, G·M], the logarithms of the
    running sums of exp scores, it takes its share of these.

    Shapes: mixed [B, 1, (H + 2G)·K], scores [B, 1, G·M], state "K" and "V" [B, G, M, K].
    """
    keys, values, top = state["K"], state["V"], state.get("z")
    (B, G, M, K), new_k, new_v = keys.shape, blank(keys), blank(values)
    H, after = mixed.shape[2] // K - 2 * G, None if top is None else blank(top)
    y = keys.new_empty(B, 1, H * K)
    given = mixed, scores, top, weight, keys, values, y, after, new_k, new_v
    run(_slots.slots_token, given, B, H, G, M, K, float(temper), eps)
    return y, {"K": new_k, "V": new_v} | ({} if after is None else {"z": after})


def lattice_token(
    mixed: Tensor,
    rate: Tensor,
    taps: Tensor,
    tail: Tensor,
    start: Tensor,
    readout: Readout,
    *,
    correct: bool,
    renormalise: bool,
    by_slot: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lattice` from what a layer projects: y, the next state and the next tail.

    Queries, keys and values pass a convolution and SiLU, queries and keys are brought to unit length; keys are the
    code of values in slots, or values that of keys (`by_slot`).

    Shapes: mixed [B, 1, F], rate [B, 1, H] (logits), taps [F, width], tail [B, width − 1, F], start [B, H, M, D].
    """
    (B, H, M, D), width = start.shape, taps.shape[1]
    y, after, S = start.new_empty(B, 1, H * (M if by_slot else D)), blank(tail), blank(start)
    given = mixed, taps, tail, rate, *readout[:2], start, y, after, S
    how = width, correct, renormalise, by_slot, 1e-6, *readout.how(H)[1:]
    run(_slots.lattice_token, given, B, H, M, D, *how)
    return y, S, after


_least_squares = Kernels("least_squares_step_kernels")


def least_squares_token(
    mixed: Tensor,
    v: Tensor,
    gates: Tensor,
    taps: Tensor,
    ridge: Tensor,
    least: float,
    state: State,
    readout: Readout,
    steps: int,
) -> tuple[Tensor, State]:
    """`least_squares` from what a layer projects: y, and the state "H", "G" and "conv".

    Queries and keys, mixed [B, 1, 2·H·K], pass a convolution, SiLU and a norm to unit length; gates [B, 1, 2H] are the
    logits of what is kept and of β; the ridge is `least` + softplus(`ridge` [H, K]).
    """
    H, G, tail = state["H"], state["G"], state["conv"]["tail"]
    (B, heads, K, _), width, rounding = H.shape, taps.shape[1], 10 * torch.finfo(H.dtype).eps
    y, after, new_H, new_G = H.new_empty(B, 1, heads * K), blank(tail), blank(H), blank(G)
    given = mixed, v, gates, taps, tail, ridge, *readout[:2], H, G, y, after, new_H, new_G
    how = B, heads, K, width, steps, least, 1e-6, rounding, *readout.how(heads)[1:]
    run(_least_squares.least_squares_token, given, *how)
    return y, {"H": new_H, "G": new_G, "conv": {"tail": after}}


def regression_token(
    mixed: Tensor,
    v: Tensor,
    taps: Tensor,
    state: State,
    readout: Readout,
    *,
    order: int,
    bandwidth: Tensor | None,
    ridge: Tensor | None,
) -> tuple[Tensor, State]:
    """`local_regression` from what a layer projects: y, and the state of the op and "conv".

    Queries and keys, mixed [B, 1, 2·H·K], pass a convolution, SiLU and a norm to unit length; `order` counts in
    `ORDERS`; bandwidth and ridge [H] are logarithms.
    """
    keys, values, tail, position = state["k"], state["v"], state["conv"]["tail"], state["seen"].contiguous()
    (B, H, before, K), width, seen = keys.shape, taps.shape[1], blank(position)
    y, after, new_k, new_v = keys.new_empty(B, 1, H * K), blank(tail), blank(keys), blank(values)
    learnt = taps, tail, bandwidth, ridge, *readout[:2]
    given = mixed, v, *learnt, keys, values, y, after, new_k, new_v
    how = B, H, K, width, before + 1, order, 1e-6, *readout.how(H)[1:]
    run(_least_squares.regression_token, given, position.data_ptr(), seen.data_ptr(), *how)
    return y, {"k": new_k, "v": new_v, "seen": seen, "conv": {"tail": after}}


_exponential = Kernels("exponential_step_kernels")


def coefficients_token(
    mixed: Tensor,
    gates: Tensor,
    taps: Tensor,
    length: Tensor,
    state: State,
    room: int,
    readout: Readout,
    *,
    squared: bool,
) -> tuple[Tensor, State]:
    """`exponential_memory` from what a layer projects: y, and the state of the op and "conv", with `room` places.

    Queries, keys and values, mixed [B, 1, 3·H·K], pass a convolution and SiLU; queries and keys are brought to the
    `length` [H] of their head. gates [B, 1, H·c] are the logits of c times what a token of the window is written with.
    """
    keys, values, recent, tail = state["keys"], state["values"], state["recent"], state["conv"]["tail"]
    (B, H, before, K), c, width = keys.shape, recent.shape[2] + 1, taps.shape[1]
    y, position, recent_after, after = (
        keys.new_empty(B, 1, H * K),
        state["position"].contiguous(),
        blank(recent),
        blank(tail),
    )
    moved, new_k, new_v = blank(position), keys.new_empty(B, H, room, K), keys.new_empty(B, H, room, K)
    given = mixed, taps, tail, length, gates, *readout[:2], keys, values, recent, y, after, recent_after, new_k, new_v
    how = B, H, K, width, c, before, room, squared, 1e-6, *readout.how(H)[1:]
    run(_exponential.coefficients_token, given, position.data_ptr(), moved.data_ptr(), *how)
    held = {"keys": new_k, "values": new_v, "recent": recent_after, "position": moved}
    return y, {**held, "conv": {"tail": after}}


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

    Those seen lie multiples of `stride` back; a `prefix` (two [H, P, K]) is seen always. Queries and keys are turned by
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


def chunk_token(
    mixed: Tensor, value: Tensor, scale: Tensor, shift: Tensor, bias: Tensor, state: State
) -> tuple[Tensor, State]:
    """`chunk_attention` from what TCNCA projects: y [B, 1, V], gated by SiLU(r), and the state.

    Shapes: mixed [B, 1, D + K + V + D] are u, z, r and h; value [B, 1, V]; queries and keys are SiLU(z) by `scale`
    [2, K] and `shift`; bias [C].
    """
    keys, values, position = state["k"], state["v"], state["position"].contiguous()
    (B, C, K), V, after = keys.shape, value.shape[2], blank(position)
    y, new_k, new_v = values.new_empty(B, 1, V), blank(keys), blank(values)
    given, D = (mixed, value, scale, shift, bias, keys, values, new_k, new_v, y), (mixed.shape[2] - K - V) // 2
    run(_attention.chunk_token, given, position.data_ptr(), after.data_ptr(), B, D, K, V, C)
    return y, {"k": new_k, "v": new_v, "position": after}


def update_token(x: Tensor, mixed: Tensor, found: Tensor) -> Tensor:
    """x + σ(u) ⊙ (SiLU(h + found) − x) [B, 1, D], u being the first D of mixed [B, 1, ≥ 2D] and h the last."""
    (B, _, D), y = x.shape, blank(x)
    run(_attention.update_token, (x, mixed, found, y), B, D, mixed.shape[2] - 2 * D)
    return y


_omega = Kernels("omega_step_kernels")


class Lift(NamedTuple):
    """Features as products of entries of x and 1: which [F, factors], their degrees, shares and the degrees' roots."""

    factors: Tensor
    degrees: Tensor
    shares: Tensor
    roots: Tensor


def window_token(
    mixed: Tensor,
    gates: Tensor,
    taps: Tensor,
    tail: Tensor,
    net: State,
    readout: Readout,
    lift: Lift | None,
    *,
    decays: bool,
    squared: bool,
    most: float,
    bound: float | None,
) -> tuple[Tensor, State, Tensor, bool]:
    """A matrix that writes a window of tokens: y, the next state without its anchor, its tail, and if y is finite.

    As `omega_delta`, or (not `squared`) without regard to what the matrix says, as `fast_weight` under the dot
    objective; queries and keys are lifted to features where `lift` says so.

    Shapes: mixed [B, 1, 2·H·K + H·V] passes a convolution and SiLU; gates [B, 1, ...] the logits of what is kept
    (`decays`), of the step, of the momentum, [H] each, and of the window, [H·c], where there are such.
    """
    W, S, past = net["weight"]["0"], net.get("momentum"), net.get("window")
    held, (keys, values) = S and S["0"], (None, None) if past is None else (past["key"], past["value"])
    (B, H, V, F), (D, width) = W.shape, taps.shape
    y, after, end = W.new_empty(B, 1, H * V), blank(tail), blank(W)
    moved, new_k, new_v = (None if part is None else blank(part) for part in (held, keys, values))
    which, depth, roots = (0, 0, 0), 0, None
    if lift is not None:
        shares, depth, roots = lift.shares.double(), lift.factors.shape[1], lift.roots
        which = lift.factors.data_ptr(), lift.degrees.data_ptr(), shares.data_ptr()
    weight, gate, *_ = readout
    given = mixed, gates, taps, tail, roots, weight, gate, W, held, keys, values, y, after, moved, new_k, new_v, end
    sizes = B, H, (D - H * V) // (2 * H), F, V, 1 if keys is None else keys.shape[2] + 1, depth, width
    rule = int(decays), int(S is not None), squared, float(most), float(bound or 0), 1e-6
    pos = net["pos"].contiguous()
    told: State = {"weight": {"0": end}, "pos": blank(pos)}
    when = pos.data_ptr(), told["pos"].data_ptr()
    total = run(_omega.window_token, given, *when, *which, *sizes, *rule, *readout.how(H)[1:])
    if moved is not None:
        told["momentum"] = {"0": moved}
    if new_k is not None:
        told["window"] = {"key": new_k, "value": new_v}
    return y, told, after, math.isfinite(total)


_long_conv = Kernels("long_conv_step_kernels")


def basis_token(
    x: Tensor, tail: Tensor, basis: Tensor, normed: tuple[Tensor, Tensor, Tensor], bias: Tensor
) -> tuple[Tensor, Tensor]:
    """`basis_conv` with a weight-normed map, which is read once, as it lies: y [B, 1, O] and the next tail.

    Shapes: x [B, 1, D], tail [B, L − 1, D]; basis [L, N + 1], of the farthest lag first, its last column the constant;
    `normed` the weight [O·D, N] before its rows have lengths, these and the constant's share, [O·D]; bias [O].
    """
    (B, _, D), (L, functions), weight, O = x.shape, basis.shape, normed[0], len(bias)
    fits("basis_token", tail, B, L - 1, D)
    fits("basis_token", weight, O * D, functions - 1)
    y, after = tail.new_empty(B, 1, O), blank(tail)
    run(_long_conv.basis_token, (x, tail, basis, *normed, bias, y, after), B, O, D, functions - 1, L)
    return y, after
