"""How far back the past still matters to a model's next prediction, and where along a text it begins to fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence.catalogue import card
from remanence.errors import ShapeError
from remanence.memory.base import Memory
from remanence.state import flatten


@card(
    "effective-remembrance",
    kind="diagnostic",
    says="How much a model's next prediction changes when it did not read what came before some token.",
    source="arXiv:2507.02782",
    covers="length-generalization",
)
@torch.no_grad()
def effective_remembrance(model: Callable[[Tensor], Any], tokens: Tensor, starts: Sequence[int]) -> Tensor:
    """EffRem_T(t) = TV(p(· | x_0 … x_T), p(· | x_t … x_T)) for each t: 0 if nothing before t matters, at most 1.

    TV is the total variation, half the sum of absolute differences. A model that is sound beyond its training length
    lets it fall as t goes back; one that has never met its states sees it rise.

    Args:
        model: called as model(tokens) -> (logits, ...) or logits, from an empty state.
        tokens: int64 [batch, time].
        starts: values of t, from 0 to time − 1.

    Returns: [starts, batch]. Raises: `ShapeError`; `ValueError` for a start outside the text.
    Source: Understanding and Improving Length Generalization in Recurrent Models (2025), arXiv:2507.02782.
    """
    if tokens.ndim != 2:
        raise ShapeError(f"effective_remembrance: tokens must be [batch, time], got {list(tokens.shape)}.")
    if odd := [t for t in starts if not 0 <= t < tokens.shape[1]]:
        raise ValueError(f"effective_remembrance: starts must be from 0 to {tokens.shape[1] - 1}, got {odd[0]}.")
    whole = _next(model, tokens)
    return torch.stack([(whole - _next(model, tokens[:, t:])).abs().sum(-1) / 2 for t in starts])


@torch.no_grad()
def loss_by_position(model: Callable[[Tensor], Any], tokens: Tensor, bins: int = 16) -> tuple[Tensor, Tensor]:
    """Mean loss in nats per token over `bins` equal stretches of the text: (first positions [bins], losses [bins]).

    Shapes: tokens int64 [batch, time], time > bins; position t is the prediction of token t + 1.
    Raises: `ValueError` when there are fewer predictions than bins.
    """
    if not 1 <= bins < tokens.shape[1]:
        raise ValueError(f"loss_by_position: bins must be from 1 to {tokens.shape[1] - 1}, got {bins}.")
    logits = _logits(model, tokens)[:, :-1].double()
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    pieces = losses.view(len(tokens), -1).mean(0).tensor_split(bins)
    first = torch.tensor([0, *[len(p) for p in pieces[:-1]]]).cumsum(0)
    return first, torch.stack([p.mean() for p in pieces])


@torch.no_grad()
def state_norms(memory: Memory, x: Tensor, positions: Sequence[int]) -> dict[str, Tensor]:
    """The norm of each tensor of the state after so many tokens, by its path: [positions, batch].

    A norm that is still moving at the end of the training length will be elsewhere beyond it.

    Args:
        memory: any memory.
        x: [batch, time, dim].
        positions: rising numbers of tokens, from 0 to time.

    Raises: `ValueError` for positions that fall or lie outside.
    """
    if any(b < a for a, b in zip([0, *positions], [*positions, x.shape[1]], strict=True)):
        raise ValueError(f"state_norms: positions must rise from 0 to {x.shape[1]}, got {list(positions)}.")
    state, at = memory.initial_state(x.shape[0]), 0
    norms: dict[str, list[Tensor]] = {}
    for position in positions:
        _, state = memory(x[:, at:position], state)
        at = position
        for path, t in flatten(state).items():
            if t.is_floating_point():
                norms.setdefault(path, []).append(t.flatten(1).double().norm(dim=1))
    return {path: torch.stack(n) for path, n in norms.items()}


def _logits(model: Callable[[Tensor], Any], tokens: Tensor) -> Tensor:
    out = model(tokens)
    return out[0] if isinstance(out, tuple) else out


def _next(model: Callable[[Tensor], Any], tokens: Tensor) -> Tensor:
    return _logits(model, tokens)[:, -1].double().softmax(-1)
