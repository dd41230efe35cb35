"""What is particular to retrieval beside a recurrence; its laws are tested with all others'."""

from __future__ import annotations

import pytest
import torch

from remanence.errors import UnknownName
from remanence.memory import Resona, make
from remanence.memory.base import Memory
from remanence.state import nbytes


def layer(**given) -> Resona:
    torch.manual_seed(0)
    given = {"memory": "retnet", "arguments": {"heads": 2}, "chunk": 3, "top": 1, "budget": 4, "heads": 2, **given}
    memory = Resona(8, **given).double()
    for p in memory.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return memory


def text(time: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, time, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(memory: Resona, x: torch.Tensor) -> torch.Tensor:
    """Token by token, with lists."""
    h, _ = memory.memory(x)
    out, C = [], memory.chunk
    for t in range(x.shape[1]):
        chunks = [x[0, i * C : (i + 1) * C] for i in range(t // C)]
        first = max(0, len(chunks) - memory.budget)
        read = torch.zeros(8, dtype=x.dtype)
        if len(chunks) - first >= 2:
            now = chunks[-1].mean(0)
            like = [torch.cosine_similarity(now, c.mean(0), dim=0) for c in chunks[first:-1]]
            best = torch.stack(like).topk(min(memory.top, len(like))).indices.tolist()
            seen = torch.cat([torch.cat([chunks[first + j], chunks[first + j + 1]]) for j in best])
            q, k, v = (
                m.unflatten(-1, (memory.heads, -1))
                for m in (memory.query(x[0, t]), memory.key(seen), memory.value(seen))
            )
            weight = (torch.einsum("hk,jhk->hj", q, k) / q.shape[-1] ** 0.5).softmax(-1)
            read = memory.out(torch.einsum("hj,jhk->hk", weight, v).flatten())
        out.append(h[0, t] + memory.gate(h[0, t]).sigmoid() * read)
    return torch.stack(out)[None]


@pytest.mark.parametrize("given", [{}, {"top": 2}, {"top": 3, "budget": 2}, {"chunk": 1}, {"memory": "gated-deltanet"}])
def test_it_is_its_definition(given: dict) -> None:
    memory, x = layer(**given), text(31)
    torch.testing.assert_close(memory(x)[0], by_definition(memory, x), rtol=0, atol=1e-9)


def test_nothing_of_what_is_to_come_and_nothing_of_an_open_chunk_is_looked_up() -> None:
    memory, x = layer(), text(20)
    other = x.clone()
    other[:, 13:] += 10
    torch.testing.assert_close(memory(x)[0][:, :13], memory(other)[0][:, :13], rtol=0, atol=1e-12)


def test_the_budget_holds_and_what_is_kept_is_counted() -> None:
    memory = layer(budget=5)
    state = memory(text(200))[1]
    assert nbytes(state) == nbytes(memory.initial_state(1))
    torch.testing.assert_close(state["kept"][0].flatten(0, 1), text(200)[0, 198 - 15 : 198])


def test_a_new_gate_leaves_a_trained_memory_almost_as_it_was() -> None:
    torch.manual_seed(0)
    inner = make("retnet", 64)
    x = torch.randn(1, 300, 64)
    h = inner(x)[0]
    assert (Resona(64, memory=inner, chunk=16)(x)[0] - h).norm() < 0.05 * h.norm()


def test_any_memory_or_its_name_is_taken_and_what_is_not_one_is_refused() -> None:
    assert isinstance(Resona(8, memory="hgrn").memory, Memory)
    with pytest.raises(UnknownName, match="did you mean 'retnet'"):
        Resona(8, memory="retnett")
    with pytest.raises(ValueError, match="must have width 8, got 16"):
        Resona(8, memory=make("hgrn", 16))
    with pytest.raises(ValueError, match="budget at least 2, got 64, 2, 1"):
        Resona(8, memory="hgrn", budget=1)
