"""Eight bits for weights, for what enters and leaves a recurrence, and for states at rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.errors import StateError
from remanence.memory.base import Memory
from remanence.memory.parts import ShortConv
from remanence.models.statex import _outermost
from remanence.ops.taps import Call, tap
from remanence.state import State


def hadamard(n: int) -> Tensor:
    """An orthonormal matrix [n, n], float64, that spreads every feature over all: a Hadamard matrix where one is known.

    For n = 2^a · m by doubling (Sylvester), starting from 4m where 4m − 1 is prime (Paley), else from the cosine
    transform of the odd part m. Raises: `ValueError` for n < 1.
    """
    if n < 1:
        raise ValueError(f"hadamard: n must be at least 1, got {n}.")
    m = n
    while m % 2 == 0:
        m //= 2
    if m > 1 and n % (4 * m) == 0 and all((4 * m - 1) % d for d in range(2, 2 * m)):
        H = _paley(4 * m - 1)
    else:
        i = torch.arange(m, dtype=torch.float64)
        H = torch.cos(torch.pi * i[:, None] * (i + 0.5) / m) * (2 / m) ** 0.5
        H[0] = m**-0.5
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)]) / 2**0.5
    return H


def _paley(q: int) -> Tensor:
    """The orthonormal Hadamard matrix of order q + 1, for a prime q that is 3 modulo 4."""
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)], dtype=torch.float64)
    place = torch.arange(q)
    H = torch.ones(q + 1, q + 1, dtype=torch.float64)
    H[1:, 1:] = chi[(place[:, None] - place) % q] + torch.eye(q, dtype=torch.float64)
    H[1:, 0] = -1
    return H / (q + 1) ** 0.5


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x to the nearest of the 255 values scale·(−127 … 127)."""
    return (x / scale).round().clamp(-127, 127) * scale


class QuantLinear(nn.Module):
    """A linear map with int8 weights, one scale for them, and inputs rounded to 8 bits by a fixed scale.

    With a rotation H, y = (x H) (W H)ᵀ: outliers of single features are spread before they are rounded, and the
    product is as it was. Products are summed in floating point, so this shows what 8 bits cost, not what they save
    in time; `int8` takes a quarter of float32's bytes, and `weight` is made of it when asked for.
    """

    H: Tensor
    int8: Tensor
    scale: Tensor
    input_scale: Tensor

    def __init__(self, linear: nn.Linear, largest: Tensor, *, rotate: bool = False):
        super().__init__()
        W = linear.weight.detach()
        self.rotate = rotate
        if rotate:
            self.register_buffer("H", hadamard(W.shape[1]).to(W))
            W = W @ self.H
        scale = W.abs().amax().clamp(min=1e-30) / 127
        self.register_buffer("int8", (W / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("input_scale", largest.to(W).clamp(min=1e-30) / 127)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        x = rounded(x @ self.H if self.rotate else x, self.input_scale)
        return nn.functional.linear(x, self._rotated.to(x.dtype), self.bias)

    @property
    def _rotated(self) -> Tensor:
        return self.int8.to(self.scale.dtype) * self.scale

    @property
    def weight(self) -> Tensor:
        """The rounded weights in floating point, for the inputs as they come."""
        return self._rotated @ self.H.mT if self.rotate else self._rotated


class Quantised(Memory):
    """A memory whose recurrence gets its values, keys and queries in 8 bits, by fixed scales; the state stays wide.

    `scales`: per recurrence, in the order of calls, the scale of each argument by name; scalars.
    Shapes and state are the memory's.
    """

    def __init__(self, memory: Memory, scales: Iterable[dict[str, Tensor]]):
        super().__init__()
        self.dim, self.memory = memory.dim, memory
        self.names = [list(of) for of in scales]
        for i, of in enumerate(scales):
            for name, scale in of.items():
                self.register_buffer(f"scale{i}_{name}", scale)

    def initial_state(self, batch: int) -> State:
        return self.memory.initial_state(batch)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        number = 0

        def handler(call: Call) -> Any:
            nonlocal number
            if call.roles is None:
                return call.run()
            scales = {name: getattr(self, f"scale{number}_{name}") for name in self.names[number]}
            number += 1
            return call.run(**{name: rounded(call.arguments[name], scale) for name, scale in scales.items()})

        with tap(handler):
            return self.memory(x, state)


@card(
    "quamba",
    kind="tool",
    says="Makes a trained model's weights and activations 8-bit, guarding the recurrence's input and its output.",
    source="arXiv:2410.13229",
)
@torch.no_grad()
def quantise(
    model: nn.Module,
    samples: Iterable[Tensor],
    *,
    percentile: float = 99.999,
    momentum: float = 0.01,
    rotate: Callable[[str], bool] = lambda name: name.split(".")[-1] in ("out", "out_proj"),
    skip: Callable[[str], bool] = lambda name: name.split(".")[-1] == "head",
) -> None:
    """Turn the linear maps, short convolutions and recurrences of a trained model to 8 bits, in place.

    All scales are symmetric, one per tensor, and fixed by calibration: the largest value seen, but for the values that
    enter a recurrence, whose few outliers are cut at a percentile (its moving average over samples). What leaves
    a recurrence is never cut: the projection that reads it is rotated. Recurrent states stay wide, and so do decays
    and step sizes, the most sensitive of all.

    Args:
        model: called as model(sample); anything that holds memories.
        samples: inputs to calibrate on; at least one.
        percentile: of the absolute values that enter a recurrence, in (0, 100].
        momentum: weight of each further sample in its moving average.
        rotate: name of a linear map -> whether its input is rotated by a Hadamard matrix.
        skip: name of a linear map -> whether it stays as it is.

    Raises: `ValueError` without samples, or for a percentile out of range.
    Source: Quamba (2024), arXiv:2410.13229. There Δ is 8-bit too.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"quantise: percentile must be in (0, 100], got {percentile}.")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and not skip(n)}
    largest: dict[str, Tensor] = {}
    ranges: dict[Memory, list[dict[str, Tensor]]] = {memory: [] for *_, memory in _outermost(model)}
    hooks = [m.register_forward_pre_hook(_watch(n, largest, rotate(n))) for n, m in linears.items()]
    reading: list[tuple[Memory, int]] = []

    def enter(memory: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(memory, Memory)
        reading[:] = [(memory, 0)]

    def observe(call: Call) -> Any:
        if call.roles is not None and reading:
            memory, number = reading[0]
            reading[0] = (memory, number + 1)
            if number == len(ranges[memory]):
                ranges[memory].append({})
            _note(ranges[memory][number], call, percentile, momentum)
        return call.run()

    hooks += [memory.register_forward_pre_hook(enter) for memory in ranges]
    try:
        with tap(observe):
            count = sum(1 for sample in samples if model(sample) is not None)
    finally:
        for hook in hooks:
            hook.remove()
    if not count:
        raise ValueError("quantise: at least one sample is needed, got none.")
    for conv in (m for m in model.modules() if isinstance(m, ShortConv)):
        conv.weight.copy_(rounded(conv.weight, conv.weight.abs().amax().clamp(min=1e-30) / 127))
    places = list(_outermost(model))
    for name, linear in linears.items():
        if name in largest:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantLinear(linear, largest[name], rotate=rotate(name)))
    for parent_module, child, memory in places:
        if ranges[memory]:
            scales = [{name: x / 127 for name, x in of.items()} for of in ranges[memory]]
            setattr(parent_module, child, Quantised(memory, scales))


def _watch(name: str, largest: dict[str, Tensor], rotate: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        (x,) = args
        x = x @ hadamard(x.shape[-1]).to(x) if rotate else x
        if x.numel():
            most = x.abs().amax()
            largest[name] = torch.maximum(largest[name], most) if name in largest else most

    return hook


def _note(seen: dict[str, Tensor], call: Call, percentile: float, momentum: float) -> None:
    assert call.roles is not None
    for name in {"query", "key", "value", "B", "C", call.roles.value} & call.arguments.keys():
        x = call.arguments[name].abs().flatten()
        if not x.numel():
            continue
        if name == call.roles.value:
            top = x.kthvalue(max(1, round(x.numel() * percentile / 100))).values
            seen[name] = seen[name] + momentum * (top - seen[name]) if name in seen else top
        else:
            seen[name] = torch.maximum(seen[name], x.amax()) if name in seen else x.amax()
        seen[name] = seen[name].clamp(min=1e-30)


def pack_state(state: State) -> State:
    """A state at rest in 8 bits: each vector along the last axis as int8 with a float32 scale; the rest as it is.

    What comes is itself a state: rows may be selected and joined, and it can be saved. A third of float32's bytes or
    less, once vectors have more than a dozen entries. `unpack_state` makes it a state that a memory takes.
    """
    packed: State = {}
    for name, value in state.items():
        if isinstance(value, dict):
            packed[name] = pack_state(value)
        elif value.is_floating_point() and value.ndim > 1:
            scale = value.detach().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
            int8 = (value.detach() / scale).round().to(torch.int8)
            packed[name] = {"int8": int8, "scale": scale.float()}
        else:
            packed[name] = value
    return packed


def unpack_state(packed: State, like: State) -> State:
    """The state that `pack_state` was given, rounded, in the precision of `like` (any state of the same layer)."""
    state: State = {}
    for name, value in like.items():
        if name not in packed:
            raise StateError(f"unpack_state: this state belongs to another layer: it has no {name!r}.")
        given = packed[name]
        if isinstance(value, dict):
            state[name] = unpack_state(given, value)
        elif isinstance(given, dict):
            state[name] = given["int8"].to(value.dtype) * given["scale"].to(value.dtype)
        else:
            state[name] = given
    return state
