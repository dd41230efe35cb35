"""Parts learn when their clock strikes, from all that they gathered, and a run restarts exactly within a period."""

from functools import partial

import pytest
import torch
from torch import nn

from remanence.errors import CheckpointError, RemanenceError, UnknownName
from remanence.learning import Learner
from remanence.models.language import LanguageModel
from remanence.optim import AdamW, Clock, Clocks, clocked

SGD = partial(torch.optim.SGD, lr=0.1)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def gradients(net, steps, seed=1):
    """A gradient for every parameter and step, independent of the weights."""
    g = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=g, dtype=p.dtype) for p in net.parameters()] for _ in range(steps)]


def run(net, optimizer, grads):
    for step in grads:
        optimizer.zero_grad()
        for p, g in zip(net.parameters(), step, strict=True):
            p.grad = g.clone()
        optimizer.step()
        yield [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize(("period", "steps"), [(1, 5), (3, 11), (4, 4), (7, 6)])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_part_changes_when_its_period_ends_by_what_it_gathered(period, steps, reduce):
    net = model()
    start = [p.detach().clone() for p in net.parameters()]
    grads = gradients(net, steps)
    optimizer = Clocks(Clock(net[0], make=SGD), Clock(net[2], period, SGD, reduce=reduce))
    states = list(run(net, optimizer, grads))
    slow = torch.stack([state[2] for state in [start, *states]])
    changed = (slow.diff(dim=0).flatten(1).abs().amax(1) > 0).nonzero().flatten() + 1
    assert changed.tolist() == [*range(period, steps + 1, period)]
    used = steps // period * period
    total = sum((step[2] for step in grads[:used]), torch.zeros(3, 5).double())
    want = start[2] - 0.1 * total / (period if reduce == "mean" else 1)
    torch.testing.assert_close(states[-1][2], want)
    fast = start[0] - 0.1 * sum(step[0] for step in grads)
    torch.testing.assert_close(states[-1][0], fast)


def test_period_one_is_the_optimiser_itself():
    one, two = model(), model()
    grads = gradients(one, 6)
    *_, got = run(one, Clocks(Clock(one, 1, partial(AdamW, lr=1e-2))), grads)
    *_, want = run(two, AdamW(two.parameters(), 1e-2), grads)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_restart_returns_to_the_start_and_the_start_may_follow():
    for follow in (0.0, 0.25):
        net = model()
        start = net[0].weight.detach().clone()
        momentum = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        optimizer = Clocks(Clock(net[0], 1, momentum, restart=3, follow=follow), Clock(net[2], 2, SGD))
        grads = gradients(net, 4)
        states = list(run(net, optimizer, grads))
        before = states[1][0] - 0.1 * (grads[2][0] + 0.9 * grads[1][0] + 0.81 * grads[0][0])
        torch.testing.assert_close(states[2][0], start + follow * (before - start))
        # the optimiser is new too: no momentum is left
        torch.testing.assert_close(states[3][0], states[2][0] - 0.1 * grads[3][0])


def tree(model, make=partial(AdamW, lr=1e-2)):
    return clocked(model, {"embedding": 3, "blocks": 2, "blocks.0.mixer": 4}, make)


def learner(make):
    torch.manual_seed(0)
    net = LanguageModel("gla", vocabulary=11, dim=8, ngrams=(), arguments={"gla": {"heads": 2}})
    return Learner(net, tree(net, make), schedule=lambda step: 1 / (1 + step))


@pytest.mark.parametrize("make", [partial(AdamW, lr=1e-2), partial(torch.optim.Adam, lr=1e-2), SGD])
@pytest.mark.parametrize("forget", [None, "sums", "count"])
def test_a_learner_restarts_exactly_within_a_period(tmp_path, make, forget):
    text = torch.randint(11, (2, 60), generator=torch.Generator().manual_seed(3)).split(4, dim=1)
    whole = learner(make)
    for piece in text[:7]:  # 7 is within every period but 1
        whole.observe(piece)
    whole.save(tmp_path / "cut")
    torch.manual_seed(9)
    back = learner(make)
    back.load(tmp_path / "cut")
    if forget == "count":
        back.optimizer.count = 0
    elif forget:
        for part in back.optimizer.parts:
            part.sums = {}
    ends = [torch.cat([who.observe(piece).bits for piece in text[7:]], 1) for who in (whole, back)]
    assert torch.equal(*ends) == (forget is None)


def test_names_give_paces_and_the_longest_counts():
    net = LanguageModel("gla", vocabulary=11, dim=8, ngrams=(), arguments={"gla": {"heads": 2}})
    net.norm.update_period = 5
    paces = {id(p): part.clock.period for part in tree(net).parts for p in part.parameters}
    assert len(paces) == len(list(net.parameters()))
    for name, p in net.named_parameters():
        want = 4 if ".mixer." in name else 2 if name.startswith("blocks") else 3 if name.startswith("embed") else 1
        assert paces[id(p)] == (5 if name.startswith("norm") else want), name
    with pytest.raises(UnknownName, match=r"no part of the model called 'blocks\.1'; did you mean 'blocks\.0"):
        clocked(net, {"blocks.1": 2})


def test_a_foreign_state_changes_nothing():
    net, other = model(), model()
    optimizer = Clocks(Clock(net[0], 2, AdamW), Clock(net[2], 3, AdamW))
    list(run(net, optimizer, gradients(net, 4)))
    before = [{i: t.clone() for i, t in part.sums.items()} for part in optimizer.parts]
    for foreign in (
        Clocks(Clock(other[0], 2, AdamW)),
        Clocks(Clock(other[0], 2, AdamW), Clock(other[2], 4, AdamW)),
        Clocks(Clock(other[2], 2, AdamW), Clock(other[0], 3, AdamW)),
    ):
        list(run(other, foreign, gradients(other, 5)))
        with pytest.raises(CheckpointError, match="clock"):
            optimizer.load_state_dict(foreign.state_dict())
        assert optimizer.count == 4
        for part, sums in zip(optimizer.parts, before, strict=True):
            assert part.sums.keys() == sums.keys()
            assert all(torch.equal(part.sums[i], t) for i, t in sums.items())


def test_what_cannot_be_is_refused():
    net = model()
    with pytest.raises(RemanenceError, match="two clocks; part 1"):
        Clocks(Clock(net), Clock([net[0].weight]))
    with pytest.raises(RemanenceError, match="part 0 has no parameters"):
        Clocks(Clock(net[1], make=lambda given: torch.optim.SGD([torch.zeros(1)], lr=1.0)))
    for wrong in ({"period": 0}, {"period": 1.5}, {"restart": -1}, {"reduce": "max"}, {"follow": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Clock(net, **wrong)
