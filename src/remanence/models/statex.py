"""A larger state for layers that have already been trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.errors import RemanenceError, unknown
from remanence.memory.base import Memory
from remanence.memory.parts import split, wide
from remanence.ops.taps import Call, tap
from remanence.state import State

INITS = ("fresh", "zero", "copy")
MATRIX = ("linear_attention", "gated_delta_rule", "dplr")


class Expanded(Memory):
    """A memory whose matrices have more rows: to each head's key features come (factor − 1) times as many.

    New key and query features are linear maps of the layer's input and forget as the head's others do; delta rules
    keep the length of their keys. With `merge_heads` the heads share one matrix instead: every query reads what
    every key wrote, the state is `heads` times larger, and there is no new parameter.

    Args:
        memory: any memory whose recurrence is linear attention or a delta rule.
        factor: how many times larger the state's matrices become, ≥ 1; unused with `merge_heads`.
        init: of the new features. `fresh` is random; `zero` writes nothing at first, so that outputs are as before;
            `copy` repeats the old features, and learns what to add.
        merge_heads: linear attention only.

    Shapes: x and y [batch, time, dim]; state {"memory": that of the memory, "extra": {"0": [batch, heads,
        (factor − 1)·K, V], ...}} (with `merge_heads` [batch, heads·(heads − 1), K, V]), one per matrix.
    Raises: `RemanenceError` for a memory that has no such matrix; `ValueError` for factor < 1; `UnknownName` for init.
    """

    def __init__(self, memory: Memory, factor: int = 4, *, init: str = "fresh", merge_heads: bool = False):
        super().__init__()
        if factor < 1:
            raise ValueError(f"Expanded: factor must be at least 1, got {factor}.")
        if init not in INITS:
            raise unknown("way to initialise", init, INITS)
        self.dim, self.memory, self.factor, self.init, self.merge_heads = memory.dim, memory, factor, init, merge_heads
        self.shapes = list(_matrices(memory))
        if not self.shapes or (merge_heads and any(op != "linear_attention" for op, *_ in self.shapes)):
            what = "heads to merge: linear attention has" if merge_heads else "matrix with keys as rows"
            raise RemanenceError(f"{type(memory).__name__} has no {what}; its state stays as large as it is.")
        like = next(memory.parameters())
        self.features = nn.ModuleList()
        for _, H, K, _ in [] if merge_heads else self.shapes:
            maps = nn.Linear(memory.dim, 2 * H * (factor - 1) * K, bias=False).to(like)
            if init != "fresh":  # all, or only the half that makes keys: were both zero, no gradient would move them
                maps.weight.data[len(maps.weight) // 2 if init == "zero" else 0 :] = 0
            self.features.append(maps)

    def initial_state(self, batch: int) -> State:
        like = next(self.memory.parameters())
        zeros = wide(like).new_zeros
        extra = {
            str(i): zeros(batch, H * (H - 1), K, V) if self.merge_heads else zeros(batch, H, (self.factor - 1) * K, V)
            for i, (_, H, K, V) in enumerate(self.shapes)
        }
        return {"memory": self.memory.initial_state(batch), "extra": extra}

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        after: State = {}

        def handler(call: Call) -> Any:
            if call.op not in MATRIX:
                return call.run()
            name = str(len(after))
            run = self._merged if self.merge_heads else self._widened
            y, end, after[name] = run(call, x, len(after), state["extra"][name])
            return y, end

        with tap(handler):
            y, inner = self.memory(x, state["memory"])
        return y, {"memory": inner, "extra": after}

    def _widened(self, call: Call, x: Tensor, number: int, extra: Tensor) -> tuple[Tensor, State, Tensor]:
        old = call.arguments
        H, K = old["key"].shape[1], old["key"].shape[3]
        new_q, new_k = (split(part, H) for part in self.features[number](x).chunk(2, -1))
        if self.init == "copy":
            new_q, new_k = (
                new + wide(p).repeat(1, 1, 1, self.factor - 1)
                for new, p in ((new_q, old["query"]), (new_k, old["key"]))
            )
        key = torch.cat([old["key"], new_k.to(old["key"].dtype)], -1)
        if call.op == "gated_delta_rule":
            norm = [k.square().sum(-1, keepdim=True) + 1e-12 for k in (old["key"], key)]
            key = key * (norm[0] / norm[1]).sqrt()
        changed = {"query": torch.cat([old["query"], new_q.to(old["query"].dtype)], -1), "key": key}
        if old["log_decay"] is not None and old["log_decay"].ndim == 4:
            changed["log_decay"] = old["log_decay"].repeat(1, 1, 1, self.factor)
        if call.op == "dplr":
            changed |= {name: nn.functional.pad(old[name], (0, new_k.shape[-1])) for name in ("a", "b")}
        S = torch.cat([_start(old, extra), extra], 2)
        y, after = call.run(**changed, state={"S": S})
        first, rest = after["S"].split([K, S.shape[2] - K], 2)
        return y, {"S": first}, rest

    def _merged(self, call: Call, x: Tensor, number: int, extra: Tensor) -> tuple[Tensor, State, Tensor]:
        old = call.arguments
        (B, H, T, K), V = old["key"].shape, old["value"].shape[3]
        q, k, v = (old[name].transpose(1, 2).flatten(2)[:, None] for name in ("query", "key", "value"))
        decay = old["log_decay"]
        if decay is not None:
            decay = decay if decay.ndim == 4 else decay[..., None].expand(B, H, T, K)
            decay = decay.transpose(1, 2).flatten(2)[:, None]
        own = torch.eye(H, dtype=torch.bool, device=k.device)
        S = extra.new_zeros(B, H, H, K, V)
        S[:, own], S[:, ~own] = _start(old, extra).to(S.dtype), extra
        S = S.transpose(2, 3).reshape(B, 1, H * K, H * V)
        y, after = call.run(query=q, key=k, value=v, log_decay=decay, state={"S": S})
        S = after["S"].view(B, H, K, H, V).transpose(2, 3)
        return y.view(B, T, H, V).transpose(1, 2), {"S": S[:, own]}, S[:, ~own]


def _start(arguments: dict[str, Any], like: Tensor) -> Tensor:
    if arguments["state"] is not None:
        return arguments["state"]["S"]
    return like.new_zeros(*arguments["key"].shape[:2], arguments["key"].shape[3], arguments["value"].shape[3])


def _matrices(memory: Memory) -> Iterator[tuple[str, int, int, int]]:
    """Op, heads, key and value features of every matrix that tokens meet."""
    found: list[tuple[str, int, int, int]] = []

    def handler(call: Call) -> Any:
        if call.op in MATRIX:
            k, v = call.arguments["key"], call.arguments["value"]
            if (k.shape[0], k.shape[2]) != (2, 3):
                raise RemanenceError(f"{type(memory).__name__} does not write once per token, which has no expansion.")
            found.append((call.op, k.shape[1], k.shape[3], v.shape[3]))
        return call.run()

    with torch.no_grad(), tap(handler):
        x = torch.linspace(-1, 1, 6 * memory.dim).view(2, 3, memory.dim)
        memory(x.to(next(memory.parameters())))
    return iter(found)


@card(
    "statex",
    kind="tool",
    says="Enlarges the recurrent state of some layers of a trained model, which is then trained on.",
    source="arXiv:2509.22630",
)
def expand_state(
    model: nn.Module,
    factor: int = 4,
    *,
    every: int = 1,
    layers: Sequence[int] | None = None,
    init: str = "fresh",
    merge_heads: bool = False,
    restart: bool = False,
) -> list[nn.Parameter]:
    """Give memories of a model larger states, in place; returns the parameters that are new or were drawn afresh.

    The papers' recipes: for gated linear attention `merge_heads=True, every=6, restart=True`; for Mamba-2 `factor=4`.
    The optimiser's moments of what is returned must go: see `forget_moments`.

    Args:
        model: anything that holds memories; the outermost of each are its layers, counted from 0.
        every: each so many layers, evenly spaced from the first, are changed.
        layers: their numbers, instead of `every`.
        factor, init, merge_heads: of `Expanded`.
        restart: draw the changed memories' linear maps and norms afresh.

    Raises: as `Expanded`; `ValueError` for numbers of layers that there are not; nothing is changed then.
    Source: StateX (2025), arXiv:2509.22630. There the widened rows pass the short convolution too; here they are maps
        of the layer's input. With both new queries and new keys zero, as in one of its ablations, neither would ever
        learn; `zero` here silences the keys only.
    """
    places = list(_outermost(model))
    chosen = range(0, len(places), every) if layers is None else layers
    if odd := [i for i in chosen if not 0 <= i < len(places)]:
        raise ValueError(f"expand_state: layers must be from 0 to {len(places) - 1}, got {odd[0]}.")
    made = [Expanded(places[i][2], factor, init=init, merge_heads=merge_heads) for i in chosen]
    changed: list[nn.Parameter] = []
    for i, expanded in zip(chosen, made, strict=True):
        parent, name, memory = places[i]
        setattr(parent, name, expanded)
        changed += expanded.features.parameters()
        for part in memory.modules() if restart else ():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
                changed += part.parameters(recurse=False)
    return changed


def forget_moments(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Make an optimiser of PyTorch take these parameters as new: without moments, and among those it updates.

    Moments that belong to other values than a parameter now has would drive its first steps.
    """
    known = {p for group in optimizer.param_groups for p in group["params"]}
    optimizer.param_groups[0]["params"] += [p for p in parameters if p not in known]
    for p in parameters:
        optimizer.state.pop(p, None)


def _outermost(module: nn.Module) -> Iterator[tuple[nn.Module, str, Memory]]:
    """Parent, name and memory of all memories that are in no other."""
    for name, child in module.named_children():
        if isinstance(child, Memory):
            yield module, name, child
        else:
            yield from _outermost(child)
