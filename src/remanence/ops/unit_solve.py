"""Systems with ones on the diagonal and nothing above it, many at once: what tokens of a chunk owe to earlier ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remanence.ops import dispatch


def unit_solve(A: Tensor, X: Tensor) -> Tensor:
    """(I + A)⁻¹ X for strictly lower triangular A, of which only that part is read.

    Shapes: A [..., n, n], X [..., n, columns], with the same leading axes.
    """
    return _Solve.apply(A, X) if dispatch.compiled(X) else _plain(A, X)


def _plain(A: Tensor, X: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(A, X, upper=False, unitriangular=True)


class _Solve(torch.autograd.Function):
    """Compiled, since a call to LAPACK for each small system takes several times as long."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, X: Tensor) -> Tensor:
        Y = _run("forward", A, X)
        ctx.save_for_backward(A, Y)
        return Y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        A, Y = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            upper = A.tril(-1).mT
            d_X = torch.linalg.solve_triangular(upper, grads[0], upper=True, unitriangular=True)
        else:
            d_X = _run("backward", A, grads[0])
        return (-(d_X @ Y.mT)).tril(-1) if ctx.needs_input_grad[0] else None, d_X


def _run(name: str, A: Tensor, X: Tensor) -> Tensor:
    from remanence.ops import unit_solve_kernels  # here, because Numba takes half a second that most need not pay
    from remanence.ops.compiled import spread_products

    Y = X.detach().clone(memory_format=torch.contiguous_format)
    parts = [x.detach().reshape(-1, *x.shape[-2:]).contiguous().numpy() for x in (A, Y)]
    spread_products(getattr(unit_solve_kernels, name), len(parts[0]), A.numel(), *parts)
    return Y
