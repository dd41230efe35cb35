"""Reading a prompt with fewer and fewer tokens from layer to layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remanence.catalogue import card
from remanence.memory.base import Memory
from remanence.ops.taps import Call, tap
from remanence.state import State


def contributions(memory: Memory, x: Tensor, state: State | None = None) -> Tensor:
    """How much each token still adds to what the last token reads: [batch, time], ≥ 0.

    The outputs of a recurrence are linear in its values, so value times gradient is exactly the value's share of the
    last output; shares are summed in absolute value over features, heads and recurrences. For Mamba this is
    Σ_d |Σ_n C_T[n] (Π_{s>t} Ā_s)[d, n] B̄_t[d, n] x_t[d]|. A memory without a recurrence whose roles are known (a
    network, attention) is scored alike by its input, to first order.

    Shapes: x [batch, time, dim]. Costs one pass forwards and one back.
    """
    if not x.shape[1]:
        return x.new_zeros(x.shape[:2])
    found: list[tuple[Tensor, Tensor, int]] = []

    def handler(call: Call) -> Any:
        if call.roles is None:
            return call.run()
        value = call.arguments[call.roles.value].detach().requires_grad_()
        result = call.run(**{call.roles.value: value})
        if value.shape[call.roles.time] == x.shape[1] and result[0].requires_grad:
            found.append((value, result[0].select(call.roles.time, -1), call.roles.time))
        return result

    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        with tap(handler):
            y, _ = memory(leaf, state)
        scores = x.new_zeros(x.shape[:2])
        for value, last, time in found:
            (grad,) = torch.autograd.grad(last.sum(), value, retain_graph=True)
            share = (value * grad).abs().sum(-1)
            scores = scores + (share if time == 1 else share.sum(1)).to(scores.dtype)
        if not scores.any():
            scores = (leaf * torch.autograd.grad(y[:, -1].sum(), leaf)[0]).abs().sum(-1)
    return scores.detach()


def prune_tokens(scores: Tensor, keep: int) -> Tensor:
    """Places of the `keep` tokens with the highest scores, in their order, the last token always among them.

    Shapes: scores [batch, time] -> int64 [batch, keep]. Raises: `ValueError` unless 1 ≤ keep ≤ time.
    """
    if not 1 <= keep <= scores.shape[1]:
        raise ValueError(f"prune_tokens: keep must be from 1 to {scores.shape[1]}, got {keep}.")
    scores = scores.clone()
    scores[:, -1] = torch.inf
    return scores.topk(keep, dim=1).indices.sort(dim=1).values


def falling(layers: int, final: float = 0.1, every: int = 2) -> list[float]:
    """The share of tokens that is left after each layer: it falls evenly to `final`, every so many layers.

    >>> falling(4, 0.2, 2)
    [1.0, 0.6, 0.6, 0.2]
    """
    share, shares = 1.0, []
    for i in range(layers):
        if (i + 1) % every == 0 or i == layers - 1:
            share = round(1 - (1 - final) * (i + 1) / layers, 12)
        shares.append(share)
    return shares


@card(
    "simba",
    kind="tool",
    says="Reads a prompt with fewer tokens in each deeper layer: those that still matter to the last one.",
    source="arXiv:2505.20698",
)
@contextmanager
def token_pruning(blocks: Sequence[nn.Module], keep: Sequence[float] | None = None) -> Iterator[list[Tensor]]:
    """In this block, calls of `blocks` drop tokens: after block i a share `keep[i]` of the prompt is left.

    Yields a list that receives, per pruned block, the places in the prompt that are left [batch, count]. Each row
    keeps its own. The state that a model leaves is that of the tokens that each layer read: one prompt is read in one
    piece, and then decoded, without this, from that state. Training-free; gradients are not the point.

    Args:
        blocks: the model's residual blocks, first to last, each called as block(x, state) -> (x, state) and holding
            one memory: `model.blocks` of `LanguageModel`.
        keep: shares in (0, 1] that never rise; `falling(len(blocks))` by default. 1 everywhere changes nothing.

    Raises: `ValueError` on shares that rise, are out of range, or of another number.
    Source: Sparsified State-Space Models are Efficient Highway Networks (2025), arXiv:2505.20698. The aggregation over
        features and the schedule are not published in full: absolute values are summed, shares fall linearly.
    """
    keep = falling(len(blocks)) if keep is None else list(keep)
    if len(keep) != len(blocks) or any(not 0 < b <= a for a, b in zip([1.0, *keep], keep, strict=False)):
        raise ValueError(f"token_pruning: keep must be {len(blocks)} shares in (0, 1] that never rise, got {keep}.")
    kept: list[Tensor] = []
    length: list[int] = []

    def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.clear()
        length[:] = [args[0].shape[1]]

    hooks: list[Any] = [blocks[0].register_forward_pre_hook(begin)] if blocks else []
    for i, (block, share) in enumerate(zip(blocks, keep, strict=True)):
        if share < (keep[i - 1] if i else 1.0):
            hooks += _pruned(block, share, length, kept)
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _pruned(block: nn.Module, share: float, length: list[int], kept: list[Tensor]) -> list[Any]:
    memory = next(m for m in block.modules() if isinstance(m, Memory))
    scores: list[Tensor] = []
    measuring = False

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal measuring
        if not measuring:
            measuring = True
            scores[:] = [contributions(memory, *args)]
            measuring = False

    def after(module: nn.Module, args: tuple[Any, ...], result: tuple[Tensor, State]) -> tuple[Tensor, State]:
        x, state = result
        places = prune_tokens(scores[0], max(1, min(x.shape[1], round(share * length[0]))))
        kept.append(kept[-1].gather(1, places) if kept else places)
        return x.gather(1, places[..., None].expand(-1, -1, x.shape[2])), state

    return [memory.register_forward_pre_hook(before), block.register_forward_hook(after)]
