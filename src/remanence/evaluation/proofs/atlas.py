"""What a window, lifted keys and orthogonal writes each do that a memory without them does not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence.catalogue import Check, proof
from remanence.memory.atlas import PolynomialFeatures
from remanence.ops.fast_weight import fast_weight, fast_weight_state
from remanence.ops.omega import omega_delta

PAIRS, WIDTH, TOKENS = 40, 8, 48


@proof(
    "atlas",
    "Fitting windows of 16 tokens halves the error of the delta rule on 48 correlated keys; quadratic features "
    "hold 40 pairs of 8 features exactly; a write's singular values lie in 0.5 to 1.25. Without window, features and "
    "Newton–Schulz, not one of the three holds.",
)
def atlas() -> tuple[Check, Check]:
    return _check(all, 16, PolynomialFeatures(WIDTH, 2).double(), True), _check(any, 1, nn.Identity(), False)


@torch.no_grad()
def _check(enough: Callable[[tuple[bool, ...]], bool], window: int, features: nn.Module, orthogonal: bool) -> Check:
    error, residual, (low, high) = _teacher(window) / _teacher(1), _residual(features), _singular(orthogonal)
    held = error <= 0.5, residual <= 1e-20, low >= 0.5 and high <= 1.25
    says = f"{error:.2f} of the delta rule's error; residual {residual:.0e}; singular values {low:.2f} to {high:.2f}"
    return Check(enough(held), says)


def _teacher(window: int) -> float:
    """Mean squared error on fresh keys, after one reading of keys that share a component, of a linear teacher's map."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(4, *shape, generator=g, dtype=torch.float64)

    key = F.normalize(normal(TOKENS, 16) + 2 * F.normalize(normal(1, 16), dim=-1), dim=-1)
    teacher, fresh = normal(16, 16), normal(500, 16)
    seen = [key[:, max(0, t + 1 - window) : t + 1] for t in range(TOKENS)]
    step = torch.stack([0.9 / torch.linalg.matrix_norm(k, ord=2).square() for k in seen], -1)
    state = fast_weight_state([key.new_zeros(1, 16, 16)], 4, window=window, momentum=False)
    k, v, gate = key[:, None], (key @ teacher.mT)[:, None], key.new_ones(4, 1, TOKENS, window)
    _, state = omega_delta(k, k, v, step[:, None], gate, state)
    return (fresh @ (state["weight"]["0"][:, 0] - teacher).mT).square().mean().item()


def _residual(features: nn.Module) -> float:
    """What the best matrix over the features leaves of random pairs."""
    g = torch.Generator().manual_seed(1)
    key = features(torch.randn(PAIRS, WIDTH, generator=g, dtype=torch.float64))
    value = torch.randn(PAIRS, 4, generator=g, dtype=torch.float64)
    left: Tensor = key @ torch.linalg.lstsq(key, value).solution - value
    return left.square().mean().item()


def _singular(orthogonal: bool) -> tuple[float, float]:
    """The extreme singular values of one write of 24 tokens."""
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 1, 24, 8, generator=g, dtype=torch.float64) for _ in range(3))
    state = fast_weight_state([torch.zeros(1, 8, 8, dtype=torch.float64)], 1, window=24)
    last = F.one_hot(torch.tensor([[23]]), 24).double()
    gate = last[..., None].expand(1, 1, 24, 24)
    steps = 5 if orthogonal else 0
    _, state = fast_weight(q, k, v, last, state, momentum_log=0 * last, window=gate, chunk_size=24, orthogonal=steps)
    values = torch.linalg.svdvals(state["weight"]["0"][0, 0])
    return values.min().item(), values.max().item()
