"""A language model: a stack of memories described by a short pattern."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence import catalogue
from remanence.errors import StateError
from remanence.memory import make
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import RMSNorm
from remanence.state import State, check_state


def parse_pattern(pattern: str) -> list[str]:
    """The layers that a pattern names, first to last.

    >>> parse_pattern("2*gated-deltanet, sliding-window")
    ['gated-deltanet', 'gated-deltanet', 'sliding-window']

    Raises: `ValueError` when the pattern is not `[COUNT*]NAME, ...` or names nothing.
    """
    layers: list[str] = []
    for part in pattern.split(","):
        found = re.fullmatch(r"(?:(\d+)\s*\*\s*)?([\w+-]+)", part.strip())
        if not found:
            raise ValueError(f"A pattern reads like '3*gated-deltanet, sliding-window', got {pattern!r}.")
        layers += [found[2]] * int(found[1] or 1)
    if not layers:
        raise ValueError(f"A pattern must name at least one layer, got {pattern!r}.")
    return layers


def depth(name: str, layer: int, layers: int) -> dict[str, int]:
    """The arguments that tell a memory its place in the stack, if it wants to know."""
    asked = inspect.signature(catalogue.find(name, "memory").make).parameters
    return {"layer": layer, "layers": layers} if {"layer", "layers"} <= asked.keys() else {}


class ChannelMixer(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): W_o(SiLU(W_g x) ⊙ W_i x). Shapes: [..., dim] to [..., dim]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.inner = Linear(dim, 2 * hidden, bias=False)
        self.out = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.inner(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm residual pair: a memory over time, then a mixer over channels."""

    def __init__(self, memory: Memory, hidden: int):
        super().__init__()
        self.memory_norm = RMSNorm(memory.dim)
        self.memory = memory
        self.mixer_norm = RMSNorm(memory.dim)
        self.mixer = ChannelMixer(memory.dim, hidden)

        self.shares = "context" in inspect.signature(memory.forward).parameters

    def forward(self, x: Tensor, state: State, context: dict[str, Tensor] | None = None) -> tuple[Tensor, State]:
        """`context` is what the layers of one stack tell each other about these tokens (RWKV-7's first values)."""
        x_in = self.memory_norm(x)
        y, state = self.memory(x_in, state, context) if self.shares else self.memory(x_in, state)
        x = x + y
        return x + self.mixer(self.mixer_norm(x)), state


class LanguageModel(nn.Module):
    """Tokens to logits of the next token, with a state.

    Args:
        pattern: the memories, first to last: `"3*gated-deltanet, sliding-window"`.
        vocabulary: number of tokens; 256 reads bytes. Token `vocabulary` itself stands for the beginning.
        dim: width of the stack.
        expand: hidden width of the channel mixers over `dim`.
        ngrams: orders of the hashed n-gram embeddings added to each token's own (Svenstrup et al. 2017,
            arXiv:1709.03933, in its simplest form: one hash, shared rows).
        ngram_rows: rows of each hashed table.
        arguments: constructor arguments for memories by name: `{"sliding-window": {"window": 64}}`.

    Shapes: `tokens` int64 [batch, time] in [0, vocabulary]; logits [batch, time, vocabulary].
    Raises: `UnknownName` for a memory that nothing goes by, `StateError` for a state of another model.
    """

    def __init__(
        self,
        pattern: str = "2*gated-deltanet, sliding-window",
        *,
        vocabulary: int = 256,
        dim: int = 256,
        expand: float = 2.0,
        ngrams: Sequence[int] = (2, 3),
        ngram_rows: int = 4096,
        arguments: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        super().__init__()
        self.vocabulary, self.dim, self.ngrams, self.ngram_rows = vocabulary, dim, tuple(ngrams), ngram_rows
        given = arguments or {}
        self.embedding = nn.Embedding(vocabulary + 1, dim)
        self.hashed = nn.ModuleList(nn.Embedding(ngram_rows, dim) for _ in self.ngrams)
        names = parse_pattern(pattern)
        memories = [make(n, dim, **{**depth(n, i, len(names)), **given.get(n, {})}) for i, n in enumerate(names)]
        self.blocks = nn.ModuleList(Block(memory, int(dim * expand)) for memory in memories)
        self.norm = RMSNorm(dim)
        self.head = Linear(dim, vocabulary)
        for table in [self.embedding, *self.hashed]:
            nn.init.normal_(table.weight, std=0.5 / (1 + len(self.hashed)) ** 0.5)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def memories(self) -> list[Memory]:
        """The memories of the stack, first to last."""
        return [block.memory for block in self.blocks if isinstance(block, Block)]

    def initial_state(self, batch: int) -> State:
        """The state before the first token."""
        keep = max(self.ngrams, default=1) - 1
        weight = self.head.weight
        return {
            "recent": torch.full((batch, keep), self.vocabulary, dtype=torch.long, device=weight.device),
            "layers": {str(i): memory.initial_state(batch) for i, memory in enumerate(self.memories)},
        }

    def check_state(self, state: State, batch: int) -> None:
        """Raise `StateError` unless `state` belongs to this model and has `batch` rows."""
        if set(state) != {"recent", "layers"}:
            raise StateError(f"LanguageModel: this state belongs to another model: it holds {sorted(state)}.")
        recent = self.initial_state(batch)["recent"]
        check_state("LanguageModel", {"recent": state["recent"]}, {"recent": recent})
        if state["layers"].keys() != (known := {str(i) for i in range(len(self.blocks))}):
            layers = len(state["layers"])
            raise StateError(
                f"LanguageModel: this state belongs to another model: of {layers} layers, not {len(known)}."
            )
        for i, memory in enumerate(self.memories):
            memory.begin(self.head.weight.new_zeros(batch, 0, self.dim), state["layers"][str(i)])

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        state = state if state is not None else self.initial_state(tokens.shape[0])
        x, recent = self._embed(tokens, state["recent"])
        layers: State = {}
        context: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x, layers[str(i)] = block(x, state["layers"][str(i)], context)
        return self.head(self.norm(x)), {"recent": recent, "layers": layers}

    def _embed(self, tokens: Tensor, recent: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        keep, time = recent.shape[1], tokens.shape[1]
        seen = torch.cat([recent, tokens], dim=1)
        for order, table in zip(self.ngrams, self.hashed, strict=True):
            key = torch.zeros_like(tokens)
            for lag in range(order):
                key = (key * 0x9E3779B1 + seen[:, keep - lag : keep - lag + time] + 1) % 0x7FFFFFFF
            x = x + table((key ^ (key >> 15)) % self.ngram_rows)
        return x, seen[:, time:]
