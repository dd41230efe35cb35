"""Tokens of a fast-weight memory without gradients, in one compiled call: for windows and for orthogonal steps.

Every token's weights are made, and stay in the cache: for a window of a few tokens they cost less than what tells how
the tokens of a chunk enter them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from remanence.ops.inner_network import Weights
from remanence.state import State


class Form(NamedTuple):
    """What the compiled rules are besides their tensors. steps: of a Newton–Schulz iteration, or 0."""

    steps: int
    gated: bool
    before: bool
    momentum: bool
    shapes: list[tuple[int, ...]]


def token_stream(
    x: dict[str, Tensor],
    state: State,
    phase: int,
    chunk_size: int,
    *,
    orthogonal: int,
    read: str,
    residual: bool,
    gated: bool,
    bound: float | None,
) -> tuple[Tensor, State]:
    """`fast_weight` under the squared error without a norm, "after" or "before" a write.

    `x` holds its tensors by name, `momentum_log` where the state has momentum; rows stand at `phase` tokens of a chunk.
    """
    from remanence.ops import token_weights_kernels as kernels
    from remanence.ops.compiled import rows, spread_products

    query, theta, past = x["query"], x["step"], state.get("window", {})
    seen = {i: torch.cat([past[i], x[i]], 2) if past else x[i] for i in ("key", "value")}
    weights, T, momentum = state["weight"], query.shape[2], "momentum" in state
    form = Form(orthogonal, gated, read == "before", momentum, [tuple(W.shape[2:]) for W in weights.values()])
    anchor, W = (torch.cat([A.flatten(2) for A in state[i].values()], 2) for i in ("anchor", "weight"))
    S = torch.cat([A.flatten(2) for A in state["momentum"].values()], 2) if momentum else torch.zeros_like(W)
    eta = x["momentum_log"].exp() if momentum else torch.zeros_like(theta)
    gamma = x["window"] if "window" in x else torch.ones_like(theta)[..., None]
    target = seen["value"] - seen["key"] if residual else seen["value"]
    z = query.new_empty(*query.shape[:3], form.shapes[-1][0])
    inputs = [rows(part) for part in (query, seen["key"], target, theta, x["retain_log"].exp(), eta, gamma)]
    clock = query.shape[1], chunk_size, phase, 0.0 if bound is None else bound / chunk_size
    spread_products(
        kernels.stream, *kernel_sizes(form, query), *clock, *inputs, state["pos"].numpy(),
        *(rows(part) for part in (anchor, W, S, z)),
    )  # fmt: skip

    def named(packed: Tensor) -> State:
        return dict(zip(weights, unpacked(packed, form), strict=True))

    after: State = {"anchor": named(anchor), "weight": named(W)}
    after |= {"momentum": named(S)} if momentum else {}
    after |= {"window": {i: part[:, :, T:] for i, part in seen.items()}} if past else {}
    return query + z if residual else z, {**after, "pos": state["pos"] + T}


def unpacked(x: Tensor, form: Form) -> Weights:
    """The layers of [B, H, numbers]."""
    parts = x.split([out * into for out, into in form.shapes], 2)
    return [part.unflatten(2, shape) for part, shape in zip(parts, form.shapes, strict=True)]


def kernel_sizes(form: Form, query: Tensor) -> list[Any]:
    """How many heads, how much work, and what the kernels are told of the form."""
    import numpy as np

    parts = query.shape[0] * query.shape[1]
    work = parts * query.shape[2] * sum(out * into * min(out, into) for out, into in form.shapes)
    return [parts, work, form.steps, int(form.gated), int(form.before), np.array(form.shapes)]
