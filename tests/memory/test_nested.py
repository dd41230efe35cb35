"""What is particular to self-modifying memories, to the continuum memory, and to Hope."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from remanence.learning import Learner
from remanence.memory import Hope, SelfModifyingTitans
from remanence.memory.continuum import ContinuumMemory
from remanence.models.language import ChannelMixer, LanguageModel
from remanence.ops.inner_network import fast_weight_read
from remanence.optim import clocked
from remanence.state import flatten

SMALL = {"dim": 8, "heads": 2, "expand": 2, "chunk_size": 3, "maker_chunk_size": 4}


def build(**changes):
    torch.manual_seed(0)
    return SelfModifyingTitans(**{**SMALL, **changes}).double()


def draw(T, batch=2, dim=8, seed=1):
    return torch.randn(batch, T, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(memory, x):
    """One token after another: each group keeps its anchor until its own chunk ends; gradients by autograd."""
    mixed, _ = memory.conv(x)
    heads = memory.heads
    nets = {name: [W.expand(len(x), *W.shape) for W in start] for name, start in memory.start.items()}
    anchors = dict(nets)

    def unit(z):
        return z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def say(name, z, weights):
        return fast_weight_read(z, weights, residual=name != "gates")

    y = []
    for t in range(x.shape[1]):
        z = mixed[:, t : t + 1].unflatten(-1, (heads, -1)).transpose(1, 2)
        q = unit(memory.query(mixed[:, t : t + 1]).unflatten(-1, (heads, -1)).transpose(1, 2))
        k, v = (unit(part) for part in say("makers", torch.cat([z, z], 1), anchors["makers"]).chunk(2, 1))
        eta, alpha = say("gates", torch.cat([z, z], 1), anchors["gates"]).chunk(2, 1)
        theta = memory.scale * F.softplus(eta + memory.bias[0][:, None, None])
        a = (alpha + memory.bias[1][:, None, None]).sigmoid()
        y.append(say("memory", q, nets["memory"]))
        for name, weights in nets.items():
            n = weights[0].shape[1] // heads
            K, V, step, retain = (part.repeat(1, n, 1, 1) for part in (k, v, theta, a))
            target = say(name, V, anchors[name])

            def loss(given, name=name, K=K, target=target):
                return 0.5 * (say(name, K, given) - target).square().sum()

            gradient = torch.func.grad(loss)(anchors[name])
            error = (say(name, K, anchors[name]) - target).square().sum((2, 3))
            size = sum(u.square().sum((2, 3)) for u in gradient)
            step = torch.minimum(step, (0.5 / memory.clocks[name] * error / (size + 1e-12))[..., None, None])
            factor = retain * torch.eye(K.shape[-1], dtype=x.dtype) - step * K.mT @ K
            nets[name] = [weights[0] @ factor - step * gradient[0], retain * weights[1] - step * gradient[1]]
            if (t + 1) % memory.clocks[name] == 0:
                anchors[name] = nets[name]
    return memory.readout(torch.cat(y, 2), x), nets


@pytest.mark.parametrize("sizes", [(1, 1), (3, 4), (4, 2)])
def test_it_is_its_definition(sizes):
    memory, x = build(chunk_size=sizes[0], maker_chunk_size=sizes[1]), draw(11)
    y, state = memory(x)
    want, nets = by_definition(memory, x)
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    for name, weights in nets.items():
        torch.testing.assert_close(list(state[name]["weight"].values()), weights, rtol=1e-9, atol=1e-9)


def test_no_steps_and_no_decay_is_a_static_network_of_the_query():
    memory, x = build(), draw(9)
    with torch.no_grad():
        for W in memory.start["gates"]:
            W.zero_()
        memory.bias.copy_(torch.tensor([[-1e3], [1e3]]).expand(2, 2))
    y, state = memory(x)
    before = memory.initial_state(2)
    for name in ("memory", "makers"):
        torch.testing.assert_close(flatten(state[name]), flatten(before[name]))
    live, _ = build()(x)
    assert (live - y).abs().max() > 1e-3


def test_each_group_is_read_where_its_own_chunk_began():
    memory, x = build(), draw(3)
    _, state = memory(x)
    for name, size in memory.clocks.items():
        assert torch.equal(state[name]["anchor"]["0"], state[name]["weight"]["0"]) == (size == 3)


def test_a_monotonous_loud_stream_stays_finite_and_every_parameter_learns():
    memory = build()
    x = 10 * draw(1).expand(2, 300, 8)
    with torch.no_grad():
        assert all(t.isfinite().all() for t in flatten(memory(x)[1]).values())
    y, _ = memory(draw(11))
    y.square().sum().backward()
    for name, p in memory.named_parameters():
        assert p.grad.abs().max() > 0, name


def test_the_continuum_changes_each_level_in_its_own_time():
    torch.manual_seed(0)
    cms = ContinuumMemory(8, periods=(1, 2, 5))
    x = torch.randn(4, 8)
    optimizer, changes = clocked(cms, make=partial(torch.optim.SGD, lr=0.01)), [0, 0, 0]
    for _ in range(11):
        before = [level.out.weight.detach().clone() for level in cms.levels]
        optimizer.zero_grad()
        cms(x).square().sum().backward()
        optimizer.step()
        changes = [
            n + (not torch.equal(b, level.out.weight)) for n, b, level in zip(changes, before, cms.levels, strict=True)
        ]
    assert changes == [11, 5, 2]


def test_levels_chain_add_up_restart_and_retrofit():
    torch.manual_seed(0)
    x, mixer = torch.randn(3, 8), ChannelMixer(8, 12)
    chain = ContinuumMemory(8, (1, 4), level=lambda: copy.deepcopy(mixer))
    torch.testing.assert_close(chain(x), mixer(mixer(x)))
    beside = ContinuumMemory(8, (1, 4), combine="independent", level=lambda: copy.deepcopy(mixer))
    torch.testing.assert_close(beside(x), mixer(x))
    nested = clocked(ContinuumMemory(8, (1, 4, 8), nested=True, follow=0.5))
    paces = [(p.clock.period, p.clock.restart, p.clock.follow) for p in nested.parts]
    assert paces == [(1, 4, 0.5), (4, 8, 0.5), (8, None, 0.0)]
    for wrong, message in (((), "periods"), ((0,), "periods"), ((4, 1), "increase")):
        with pytest.raises(ValueError, match=message):
            ContinuumMemory(8, wrong, nested=True)
    with pytest.raises(ValueError, match="combine"):
        ContinuumMemory(8, combine="sum")


@pytest.mark.parametrize("nested", [False, True])
def test_hope_learns_at_every_pace_and_restarts_exactly(tmp_path, nested):
    text = torch.randint(7, (1, 72), generator=torch.Generator().manual_seed(3)).split(6, dim=1)

    def learner():
        torch.manual_seed(0)
        arguments = {"hope": {"heads": 2, "expand": 1, "periods": (1, 3, 5), "nested": nested}}
        net = LanguageModel("hope", vocabulary=7, dim=8, ngrams=(), arguments=arguments)
        return Learner(net, clocked(net))

    whole = learner()
    for piece in text[:7]:
        whole.observe(piece)
    whole.save(tmp_path / "cut")
    torch.manual_seed(5)
    back = learner()
    back.load(tmp_path / "cut")
    ends = [torch.cat([who.observe(piece).bits for piece in text[7:]], 1) for who in (whole, back)]
    assert torch.equal(*ends)
    assert {part.clock.period for part in whole.optimizer.parts} == {1, 3, 5}


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="multiple of heads, got dim=10, heads=4"):
        SelfModifyingTitans(10)
    with pytest.raises(ValueError, match="chunk_size=0"):
        Hope(8, chunk_size=0)
