"""One token of Mamba-2, the RWKVs and JRT between a layer's projections, without gradients: one compiled call each.

`steps.worth` says when. Shapes are those of the layers' own tensors, with a time axis of one.
"""

from __future__ import annotations

from torch import Tensor

from remanence.ops.steps import Kernels, blank, fits, run
from remanence.state import State

kernels = Kernels("recurrence_step_kernels")
Map = tuple[Tensor, Tensor]
"""The two matrices of a map of low rank: inwards and outwards."""


def mamba2(
    projected: Tensor,
    conv: tuple[Tensor, Tensor, Tensor | None],
    learnt: tuple[Tensor, Tensor, Tensor, Tensor],
    start: Tensor,
    groups: int,
    limit: tuple[float, float],
    norm_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mamba-2 from what it projects to what it projects back: y [B, 1, H·V], the next state and the next tail.

    Shapes: projected [B, 1, 2·H·V + 2·groups·K + H]; `conv` tail, weights and bias; `learnt` the biases of the steps,
    the logarithms of the rates and the skips, all [H], and the norm's weights [H·V]; start [B, H, K, V].
    """
    (B, H, K, V), (tail, taps, bias) = start.shape, conv
    fits("mamba2", tail, B, taps.shape[1] - 1, H * V + 2 * groups * K)
    y, after, S = start.new_empty(B, 1, H * V), blank(tail), blank(start)
    given = projected, tail, taps, bias, *learnt, start, start.new_empty(len(taps)), y, after, S
    low, high = limit
    run(kernels.mamba2, given, B, H, groups, K, V, taps.shape[1], float(low), float(high), norm_groups, eps)
    return y, S, after


def rwkv_blends(x: Tensor, last: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
    """x' + (x − x') ⊙ μ [n, B, 1, D] for each μ of mix [n, D], and x [B, 1, D] as the next x' [B, D]."""
    (B, _, D), n = x.shape, len(mix)
    y, newest = x.new_empty(n, B, 1, D), blank(last)
    run(kernels.rwkv_blends, (x, last, mix, newest, y), n, B, D)
    return y, newest


def rwkv(k: Tensor, v: Tensor, r: Tensor, log_rate: Tensor, bonus: Tensor, state: State) -> tuple[Tensor, State]:
    """`softmax_scan` with the decay −exp(`log_rate`), gated by σ(r): k, v, r and y [B, 1, D], the others [D]."""
    B, _, D = v.shape
    w, u, m = state["w"], state["u"], state["m"].double().contiguous()
    y, sums, sizes, top = blank(v), blank(w), blank(u), blank(m)
    given = k, v, r, log_rate, bonus, w, u, v.new_empty(D), y, sums, sizes
    run(kernels.rwkv, given, m.data_ptr(), top.data_ptr(), B, D)
    return y, {"w": sums, "u": sizes, "m": top}


def rwkv6_blends(
    x: Tensor, last: Tensor, share: Tensor, down: Tensor, mix: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """x + (x' − x) ⊙ (μ + tanh((x + (x' − x) ⊙ share) down) up) [n, B, 1, D] for each μ, and x as the next x'.

    Shapes: x [B, 1, D], last [B, D], share [D], down [D, n·R], mix [n, D], up [n, R, D].
    """
    (n, R, D), B = up.shape, len(x)
    y, newest = x.new_empty(n, B, 1, D), blank(last)
    run(kernels.rwkv6_blends, (x, last, share, down, mix, up, newest, y), n, R, B, D)
    return y, newest


def rwkv6(
    w: Tensor, decay: Map, base: Tensor, rkvg: tuple[Tensor, ...], bonus: Tensor, norm: Map, eps: float, start: Tensor
) -> tuple[Tensor, Tensor]:
    """RWKV-6 from its blend w and its projections r, k, v and g to what it projects back, and the next state.

    Shapes: w, r, k, v, g and y [B, 1, D]; `decay` [D, R] and [R, D], base [D], bonus [H, 1, K], start [B, H, K, K];
    `norm` weights and biases [D].
    """
    B, H, K, _ = start.shape
    y, S = w.new_empty(B, 1, H * K), blank(start)
    r, k, v, g = rkvg
    given = w, *decay, base, r, k, v, g, bonus, *norm, start, blank(w), y, S
    run(kernels.rwkv6, given, B, H, K, decay[0].shape[1], eps)
    return y, S


def rwkv7(
    blends: tuple[Tensor, Tensor, Tensor],
    rkv: tuple[Tensor, Tensor, Tensor],
    decay: tuple[Tensor, Tensor, Tensor],
    rate: tuple[Tensor, Tensor, Tensor],
    gate: Map,
    learnt: tuple[Tensor, Tensor, Tensor],
    norm: Map,
    lowest: float,
    eps: float,
    start: Tensor,
) -> tuple[Tensor, Tensor]:
    """RWKV-7 from its blends w, a and g and its projections r, k and v to what it projects back, and the next state.

    Shapes: blends, r, k, v and y [B, 1, D]; decay, rate and gate are maps [R, D] and [D, R], the first two with biases
    [D]; `learnt` removal, replacement and bonus, of D numbers; `norm` weights and biases [D]; start [B, H, K, K].
    """
    B, H, K, _ = start.shape
    y, S, room = start.new_empty(B, 1, H * K), blank(start), start.new_empty(3, B, H * K)
    given = *blends, *rkv, *decay, *rate, *gate, *learnt, *norm, start, room, y, S
    run(kernels.rwkv7, given, B, H, K, len(decay[0]), len(rate[0]), len(gate[0]), lowest, eps)
    return y, S


def taylor(qk: Tensor, v: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Linear attention over `taylor_features`, divided by what a value of 1 reads: y as v, and the next state.

    Shapes: qk [B, 1, 2·H·d] (queries, then keys), v [B, 1, H·V], start [B, H, 1 + d + d(d + 1)/2, V + 1].
    """
    (B, H, _, columns), y, S = start.shape, blank(v), blank(start)
    run(kernels.taylor, (qk, v, start, y, S), B, H, qk.shape[2] // (2 * H), columns - 1, 1e-12)
    return y, S
