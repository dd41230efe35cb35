"""Where the chunks of a stream fall in a call: they are counted from the stream's first token, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from remanence.state import State, concat, select


def piece_sizes(length: int, phase: int, chunk_size: int) -> list[int]:
    """How `length` tokens fall into chunks when `phase` tokens of the first one were already read."""
    first = min(length, chunk_size - phase)
    full, rest = divmod(length - first, chunk_size)
    return [first] + [chunk_size] * full + [rest] * (rest > 0)


def whole_sizes(length: int, phase: int, chunk_size: int, most: int) -> list[int]:
    """Like `piece_sizes`, with whole chunks together, up to `most` tokens (or one chunk) at a time."""
    first = (chunk_size - phase) % chunk_size
    if first >= length:
        return [length]
    span = max(most // chunk_size, 1) * chunk_size
    full, rest = divmod(length - first, chunk_size)
    spans, left = divmod(full * chunk_size, span)
    return [first] * (first > 0) + [span] * spans + [left] * (left > 0) + [rest] * (rest > 0)


def cuts(x: Tensor, sizes: list[int], dim: int) -> Sequence[Tensor]:
    """`split` that leaves a tensor that is one piece as it is, so that its gradient is not copied."""
    return x.split(sizes, dim) if len(sizes) > 1 else (x,)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat` that leaves one piece as it is, in the order in memory that it has."""
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


def by_phase(
    run: Callable[[list[Tensor], State, int], tuple[Tensor, State]],
    inputs: list[Tensor],
    state: State,
    pos: Tensor,
    chunk_size: int,
) -> tuple[Tensor, State]:
    """`run(inputs, state, phase)` on each group of rows that stand at the same phase of a chunk."""
    phases = (pos % chunk_size).tolist()
    if len(set(phases)) == 1:
        return run(inputs, state, phases[0])
    groups = [[i for i, p in enumerate(phases) if p == phase] for phase in sorted(set(phases))]
    parts = [run([x[rows] for x in inputs], select(state, rows), phases[rows[0]]) for rows in groups]
    order = torch.tensor([i for rows in groups for i in rows], device=pos.device).argsort()
    return torch.cat([y for y, _ in parts])[order], select(concat(s for _, s in parts), order)
