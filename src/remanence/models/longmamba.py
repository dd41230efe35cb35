"""Long inputs for memories that were trained on short ones: what hardly matters is not written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.models.statex import _outermost
from remanence.ops.taps import Call, tap
from remanence.state import State

LENGTHS = (3000, 4000, 6000, 8000, 12000, 16000, 24000, 32000, 48000, 64000, 96000, 128000, 192000)


def threshold(steps: Tensor, length: int, budget: Tensor | None = None) -> Tensor:
    """θ(L'): the step below which tokens must be skipped, for the rest of L' tokens to sum to the budget.

    The steps of a shorter text, sorted, are stretched to L' by linear interpolation, and the largest are kept until
    their sum exceeds the budget, which is their own sum by default.

    Shapes: steps [channels, tokens] ≥ 0; budget and result [channels].
    """
    budget = steps.sum(1) if budget is None else budget
    order = steps.double().sort(dim=1, descending=True).values
    between = (order[:, 1:] + order[:, :-1]) / 2
    area = torch.cat([torch.zeros_like(order[:, :1]), between.cumsum(1)], 1)
    # the sum of a stretched line is its area and half its ends: what is long is never made
    total = area * ((length - 1) / max(order.shape[1] - 1, 1)) + (order[:, :1] + order) / 2
    left = budget.double()[:, None] * (1 + 1e-9)
    place = (total <= left).sum(1, keepdim=True).clamp(max=order.shape[1] - 1)
    before = (place - 1).clamp(min=0)
    low, high = total.gather(1, before), total.gather(1, place)
    share = ((left - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
    return torch.lerp(order.gather(1, before), order.gather(1, place), share)[:, 0].to(steps.dtype)


class LongMamba(Memory):
    """A memory in whose slowly forgetting channels tokens of a small step are neither written nor forgotten by.

    Its thresholds come from `extend`. They rise with the total length, so a stream, whose length nobody knows, takes
    that of each token's own position, rounded up to a length in the table: thus resumption holds.

    Args:
        memory: any memory whose recurrences forget by input-chosen steps.
        lengths: the table's total lengths, rising.
        thresholds: for each recurrence, in the order in which the memory calls them, [lengths, channels...]; −1 for
            channels that skip nothing.
        trained: up to twice this length nothing is skipped.
        scale: b of the paper, on the thresholds.

    Shapes: x and y [batch, time, dim]; state {"memory": that of the memory, "seen": int64 [batch]}.
    """

    def __init__(
        self, memory: Memory, lengths: Sequence[int], thresholds: Sequence[Tensor], *, trained: int, scale: float = 1.0
    ):
        super().__init__()
        self.dim, self.memory, self.trained, self.scale = memory.dim, memory, trained, scale
        self.total: int | None = None
        self.register_buffer("lengths", torch.tensor(lengths, dtype=torch.int64))
        for i, theta in enumerate(thresholds):
            self.register_buffer(f"threshold{i}", theta)

    def initial_state(self, batch: int) -> State:
        weight = next(self.memory.parameters())
        return {
            "memory": self.memory.initial_state(batch),
            "seen": torch.zeros(batch, dtype=torch.int64, device=weight.device),
        }

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        place = state["seen"][:, None] + torch.arange(x.shape[1], device=x.device)
        total = place + 1 if self.total is None else torch.full_like(place, self.total)
        entry = torch.bucketize(total, self.lengths).clamp(max=len(self.lengths) - 1)  # type: ignore[arg-type]
        long = total > 2 * self.trained
        number = 0

        def handler(call: Call) -> Any:
            nonlocal number
            step = call.forgetting
            if step is None:
                return call.run()
            theta = getattr(self, f"threshold{number}", None)
            number += 1
            if theta is None or not long.any() or call.roles is None or step.shape[call.roles.time] != x.shape[1]:
                return call.run()
            least = self.scale * _tokens_in_place(theta[entry], call)
            skipped = (step <= least) & _tokens_in_place(long, call).view(*_ones(call, long, step))
            return call.run(**call.skipping(~skipped))

        with tap(handler):
            y, inner = self.memory(x, state["memory"])
        return y, {"memory": inner, "seen": state["seen"] + x.shape[1]}


def _tokens_in_place(x: Tensor, call: Call) -> Tensor:
    """[batch, time, heads...] in the layout of the op: [batch, heads, time, ...] where time is its third axis."""
    assert call.roles is not None
    return x.transpose(1, 2) if call.roles.time == 2 and x.ndim > 2 else x


def _ones(call: Call, long: Tensor, step: Tensor) -> list[int]:
    assert call.roles is not None
    shape = [1] * step.ndim
    shape[0], shape[call.roles.time] = long.shape
    return shape


def steps_of(memory: Memory, x: Tensor, state: State | None = None) -> list[tuple[Tensor, Tensor]]:
    """What each recurrence of a memory takes away at each token: (steps [batch, channels..., time], rates).

    `rates` [channels...] is what a step means in log decay, at least, where steps are of another unit; else ones.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def handler(call: Call) -> Any:
        if call.forgetting is not None and call.roles is not None:
            step = call.forgetting.movedim(call.roles.time, -1)
            A = call.arguments.get("A")
            rate = torch.ones_like(step[0, ..., 0]) if A is None else A.abs().amin(-1)
            found.append((step.detach(), rate.detach()))
        return call.run()

    with tap(handler):
        memory(x, state)
    return found


@card(
    "longmamba",
    kind="tool",
    says="Lets a trained model read far more than it was trained on: its long-lived channels skip what hardly matters.",
    source="arXiv:2504.16053",
)
@torch.no_grad()
def extend(
    model: nn.Module,
    samples: Iterable[Tensor],
    *,
    top: float = 0.1,
    lasting: float = 1e-3,
    scale: float = 1.0,
    lengths: Sequence[int] = LENGTHS,
) -> list[LongMamba]:
    """Put a `LongMamba` around every memory of a model that forgets by its input, in place; returns them.

    Training-free: the model reads the samples, all of the length that it was trained on (the paper takes 100 of 2000).
    A channel's steps, cut at their `top` quantile, sum to its budget; channels that keep more than `lasting` of the
    first token to the end are global, and only those skip tokens. In what unit a memory forgets does not matter:
    steps are −log of the decay, or Δ where the decay is exp(Δ A).

    Args:
        model: called as model(sample); anything that holds memories.
        samples: inputs of the model [batch, time, ...]; at least one.
        top: 0.05 to 0.2; the share of the largest steps that are cut.
        lasting: c of the paper, in (0, 1).
        scale: b of the paper: above 1 skips more.
        lengths: of the table.

    Set `total` of what is returned when a prompt's length is known: all its tokens then skip as that length asks.

    Raises: `ValueError` without samples, or for samples of unequal length.
    Source: LongMamba (2025), arXiv:2504.16053, for any gated recurrence instead of Mamba's.
    """
    places = list(_outermost(model))
    seen: dict[Memory, list[list[tuple[Tensor, Tensor]]]] = {memory: [] for *_, memory in places}
    time = None
    for sample in samples:
        if time not in (None, sample.shape[1]):
            raise ValueError(f"extend: samples must be of one length, got {time} and {sample.shape[1]}.")
        time = sample.shape[1]
        _observe(model, sample, seen)
    if time is None:
        raise ValueError("extend: at least one sample is needed, got none.")
    wrapped = []
    for parent, name, memory in places:
        calls = {len(parts) for parts in seen[memory]}
        tables = [_table(list(parts), top, lasting, lengths) for parts in zip(*seen[memory], strict=False)]
        if tables and len(calls) == 1:
            wrapped.append(LongMamba(memory, lengths, tables, trained=time, scale=scale))
            setattr(parent, name, wrapped[-1])
    return wrapped


def _observe(model: nn.Module, sample: Tensor, seen: dict[Memory, list[list[tuple[Tensor, Tensor]]]]) -> None:
    hooks: list[Any] = []
    for memory in seen:

        def before(memory: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert isinstance(memory, Memory)
            for hook in hooks:
                hook.remove()
            try:
                seen[memory].append(steps_of(memory, *args, **kwargs))
            finally:
                hooks[:] = [m.register_forward_pre_hook(before, with_kwargs=True) for m in seen]

        hooks.append(memory.register_forward_pre_hook(before, with_kwargs=True))
    try:
        model(sample)
    finally:
        for hook in hooks:
            hook.remove()


def _table(parts: list[tuple[Tensor, Tensor]], top: float, lasting: float, lengths: Sequence[int]) -> Tensor:
    """Thresholds [lengths, channels...], averaged over samples; −1 where a channel forgets fast, or by no input."""
    thetas, kept, fixed = [], [], []
    for steps, rate in parts:
        shape = steps.shape[:-1]
        flat = steps.flatten(0, -2)
        T = flat.shape[1]
        most = flat.kthvalue(max(1, min(T, round((1 - top) * T))), dim=1, keepdim=True).values
        budget = torch.minimum(flat, most).sum(1)
        thetas.append(torch.stack([threshold(flat, L, budget).view(shape).mean(0) for L in lengths]))
        kept.append(budget.view(shape).mean(0) * rate)
        fixed.append((flat.amax(1) - flat.amin(1) <= 1e-6 * flat.amax(1)).view(shape).all(0))
    local = torch.stack(kept).mean(0).neg().exp() <= lasting
    return torch.stack(thetas).mean(0).masked_fill(local | torch.stack(fixed).all(0), -1.0)
