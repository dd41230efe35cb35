"""Softmax attention to the nearest positions along one, two or three axes. Axes: B batch, H heads, L… positions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from remanence.errors import ShapeError
from remanence.ops.decay import recurrent_dtype
from remanence.ops.taps import tapped

TILE = {1: 64, 2: 8, 3: 4}
"""Queries per axis that share one gathered window of keys."""
T = TypeVar("T")


def window_start(position: Tensor, length: int, window: int, causal: bool) -> Tensor:
    """The first of the positions that each one attends to: at the edges a window is shifted, and not cut.

    >>> window_start(torch.arange(10), 10, 5, causal=False).tolist()
    [0, 0, 0, 1, 2, 3, 4, 5, 5, 5]
    """
    if causal:
        return (position - window + 1).clamp(min=0)
    left = window // 2
    return (position - left).clamp(min=0, max=length - window)


def neighborhood_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Tensor:
    """The definition: softmax attention over all positions, with all but the neighbours masked."""
    sizes = query.shape[2:-1]
    seen = torch.ones(1, 1, dtype=torch.bool, device=query.device)
    for L, w, step, past in zip(sizes, *_per_axis(sizes, window, dilation, causal), strict=True):
        i = torch.arange(L, device=query.device)
        length = (L - i % step + step - 1) // step  # of the position's residue class
        first = torch.stack([window_start(p // step, int(n), w, past) for p, n in zip(i, length, strict=True)])
        last = i // step + 1 if past else first + w
        near = (i // step >= first[:, None]) & (i // step < last[:, None]) & (i % step == (i % step)[:, None])
        seen = (seen[:, None, :, None] & near[None, :, None, :]).flatten(0, 1).flatten(1, 2)
    dtype = recurrent_dtype(value)
    q, k, v = (x.to(dtype).flatten(2, -2) for x in (query, key, value))
    scores = (q @ k.mT / key.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).view(value.shape).to(value.dtype)


@tapped
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> Tensor:
    """Each position attends to exactly the `window` nearest along each axis, scaled by K^{−1/2}.

    Tiles of queries gather the keys that any of them sees; memory grows with the number of positions, not its square.

    Args:
        window: neighbours per axis, itself included; one number stands for all axes. A window of even size reaches
            one further back than ahead.
        dilation: distance between neighbours: only positions of the same residue see each other.
        causal: whether an axis is read in order, where each position sees itself and up to window − 1 before it.
            Only such an axis can be continued by a state: see `remanence.memory.NeighborhoodAttention`.

    Shapes: `query`, `key` [B, H, L…, K], `value` and y [B, H, L…, V], with one, two or three axes L.
    Raises: `ShapeError`; `ValueError` when window · dilation exceeds an axis that is not causal, or is below 1.
    Source: Hassani et al., Faster Neighborhood Attention, arXiv:2403.04690 (2024).
    """
    sizes = query.shape[2:-1]
    if not 1 <= len(sizes) <= 3 or key.shape != query.shape or value.shape[:-1] != key.shape[:-1]:
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
        raise ShapeError(
            "neighborhood_attention: query, key and value must be [batch, heads, one to three axes, features], "
            f"alike but for the value's features; got {shapes}."
        )
    if query.numel() == 0:
        return value
    options = _per_axis(sizes, window, dilation, causal)
    plans = [_plan(*axis, TILE[len(sizes)], query.device) for axis in zip(sizes, *options, strict=True)]
    # positions and masks of all axes together: [tiles, queries per tile], [tiles, keys per tile] and both
    at, read = (_together([getattr(p, name) for p in plans], sizes) for name in ("queries", "keys"))
    seen = plans[0].seen
    for plan in plans[1:]:
        seen = (seen[:, None, :, None, :, None] & plan.seen[None, :, None, :, None]).flatten(0, 1)
        seen = seen.flatten(1, 2).flatten(2, 3)
    dtype = recurrent_dtype(value)
    q, k, v = (x.to(dtype).flatten(2, -2) for x in (query, key, value))
    scores = (q[:, :, at] / key.shape[-1] ** 0.5) @ k[:, :, read].mT
    y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[:, :, read]
    # filled-up tiles repeat a position, with the same result: any of the copies will do
    place = torch.empty(prod(sizes), dtype=torch.int64, device=query.device)
    place[at.flatten()] = torch.arange(at.numel(), device=query.device)
    return y.flatten(2, 3)[:, :, place].view(value.shape).to(value.dtype)


class _Axis(NamedTuple):
    """One axis in tiles: positions of queries [n, t] and of the keys gathered for them [n, s], and who sees whom."""

    queries: Tensor
    keys: Tensor
    seen: Tensor


def _plan(length: int, window: int, dilation: int, causal: bool, tile: int, device: torch.device) -> _Axis:
    tile = min(tile, -(-length // dilation))
    span = min(tile + window - 1, -(-length // dilation))
    found = []
    for residue in range(min(dilation, length)):
        n = -(-(length - residue) // dilation)
        q = torch.arange(0, -(-n // tile) * tile, device=device).clamp(max=n - 1).view(-1, tile)
        first = window_start(q, n, window, causal)
        last = q + 1 if causal else first + window
        k = first[:, :1] + torch.arange(span, device=device)
        seen = (k[:, None] >= first[..., None]) & (k[:, None] < last[..., None])
        found.append(_Axis(q * dilation + residue, k.clamp(max=n - 1) * dilation + residue, seen))
    return _Axis(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _together(positions: list[Tensor], sizes: Sequence[int]) -> Tensor:
    """Per-axis positions [n_a, t_a] to flat ones [Π n_a, Π t_a]."""
    flat = positions[0]
    for more, size in zip(positions[1:], sizes[1:], strict=True):
        flat = (flat[:, None, :, None] * size + more[None, :, None, :]).flatten(0, 1).flatten(1, 2)
    return flat


def _per_axis(
    sizes: Sequence[int], window: int | Sequence[int], dilation: int | Sequence[int], causal: bool | Sequence[bool]
) -> tuple[list[int], list[int], list[bool]]:
    windows, dilations, causals = _each(window, len(sizes)), _each(dilation, len(sizes)), _each(causal, len(sizes))
    for L, w, step, past in zip(sizes, windows, dilations, causals, strict=True):
        if w < 1 or step < 1 or (not past and w * step > L > 0):
            raise ValueError(
                "neighborhood_attention: window and dilation must be at least 1, and window · dilation at most the "
                f"length of an axis that is not causal; got window={w}, dilation={step}, length={L}."
            )
    return windows, dilations, causals


def _each(x: T | Sequence[T], axes: int) -> list[T]:
    many = list(x) if isinstance(x, Sequence) else [x] * axes
    if len(many) != axes:
        raise ValueError(f"neighborhood_attention: one value per axis is needed, {axes} in all, got {many}.")
    return many
