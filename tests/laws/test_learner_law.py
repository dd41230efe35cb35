"""Exact restart holds for every registered memory and strategy; and a checkpoint that forgets is found out."""

import pytest
import torch

from remanence import continual
from remanence.catalogue import cards
from remanence.learning import Learner
from remanence.models.language import LanguageModel


def learner(memory="gla", strategies=()):
    torch.manual_seed(0)
    small = dict(cards("memory")[memory].small)
    dim = small.pop("dim", 16)
    made = [continual.make(name, **cards("strategy")[name].small) for name in strategies]
    return Learner(LanguageModel(memory, dim=dim, ngram_rows=64, arguments={memory: small}), strategies=made)


def stream(count=8, size=8):
    g = torch.Generator().manual_seed(1)
    return torch.randint(97, 101, (1, count * size), generator=g).split(size, dim=1)


def after_restart(make, path, forget=None):
    """Bits of the second half: of a learner that went on, and of one that was read back from the first's file."""
    first, pieces = make(), stream()
    for piece in pieces[:4]:
        first.observe(piece)
    first.boundary("a")
    first.save(path)
    torch.manual_seed(77)
    second = make()
    second.load(path)
    if forget:
        forget(second)
    return [torch.cat([who.observe(piece).bits for piece in pieces[4:]], 1) for who in (first, second)]


@pytest.mark.parametrize("memory", sorted(cards("memory")))
def test_every_memory_restarts_exactly(memory, tmp_path):
    on, back = after_restart(lambda: learner(memory), tmp_path / "c")
    assert torch.equal(on, back)


@pytest.mark.parametrize("strategy", sorted(cards("strategy")))
def test_every_strategy_restarts_exactly(strategy, tmp_path):
    on, back = after_restart(lambda: learner(strategies=[strategy]), tmp_path / "c")
    assert torch.equal(on, back)


def forget_state(one):
    one.state = None


def forget_last(one):
    one.last = None


def forget_moments(one):
    for first, second, _ in one.optimizer.state.values():
        first.zero_()
        second.zero_()


def forget_buffer(one):
    one.strategies.members[0].seen = 0


@pytest.mark.parametrize("forget", [forget_state, forget_last, forget_moments, forget_buffer])
def test_whatever_is_forgotten_shows(forget, tmp_path):
    on, back = after_restart(lambda: learner(strategies=["replay"]), tmp_path / "c", forget)
    assert not torch.equal(on, back)
