"""Time-invariant linear recurrences with a dense transition. Axes: B batch, T time, D features, N state, M outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remanence.errors import expect
from remanence.ops import dispatch, steps
from remanence.ops.decay import recurrent_dtype, second_order
from remanence.ops.taps import tapped
from remanence.state import State

kernels = steps.Kernels("dense_ssm_kernels")
CHUNK = 32
"""Tokens handled by matrix products, a power of two; the state is carried from one such piece to the next."""


def dense_ssm_reference(
    u: Tensor, transition: Tensor, write: Tensor, read: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """The definition: h_t = Ā h_{t−1} + B̄ u_t, y_t = C h_t, for every feature by itself."""
    h = _start(u, write, state)
    transition, write, read = (p.to(h.dtype) for p in (transition, write, read))
    y = []
    for t in range(u.shape[1]):
        h = (transition @ h[..., None])[..., 0] + write * u[:, t, :, None]
        y.append((read @ h[..., None])[..., 0])
    return (torch.stack(y, 1) if y else u.to(h.dtype)[..., None] * read.sum(-1)), {"h": h}


@tapped
def dense_ssm(
    u: Tensor, transition: Tensor, write: Tensor, read: Tensor, state: State | None = None
) -> tuple[Tensor, State]:
    """h_t = Ā h_{t−1} + B̄ u_t, y_t = C h_t, for every feature by itself, in chunks by matrix products.

    Within a chunk the recurrence is the convolution with K_l = C Ā^l B̄; states cross from chunk to chunk. No state is
    held for every token.

    Shapes: `u` [B, T, D], any T ≥ 0; `transition` Ā [D, N, N]; `write` B̄ [D, N]; `read` C [D, M, N];
    y [B, T, D, M]; state {"h": [B, D, N]}. y and h have float32 or wider. Raises: `ShapeError`.
    Source: the convolution is that of the Linear State-Space Layer, arXiv:2110.13985 (2021).
    """
    expect("dense_ssm", "write", write, "features state")
    D, N = write.shape
    expect("dense_ssm", "u", u, "batch time features", features=D)
    expect("dense_ssm", "transition", transition, "features state state", features=D, state=N)
    expect("dense_ssm", "read", read, "features outputs state", features=D, state=N)
    if u.shape[1] == 1 and state is not None and steps.worth(state["h"], u, transition, write, read):
        y, after = u.new_empty(*u.shape, read.shape[1]), steps.blank(state["h"])
        given = u, transition, write, read, state["h"], y, after
        steps.run(kernels.token, given, u.shape[0], *read.shape)
        return y, {"h": after}
    if u.shape[1] <= 1:
        return dense_ssm_reference(u, transition, write, read, state)
    h = _start(u, write, state)
    transition, write, read, u = (p.to(h.dtype) for p in (transition, write, read, u))
    run = _Compiled.apply if dispatch.compiled(transition) else _in_chunks
    y, h = run(u, transition, write, read, h)
    return y, {"h": h}


def _in_chunks(u: Tensor, transition: Tensor, write: Tensor, read: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """In tensor operations, on any device."""
    (B, T, D), h = u.shape, h.permute(1, 2, 0)  # [D, N, B]
    C = min(CHUNK, T)
    powers = squarings(transition, C)
    written = krylov(powers, write[..., None], C)[..., 0, :]  # Ā^l B̄: [D, N, C]
    kernel = read @ written  # [D, M, C]
    lag = torch.arange(C, device=u.device)[:, None] - torch.arange(C, device=u.device)
    local = kernel[..., lag.clamp(min=0)].masked_fill(lag < 0, 0)  # [D, M, C, C]: K_{i−j} for j ≤ i
    seen = krylov([p.mT for p in powers], transition.mT @ read.mT, C).permute(0, 2, 3, 1)  # C Ā^{i+1}: [D, M, C, N]
    written = written.flip(-1)

    def piece(x: Tensor, h: Tensor) -> Tensor:
        """Outputs [D, M, length, columns] of inputs [D, length, columns] that follow on states [D, N, columns]."""
        n = x.shape[1]
        return local[..., :n, :n] @ x[:, None] + seen[:, :, :n] @ h[:, None]

    whole = T // C * C
    x = u[:, :whole].reshape(B, -1, C, D).permute(3, 2, 1, 0)  # [D, C, chunks, B]
    ends = (written @ x.flatten(2)).unflatten(2, x.shape[2:])
    starts = []
    for end in ends.unbind(2):
        starts.append(h)
        h = advance(powers, h, C) + end
    y = piece(x.flatten(2), torch.cat(starts, -1)).unflatten(-1, x.shape[2:])  # [D, M, C, chunks, B]
    y = y.permute(4, 3, 2, 0, 1).reshape(B, whole, D, -1)
    if rest := T - whole:
        x = u[:, whole:].permute(2, 1, 0)
        y = torch.cat([y, piece(x, h).permute(3, 2, 0, 1)], 1)
        h = advance(powers, h, rest) + written[..., C - rest :] @ x
    return y, h.permute(2, 0, 1)


class _Compiled(torch.autograd.Function):
    """Feature by feature in the cache. The gradients of powers are found by the chain of squarings alone."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, transition: Tensor, write: Tensor, read: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        (B, T, D), (_, M, N) = u.shape, read.shape
        C = min(CHUNK, 1 << (T - 1).bit_length())
        x = _by_feature(u, C)
        n = x.shape[1]
        y, end = u.new_empty(D, n, B, M * C), u.new_empty(D, B, N)
        starts, W, R = u.new_empty(D, n, B, N), u.new_empty(D, C, N), u.new_empty(D, M * C, N)
        powers = u.new_empty(D, (C.bit_length() - 1) * (n > 1), N, N)
        kept = starts, W, R, powers
        _run("forward", T - (n - 1) * C, x, transition, write, read, start.transpose(0, 1), y, *kept, end)
        ctx.save_for_backward(u, transition, write, read, start, *kept)
        y = y.unflatten(3, (M, C)).permute(2, 1, 4, 0, 3).reshape(B, n * C, D, M)
        return y[:, :T], end.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, transition, write, read, start, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            return second_order(ctx.needs_input_grad, _in_chunks, (u, transition, write, read, start), grads)
        (B, T, D), M = u.shape, read.shape[1]
        C = kept[1].shape[1]
        x, d_end = _by_feature(u, C), grads[1].transpose(0, 1)
        d_y = _by_feature(grads[0].flatten(2), C).view(D, M, *x.shape[1:]).permute(0, 2, 3, 1, 4).flatten(3)
        found = [
            torch.empty_like(p, memory_format=torch.contiguous_format) for p in (x, transition, write, read, d_end)
        ]
        _run("backward", T - (x.shape[1] - 1) * C, x, transition, write, read, *kept, d_y, d_end, *found)
        d_x, *others, d_start = found
        return d_x.permute(2, 1, 3, 0).reshape(B, -1, D)[:, :T], *others, d_start.transpose(0, 1)


def _by_feature(u: Tensor, C: int) -> Tensor:
    """[B, T, D] as contiguous [D, pieces, B, C], with zeros after the last token."""
    B, T, D = u.shape
    return torch.nn.functional.pad(u.permute(2, 0, 1), (0, -T % C)).view(D, B, -1, C).transpose(1, 2).contiguous()


def _run(name: str, rest: int, *tensors: Tensor) -> None:
    """A kernel over the features, which know nothing of each other; `rest` tokens are in the last piece."""
    from remanence.ops import dense_ssm_kernels  # here, because Numba takes half a second that most need not pay
    from remanence.ops.compiled import spread_products

    arrays = [x.detach().contiguous().numpy() for x in tensors]
    spread_products(getattr(dense_ssm_kernels, name), len(arrays[0]), 2**20, rest, *arrays)


def inverses(A: Tensor) -> Tensor:
    """The inverses of many small matrices, [D, N, N], which must have one."""
    return _Inverses.apply(A) if dispatch.compiled(A) else torch.linalg.inv(A)


class _Inverses(torch.autograd.Function):
    """For small matrices, elimination in the cache beats a call to LAPACK for each."""

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        from remanence.ops import dense_ssm_kernels
        from remanence.ops.compiled import spread

        inverse = A.detach().clone(memory_format=torch.contiguous_format)
        spread(dense_ssm_kernels.inverses, len(A), A.numel() * A.shape[1], inverse.numpy())
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grads[0] @ inverse.mT)


def dense_ssm_carry(u: Tensor, transition: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """(M [D, N, N], N [B, D, N]) with h_end = M h_start + N for every state h_start."""
    end = dense_ssm(u, transition, write, write[:, None])[1]["h"]
    one = torch.eye(write.shape[1], dtype=end.dtype, device=u.device).expand_as(transition)
    return advance(squarings(transition.to(end.dtype), u.shape[1]), one, u.shape[1]), end


def squarings(transition: Tensor, most: int) -> list[Tensor]:
    """A, A², A⁴, ...: all that powers up to `most` are made of. Shapes: [..., N, N]."""
    powers = [transition]
    while 2 ** len(powers) <= most:
        powers.append(powers[-1] @ powers[-1])
    return powers


def advance(powers: list[Tensor], h: Tensor, steps: int) -> Tensor:
    """A^steps h from `squarings` of A. Shapes: h [..., N, columns]."""
    for k, power in enumerate(powers):
        if steps >> k & 1:
            h = power @ h
    return h


def krylov(powers: list[Tensor], start: Tensor, length: int) -> Tensor:
    """A^l b for l < length, by doubling. Shapes: start [..., N, M] -> [..., N, M, length]."""
    columns, M = start, start.shape[-1]
    for power in powers:
        if columns.shape[-1] >= length * M:
            break
        columns = torch.cat([columns, power @ columns], -1)
    return columns[..., : length * M].unflatten(-1, (length, M)).mT


def _start(u: Tensor, write: Tensor, state: State | None) -> Tensor:
    if state is not None:
        return state["h"]
    return u.new_zeros(u.shape[0], *write.shape, dtype=recurrent_dtype(u))
