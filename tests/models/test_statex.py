"""Larger states in trained models."""

from __future__ import annotations

import pytest
import torch

from remanence.errors import RemanenceError, UnknownName
from remanence.memory import make
from remanence.models.language import LanguageModel
from remanence.models.statex import Expanded, expand_state, forget_moments
from remanence.ops.selective_scan import selective_scan  # noqa: F401  (its tap must be open, too)
from remanence.state import nbytes, tree_map

SMALL = {
    "gla": {"heads": 2, "rank": 3},
    "gated-deltanet": {"heads": 2},
    "retnet": {"heads": 2},
    "mamba2": {"state_size": 3, "head_dim": 4},
}


def small(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    memory = make(name, 8, **SMALL[name]).double()
    for p in memory.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return memory


def x(time: int = 9) -> torch.Tensor:
    return torch.randn(2, time, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("how", [{"init": "fresh"}, {"init": "zero"}, {"init": "copy"}, {"merge_heads": True}])
def test_an_expanded_memory_resumes_at_any_cut_with_its_gradients(name: str, how: dict) -> None:
    if name == "gated-deltanet" and "merge_heads" in how:
        return
    memory = Expanded(small(name), 3, **how)
    for p in memory.features.parameters():
        p.data += 0.3 * torch.randn_like(p)
    whole, end = memory(x())
    state, pieces = None, []
    for piece in x().tensor_split([0, 1, 5], dim=1):
        y, state = memory(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)
    tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-9) or a, state, end)
    wanted = torch.autograd.grad(whole.square().sum(), list(memory.parameters()), allow_unused=True)
    got = torch.autograd.grad(torch.cat(pieces, 1).square().sum(), list(memory.parameters()), allow_unused=True)
    for a, b in zip(got, wanted, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_the_matrix_grows_by_exactly_the_factor_and_zero_keeps_the_outputs(name: str) -> None:
    memory = small(name)
    wide = Expanded(memory, 4, init="zero")
    before = memory.initial_state(1)
    assert nbytes(wide.initial_state(1)) - nbytes(before) == 3 * nbytes({"S": before["S"]})
    assert not torch.equal(Expanded(memory, 4)(x())[0], memory(x())[0])
    torch.testing.assert_close(wide(x())[0], memory(x())[0], rtol=0, atol=1e-12)
    wide(x())[0].square().sum().backward()
    (maps,) = wide.features
    assert maps.weight.grad.abs().sum() > 0  # and yet it learns


def test_merged_heads_read_what_every_key_wrote_without_a_new_parameter() -> None:
    memory = small("gla")
    merged = Expanded(memory, merge_heads=True)
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in memory.parameters())
    before = memory.initial_state(1)
    assert nbytes(merged.initial_state(1)) == 2 * nbytes(before)
    state = merged(x())[1]
    assert state["extra"]["0"].abs().min() > 0


def test_a_model_is_expanded_in_place_at_evenly_spaced_layers() -> None:
    torch.manual_seed(0)
    given = {"gla": {"heads": 2, "rank": 3}}
    model = LanguageModel("4*gla", vocabulary=11, dim=8, ngrams=(), arguments=given).double()
    model.head.weight.data.normal_()
    tokens = torch.randint(11, (2, 12))
    before = model(tokens)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before.square().mean().backward()
    optimizer.step()
    before = model(tokens)[0]
    changed = expand_state(model, 2, every=2, init="zero")
    assert [type(m).__name__ for m in model.memories] == ["Expanded", "GLA", "Expanded", "GLA"]
    torch.testing.assert_close(model(tokens)[0], before, rtol=0, atol=1e-6)
    kept = len(optimizer.state)
    forget_moments(optimizer, changed)
    assert len(changed) == 2
    assert len(optimizer.state) == kept
    model(tokens)[0].square().mean().backward()
    optimizer.step()
    assert all(p in optimizer.state for p in changed)
    again = expand_state(model, layers=[1], merge_heads=True, restart=True)
    assert model.memories[1].memory.qk.weight in set(again)
    forget_moments(optimizer, again)
    assert not any(p in optimizer.state for p in again)


def test_what_cannot_be_expanded_is_refused_in_words() -> None:
    with pytest.raises(RemanenceError, match="HGRN has no matrix"):
        Expanded(make("hgrn", 8))
    with pytest.raises(RemanenceError, match="GatedDeltaNet has no heads to merge"):
        Expanded(small("gated-deltanet"), merge_heads=True)
    with pytest.raises(ValueError, match="factor must be at least 1, got 0"):
        Expanded(small("gla"), 0)
    with pytest.raises(UnknownName, match="did you mean 'zero'"):
        Expanded(small("gla"), init="zeros")
    model = LanguageModel("2*gla", vocabulary=4, dim=8, ngrams=(), arguments={"gla": {"heads": 2}})
    with pytest.raises(ValueError, match="layers must be from 0 to 1, got 2"):
        expand_state(model, layers=[0, 2])
    assert type(model.memories[0]).__name__ == "GLA"
