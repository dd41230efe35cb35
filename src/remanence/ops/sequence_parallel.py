"""One sequence on many machines: each holds a piece, and they exchange states, not tokens.

The state's evolution over a piece is affine, S_end = M S_start + N. Every rank reads its piece from an empty state,
all gather the pairs (M, N) at once, and each adds what its true start contributes. Bytes do not depend on the length.
Where what is read is not linear in the state (slots, softmax averages), the piece is read again from its true start.

Full softmax attention has no split form here: what its ranks would exchange, keys and values, grows with the length.

Source: LASP-2, arXiv:2502.07563 (2025), extended to the dense carries of delta rules, and to stabilised sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from remanence.errors import RemanenceError, ShapeError
from remanence.ops import taps
from remanence.ops.decay import cumulative, floored, recurrent_dtype
from remanence.ops.exchange import Group, from_left, gather_all, inherited_start, joined
from remanence.ops.expgate import merge
from remanence.ops.taps import Call
from remanence.state import State


def scan(log_decay: Tensor, b: Tensor, state: State | None = None, *, group: Group = None) -> tuple[Tensor, State]:
    """`ops.scan` over a sequence of which each rank of `group` holds a piece.

    Arguments and results are the rank's own tokens (pieces may differ in length, and be empty). Of `state` only rank
    0's counts; the state returned is the one after the rank's last token, on the last rank that of the sequence.
    Every rank must run backward through its outputs. Raises: `ShapeError`.
    """
    from remanence import ops

    local, after = ops.scan(log_decay, b)
    G = cumulative(floored(log_decay.to(local.dtype)), 1)
    N = after["h"]
    M = G[:, -1].exp().to(N.dtype) if G.shape[1] else torch.ones_like(N)
    start = inherited_start(M, N, _first(state, "h", N), group)
    return local + G.exp().to(N.dtype) * start[:, None], {"h": M * start + N}


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    *,
    group: Group = None,
    **settings: Any,
) -> tuple[Tensor, State]:
    """`ops.linear_attention`, with any decay, over a sequence split as in `scan`."""
    from remanence import ops

    local, after = ops.linear_attention(query, key, value, log_decay, **settings)
    N = after["S"]
    M, read = torch.ones_like(N[..., :1]), query.to(N.dtype)
    if log_decay is not None and key.shape[2]:
        G = cumulative(floored(log_decay.to(N.dtype)), 2)
        share = (G if G.ndim == 4 else G[..., None]).exp().to(N.dtype)
        M, read = M * share[:, :, -1, :, None], read * share
    start = inherited_start(M, N, _first(state, "S", N), group)
    return (local + read @ start).to(value.dtype), {"S": M * start + N}


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    *,
    group: Group = None,
    **settings: Any,
) -> tuple[Tensor, State]:
    """`ops.gated_delta_rule` over a sequence split as in `scan`; M is dense, K × K per head."""
    from remanence import ops

    def local(value: Tensor, begin: State) -> tuple[Tensor, State]:
        return ops.gated_delta_rule(query, key, value, beta, log_decay, begin, **settings)

    return _by_columns(local, key, value, state, group)


def dplr(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    *,
    group: Group = None,
    **settings: Any,
) -> tuple[Tensor, State]:
    """`ops.dplr` over a sequence split as in `scan`; M is dense, K × K per head."""
    from remanence.ops.dplr import dplr as op

    def local(value: Tensor, begin: State) -> tuple[Tensor, State]:
        return op(query, key, value, a, b, log_decay, begin, **settings)

    return _by_columns(local, key, value, state, group)


def _by_columns(
    local: Callable[[Tensor, State], tuple[Tensor, State]],
    key: Tensor,
    value: Tensor,
    state: State | None,
    group: Group,
) -> tuple[Tensor, State]:
    """A rule acts on each column of S by itself: the identity's columns, beside the values', find what starts give."""
    (B, H, T, K), V = key.shape, value.shape[3]
    one = torch.eye(K, dtype=recurrent_dtype(value), device=value.device).expand(B, H, K, K)
    begin = {"S": torch.cat([one.new_zeros(B, H, K, V), one], -1)}
    y, after = local(torch.cat([value.to(one.dtype), one.new_zeros(B, H, T, K)], -1), begin)
    N, M = after["S"].split([V, K], -1)
    start = inherited_start(M.contiguous(), N.contiguous(), _first(state, "S", N), group)
    return (y[..., :V] + y[..., V:] @ start).to(value.dtype), {"S": M @ start + N}


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor | None,
    B: Tensor,
    C: Tensor,
    state: State | None = None,
    *,
    group: Group = None,
) -> tuple[Tensor, State]:
    """`ops.selective_scan` over a sequence split as in `scan`."""
    from remanence.ops.selective_scan import selective_scan as op
    from remanence.ops.selective_scan import selective_scan_carry

    local, after = op(x, delta, A, B, C)
    N = after["h"]
    M = selective_scan_carry(x, delta, A, B, C)[0] if A is None else (delta.to(N.dtype).sum(1)[..., None] * A).exp()
    start = inherited_start(M, N, _first(state, "h", N), group)
    inherited, _ = op(torch.zeros_like(x), delta, A, B, C, {"h": start})
    return local + inherited, {"h": M * start + N}


def complex_scan(a: Tensor, b: Tensor, state: State | None = None, *, group: Group = None) -> tuple[Tensor, State]:
    """`ops.complex_scan` over a sequence split as in `scan`."""
    from remanence import ops

    local, after = ops.complex_scan(a, b)
    N = _modes(after, b)
    ones = torch.ones_like(N)
    share, kept = ops.complex_scan(a, torch.zeros_like(b), {"h": _numbers(ones)})  # what is left of any start
    M = _modes(kept, b)
    start = inherited_start(M, N, torch.zeros_like(N) if state is None else _modes(state, N), group)
    return local + share * start[:, None], {"h": _numbers(M * start + N)}


def diagonal_ssm(
    u: Tensor, a: Tensor, read: Tensor, state: State | None = None, *, group: Group = None, **settings: Any
) -> tuple[Tensor, State]:
    """`ops.diagonal_ssm` over a sequence split as in `scan`."""
    from remanence import ops

    local, after = ops.diagonal_ssm(u, a, read, **settings)
    M, N = a ** u.shape[1], _modes(after, a)
    start = inherited_start(M, N, torch.zeros_like(N) if state is None else _modes(state, N), group)
    inherited, end = ops.diagonal_ssm(torch.zeros_like(u), a, read, {"h": _numbers(start)}, **settings)
    return local + inherited, {"h": end["h"] + after["h"]}


def _modes(state: State, like: Tensor) -> Tensor:
    """h as numbers of the kind of `like`, complex or real."""
    h = state["h"]
    return torch.view_as_complex(h.contiguous()).to(like.dtype) if like.is_complex() else h.to(like.dtype)


def _numbers(h: Tensor) -> Tensor:
    return torch.view_as_real(h.resolve_conj()) if h.is_complex() else h


def dense_ssm(
    u: Tensor, transition: Tensor, write: Tensor, read: Tensor, state: State | None = None, *, group: Group = None
) -> tuple[Tensor, State]:
    """`ops.dense_ssm` over a sequence split as in `scan`; M is dense, N × N per feature."""
    from remanence import ops

    local, after = ops.dense_ssm(u, transition, write, read)
    N = after["h"][..., None]
    M = torch.linalg.matrix_power(transition.to(N.dtype), u.shape[1])[None]
    start = inherited_start(M, N, _first(None if state is None else {"h": state["h"][..., None]}, "h", N), group)
    inherited, end = ops.dense_ssm(torch.zeros_like(u), transition, write, read, {"h": start[..., 0]})
    return local + inherited, {"h": end["h"] + after["h"]}


def slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    write: Tensor,
    log_decay: Tensor,
    state: State | None = None,
    *,
    group: Group = None,
    **settings: Any,
) -> tuple[Tensor, State]:
    """`ops.slots` over a sequence split as in `scan`."""
    from remanence import ops

    K, V = key.shape[3], value.shape[3]
    both = torch.cat([key, value], -1)
    M, N = ops.linear_attention_carry(write.to(both.dtype), both, log_decay)
    first = None if state is None else {"S": torch.cat([state["K"], state["V"]], -1)}
    start = inherited_start(M, N, _first(first, "S", N), group)
    begin = dict(zip("KV", start.split([K, V], -1), strict=True))
    return ops.slots(query, key, value, write, log_decay, begin, **settings)


def least_squares(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    ridge: Tensor,
    log_decay: Tensor | None = None,
    state: State | None = None,
    *,
    group: Group = None,
    **settings: Any,
) -> tuple[Tensor, State]:
    """`ops.least_squares` over a sequence split as in `scan`."""
    from remanence import ops

    K, V = key.shape[3], value.shape[3]
    both = torch.cat([key, value], -1)
    M, N = ops.linear_attention_carry(beta[..., None] * key, both, log_decay)
    first = None if state is None else {"S": torch.cat([state["H"], state["G"]], -1)}
    start = inherited_start(M, N, _first(first, "S", N), group)
    begin = dict(zip("HG", start.split([K, V], -1), strict=True))
    return ops.least_squares(query, key, value, beta, ridge, log_decay, begin, **settings)


def expgate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_forget: Tensor,
    log_input: Tensor,
    state: State | None = None,
    *,
    group: Group = None,
    **settings: Any,
) -> tuple[Tensor, State]:
    """`ops.expgate` over a sequence split as in `scan`."""
    from remanence import ops

    log_decay, own = ops.expgate_carry(key, value, log_forget, log_input)
    if state is None:
        state = {name: torch.zeros_like(x) for name, x in own.items()}
    start = _stabilised_start(log_decay, own, state, group)
    return ops.expgate(query, key, value, log_forget, log_input, start, **settings)


def softmax_scan(
    score: Tensor,
    value: Tensor,
    log_decay: Tensor | None = None,
    bonus: Tensor | None = None,
    state: State | None = None,
    *,
    group: Group = None,
) -> tuple[Tensor, State]:
    """`ops.softmax_scan` over a sequence split as in `scan`."""
    from remanence import ops

    total, own = ops.softmax_scan_carry(score, value, log_decay)
    if state is None:
        _, state = ops.softmax_scan(score[:, :0], value[:, :0])
    start = _stabilised_start(total.expand_as(own["m"]), own, state, group)
    return ops.softmax_scan(score, value, log_decay, bonus, start)


def _stabilised_start(log_decay: Tensor, own: State, first: State, group: Group) -> State:
    """The state before this rank's tokens where states are e^m times their tensors; `first` on rank 0.

    All gather what each piece forgets (`log_decay`) and leaves (`own`), in the float64 of the exponents, and join what
    is to their left.
    """
    shapes = {"decay": log_decay.shape, **{name: x.shape for name, x in own.items()}}
    packed = torch.cat([x.double().flatten() for x in (log_decay, *own.values())])
    everyone = gather_all(packed, group)
    nothing = 0 * everyone[0, 0]  # all must go backward through the gathering, also rank 0, which reads none of it
    start = {name: x if name == "m" else x + nothing.to(x.dtype) for name, x in first.items()}
    for piece in everyone[: joined(group).rank()]:
        parts = piece.split([shape.numel() for shape in shapes.values()])
        found = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        found = {name: x if name in ("decay", "m") else x.to(own[name].dtype) for name, x in found.items()}
        start = merge(start, found.pop("decay"), found)
    return start


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: State | None = None,
    *,
    group: Group = None,
    **settings: Any,
) -> tuple[Tensor, State]:
    """`ops.causal_conv` over a sequence split as in `scan`: the tail comes from the left neighbour.

    Raises: `ShapeError` when a rank holds fewer tokens than the tail, which then would come from further left.
    """
    from remanence import ops

    width = weight.shape[1] - 1
    if x.shape[1] < width:
        raise ShapeError(f"causal_conv over ranks: each needs at least {width} tokens, this one has {x.shape[1]}.")
    own = x[:, x.shape[1] - width :].to(recurrent_dtype(x))
    tail = from_left(own, _first(state, "tail", own), group) if width else own
    return ops.causal_conv(x, weight, bias, {"tail": tail}, **settings)


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    state: State | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    group: Group = None,
) -> tuple[Tensor, Tensor, State]:
    """`ops.window_attention` over a sequence split into equal pieces: keys and values come from the left.

    From the neighbour where the window is no longer than a piece, else by one gathering of all keys and values
    (LASP-2H), whose bytes grow with the length. Without a state, rank r's first token is number r times a piece's.
    """
    from remanence import ops

    group = joined(group)
    reach, T, rank = window - 1, key.shape[2], group.rank()
    dtype = recurrent_dtype(value)
    both = torch.cat([key, value], -1).to(dtype)
    past = both.new_zeros(*both.shape[:2], reach, both.shape[3])
    seen = torch.full((key.shape[0],), rank * T, dtype=torch.int64, device=key.device)
    if state is not None:
        past, seen = torch.cat([state["k"], state["v"]], -1).to(dtype), state["seen"]
    if reach <= T:
        past = from_left(both[:, :, T - reach :], past, group)
    else:
        everyone = gather_all(torch.cat([past, both], 2), group)
        past = torch.cat([everyone[0, :, :, :reach], *everyone[:rank, :, :, reach:]], 2)[:, :, -reach:]
    k, v = past.split([key.shape[3], value.shape[3]], -1)
    begin = {"k": k, "v": v, "seen": seen}
    return ops.window_attention(query, key, value, window=window, state=begin, prefix=prefix)


SPLIT: dict[str, Callable[..., Any]] = {
    "scan": scan,
    "complex_scan": complex_scan,
    "diagonal_ssm": diagonal_ssm,
    "dense_ssm": dense_ssm,
    "selective_scan": selective_scan,
    "dplr": dplr,
    "linear_attention": linear_attention,
    "gated_delta_rule": gated_delta_rule,
    "least_squares": least_squares,
    "slots": slots,
    "expgate": expgate,
    "softmax_scan": softmax_scan,
    "causal_conv": causal_conv,
    "window_attention": window_attention,
}


POINTWISE = ("normalise",)
"""Ops that treat every token by itself."""


def _first(state: State | None, name: str, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if state is None else state[name].to(like.dtype)


@contextmanager
def sequence_parallel(group: Group = None) -> Iterator[None]:
    """In this block every op that layers call runs over the ranks' pieces of one sequence.

    Raises: `RemanenceError` when a layer calls a recurrence that has no split form.
    """

    def handler(call: Call) -> Any:
        if call.op in POINTWISE:
            return call.run()
        if call.op not in SPLIT:
            raise RemanenceError(f"The op {call.op!r} cannot be split over ranks; these can: {', '.join(SPLIT)}.")
        return SPLIT[call.op](**call.arguments, group=group)

    with taps.tap(handler):
        yield
