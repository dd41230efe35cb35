"""The stack that published models share: embedding, residual layers, norm, head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.errors import StateError
from remanence.memory.base import Memory
from remanence.memory.linear import Linear
from remanence.memory.parts import wide
from remanence.models.pretrained.mapping import Rule
from remanence.state import State


class CentredNorm(nn.RMSNorm):
    """RMSNorm whose weight is kept less 1, as Gemma's and Qwen3-Next's checkpoints have it. [..., dim] both ways."""

    def __init__(self, dim: int, eps: float):
        super().__init__(dim, eps=eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        # at least float32 in between, as in the published models
        return F.rms_norm(wide(x), self.normalized_shape, 1 + wide(self.weight), self.eps).to(x.dtype)


class Residual(nn.Module):
    """x + inner(norm(x)); `inner` is a memory, or a module over channels alone."""

    def __init__(self, norm: nn.Module, inner: nn.Module):
        super().__init__()
        self.norm, self.inner = norm, inner

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State | None]:
        if not isinstance(self.inner, Memory):
            return x + self.inner(self.norm(x)), None
        y, state = self.inner(self.norm(x), state)
        return x + y, state


class PretrainedModel(nn.Module):
    """A published language model: tokens to logits of the next token, with a state, as `LanguageModel` has it.

    Args:
        config: the contents of its config.json; `save` writes them again.
        layers: the residual layers, first to last.
        norm: before the head; its dim is the stack's.
        rules: which of the published tensors hold the same numbers as which of these; the head's is added.
        their_head: what they call the head; it has the embedding's weights if `config["tie_word_embeddings"]`.
        ignored: beginnings of the names of tensors that a checkpoint may hold besides.
        first_norm: after the embedding.
        scale: of the embedding.
        cap: c of c·tanh(logits/c); None leaves them as they are.

    Shapes: `tokens` int64 [batch, time] below `vocabulary`; logits [batch, time, vocabulary]; the state holds
        the memories' states by the number of their layer.
    Raises: `StateError` for a state of another model.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        layers: Iterable[Residual],
        norm: nn.Module,
        rules: Iterable[Rule],
        *,
        their_head: str = "lm_head",
        ignored: Iterable[str] = (),
        first_norm: nn.Module | None = None,
        scale: float = 1.0,
        cap: float | None = None,
    ):
        super().__init__()
        self.config = dict(config)
        self.vocabulary, self.dim = config["vocab_size"], config["hidden_size"]
        self.scale, self.cap = scale, cap
        self.embedding = nn.Embedding(self.vocabulary, self.dim)
        self.first_norm = first_norm
        self.layers = nn.ModuleList(layers)
        self.remembering = frozenset(self.memories)
        self.norm = norm
        self.head = Linear(self.dim, self.vocabulary, bias=False)
        self.tied = bool(config["tie_word_embeddings"])
        self.tie()
        head = Rule(("head.weight",), (f"{their_head}.weight",))
        self.ignored = [*ignored, f"{their_head}."] if self.tied else [*ignored]
        own = self.state_dict()
        # a rule for a bias that is off is idle
        self.rules = [r for r in (*rules, *([] if self.tied else [head])) if own.keys() >= {*r.ours}]
        mapped = {n for rule in self.rules for n in rule.ours}
        if unmapped := own.keys() - mapped - ({"head.weight"} if self.tied else set()):
            raise TypeError(f"PretrainedModel: no rule gives {sorted(unmapped)}.")

    def tie(self) -> None:
        """Give the head the embedding's weights, where they are tied."""
        if self.tied:
            self.head.weight = self.embedding.weight

    @property
    def beginning(self) -> int:
        """The token that stands before the first one."""
        given = self.config.get("bos_token_id")
        return given if isinstance(given, int) else 0

    @property
    def memories(self) -> dict[str, Memory]:
        """The memories by the number of their layer."""
        inner = {str(i): layer.get_submodule("inner") for i, layer in enumerate(self.layers)}
        return {i: memory for i, memory in inner.items() if isinstance(memory, Memory)}

    def initial_state(self, batch: int) -> State:
        """The state before the first token."""
        return {i: memory.initial_state(batch) for i, memory in self.memories.items()}

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        if state is not None and state.keys() != self.remembering:
            raise StateError(f"PretrainedModel: this state belongs to another model: it holds {sorted(state)}.")
        x = self.embedding(tokens) * self.scale
        if self.first_norm is not None:
            x = self.first_norm(x)
        after: State = {}
        for i, layer in enumerate(self.layers):
            x, left = layer(x, state.get(str(i)) if state else None)
            if left is not None:
                after[str(i)] = left
        logits = self.head(self.norm(x))
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap), after
