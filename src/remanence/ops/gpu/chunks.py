"""What the kernels of the matrix memories share: reading a chunk of one head, and its decays.

Axes: C tokens of a chunk, K key features, V value features; r counts the B·H heads. Tensors [B, H, T, features] come
with the strides of their first three axes. Tokens and features beyond the ends read as 0, which changes nothing.

Every decay is e to a sum that begins where the decay does: a difference of two sums would lose digits after a hard
forget, and a quotient of two decays is 0 / 0.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from remanence.ops.decay import FLOOR as LOWEST
from remanence.ops.decay import recurrent_dtype

FLOOR = tl.constexpr(LOWEST)
NONE, PER_HEAD, PER_KEY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""How many decays a token has: none, one for its head, one for each key feature."""
OPTIONS = {"num_warps": 4, "num_stages": 2}
"""Of every launch: with three stages some kernels need more shared memory than most GPUs have."""
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def take(x, at, r, H, first, last, column, width, C: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr):
    """Tokens first … first + C − 1 (before `last`) and W features from `column` of head r: [C, W]."""
    t, d = (first + tl.arange(0, C)).to(tl.int64)[:, None], column + tl.arange(0, W)[None, :]
    here = (r // H) * at[0] + (r % H) * at[1] + t * at[2] + d
    return tl.load(x + here, mask=(t < last) & (d < width), other=0).to(WIDE)


@triton.jit
def put(x, at, r, H, first, last, column, width, rows, C: tl.constexpr, W: tl.constexpr):
    """The inverse of `take`."""
    t, d = (first + tl.arange(0, C)).to(tl.int64)[:, None], column + tl.arange(0, W)[None, :]
    here = (r // H) * at[0] + (r % H) * at[1] + t * at[2] + d
    tl.store(x + here, rows.to(x.dtype.element_ty), mask=(t < last) & (d < width))


@triton.jit
def take_state(S, slot, d, e, K, V, BK: tl.constexpr, BV: tl.constexpr):
    """A block of one of many states [K, V]."""
    i, j = d + tl.arange(0, BK)[:, None], e + tl.arange(0, BV)[None, :]
    return tl.load(S + slot * K * V + i * V + j, mask=(i < K) & (j < V), other=0)


@triton.jit
def put_state(S, slot, d, e, K, V, state, BK: tl.constexpr, BV: tl.constexpr):
    i, j = d + tl.arange(0, BK)[:, None], e + tl.arange(0, BV)[None, :]
    tl.store(S + slot * K * V + i * V + j, state, mask=(i < K) & (j < V))


@triton.jit
def dot(x, y, OPERAND: tl.constexpr):
    """x y, of numbers rounded to OPERAND and summed in float32 or wider."""
    x, y = x.to(OPERAND), y.to(OPERAND)
    if INTERPRETED and tl.bfloat16 == OPERAND:  # which the interpreter cannot multiply
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def log_decays(
    g, at, r, H, first, last, d, K, KIND: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr
):
    """[C, BK], or [C] where decays are per head."""
    if KIND == PER_KEY:
        return tl.maximum(take(g, at, r, H, first, last, d, K, C, BK, WIDE), FLOOR)
    else:
        t = (first + tl.arange(0, C)).to(tl.int64)
        x = tl.load(g + (r // H) * at[0] + (r % H) * at[1] + t * at[2], mask=t < last, other=0)
        return tl.maximum(x.to(WIDE), FLOOR)


@triton.jit
def decays(
    g, at, r, H, first, last, d, K, REVERSE: tl.constexpr,
    KIND: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of tokens from `first` up to and with each or, in REVERSE, from each: [C, BK] or [C, 1]."""
    found = tl.exp(tl.cumsum(log_decays(g, at, r, H, first, last, d, K, KIND, C, BK, WIDE), 0, reverse=REVERSE))
    if KIND != PER_KEY:
        found = found[:, None]
    return found


@triton.jit
def from_start(
    g, at, r, H, first, last, d, K, KIND: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr
):
    """The decay over tokens `first` up to and with each."""
    return decays(g, at, r, H, first, last, d, K, False, KIND, C, BK, WIDE)


@triton.jit
def to_end(g, at, r, H, first, last, d, K, KIND: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr):
    """The decay over the tokens after each, up to `last` or the chunk's end."""
    return decays(g, at, r, H, first + 1, tl.minimum(last, first + C), d, K, True, KIND, C, BK, WIDE)


@triton.jit
def whole(g, at, r, H, first, last, d, K, KIND: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr):
    """The decay over a chunk, for the rows of its state: [BK, 1], or one number."""
    found = tl.exp(tl.sum(log_decays(g, at, r, H, first, last, d, K, KIND, C, BK, WIDE), 0))
    if KIND == PER_KEY:
        found = found[:, None]
    return found


@triton.jit
def between(g, at, r, H, first, T, STRICT: tl.constexpr, KIND: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr):
    """The decay after token j up to i, for j ≤ i (j < i where STRICT), else 0: [C, C]; 1 where it is not per head."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if KIND == PER_HEAD:
        own = log_decays(g, at, r, H, first, T, 0, 1, KIND, C, 1, WIDE)[:, None]
        decay = tl.exp(tl.cumsum(tl.where(i > j, own, 0), 0))
    else:
        decay = tl.full([C, C], 1, WIDE)
    if STRICT:
        return tl.where(i > j, decay, 0)
    else:
        return tl.where(i >= j, decay, 0)


@triton.jit
def pairs(
    x, x_at, y, y_at, r, H, first, T, width, C: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, OPERAND: tl.constexpr
):
    """x_i · y_j for the tokens of a chunk: [C, C]."""
    found = tl.zeros([C, C], WIDE)
    for d in range(0, width, W):
        xs = take(x, x_at, r, H, first, T, d, width, C, W, WIDE)
        ys = take(y, y_at, r, H, first, T, d, width, C, W, WIDE)
        found += dot(xs, tl.trans(ys), OPERAND)
    return found


@dataclass(frozen=True)
class Sizes:
    """What every kernel of one call is told."""

    B: int
    H: int
    T: int
    K: int
    V: int
    kind: int
    C: int
    BK: int
    BV: int
    largest: int
    dtype: torch.dtype
    wide: Any
    operand: Any

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, chunk_size: int) -> "Sizes":
        """Products are of bfloat16 numbers where all of q, k and v are; sums and states are float32 or wider."""
        dtype = recurrent_dtype(v)
        wide = tl.float64 if dtype == torch.float64 else tl.float32
        narrow = q.dtype == k.dtype == v.dtype == torch.bfloat16
        kind = 0 if g is None else g.ndim - 2
        largest = 64 if narrow else 32  # what a program holds in registers without spilling, as compiled for sm_90
        (B, H, T, K), V = k.shape, v.shape[3]
        C, BK, BV = power(chunk_size), power(K, largest), power(V, largest)
        return cls(B, H, T, K, V, kind, C, BK, BV, largest, dtype, wide, tl.bfloat16 if narrow else wide)

    @property
    def chunks(self) -> int:
        return -(-self.T // self.C)

    @property
    def heads(self) -> int:
        return self.B * self.H

    def states(self, like: Tensor) -> Tensor:
        """Room for the states before each chunk and after the last, or for their gradients."""
        return like.new_empty(self.heads, self.chunks + 1, self.K, self.V, dtype=self.dtype)


def power(n: int, largest: int = 64) -> int:
    """The power of two from 16, the least that a product takes, to `largest` that n fits in, or the largest."""
    return min(largest, max(16, triton.next_power_of_2(n)))


def strided(x: Tensor | None, like: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """x [B, H, T, …], its features side by side, and its strides; something that is not read where there is none."""
    if x is None:
        return like, (0, 0, 0)
    if x.ndim == 4 and x.stride(3) != 1:
        x = x.contiguous()
    return x, x.stride()[:3]


def blank(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty tensor to write to, laid out like x where that can be."""
    y = torch.empty_like(x, dtype=dtype)
    return y if y.stride(-1) == 1 else torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def decay_gradient(change: Tensor, over: Tensor, g: Tensor, sizes: Sizes) -> Tensor:
    """The gradient of log decays g, [B, H, T] or [B, H, T, K].

    `change`, of that shape, is that of the sums up to each token, which enter only as e^{G} q and e^{−G} k, and so is
    q ⊙ ∂q − k ⊙ ∂k; `over` [B·H, chunks, K] is that of the decay over a whole chunk. A token's decay is in its own
    sum and in all later ones of the chunk. Below the floor, where decays are clamped, the gradient is 0.
    """
    over = over.unflatten(0, (sizes.B, sizes.H))
    over = over.sum(-1) if g.ndim == 3 else over
    late = change.new_zeros(*change.shape[:2], sizes.chunks * sizes.C, *change.shape[3:])
    late[:, :, : sizes.T] = change
    found = late.unflatten(2, (sizes.chunks, sizes.C)).flip(3).cumsum(3).flip(3) + over.unsqueeze(3)
    return found.flatten(2, 3)[:, :, : sizes.T].masked_fill(g < LOWEST, 0).to(g.dtype)
