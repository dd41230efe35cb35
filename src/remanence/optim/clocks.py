"""Clocks: every part of a model learns at its own pace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from remanence.errors import CheckpointError, RemanenceError, unknown
from remanence.optim.adamw import AdamW


class Optimizer(Protocol):
    """What a clock drives: PyTorch's optimisers, and those of this package."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, tree: Any, /) -> None: ...


@dataclass(frozen=True, eq=False)
class Clock:
    """A part of a model and the pace at which it learns.

    Args:
        part: a module, or parameters.
        period: steps from one update to the next; gradients are gathered in between.
        make: parameters -> optimiser. `functools.partial(AdamW, lr=1e-3)` gives it arguments.
        reduce: whether an update sees the mean of the gathered gradients, or their sum.
        restart: steps after which the part returns to its start and its optimiser is made anew; None for never.
        follow: in [0, 1]. At a restart the start itself first moves by this share to where the part ended, so that it
            learns where to begin (Nichol et al. 2018, arXiv:1803.02999); 0 keeps the start as it was made.

    Raises: `ValueError` for numbers out of range.
    """

    part: nn.Module | Iterable[nn.Parameter]
    period: int = 1
    make: Callable[[Iterable[nn.Parameter]], Optimizer] = AdamW
    reduce: Literal["mean", "sum"] = "mean"
    restart: int | None = None
    follow: float = 0.0

    def __post_init__(self) -> None:
        for name, value in {"period": self.period, "restart": self.restart or 1}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Clock: {name} must be a count of steps of at least 1, got {value!r}.")
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"Clock: reduce must be 'mean' or 'sum', got {self.reduce!r}.")
        if not 0 <= self.follow <= 1:
            raise ValueError(f"Clock: follow must lie in [0, 1], got {self.follow!r}.")


class _Part:
    """A clock that runs."""

    def __init__(self, clock: Clock):
        self.clock = clock
        given = clock.part.parameters() if isinstance(clock.part, nn.Module) else clock.part
        self.parameters = [p for p in given if p.requires_grad]
        self.optimizer = clock.make(self.parameters)
        self.sums: dict[int, Tensor] = {}
        self.start = [p.detach().clone() for p in self.parameters] if clock.restart else []

    def tick(self, step: int) -> None:
        """After the `step`-th backward pass: gather, and learn or begin anew where it is time."""
        if self.clock.period == 1:
            self.optimizer.step()
        else:
            self._gather()
            if step % self.clock.period == 0:
                self._learn()
        if self.clock.restart and step % self.clock.restart == 0:
            self._restart()

    def _gather(self) -> None:
        for i, p in enumerate(self.parameters):
            if p.grad is not None and i in self.sums:
                self.sums[i].add_(p.grad)
            elif p.grad is not None:
                self.sums[i] = p.grad.detach().clone()

    def _learn(self) -> None:
        share = 1 / self.clock.period if self.clock.reduce == "mean" else 1.0
        for i, p in enumerate(self.parameters):
            p.grad = self.sums[i].mul_(share) if i in self.sums else None
        self.sums = {}
        self.optimizer.step()

    def _restart(self) -> None:
        for p, start in zip(self.parameters, self.start, strict=True):
            p.copy_(start.lerp_(p, self.clock.follow))
        rates = [group["lr"] for group in self.optimizer.param_groups]
        getattr(self.optimizer, "close", lambda: None)()  # those that watch a model must not go on watching
        self.optimizer, self.sums = self.clock.make(self.parameters), {}
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        named = {"sums": self.sums, "start": dict(enumerate(self.start))}
        return {
            "clock": [self.clock.period, self.clock.restart],
            "optimizer": self.optimizer.state_dict(),
            **{name: {str(i): t for i, t in tensors.items()} for name, tensors in named.items()},
        }

    def fits(self, tree: Mapping[str, Any]) -> bool:
        """Whether a state is of this part and this pace."""
        if list(tree.get("clock", ())) != [self.clock.period, self.clock.restart]:
            return False
        shapes = {str(i): p.shape for i, p in enumerate(self.parameters)}
        if tree["start"].keys() != (shapes.keys() if self.start else set()):
            return False
        return all(shapes.get(i) == t.shape for name in ("sums", "start") for i, t in tree[name].items())

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        optimizer = dict(tree["optimizer"])
        if isinstance(self.optimizer, torch.optim.Optimizer):
            # its keys are numbers, which a checkpoint's JSON made strings
            optimizer["state"] = {int(k): v for k, v in optimizer["state"].items()}
        self.optimizer.load_state_dict(optimizer)
        self.sums = {int(i): t.detach().clone() for i, t in tree["sums"].items()}
        for i, t in tree["start"].items():
            self.start[int(i)].copy_(t)


class Clocks:
    """One optimiser made of several, each over its own part of a model and with its own period.

    It takes the place of any optimiser: `Learner(model, Clocks(Clock(fast), Clock(slow, period=1000)))`. Every step
    adds the gradients at hand to what a slow part has gathered; when the step's number is a multiple of the part's
    period, its optimiser sees their mean (or sum) and the part changes. Between updates a part stands still, bit for
    bit. What was gathered belongs to the state, so a run restarts exactly also within a period.

    Periods count calls of `step`: with a learner one per segment, whatever the segment's length. `param_groups` are
    those of all parts in order, so that schedules reach all. A rate that changes within a period counts as it stands
    when the period ends.

    Args:
        clocks: the parts; no parameter may belong to two. Parameters in none do not learn.

    Raises: `RemanenceError` for a parameter with two clocks or a part that has none.

    >>> fast, slow = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> [len(group["params"]) for group in Clocks(Clock(fast), Clock(slow, period=1000)).param_groups]
    [1, 1, 1, 1]
    """

    def __init__(self, *clocks: Clock):
        self.parts = [_Part(clock) for clock in clocks]
        self.count = 0
        seen: set[nn.Parameter] = set()
        for i, part in enumerate(self.parts):
            if not part.parameters:
                raise RemanenceError(f"Clocks: part {i} has no parameters that learn.")
            if shared := seen.intersection(part.parameters):
                shape = list(next(iter(shared)).shape)
                raise RemanenceError(f"Clocks: a parameter of shape {shape} has two clocks; part {i} is the second.")
            seen.update(part.parameters)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts, first to last."""
        return [group for part in self.parts for group in part.optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients at hand; what was gathered stays."""
        for part in self.parts:
            for p in part.parameters:
                p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Let one step pass: gather everywhere, update those parts whose period ends."""
        self.count += 1
        for part in self.parts:
            part.tick(self.count)

    def state_dict(self) -> dict[str, Any]:
        """The step's number, and of each part its optimiser's state, gathered gradients and start."""
        return {"step": self.count, "parts": {str(i): part.state_dict() for i, part in enumerate(self.parts)}}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises: `CheckpointError`, changing nothing, when it does not fit."""
        trees = list(tree.get("parts", {}).values())
        if len(trees) != len(self.parts):
            raise CheckpointError(f"The checkpoint has {len(trees)} clocks, but this optimiser has {len(self.parts)}.")
        for i, (part, theirs) in enumerate(zip(self.parts, trees, strict=True)):
            if not part.fits(theirs):
                raise CheckpointError(f"The optimiser's state is of another model or pace: clock {i} differs.")
        before = deepcopy([part.state_dict() for part in self.parts])
        try:
            for part, theirs in zip(self.parts, trees, strict=True):
                part.load_state_dict(theirs)
        except (CheckpointError, KeyError, ValueError, TypeError, AttributeError, RuntimeError):
            for part, mine in zip(self.parts, before, strict=True):
                part.load_state_dict(mine)
            raise
        self.count = int(tree["step"])


def clocked(
    model: nn.Module,
    periods: Mapping[str, int] | None = None,
    make: Callable[[Iterable[nn.Parameter]], Optimizer] = AdamW,
) -> Clocks:
    """`Clocks` over all parameters of a model, by name.

    Args:
        model: the model that learns.
        periods: name of a module or parameter, as in `model.named_parameters()`, -> period. The longest name that
            fits a parameter counts; "" names the whole model. Where none fits, the nearest module around it that
            declares an `update_period` (and perhaps a `restart_period` and `restart_follow`) does, as the levels of
            `ContinuumMemory` do; else 1.
        make: parameters -> optimiser, for each pace.

    Raises: `UnknownName` for a name that no parameter has.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    >>> [part.clock.period for part in clocked(model, {"": 16, "0.bias": 1}).parts]
    [1, 16]
    """
    given = dict(periods or {})
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for prefix in given:
        if not any(prefix in _around(name) for name in names):
            raise unknown("part of the model", prefix, {part for name in names for part in _around(name)})
    modules = dict(model.named_modules())
    paces: dict[tuple[int, int | None, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        named = next((given[part] for part in _around(name) if part in given), None)
        declared = (modules[part] for part in _around(name) if hasattr(modules.get(part), "update_period"))
        around = next(declared, None)
        pace: tuple[int, int | None, float] = (1 if named is None else named, None, 0.0)
        if named is None and around is not None:
            restart, follow = getattr(around, "restart_period", None), getattr(around, "restart_follow", 0.0)
            pace = int(around.update_period), restart, follow
        paces.setdefault(pace, []).append(p)
    ordered = sorted(paces, key=lambda pace: pace[0])
    return Clocks(*(Clock(paces[p], p[0], make, restart=p[1], follow=p[2]) for p in ordered))


def _around(name: str) -> Iterator[str]:
    """A parameter's name and those of the modules around it, innermost first."""
    parts = name.split(".")
    for n in range(len(parts), -1, -1):
        yield ".".join(parts[:n])
