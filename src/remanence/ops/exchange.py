"""What the ranks of a split sequence exchange: the states that pieces start from, tensors of a neighbour, or of all.

Each exchange sends gradients back the way its tensors came, so every rank must run backward through its outputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from remanence.errors import RemanenceError

Group = Any
"""A process group of `torch.distributed`: its `rank`, `size`, `allgather`, `send`, `recv`. None is all processes."""


def joined(group: Group) -> Group:
    """The group, or that of all processes; raises `RemanenceError` where they have not been joined."""
    if group is not None:
        return group
    if not dist.is_initialized():
        raise RemanenceError("There are no ranks yet: call torch.distributed.init_process_group, or start by torchrun.")
    return dist.group.WORLD


def _gather(x: Tensor, group: Group) -> list[Tensor]:
    if x.is_complex():  # not every backend sends such numbers
        return [torch.view_as_complex(y) for y in _gather(torch.view_as_real(x.resolve_conj()), group)]
    everyone = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    group.allgather([everyone], [x.contiguous()]).wait()
    return everyone


class _Start(torch.autograd.Function):
    """The state before this rank's tokens: `first` on rank 0, else the fold of all (M, N) to the left.

    One all-gather forwards, of (M, N), and one backwards, of the gradients of the starts.
    """

    @staticmethod
    def forward(ctx: Any, M: Tensor, N: Tensor, first: Tensor, group: Group) -> Tensor:
        rank, dense = group.rank(), M.ndim == 4 and M.shape[-1] > 1
        if rank == 0:
            N = N + _apply(M, first, dense)
        everyone = _gather(torch.cat([M.flatten(), N.flatten()]), group)
        Ms, Ns = zip(*(x.split([M.numel(), N.numel()]) for x in everyone), strict=True)
        start = first.expand_as(N) if rank == 0 else Ns[0].view_as(N)
        for s in range(1, rank):
            start = _apply(Ms[s].view_as(M), start, dense) + Ns[s].view_as(N)
        ctx.save_for_backward(start, M, *Ms[rank + 1 :])
        ctx.group, ctx.dense = group, dense
        return start.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        start, M, *later = ctx.saved_tensors
        rank, dense = ctx.group.rank(), ctx.dense
        grads = _gather(grad, ctx.group)
        d_N = torch.zeros_like(grad)
        for s in reversed(range(rank + 1, len(grads))):  # of the state that this rank leaves
            M_s = later[s - rank - 1].view_as(M)
            d_N = grads[s] + _apply(_adjoint(M_s, dense), d_N, dense)
        d_M = (d_N @ start.mH if dense else d_N * start.conj()).sum_to_size(M.shape)
        d_first = grad + _apply(_adjoint(M, dense), d_N, dense) if rank == 0 else torch.zeros_like(grad)
        return d_M, d_N, d_first, None


def _apply(M: Tensor, S: Tensor, dense: bool) -> Tensor:
    return M @ S if dense else M * S


def _adjoint(M: Tensor, dense: bool) -> Tensor:
    return M.mH if dense else M.conj()


class _FromLeft(torch.autograd.Function):
    """The left neighbour's `x`, and `first` on rank 0; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _pass(x, first, 1, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_x = _pass(grad, torch.zeros_like(grad), -1, ctx.group)
        return d_x, grad if ctx.group.rank() == 0 else torch.zeros_like(grad), None


def _pass(x: Tensor, first: Tensor, step: int, group: Group) -> Tensor:
    """Send to the rank `step` further, receive from the one as far behind; `first` where there is none."""
    rank, got = group.rank(), torch.empty_like(x, memory_format=torch.contiguous_format)
    sent = x.contiguous()
    messages = []
    if 0 <= rank + step < group.size():
        messages.append(group.send([sent], rank + step, 0))
    if 0 <= rank - step < group.size():
        messages.append(group.recv([got], rank - step, 0))
    else:
        got = first.to(x.dtype).expand_as(x).clone()
    for message in messages:
        message.wait()
    return got


class _GatherAll(torch.autograd.Function):
    """Everyone's `x`, stacked on a new first axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return torch.stack(_gather(x, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.stack(_gather(grad, ctx.group))[:, ctx.group.rank()].sum(0), None


def from_left(x: Tensor, first: Tensor, group: Group = None) -> Tensor:
    """The `x` of the left neighbour, and `first` on rank 0: one message to each neighbour, gradients back through it.

    Shapes: `x` and `first` alike on every rank.
    """
    return _FromLeft.apply(x, first, joined(group))


def inherited_start(M: Tensor, N: Tensor, first: Tensor, group: Group = None) -> Tensor:
    """The state before this rank's tokens, from S_end = M S_start + N of every piece and `first`, rank 0's start.

    Shapes: N and first [B, H, K, V] or [B, D]; M broadcasts over them, or is dense, [B, H, K, K].
    """
    return _Start.apply(M, N, first, joined(group))


def gather_all(x: Tensor, group: Group = None) -> Tensor:
    """Everyone's `x`, alike in shape, stacked on a new first axis."""
    return _GatherAll.apply(x, joined(group))
