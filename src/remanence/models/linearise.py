"""Turning a model's softmax attention into recurrences that keep its weights, and teaching them what is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from remanence.catalogue import card, cards
from remanence.errors import unknown
from remanence.memory.softmax import SoftmaxAttention, SoftmaxWeights

M = TypeVar("M", bound=nn.Module)


@card(
    "linearise",
    kind="tool",
    says="Replaces a model's softmax attention by a recurrence with the same weights (Liger, Lizard).",
    source="arXiv:2503.01496",
    covers="liger",
)
def linearise(model: M, to: str = "liger", **arguments: Any) -> M:
    """A copy of a model in which every `SoftmaxAttention` has become `to`, with its weights.

    Args:
        model: any module with softmax layers of ours in it; it is left as it was.
        to: "liger", which has no other parameters, or "lizard", whose feature maps, gates and meta tokens are new.
        arguments: of the new layers (`window`, `mix`, ...).

    Raises: `UnknownName` when `to` is no such memory; `ValueError` when the model has no softmax layer.
    """
    known = {id: c.make for id, c in cards("memory").items() if _shares_weights(c.make)}
    if to not in known:
        raise unknown("linearisation", to, known)
    student = copy.deepcopy(model)
    layers = list(_attentions(student, SoftmaxAttention))
    if not layers:
        raise ValueError(f"linearise: {type(model).__name__} has no layer of softmax attention.")
    for path, old in layers:
        new = known[to](old.dim, heads=old.heads, kv_heads=old.kv_heads, **arguments)
        new.frequencies = old.frequencies
        new = new.to(old.out.weight).train(old.training)
        new.load_state_dict(old.state_dict(), strict=False)
        parent, _, name = path.rpartition(".")
        if not path:
            return new
        setattr(student.get_submodule(parent), name, new)
    return student


def attention_transfer(student: nn.Module, teacher: nn.Module, *inputs: Any) -> Tensor:
    """How far each linearised layer is from the teacher's attention, on the teacher's own activations.

    The mean squared error of the outputs, summed over layers: what Lizard's first stage makes small, with all but the
    new parameters frozen (`new_parameters`). `inputs` are what the teacher is called with.

    Raises: `ValueError` when the two have no such pairs of layers.
    """
    pairs = list(zip(_attentions(student), _attentions(teacher, SoftmaxAttention), strict=True))
    if not pairs:
        raise ValueError("attention_transfer: the teacher has no layer of softmax attention.")
    seen: list[tuple[SoftmaxWeights, Tensor, Tensor]] = []

    def listen(layer: SoftmaxWeights) -> Callable[..., None]:
        return lambda _, given, out: seen.append((layer, given[0].detach(), out[0].detach()))

    hooks = [old.register_forward_hook(listen(new)) for (_, new), (_, old) in pairs]
    try:
        with torch.no_grad():
            teacher(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    losses = [F.mse_loss(layer(x)[0], y) for layer, x, y in seen]
    return torch.stack(losses).sum()


def new_parameters(student: nn.Module) -> list[nn.Parameter]:
    """The parameters of linearised layers that softmax attention does not have; all others are frozen."""
    student.requires_grad_(False)
    taught = {"qkv", "out"}
    found = [
        p for _, layer in _attentions(student) for n, p in layer.named_parameters() if n.partition(".")[0] not in taught
    ]
    for p in found:
        p.requires_grad_(True)
    return found


class LowRank(nn.Module):
    """W + B A of rank r; B starts at zero, so that nothing has changed yet (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        out, into = weight.shape
        self.A = nn.Parameter(torch.randn(rank, into).to(weight) * into**-0.5)
        self.B = nn.Parameter(torch.zeros(out, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def adapt(student: nn.Module, rank: int = 8) -> list[nn.Parameter]:
    """Freeze a model but for a low-rank change of its attention's q, k and v; returns the parameters to train.

    `fold` makes the change permanent. Raises: `ValueError` when `rank` < 1, or nothing is there to adapt.
    """
    layers = list(_attentions(student))
    if rank < 1 or not layers:
        raise ValueError(
            f"adapt: rank must be at least 1 and the model have attention, got {rank}, {len(layers)} layers."
        )
    student.requires_grad_(False)
    found: list[nn.Parameter] = []
    for _, layer in layers:
        change = LowRank(layer.qkv.weight, rank)
        parametrize.register_parametrization(layer.qkv, "weight", change)
        found += change.parameters()
    return found


def fold(student: nn.Module) -> None:
    """Add what `adapt` has learnt to the weights; names and shapes are those of the base again."""
    for _, layer in _attentions(student):
        if parametrize.is_parametrized(layer.qkv):
            parametrize.remove_parametrizations(layer.qkv, "weight", leave_parametrized=True)


def _attentions(model: nn.Module, kind: type[SoftmaxWeights] = SoftmaxWeights) -> Iterator[tuple[str, SoftmaxWeights]]:
    return ((path, layer) for path, layer in model.named_modules() if isinstance(layer, kind))


def _shares_weights(make: object) -> bool:
    return isinstance(make, type) and issubclass(make, SoftmaxWeights) and make is not SoftmaxAttention
