"""Softmax layers turned into recurrences: same weights, and ways to teach them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remanence import catalogue
from remanence.errors import UnknownName
from remanence.evaluation.proofs import linearise as proofs
from remanence.memory.liger import Liger
from remanence.memory.lizard import Lizard
from remanence.memory.softmax import SoftmaxAttention
from remanence.models.language import LanguageModel
from remanence.models.linearise import adapt, attention_transfer, fold, linearise, new_parameters


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def base(**arguments: object) -> LanguageModel:
    options = {"softmax": {"heads": 4, "kv_heads": 2}, "sliding-window": {"heads": 2, "window": 4}}
    model = LanguageModel("softmax, sliding-window, softmax", vocabulary=9, dim=16, ngrams=(), arguments=options)
    nn.init.normal_(model.head.weight)
    return model.double()


def tokens(time: int = 12) -> Tensor:
    return torch.randint(9, (2, time))


def test_liger_has_the_base_names_and_its_logits_when_the_window_holds_all() -> None:
    model, text = base(), tokens()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    student = linearise(model, "liger", window=12, mix=(0.0, 1.0))
    assert {n: p.shape for n, p in student.state_dict().items()} == {n: p.shape for n, p in before.items()}
    assert [type(m).__name__ for m in student.memories] == ["Liger", "WindowAttention", "Liger"]
    torch.testing.assert_close(student(text)[0], model(text)[0])
    for p in student.parameters():
        p.data += 1
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items()), "the base was altered"


def test_a_student_reads_piece_by_piece_in_constant_memory() -> None:
    student, text = linearise(base(), "lizard", window=4, features=6), tokens()
    whole, _ = student(text)
    first, state = student(text[:, :5])
    rest, _ = student(text[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    assert isinstance(student.memories[0], Lizard)
    assert student.memories[0].qkv.weight.dtype == torch.float64


def test_a_bare_layer_is_linearised_itself() -> None:
    layer = SoftmaxAttention(8, heads=2, base=100.0)
    student = linearise(layer, "liger", window=3)
    assert isinstance(student, Liger)
    assert torch.equal(student.qkv.weight, layer.qkv.weight)
    assert torch.equal(student.frequencies, layer.frequencies)


def test_what_cannot_be_linearised_is_said() -> None:
    with pytest.raises(UnknownName, match="did you mean 'lizard'"):
        linearise(base(), "lizzard")
    with pytest.raises(UnknownName, match="no linearisation called 'softmax'"):
        linearise(base(), "softmax")
    with pytest.raises(ValueError, match="Linear has no layer of softmax attention"):
        linearise(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        adapt(linearise(base()), 0)
    with pytest.raises(ValueError, match="the teacher has no layer"):
        attention_transfer(nn.Linear(2, 2), nn.Linear(2, 2), torch.zeros(1, 2))


def test_low_rank_changes_start_at_nothing_train_alone_and_fold_away() -> None:
    student, text = linearise(base(), "liger", window=4), tokens()
    want = student(text)[0]
    names = set(student.state_dict())
    trained = adapt(student, 2)
    torch.testing.assert_close(student(text)[0], want, rtol=0, atol=0)
    assert sum(p.numel() for p in trained) == 2 * 2 * (16 + 32)
    assert {id(p) for p in student.parameters() if p.requires_grad} == {id(p) for p in trained}
    for p in trained:
        nn.init.normal_(p)
    changed = student(text)[0]
    assert (changed - want).abs().max() > 1e-3
    fold(student)
    torch.testing.assert_close(student(text)[0], changed)
    assert set(student.state_dict()) == names


def test_attention_transfer_compares_layers_on_the_teachers_activations() -> None:
    model, text = base(), tokens()
    same = linearise(model, "liger", window=12, mix=(0.0, 1.0))
    assert attention_transfer(same, model, text) < 1e-20
    student = linearise(model, "lizard", window=4, features=6)
    with torch.no_grad():
        inner = model.blocks[0].memory_norm(model.embedding(text))
        first = F.mse_loss(student.memories[0](inner)[0], model.memories[0](inner)[0])
    both = attention_transfer(student, model, text)
    assert both > first > 0


def test_only_new_parameters_are_taught_in_the_first_stage() -> None:
    model, text = base(), tokens(40)
    student = linearise(model, "lizard", window=4, features=6)
    trained = new_parameters(student)
    assert len(trained) == 2 * 5
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(15):
        loss = attention_transfer(student, model, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    taught = student.state_dict()
    assert all(torch.equal(taught[n], p) for n, p in model.state_dict().items())


@pytest.mark.parametrize("id", [i for i, p in catalogue.proofs().items() if p.run.__module__ == proofs.__name__])
def test_the_proof_holds_and_its_control_does_not(id: str) -> None:
    system, control = catalogue.proofs()[id].run()
    assert system.holds, system.says
    assert not control.holds, control.says


def test_the_example_of_the_docs_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "linearise.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, str(page), "exec"), {"__name__": "example"})
