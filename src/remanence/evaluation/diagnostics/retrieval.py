"""Solvers for the retrieval tasks: a memory of a known number of bits, and a search with hardly any.

They are built by hand, so what they fail at is what their bits do not allow, not what training did not find.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remanence import ops
from remanence.evaluation.benchmarks.retrieval import IsTree, Questions, TextTask

KEYS, VALUES, BITS = 16, 16, 8
"""The packed memory: a matrix state of KEYS × VALUES cells with BITS bits each."""


def capacity(keys: int = KEYS, values: int = VALUES, bits: int = BITS) -> int:
    """Bits that the packed memory holds."""
    return keys * values * bits


def packed_read(text: Tensor, keys: int = KEYS, values: int = VALUES, bits: int = BITS) -> Tensor:
    """What a matrix memory of `keys × values` cells of `bits` bits gives back at each place of a text.

    Letter n is added to cell n mod keys·values, by linear attention with one-hot keys; cells count modulo 2^bits.
    Texts longer than the cells write twice to some of them. Shapes: int64 [batch, n] -> int64 [batch, n].
    """
    batch, n = text.shape
    cell = torch.arange(n) % (keys * values)
    k = torch.nn.functional.one_hot(cell // values, keys).double().expand(batch, 1, n, keys)
    v = torch.nn.functional.one_hot(cell % values, values) * text[:, :, None]
    _, state = ops.linear_attention(k, k, v[:, None].double())
    S = state["S"][:, 0].round().long() % 2**bits
    return S.flatten(1)[:, cell]


def packed_accuracy(n: int, *, symbols: int = 2**BITS, batch: int = 8, seed: int = 0) -> float:
    """Share of the places of texts of `n` letters that the packed memory answers rightly."""
    text = torch.randint(symbols, (batch, n), generator=torch.Generator().manual_seed(seed))
    return float((packed_read(text) == text).double().mean())


def by_search(task: TextTask, asked: Questions) -> Tensor:
    """Answers found by searching the text with regular expressions, one search or, for a tree, one per node.

    Between searches only what was found is held: a letter, a number, the nodes still to visit. Returns int64 [batch].
    """
    answers = []
    for text, question in zip(asked.text.tolist(), asked.question.tolist(), strict=True):
        found = [] if isinstance(task, IsTree) else task.search(text, question)
        if isinstance(task, IsTree):
            answers.append(task.extra + _connected(task, text))
        else:
            answers.append(task.extra + len(found) if task.widest() > 1 else found[0])
    return torch.tensor(answers)


def _connected(task: IsTree, text: list[int]) -> bool:
    """Whether a walk from node to neighbours reaches all: with one edge fewer than nodes, that is a tree."""
    seen, todo = {text[0]}, [text[0]]
    while todo:
        for node in task.search(text, [todo.pop()]):
            if node not in seen:
                seen.add(node)
                todo.append(node)
    return len(seen) == len(text) // 2 + 1
