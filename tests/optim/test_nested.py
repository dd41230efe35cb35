"""The optimisers of nested learning are their formulas, train ordinary models, and restart exactly."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from remanence.errors import CheckpointError
from remanence.learning import Learner
from remanence.models.language import LanguageModel
from remanence.ops.newton_schulz import newton_schulz
from remanence.optim import (
    M3,
    Clock,
    Clocks,
    DeltaGradientDescent,
    GradientMemory,
    deep_momentum,
    delta_momentum,
    preconditioned_momentum,
)

MAKERS = {
    "heavy ball": lambda net: GradientMemory(net.parameters(), lr=0.05),
    "muon": lambda net: GradientMemory(net.parameters(), lr=0.02, retain=0.95, output="newton-schulz"),
    "delta momentum": lambda net: delta_momentum(net.parameters(), lr=0.1),
    "preconditioned": lambda net: preconditioned_momentum(net.parameters(), lr=2e-3),
    "deep momentum": lambda net: deep_momentum(net.parameters(), lr=0.1),
    "deep delta momentum": lambda net: deep_momentum(net.parameters(), lr=0.2, objective="squared", retain=0.99),
    "deep muon": lambda net: deep_momentum(net.parameters(), lr=0.02, output="newton-schulz"),
    "m3": lambda net: M3(net.parameters(), lr=0.02, period=3, divide=False),
    "m3 as printed": lambda net: M3(net.parameters(), lr=1e-4, period=3, ema=False),
    "delta gradient descent": lambda net: DeltaGradientDescent(net, lr=0.3),
    "gradient descent": lambda net: DeltaGradientDescent(net, lr=0.3, objective="dot"),
}
EVERY = pytest.mark.parametrize("name", MAKERS)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apply(optimizer, p, gradients):
    for g in gradients:
        p.grad = g
        optimizer.step()
    return p.detach()


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3))


def losses(net, optimizer, steps, seed=1):
    """A teacher's regression: the loss of every step."""
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
    y = (x @ torch.randn(6, 3, generator=torch.Generator().manual_seed(7)) / 3).tanh()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        yield loss.item()


@EVERY
def test_it_trains_an_ordinary_model(name):
    net = network()
    course = list(losses(net, MAKERS[name](net), 300))
    share = 0.7 if name == "delta gradient descent" else 0.15  # it is biased
    assert course[-1] < share * course[0], (course[0], course[-1])


@EVERY
def test_its_state_continues_exactly(name):
    one, two = network(), network()
    first, second = MAKERS[name](one), MAKERS[name](two)
    list(losses(one, first, 5))
    list(losses(two, second, 2, seed=3))
    two.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    assert list(losses(one, first, 7, seed=2)) == list(losses(two, second, 7, seed=2))


@EVERY
def test_a_foreign_state_is_refused(name):
    net, other = network(), nn.Sequential(nn.Linear(6, 17), nn.Linear(17, 3))
    with pytest.raises(CheckpointError, match="another model"):
        MAKERS[name](net).load_state_dict(MAKERS[name](other).state_dict())


@pytest.mark.parametrize("name", ["deep momentum", "m3", "delta gradient descent"])
@pytest.mark.parametrize("period", [1, 3])
def test_a_learner_restarts_exactly(tmp_path, name, period):
    text = torch.randint(9, (1, 60), generator=torch.Generator().manual_seed(3)).split(6, dim=1)

    def learner():
        torch.manual_seed(0)
        net = LanguageModel("gla", vocabulary=9, dim=8, ngrams=(), arguments={"gla": {"heads": 2}})
        return Learner(net, Clocks(Clock(net, period, lambda _: MAKERS[name](net))))

    whole = learner()
    for piece in text[:5]:
        whole.observe(piece)
    whole.save(tmp_path / "cut")
    back = learner()
    back.load(tmp_path / "cut")
    ends = [torch.cat([who.observe(piece).bits for piece in text[5:]], 1) for who in (whole, back)]
    assert torch.equal(*ends)


def test_momenta_are_their_formulas():
    gradients, P = [draw(4, 3, seed=s) for s in range(3)], draw(4, 3, seed=9)
    W, m = P.clone(), torch.zeros(4, 3).double()
    for g in gradients:
        m = 0.8 * m + 0.5 * g
        W = W - 0.1 * m
    p = nn.Parameter(P.clone())
    close(apply(GradientMemory([p], 0.1, retain=0.8, step=0.5), p, gradients), W)

    W, m = P.clone(), torch.zeros(4, 3).double()
    for g in gradients:
        unit = g / g.norm()
        m = 0.8 * m - 0.5 * (m @ unit.T @ unit - g)
        W = W - 0.1 * m
    p = nn.Parameter(P.clone())
    close(apply(delta_momentum([p], 0.1, retain=0.8, step=0.5), p, gradients), W)

    W, v = P.clone(), torch.zeros(4, 3).double()
    for t, g in enumerate(gradients, 1):
        v = 0.999 * v + 0.001 * g**2
        W = W - 0.1 * g / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    p = nn.Parameter(P.clone())
    close(apply(preconditioned_momentum([p], 0.1, retain=0.0), p, gradients), W, 1e-6)


def test_delta_momentum_lets_go_of_what_a_new_gradient_replaces():
    """After a gradient along one direction and its reverse, the heavy ball has half forgotten; the delta has turned."""
    g = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    ends = {}
    for objective in ("dot", "squared"):
        p = nn.Parameter(torch.zeros(1, 2).double())
        memory = GradientMemory([p], 1.0, retain=1.0, objective=objective)
        apply(memory, p, [g, g, -g])
        ends[objective] = memory.state[p]["m"][0, 0].item()
    assert ends == {"dot": 2.0, "squared": -2.0}


@pytest.mark.parametrize("objective", ["dot", "squared"])
def test_deep_momentum_steps_down_its_objective(objective):
    """Against automatic differentiation of the loss in its docstring, over three steps."""
    p = nn.Parameter(draw(5, 4))
    memory = deep_momentum([p], 0.1, objective=objective, retain=0.9, hidden=3)
    W1, W2 = memory.state[p]["0"].clone(), memory.state[p]["1"].clone()
    start, want = W1.clone(), p.detach().clone()

    def network(key, W1, W2):
        return nn.functional.gelu(key @ W1.T) @ W2.T

    for s in range(3):
        g = draw(5, 4, seed=s)
        size = g.norm() / math.sqrt(5)
        weights = [W.requires_grad_() for W in (W1, W2)]
        said = network(g / size, *weights)
        loss = -(said * g / size).sum(1) if objective == "dot" else 0.5 * (said - g / size).square().sum(1)
        u1, u2 = torch.autograd.grad(loss.mean(), weights)
        W1 = (start + 0.9 * (W1 - start) - u1 / 3).detach()
        W2 = (0.9 * W2 - u2 / 3).detach()
        want = want - 0.1 * network(g / size, W1, W2) * size
        close(apply(memory, p, [g]), want, 1e-10)


def test_m3_moves_its_slow_direction_every_period_and_without_it_is_muon():
    gradients = [draw(4, 6, seed=s) for s in range(8)]
    p = nn.Parameter(draw(4, 6, seed=9))
    m3, seen = M3([p], 0.1, period=3, divide=False, ema=False), []
    for g in gradients:
        apply(m3, p, [g])
        seen.append(m3.state[p]["direction"].clone())
    moved = [i + 1 for i, (a, b) in enumerate(zip([torch.zeros_like(p), *seen], seen, strict=False)) if (a != b).any()]
    assert moved == [3, 6]
    close(seen[-1], newton_schulz(sum(gradients[:6])), 1e-6)

    ends = []
    for make in (
        lambda p: M3([p], 0.1, slow=0.0, divide=False, ema=False),
        lambda p: GradientMemory([p], 0.1, retain=1.0, output="newton-schulz"),
        lambda p: M3([p], 0.1, slow=0.5, period=3, divide=False, ema=False),
    ):
        p = nn.Parameter(draw(4, 6, seed=9))
        ends.append(apply(make(p), p, gradients).clone())
    close(ends[0], ends[1], 1e-6)
    assert (ends[2] - ends[1]).abs().max() > 1e-2


@pytest.mark.parametrize("length", [1.7, 0.4])
def test_delta_gradient_descent_is_its_argmin(length):
    x = draw(1, 5)
    x = x / x.norm() * length
    net = nn.Linear(5, 3, bias=False).double()
    before, eta = net.weight.detach().clone(), 0.7
    optimizer = DeltaGradientDescent(net, lr=eta)
    y = net(x)
    (y.sin().sum()).backward()
    u = -y.detach().cos()
    optimizer.step()
    W = net.weight.detach()
    slope = (x @ W.T - u).T @ x + (W - before) / eta  # of ½‖Wx − u‖² + ‖W − W_t‖²/2η
    assert slope.abs().max() < 1e-12
    share = eta / (1 + eta * length**2)
    close(W, before - share * (before @ x.T) @ x + share * u.T @ x)


def test_delta_gradient_descent_of_a_batch_regresses_its_mean_and_rests_at_half():
    x, y = draw(20, 4), draw(20, 3, seed=1)
    net = nn.Linear(4, 3, bias=False).double()
    optimizer = DeltaGradientDescent(net, lr=0.5)
    before = net.weight.detach().clone()
    errors = net(x) - y
    (0.5 * errors.square().sum(1).mean()).backward()
    optimizer.step()
    W, u = net.weight.detach(), -errors.detach()
    assert ((x @ W.T - u).T @ x / 20 + (W - before) / 0.5).abs().max() < 1e-12
    for _ in range(400):
        optimizer.zero_grad()
        (0.5 * (net(x) - y).square().sum(1).mean()).backward()
        optimizer.step()
    close(net.weight.detach(), 0.5 * torch.linalg.lstsq(x, y).solution.T, 1e-9)


def test_what_is_only_looked_at_leaves_no_trace():
    ends = []
    for look in (False, True):
        net = network()
        optimizer = DeltaGradientDescent(net, lr=0.3)
        if look:
            net(torch.ones(9, 6))
            with torch.no_grad():
                net(torch.ones(9, 6))
        list(losses(net, optimizer, 3))
        ends.append(net[0].weight.detach().clone())
        optimizer.close()
        assert not net[0]._forward_hooks
    assert torch.equal(*ends)


def test_a_restarted_part_is_watched_once():
    net = network()
    course = list(losses(net, Clocks(Clock(net, 1, lambda _: DeltaGradientDescent(net, lr=0.3), restart=2)), 5))
    assert [len(layer._forward_hooks) for layer in (net[0], net[3])] == [1, 1]
    assert course[0] == course[2] == course[4] != course[1]


def test_a_gradient_of_zero_or_none_does_no_harm():
    for name, make in MAKERS.items():
        net = network()
        optimizer = make(net)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        net[0].bias.grad = None
        optimizer.step()
        assert all(p.isfinite().all() for p in net.parameters()), name
        assert torch.equal(net[0].weight, network()[0].weight), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(GradientMemory, lr=0.0), "lr must be > 0"),
        (partial(GradientMemory, structure="tree"), "structure must be 'matrix' or 'network', got 'tree'"),
        (partial(GradientMemory, retain=1.5), r"retain must lie in \[0, 1\]"),
        (partial(GradientMemory, output="tanh"), "output must be None or 'newton-schulz'"),
        (partial(M3, period=0), "period must be > 0"),
        (partial(M3, betas=(2.0, 0.1, 0.1)), "at most 1 with ema"),
        (partial(M3, slow=-1.0), "slow must be >= 0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(network().parameters())
    for wrong in ({"objective": "l2"}, {"retain": 2.0}, {"reduction": "max"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DeltaGradientDescent(network(), **wrong)
