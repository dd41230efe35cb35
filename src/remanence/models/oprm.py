"""Reading a long input in pieces that do not overflow the state, and answering from the surest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remanence.catalogue import card
from remanence.errors import ShapeError, unknown
from remanence.state import State, concat, select

CHOICES = ("min_entropy", "max_prob", "last")


@dataclass(frozen=True)
class Reading:
    """What every chunk led to.

    Shapes: `logits` [chunks, vocabulary] for the first token of the answer, `state` of as many rows, `starts` int64
    [chunks]: where each chunk begins in the context. `chosen` is the row to answer from.
    """

    logits: Tensor
    state: State
    starts: Tensor
    chosen: int

    @property
    def best(self) -> tuple[Tensor, State]:
        """Logits [1, vocabulary] and state of the chosen chunk."""
        return self.logits[self.chosen : self.chosen + 1], select(self.state, self.chosen)


@card(
    "oprm",
    kind="tool",
    says="Splits a long context, asks each piece, and answers from the piece that is surest: no state overflows.",
    source="arXiv:2505.07793",
)
@torch.no_grad()
def read_chunks(
    model: Any,
    context: Tensor,
    query: Tensor,
    *,
    prefix: Tensor | None = None,
    chunk: int = 2000,
    overlap: int = 0,
    choose: str = "min_entropy",
    refusals: Iterable[int] = (),
    batch: int = 16,
) -> Reading:
    """Read prefix + chunk + query for every chunk of a context, side by side, from one state after the prefix.

    A fact that is cut in two by the chunks is lost: let them overlap by the length of a fact.

    Args:
        model: called as model(tokens, state) -> (logits, state); `model.initial_state(rows)` where there is no prefix.
        context, query, prefix: int64 [time]; the query at least one token.
        chunk: tokens of a piece, the paper's 1000 to 3000; the last piece is moved back so that it is as long.
        overlap: tokens that neighbours share, below `chunk`.
        choose: the chunk whose first answer token has the least entropy (`min_entropy`), the likeliest token
            (`max_prob`), or the `last` one (for code completion). Among equals the first wins.
        refusals: tokens that say "not here"; chunks whose likeliest token is one are passed over, unless all are.
        batch: chunks that are read at once.

    Summaries: `decode` all rows of `reading.logits, reading.state` and join what comes.

    Raises: `ShapeError` for tensors that are not [time] or empty; `ValueError` for chunk < 1 or overlap outside
        [0, chunk); `UnknownName` for another way to choose.
    Source: Overflow Prevention Enhances Long-Context Recurrent LLMs (2025), arXiv:2505.07793.
    """
    for name, x in {"context": context, "query": query}.items():
        if x.ndim != 1 or not len(x):
            raise ShapeError(f"read_chunks: {name} must be [time], at least one token, got {list(x.shape)}.")
    if chunk < 1 or not 0 <= overlap < chunk:
        raise ValueError(f"read_chunks: chunk must be > overlap ≥ 0, got chunk={chunk}, overlap={overlap}.")
    if choose not in CHOICES:
        raise unknown("way to choose a chunk", choose, CHOICES)
    begin = model.initial_state(1)
    if prefix is not None and len(prefix):
        begin = model(prefix[None], begin)[1]
    size = min(chunk, len(context))
    last = len(context) - size
    starts = torch.tensor([*range(0, last, chunk - overlap), last], device=context.device)
    texts = torch.cat([context.unfold(0, size, 1)[starts], query.expand(len(starts), -1)], 1)
    answers, states = [], []
    for rows in texts.split(batch):
        logits, state = model(rows, select(begin, [0] * len(rows)))
        answers.append(logits[:, -1])
        states.append(state)
    found = torch.cat(answers)
    return Reading(found, concat(states), starts, _choose(found, choose, list(refusals)))


def _choose(logits: Tensor, choose: str, refusals: list[int]) -> int:
    if choose == "last":
        return len(logits) - 1
    log_p = logits.double().log_softmax(-1)
    sure = log_p.amax(-1) if choose == "max_prob" else (log_p.exp() * log_p).nan_to_num().sum(-1)
    passed = torch.isin(logits.argmax(-1), torch.tensor(refusals, dtype=torch.long, device=logits.device))
    if not passed.all():
        sure = sure.masked_fill(passed, -torch.inf)
    return int(sure.argmax())


@torch.no_grad()
def decode(model: Any, logits: Tensor, state: State, tokens: int) -> Tensor:
    """The likeliest continuation of every row: int64 [rows, tokens], from logits [rows, vocabulary] and their state."""
    out = []
    for _ in range(tokens):
        out.append(logits.argmax(-1))
        step, state = model(out[-1][:, None], state)
        logits = step[:, -1]
    return torch.stack(out, 1) if out else logits.new_zeros(len(logits), 0, dtype=torch.long)
