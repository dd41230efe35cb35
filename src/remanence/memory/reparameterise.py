"""How a free weight becomes a rate or a decay that cannot run away (StableSSM, arXiv:2311.14495).

A slow memory has its decay near 1, where a small step of the weight may do much harm. What matters is
|f'(w)| / (1 − f(w))² for a decay f, and |f'(w)| / f(w)² for a rate: it says how much the memory kernel moves with the
weight. "best" makes it proportional to |w| itself, so that a step relative to w is a step relative to the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remanence.errors import unknown

KINDS = ("direct", "exp", "softplus", "best")


def rate(w: Tensor, kind: str = "exp", *, a: float = 1.0, b: float = 0.5) -> Tensor:
    """A rate −Re Λ of continuous time: w, e^w, softplus(w) or 1/(a w² + b). Only "direct" may be negative.

    Raises: `UnknownName` for a kind that is not in `KINDS`.
    """
    if kind not in KINDS:
        raise unknown("reparameterisation", kind, KINDS)
    if kind == "direct":
        return w
    if kind == "exp":
        return w.exp()
    return F.softplus(w) if kind == "softplus" else 1 / (a * w.square() + b)


def rate_weight(r: Tensor, kind: str = "exp", *, a: float = 1.0, b: float = 0.5) -> Tensor:
    """The w ≥ 0 (where there are two) with `rate(w)` = r > 0; for "best", rates above 1/b are cut to it."""
    if kind not in KINDS:
        raise unknown("reparameterisation", kind, KINDS)
    if kind == "direct":
        return r
    if kind == "exp":
        return r.log()
    return r + torch.log(-torch.expm1(-r)) if kind == "softplus" else ((1 / r - b).clamp(min=0) / a).sqrt()


def decay(w: Tensor, kind: str = "exp", *, a: float = 1.0, b: float = 1.0) -> Tensor:
    """A decay per token: w, exp(−e^w), exp(−softplus(w)) or 1 − 1/(a w² + b), which is in [0, 1) for b ≥ 1.

    With the paper's b = ½ the last falls to −1 at w = 0, and a memory with it changes sign at each token.
    """
    if kind == "direct":
        return w
    r = rate(w, kind, a=a, b=b)
    return 1 - r if kind == "best" else (-r).exp()


def decay_weight(d: Tensor, kind: str = "exp", *, a: float = 1.0, b: float = 1.0) -> Tensor:
    """The w with `decay(w)` = d, for d in (0, 1)."""
    if kind == "direct":
        return d
    return rate_weight(1 - d if kind == "best" else -d.log(), kind, a=a, b=b)
