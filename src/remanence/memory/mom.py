"""Mixture of memories: a router sends each token to a few of several, so that they do not disturb each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from remanence import catalogue
from remanence.catalogue import card
from remanence.errors import unknown
from remanence.memory.base import Memory
from remanence.memory.gated_deltanet import GatedDeltaNet
from remanence.memory.linear import Linear
from remanence.memory.parts import merge, split, wide
from remanence.state import State, concat, select


@card(
    "mom",
    kind="memory",
    says="Several memories, of any kind, of which a router lets each token write to and read from a few.",
    source="arXiv:2502.13685",
    small={"dim": 8, "memories": 3, "heads": 2},
    parents=("gated-deltanet",),
    change="a router over several of them",
)
class MoM(Memory):
    r"""$y = \sum_{m ∈ \text{top}} p_m y^m + y^{\text{shared}}$, where memory m reads only the tokens routed to it.

    $p = \mathrm{softmax}(W_r x)$, its `top` largest made to sum to 1. Each memory has its own state, convolution
    tails included, and its own parameters but for those named in `tied`. Memories of the delta family (`recall` and
    `readout`) are mixed before one common readout, as in the paper; others after their own.

    Args:
        dim: features of input and output.
        memories: how many there are to choose from (4 in the paper, 8 in the authors' later code).
        top: how many each token goes to.
        shared: whether one more memory reads every token.
        memory: the catalogue id of the memories, or a function that makes one of a given width.
        tied: the parts that all memories have in common, by dotted path; by default, of a gated DeltaNet, what the
            paper ties: queries, convolution, and the rates and biases of the decay. All else is each memory's own.
        arguments: of the memories, where `memory` is an id.

    Shapes: x and y [batch, time, dim]; state {"0": state of the first memory, ..., "shared": state}.
    Raises: `ValueError` for counts out of range; `UnknownName` for a memory or tied part that there is not;
        `ShapeError`, `StateError` from `forward`.
    Source: MoM: Linear Sequence Modeling with Mixture-of-Memories (2025), arXiv:2502.13685.
    """

    def __init__(
        self,
        dim: int,
        *,
        memories: int = 4,
        top: int = 2,
        shared: bool = True,
        memory: str | Callable[[int], Memory] = "gated-deltanet",
        tied: Sequence[str] | None = None,
        **arguments: Any,
    ):
        super().__init__()
        if not 1 <= top <= memories:
            raise ValueError(f"MoM: top must be from 1 to memories, got top={top} and memories={memories}.")
        make = memory if callable(memory) else partial(catalogue.find(memory, "memory").make, **arguments)
        members: list[Memory] = [make(dim) for _ in range(memories + shared)]
        self.dim, self.top, self.count = dim, top, memories
        self.router = Linear(dim, memories, bias=False)
        self.readout: nn.Module | None = None
        if isinstance(members[0], GatedDeltaNet):
            tied = ("q", "conv", "decay.rate", "decay.bias") if tied is None else tied
            if members[0].decay is None:
                tied = [path for path in tied if not path.startswith("decay")]
            self.heads, self.readout = members[0].value_heads, members[0].readout
            for member in members:
                del member.readout
        for path in tied or ():
            _tie(members, path)
        names = [str(m) for m in range(memories)] + ["shared"] * shared
        self.members = nn.ModuleDict(dict(zip(names, members, strict=True)))

    def initial_state(self, batch: int) -> State:
        return {name: member.initial_state(batch) for name, member in self.each()}

    def each(self) -> Iterator[tuple[str, Memory]]:
        """The memories by their name in the state."""
        for name, member in self.members.items():
            assert isinstance(member, Memory)
            yield name, member

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All probabilities [batch, time, memories]; which are chosen; and their weights, which sum to 1."""
        p = wide(self.router(x)).softmax(-1)
        best = p.topk(self.top, -1)
        chosen = torch.zeros_like(p, dtype=torch.bool).scatter(-1, best.indices, True)
        return p, chosen, p * chosen / best.values.sum(-1, keepdim=True)

    def balance(self, x: Tensor) -> Tensor:
        """What training adds to the loss: M · Σ_m (share of tokens sent to m) · (mean of p_m); `top` when even.

        The paper weighs it by 0.01. In a stack, whose inner inputs nobody holds, `balancing` finds it.
        Source: Switch Transformers, arXiv:2101.03961.
        """
        p, chosen, _ = (part.flatten(0, 1) for part in self.route(x))
        return self.count * (chosen.to(p.dtype).mean(0) * p.mean(0)).sum()

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = self.begin(x, state)
        _, chosen, weights = self.route(x)
        y, after = x.new_zeros(()), {}
        for name, member in self.each():
            if name == "shared":
                out, after[name] = _run(member, x, state[name])
            else:
                m = int(name)
                out, after[name] = _run_on(chosen[..., m], member, x, state[name])
                out = weights[..., m, None].to(x.dtype) * out
            y = y + out
        if self.readout is None:
            return y, after
        return self.readout(split(y, self.heads), x), after


@contextmanager
def balancing(model: nn.Module) -> Iterator[list[Tensor]]:
    """While the model runs in this block, every `MoM` in it adds the `balance` of what it read to the yielded list.

    >>> from remanence.memory import make
    >>> model = make("mom", 8, heads=2)
    >>> with balancing(model) as terms:
    ...     y, _ = model(torch.ones(1, 5, 8))
    >>> loss = y.square().mean() + 0.01 * sum(terms)
    """
    terms: list[Tensor] = []

    def note(mixture: nn.Module, args: tuple[Any, ...], _: Any) -> None:
        assert isinstance(mixture, MoM)
        if args[0].shape[1]:
            terms.append(mixture.balance(args[0]))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, MoM)]
    try:
        yield terms
    finally:
        for hook in hooks:
            hook.remove()


def _run(memory: Memory, x: Tensor, state: State) -> tuple[Tensor, State]:
    if not isinstance(memory, GatedDeltaNet):
        return memory(x, state)
    y, after = memory.recall(x, state)
    return merge(y).to(x.dtype), after


def _run_on(chosen: Tensor, memory: Memory, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Run a memory over the chosen tokens [batch, time] of each row, as if there were no others; zeros elsewhere.

    Rows with equally many run together; the states of rows without any are left as they are.
    """
    if not x.shape[1]:
        return _run(memory, x, state)
    counts = chosen.sum(1)
    order = chosen.logical_not().sort(dim=1, stable=True).indices  # each row's chosen tokens first, in their order
    y: Tensor | None = None
    states, rows = [], []
    for n in counts.unique().tolist():
        group = (counts == n).nonzero()[:, 0]
        before = select(state, group)
        if n == 0:
            now = before
        else:
            places = order[group, :n]
            out, now = _run(memory, x[group[:, None], places], before)
            y = out.new_zeros(*x.shape[:2], out.shape[-1]) if y is None else y
            y = y.index_put((group[:, None], places), out)
        states.append(now)
        rows.append(group)
    return x.new_zeros(()) if y is None else y, select(concat(states), torch.cat(rows).argsort())


def _tie(members: Sequence[Memory], path: str) -> None:
    """Give all members the part of the first that goes by this path."""
    parent, _, leaf = path.rpartition(".")
    try:
        part = getattr(members[0].get_submodule(parent), leaf)
        for member in members[1:]:
            setattr(member.get_submodule(parent), leaf, part)
    except AttributeError:
        known = sorted({name for name, _ in (*members[0].named_modules(), *members[0].named_parameters()) if name})
        raise unknown(f"part of {type(members[0]).__name__}", path, known) from None
