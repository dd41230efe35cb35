"""With what state a training sequence begins."""

from __future__ import annotations

import copy

import pytest
import torch

from remanence.errors import CheckpointError, UnknownName
from remanence.learning import Learner, checkpoint
from remanence.learning.initial_states import InitialStates
from remanence.models.language import LanguageModel
from remanence.state import flatten


@pytest.fixture
def learner() -> Learner:
    torch.manual_seed(0)
    given = {"gated-deltanet": {"heads": 2}, "retnet": {"heads": 2}}
    model = LanguageModel("gated-deltanet, retnet", vocabulary=11, dim=8, arguments=given)
    model.head.weight.data.normal_()
    return Learner(model)


def batch(seed: int = 0, rows: int = 4) -> torch.Tensor:
    return torch.randint(11, (rows, 12), generator=torch.Generator().manual_seed(seed))


def test_passed_states_are_those_of_other_rows_and_carry_no_gradient(learner: Learner) -> None:
    starts = InitialStates("state-passing", zero_share=0)
    starts.observe(learner, batch())
    final = flatten(learner.state)
    drawn = flatten(starts.draw(learner.model.initial_state(4), learner.state))
    for path, t in drawn.items():
        assert not t.requires_grad
        assert sorted(map(str, t.tolist())) == sorted(map(str, final[path].tolist())), path
    S = "layers.0.S"
    assert all(not torch.equal(drawn[S][i], final[S][i]) for i in range(4))
    assert "layers.0.conv.tail" in drawn
    assert drawn["layers.1.position"].tolist() == [12] * 4
    more = starts.draw(learner.model.initial_state(6), learner.state)
    assert flatten(more)[S].shape[0] == 6


def test_the_gradient_through_a_passed_state_is_exactly_zero(learner: Learner) -> None:
    model = learner.model
    _, final = model(batch())  # with its graph
    begin = InitialStates("state-passing").draw(model.initial_state(4), final)
    loss = model(batch(1), begin)[0].square().mean()
    got = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        _, cut = model(batch())
    begin = InitialStates("state-passing").draw(model.initial_state(4), cut)
    want = torch.autograd.grad(model(batch(1), begin)[0].square().mean(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_each_policy_begins_as_it_says(learner: Learner) -> None:
    empty = learner.model.initial_state(4)
    learner.observe(batch())
    final = learner.state
    assert InitialStates("zero").draw(empty, final) is empty
    tbptt = InitialStates("tbptt").draw(empty, final)
    assert all(torch.equal(t, flatten(final)[p]) for p, t in flatten(tbptt).items())
    noise = flatten(InitialStates("noise", std=3.0, zero_share=0).draw(empty, None))
    assert 2 < noise["layers.0.S"].std() < 4
    assert noise["layers.1.position"].tolist() == [0] * 4
    assert torch.equal(noise["recent"], flatten(empty)["recent"])
    for policy in ("state-passing", "fitted-noise", "tbptt"):
        assert InitialStates(policy).draw(empty, None) is empty


def test_fitted_noise_has_the_moments_of_final_states_per_head(learner: Learner) -> None:
    wide = learner.model.initial_state(2000)
    final = learner.model.initial_state(50)
    scale = torch.tensor([0.5, 4.0])[:, None, None]
    final["layers"]["0"]["S"] = scale * torch.randn(50, 2, 4, 8) + scale
    drawn = InitialStates("fitted-noise", zero_share=0).draw(wide, final)["layers"]["0"]["S"]
    for head, want in enumerate((0.5, 4.0)):
        assert drawn[:, head].std() == pytest.approx(want, rel=0.1)
        assert drawn[:, head].mean() == pytest.approx(want, rel=0.1)


def test_a_share_of_rows_begins_empty(learner: Learner) -> None:
    empty = learner.model.initial_state(1000)
    drawn = InitialStates("noise", zero_share=0.3).draw(empty, None)
    blank = (drawn["layers"]["0"]["S"].flatten(1) == 0).all(1)
    assert 0.25 < blank.float().mean() < 0.35
    assert ((drawn["layers"]["0"]["conv"]["tail"].flatten(1) == 0).all(1) == blank).all()


@pytest.mark.parametrize("policy", ["noise", "fitted-noise", "state-passing", "tbptt"])
def test_a_killed_run_goes_on_to_the_bit(policy: str, learner: Learner, tmp_path) -> None:
    other = copy.deepcopy(learner.model)
    starts = InitialStates(policy, seed=5)
    for step in range(3):
        starts.observe(learner, batch(step))
    checkpoint.write(tmp_path / "saved", {"learner": learner.state_dict(), "starts": starts.state_dict()})
    want = [starts.observe(learner, batch(step)).loss for step in range(3, 6)]
    saved = checkpoint.read(tmp_path / "saved")
    again, resumed = Learner(other), InitialStates(policy, seed=6)
    again.load_state_dict(saved["learner"])
    resumed.load_state_dict(saved["starts"])
    assert [resumed.observe(again, batch(step)).loss for step in range(3, 6)] == want
    with pytest.raises(CheckpointError, match=f"of {policy!r}, not of 'zero'"):
        InitialStates("zero").load_state_dict(saved["starts"])


def test_what_is_none_is_refused_in_words() -> None:
    with pytest.raises(UnknownName, match="did you mean 'state-passing'"):
        InitialStates("state passing")
    with pytest.raises(ValueError, match=r"zero_share in \[0, 1\].*zero_share=2"):
        InitialStates(zero_share=2)
