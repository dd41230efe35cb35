"""What the layers share: heads, rotary phases, norms, gates, and the short convolution."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import ops
from remanence.memory.bare import unhooked
from remanence.memory.linear import Linear
from remanence.ops import steps
from remanence.ops.layer_steps import Decay, Readout
from remanence.ops.norm import ACTIVATIONS, normalise
from remanence.state import State


def wide(x: Tensor) -> Tensor:
    """`x` in float32 or wider: what a state is made of, whatever the activations are."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    return x.to(torch.promote_types(x.dtype, torch.float32))


def zeros(like: Tensor, *shape: int) -> Tensor:
    """A recurrent tensor that holds nothing, in the precision of `like` but at least float32."""
    return like.new_zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32))


def per_head(where: str, width: int, heads: int, multiple: int = 1) -> int:
    """Features per head; raises `ValueError` unless `width` splits into `heads` equal multiples of `multiple`."""
    if heads < 1 or width < 1 or width % (heads * multiple):
        times = f"{multiple}·heads" if multiple > 1 else "heads"
        raise ValueError(f"{where}: dim must be a positive multiple of {times}, got dim={width}, heads={heads}.")
    return width // heads


def split(x: Tensor, heads: int) -> Tensor:
    """[batch, time, heads·width] -> [batch, heads, time, width], in float32 or wider."""
    B, T, width = x.shape
    if T == 1:
        return wide(x).view(B, heads, 1, width // heads)
    return wide(x).view(B, T, heads, width // heads).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    """[batch, heads, time, width] -> [batch, time, heads·width]."""
    B, H, T, width = x.shape
    return x.reshape(B, 1, H * width) if T == 1 else x.transpose(1, 2).flatten(2)


def rotate(x: Tensor, start: Tensor, frequencies: Tensor) -> Tensor:
    """Turn feature pairs (j, j + K/2) by `frequencies[j]` radians per position (rotary, arXiv:2104.09864).

    Angles are computed in float64, so that a position of many millions still has an exact phase.
    Shapes: x [B, H, T, K], K even; start int64 [B], the position of the first token; frequencies float64 [K/2].
    """
    if x.shape[2] == 1 and steps.worth(x):
        return steps.rotate(x, start, frequencies)
    position = start[:, None] + torch.arange(x.shape[2], device=x.device)
    angle = position[:, None, :, None].double() * frequencies.to(x.device)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def token_shift(x: Tensor, last: Tensor, mix: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """x + (x' − x) ⊙ μ for every μ of `mix`, x' being the token before, and the last token.

    Shapes: x [batch, time, dim], last [batch, dim], float32 or wider, mix [n, dim] or [n, batch, time, dim].
    """
    if x.shape[1] == 1 and steps.worth(x, last, mix):
        blends, newest = steps.token_shift(x, last, mix)
        return blends.unbind(), newest
    seen = torch.cat([last[:, None], wide(x)], 1)
    mix = mix[:, None, None] if mix.ndim == 2 else mix
    return torch.addcmul(x, seen[:, :-1].to(x.dtype) - x, mix.to(x.dtype)).unbind(), seen[:, -1]


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`; of one token by linear maps without hooks at once: a module's call costs an eighth of its product."""
    if x.shape[1] == 1 and unhooked(layer):
        if type(layer) in (nn.Linear, Linear):
            own = layer._parameters
            return F.linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
        if type(layer) is nn.Sequential:
            for part in layer:
                x = project(part, x)
            return x
    return layer(x)


def l2_norm(x: Tensor, eps: float = 1e-6, scale: float = 1.0) -> Tensor:
    """Vectors of length `scale` along the last axis; `eps` keeps the gradient at zero finite."""
    return normalise(x, eps=eps, mean=False, scale=scale)


class RMSNorm(nn.RMSNorm):
    """PyTorch's, in one pass over the input. eps is 10⁻⁵ unless given."""

    def __init__(self, width: int, eps: float = 1e-5, elementwise_affine: bool = True):
        super().__init__(width, eps=eps, elementwise_affine=elementwise_affine)

    def forward(self, x: Tensor, gate: Tensor | None = None, activation: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
        """The norm, or its product with `activation` of a gate."""
        if activation is not F.silu and x.shape[-2] == 1 and activation in ACTIVATIONS and steps.worth(x, gate):
            return steps.normalise(x, self.weight, gate, self.eps or 0.0, kind=ACTIVATIONS[activation])
        return normalise(x, self.weight, gate, eps=self.eps or 0.0, activation=activation)

    def plan(self, gate: Tensor | None = None, activation: Callable[[Tensor], Tensor] = F.silu) -> Readout:
        """The same of all heads together, for the compiled steps, which know the gates in `ACTIVATIONS`."""
        return Readout(self.weight, gate, self.eps or 0.0, ACTIVATIONS[activation], whole=True)


class HeadNorm(nn.GroupNorm):
    """Each head's features to mean 0 and variance 1, then weights and biases, and a gate where one is given.

    Shapes: y, gate and result [batch, time, heads·width].
    """

    def forward(
        self, y: Tensor, gate: Tensor | None = None, activation: Callable[[Tensor], Tensor] = torch.sigmoid
    ) -> Tensor:
        if y.shape[-2] == 1 and activation in ACTIVATIONS and steps.worth(y, gate):
            kind, heads = ACTIVATIONS[activation], self.num_groups
            return steps.normalise(y, self.weight, gate, self.eps, centred=True, bias=self.bias, kind=kind, heads=heads)
        apart = (self.num_groups, -1)
        weight, bias = (None if p is None else p.view(apart) for p in (self.weight, self.bias))
        gate = None if gate is None else gate.unflatten(-1, apart)
        y = y.unflatten(-1, apart)
        return normalise(y, weight, gate, bias=bias, eps=self.eps, centred=True, activation=activation).flatten(-2)


class ShortConv(nn.Module):
    """Causal depthwise convolution over the last `width` tokens; of one token alone it starts as the identity.

    Shapes: x and y [batch, time, dim]; state {"tail": [batch, width - 1, dim]}, the last raw inputs.
    """

    def __init__(self, dim: int, width: int = 4, *, bias: bool = False):
        super().__init__()
        if width < 1:
            raise ValueError(f"ShortConv: width must be at least 1, got {width}.")
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(dim, width).uniform_(-bound, bound))
        if width == 1:  # the published layers without a convolution scale nothing
            nn.init.ones_(self.weight)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def initial_state(self, batch: int) -> State:
        dim, width = self.weight.shape
        return {"tail": zeros(self.weight, batch, width - 1, dim)}

    def forward(
        self, x: Tensor, state: State | None = None, *, silu: bool = False, widths: Sequence[int] | None = None
    ) -> tuple[Any, State]:
        """The convolution, or its SiLU in the same pass; with `widths` in parts of so many features."""
        bias = None if self.bias is None else wide(self.bias)
        return ops.causal_conv(wide(x), wide(self.weight), bias, state, silu=silu, widths=widths)

    def apart(
        self, xs: Sequence[Tensor], state: State, widths: Sequence[int], *, silu: bool = False
    ) -> tuple[list[Tensor], State]:
        """The same of features that stand in several tensors, which need not be joined for it; each has whole parts."""
        sizes, rest, made = [x.shape[-1] for x in xs], iter(widths), []
        weights, tails = wide(self.weight).split(sizes), state["tail"].split(sizes, -1)
        biases = [None] * len(xs) if self.bias is None else wide(self.bias).split(sizes)
        for x, w, b, tail in zip(xs, weights, biases, tails, strict=True):
            own = [next(rest)]
            while sum(own) < x.shape[-1]:
                own.append(next(rest))
            made.append(ops.causal_conv(wide(x), w, b, {"tail": tail}, silu=silu, widths=own))
        return [y for ys, _ in made for y in ys], {"tail": torch.cat([after["tail"] for _, after in made], -1)}


class DecayGate(nn.Module):
    """The log decay per head that Mamba-2 made common: g = -exp(A_log) · softplus(W x + b) ≤ 0.

    At the start the rates exp(A_log) lie in (1, 16) and the step sizes in (10⁻³, 10⁻¹), log-uniformly, so that
    some heads forget in ten tokens and some in a thousand. Give `rate` and `bias` no weight decay.

    Shapes: x [batch, time, dim] -> [batch, heads, time].
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.step = Linear(dim, heads, bias=False)
        self.rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        step = F.softplus(wide(self.step(x)) + wide(self.bias))
        return -(wide(self.rate).exp() * step).transpose(1, 2)

    def logits(self, x: Tensor) -> Decay:
        """What the decay is made of, for the compiled steps."""
        return Decay(project(self.step, x), self.rate, self.bias)


class FeatureDecay(nn.Module):
    """A log decay per head and key feature: g = −exp(A) · softplus(W₂W₁x + b), or g = bound · σ(exp(A) (W₂W₁x + b)).

    Shapes: x [batch, time, dim] -> [batch, heads, time, features]. Raises: `ValueError` for a bound that is not < 0.
    """

    def __init__(self, dim: int, heads: int, features: int, rank: int, bound: float | None = None):
        super().__init__()
        if bound is not None and not bound < 0:
            raise ValueError(f"FeatureDecay: bound must be a log decay below 0, got {bound}.")
        self.heads, self.bound = heads, bound
        self.step = nn.Sequential(Linear(dim, rank, bias=False), Linear(rank, heads * features, bias=False))
        self.rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log() if bound is None else torch.zeros(heads))
        step = torch.empty(heads * features).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        step = split(wide(self.step(x)) + wide(self.bias), self.heads)
        rate = wide(self.rate).exp()[:, None, None]
        return -rate * F.softplus(step) if self.bound is None else self.bound * torch.sigmoid(rate * step)

    def logits(self, x: Tensor) -> Decay:
        """What the decay is made of, for the compiled steps."""
        return Decay(project(self.step, x), self.rate, self.bias, self.bound)


class GatedReadout(nn.Module):
    """What a matrix memory does with what it read: normalise each head, gate by SiLU(W_g x), project to `dim`.

    Args:
        affine: whether the norm has weights; `eps` is its smallest variance.
        activation: of the gate; None leaves the gate out.
        rank: of the gate, whose projection is then W₂W₁x + b.

    Shapes: y [batch, heads, time, width per head], x [batch, time, dim] -> [batch, time, dim].
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        affine: bool = True,
        eps: float = 1e-5,
        activation: Callable[[Tensor], Tensor] | None = F.silu,
        rank: int | None = None,
    ):
        super().__init__()
        width = heads * head_dim
        self.norm = RMSNorm(head_dim, eps=eps, elementwise_affine=affine)
        self.activation, self.eps = activation, eps
        self.gate: nn.Module | None = None
        if activation is not None and rank is None:
            self.gate = Linear(dim, width, bias=False)
        elif activation is not None and rank is not None:
            self.gate = nn.Sequential(Linear(dim, rank, bias=False), Linear(rank, width))
        self.out = Linear(width, dim, bias=False)

    def plan(self, x: Tensor) -> Readout:
        """The same up to the projection, for the compiled steps, which know the gates in `ACTIVATIONS`."""
        gate = None if self.gate is None else project(self.gate, x)
        return Readout(self.norm.weight, gate, self.eps, ACTIVATIONS[self.activation or F.silu])

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        gate, kind = None if self.gate is None else self.gate(x), ACTIVATIONS.get(self.activation or F.silu)
        if x.shape[1] == 1 and kind is not None and steps.worth(y, x, gate):
            y = steps.normalise(y, self.norm.weight, gate, self.eps, kind=kind)
            return self.out(y.view(len(x), 1, -1))
        y = y.to(x.dtype).transpose(1, 2)
        if gate is None or self.activation is None:
            return self.out(self.norm(y).flatten(2))
        gate = gate.unflatten(-1, y.shape[2:])
        return self.out(self.norm(y, gate, self.activation).flatten(2))


_compare = ctypes.CDLL("msvcrt" if os.name == "nt" else None).memcmp
_compare.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t


class Derived:
    """What a layer computes from its parameters alone, kept for as long as they keep their values.

    Decoding would else derive it again for every token. Values are compared, not versions: weights may change while
    they serve, in ways that no version counts. While gradients are recorded it is computed afresh.
    """

    def __init__(self, make: Callable[..., Any]):
        self.make = make
        self.seen: tuple[Tensor, ...] = ()
        self.made: Any = None
        self.inference = False  # tensors made in inference mode cannot take part in gradients later

    def __call__(self, *parameters: Tensor) -> Any:
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            return self.make(*parameters)
        inference = torch.is_inference_mode_enabled()
        known = len(self.seen) == len(parameters) and self.inference == inference
        if not known or not all(map(_same, self.seen, parameters)):
            self.seen, self.made = tuple(p.detach().clone() for p in parameters), self.make(*parameters)
            self.inference = inference
        return self.made


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.device != b.device or a.shape != b.shape:
        return False
    if a.is_cpu and a.is_contiguous() and b.is_contiguous():  # far sooner than number by number
        return _compare(a.data_ptr(), b.data_ptr(), a.nbytes) == 0
    return torch.equal(a, b)
