"""Dynamic evaluation is its formula, its statistics are the loop's, and it resumes exactly."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.errors import CheckpointError
from remanence.evaluation.proofs.dynamic_evaluation import dynamic_evaluation
from remanence.learning import Learner
from remanence.models.language import LanguageModel
from remanence.optim import DynamicEvaluation, gather_mean_square


def parameters(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(*shape, generator=g, dtype=dtype)) for shape in [(4, 3), (5,)]]


def statistics():
    g = torch.Generator().manual_seed(4)
    return [torch.rand(*shape, generator=g, dtype=torch.float64) for shape in [(4, 3), (5,)]]


def model() -> LanguageModel:
    torch.manual_seed(5)
    made = LanguageModel("min-lstm-gru", vocabulary=7, dim=8, ngrams=())
    nn.init.normal_(made.head.weight, std=0.3)
    return made


def tokens(time: int, rows: int = 1):
    return torch.randint(7, (rows, time), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("pull", [0.0, 0.1, 1.5])  # 1.5: the pull of some weights reaches its bound
def test_steps_are_the_formula(pull):
    params, usual = parameters(), statistics()
    optimizer = DynamicEvaluation(params, usual, lr=0.02, pull=pull, eps=1e-3)
    want = start = [p.detach().clone() for p in params]
    average = (usual[0].mean() + usual[1].mean()) / 2
    assert pull != 1.5 or any((pull * m / average > 1).any() for m in usual)
    for step in range(3):
        grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(step), dtype=p.dtype) for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        want = [
            w + (m / average * pull).clamp(max=1) * (s - w) - 0.02 * g / (m + 1e-3)
            for w, s, m, g in zip(want, start, usual, grads, strict=True)
        ]
        for p, w in zip(params, want, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_without_gradients_weights_return_to_where_they_were():
    params = parameters()
    start = [p.detach().clone() for p in params]
    optimizer = DynamicEvaluation(params, statistics(), pull=5.0)
    with torch.no_grad():
        for p in params:
            p.add_(1.0)
    optimizer.zero_grad()
    distance = [1.0]
    for _ in range(400):
        optimizer.step()
        distance.append(max((p - s).abs().max().item() for p, s in zip(params, start, strict=True)))
    assert distance[1] < 1  # not at once
    assert distance[-1] < 1e-6


def test_statistics_are_the_mean_over_segments_and_disturb_nothing():
    net, text = model().train(), tokens(23, rows=2)
    net.head.bias.requires_grad_(False)
    kept = torch.ones_like(net.head.weight)
    net.head.weight.grad = kept
    before = {n: v.clone() for n, v in net.state_dict().items()}
    got = gather_mean_square(net, text.split(5, dim=1))
    assert net.training
    assert net.head.weight.grad is kept
    assert net.embedding.weight.grad is None
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())

    params = [p for p in net.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in params]
    inputs = torch.cat([torch.full((2, 1), 7), text[:, :-1]], 1)
    state = net.initial_state(2)
    for at in range(0, 23, 5):
        held = {"recent": state["recent"], "layers": {"0": {n: t.detach() for n, t in state["layers"]["0"].items()}}}
        logits, state = net(inputs[:, at : at + 5], held)
        loss = F.cross_entropy(logits.flatten(0, 1), text[:, at : at + 5].flatten())
        for total, g in zip(sums, torch.autograd.grad(loss, params), strict=True):
            total += g**2
    for a, b in zip(got, sums, strict=True):
        torch.testing.assert_close(a, (b / 5).sqrt(), rtol=1e-4, atol=1e-7)


def reader(net) -> Learner:
    usual = gather_mean_square(net, tokens(60).split(5, dim=1))
    return Learner(net, DynamicEvaluation(net.parameters(), usual, lr=1e-2, pull=0.05, eps=1e-2), clip=math.inf)


def test_a_run_cut_and_resumed_is_the_run(tmp_path):
    whole = reader(model())
    pieces = tokens(100).split(5, dim=1)
    for piece in pieces[:10]:
        whole.observe(piece)
    whole.save(tmp_path / "half.safetensors")
    want = [whole.observe(piece).bits for piece in pieces[10:]]

    other = model()
    with torch.no_grad():  # other weights and other statistics: both must come from the checkpoint
        other.head.weight.mul_(0.5)
    resumed = reader(other)
    resumed.load(tmp_path / "half.safetensors")
    got = [resumed.observe(piece).bits for piece in pieces[10:]]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    ends = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in ends)


def test_a_foreign_state_changes_nothing():
    optimizer = DynamicEvaluation(parameters(), statistics())
    before = optimizer.state_dict()
    foreign = optimizer.state_dict()
    foreign["state"]["trained"]["0"].add_(1.0)
    foreign["state"]["mean_square"]["1"] = torch.ones(6)
    for odd in [foreign, {}, {"state": {"trained": before["state"]["trained"]}, "lr": 1.0}]:
        with pytest.raises(CheckpointError, match="another model"):
            optimizer.load_state_dict(odd)
        after = optimizer.state_dict()
        assert after["lr"] == before["lr"]
        assert all(torch.equal(after["state"][n][i], t) for n, ts in before["state"].items() for i, t in ts.items())


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"lr": -1.0}, {"lr": math.nan}, {"lr": math.inf}, {"pull": -0.1}, {"pull": math.nan}, {"eps": 0.0}],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DynamicEvaluation(parameters(), statistics(), **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: m[:1],
        lambda m: m[::-1],
        lambda m: [-m[0], m[1]],
        lambda m: [m[0] * math.nan, m[1]],
        lambda m: [x * 0 for x in m],
    ],
)
def test_statistics_that_cannot_serve_are_refused(wrong):
    with pytest.raises(ValueError, match="mean_square"):
        DynamicEvaluation(parameters(), wrong(statistics()))


def test_statistics_of_nothing_are_refused():
    net = model().train()
    with pytest.raises(ValueError, match="at least one"):
        gather_mean_square(net, [])
    assert net.training


def test_the_proof_passes():
    system, control = dynamic_evaluation()
    assert system.holds, system.says
    assert not control.holds, control.says
