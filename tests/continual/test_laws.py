"""What every registered strategy obeys."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from remanence.catalogue import cards
from remanence.continual import Batch, Context, Replay, Strategies, Strategy, make

STEPS, CUT, TASK = 15, 9, 5


class Forgetful(Replay):
    """A faulty strategy: its state leaves the generator out."""

    def load_state_dict(self, state):
        own = self.generator.get_state()
        super().load_state_dict(state)
        self.generator.set_state(own)


def build(id: str) -> Strategy:
    card = cards("strategy")[id]
    return card.make(**card.small)


def fresh_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(256, 6), nn.Tanh(), nn.Linear(6, 256))


def stream() -> list[Batch]:
    x = torch.randint(256, (STEPS, 2, 9), generator=torch.Generator().manual_seed(0))
    return [Batch(row[:, :-1], row[:, 1:], 2, task=i // TASK) for i, row in enumerate(x)]


def learn(model: nn.Module, strategy: Strategy, start: int = 0, stop: int = STEPS) -> list[float]:
    """The hooks in the order of the interface, with plain gradient descent."""
    losses, parameters = [], dict(model.named_parameters())
    for i, batch in list(enumerate(stream()))[start:stop]:
        rows = strategy.collect(batch)
        outputs = model(rows.inputs)
        loss = F.cross_entropy(outputs.flatten(0, 1), rows.targets.flatten())
        extra = strategy.loss(Context(model, rows, outputs, loss))
        loss = loss if extra is None else loss + extra
        model.zero_grad()
        loss.backward()
        strategy.transform_grad(parameters)
        with torch.no_grad():
            for p in parameters.values():
                p -= 0.5 * p.grad
        strategy.after_step(parameters)
        if i % TASK == TASK - 1:
            strategy.on_boundary(batch.task)
        losses.append(loss.item())
    return losses


def resumes_exactly(new) -> bool:
    """Whether a run that is cut, and goes on with another instance and its saved state, is the whole run."""
    whole, first, second = new(), new(), new()
    model, before, after = fresh_model(), fresh_model(), fresh_model()
    for strategy, its in ((whole, model), (first, before), (second, after)):
        strategy.attach(its)
    expected = learn(model, whole)
    learn(before, first, 0, CUT)
    after.load_state_dict(before.state_dict())
    state = first.state_dict()
    learn(before, first, CUT)  # what the state was taken from lives on apart from it
    second.load_state_dict(state)
    same = learn(after, second, CUT) == expected[CUT:]
    return same and all(torch.equal(a, b) for a, b in zip(model.parameters(), after.parameters(), strict=True))


def test_replay_and_ewc_are_among_them():
    assert {"replay", "ewc"} <= set(cards("strategy"))


@pytest.mark.parametrize("id", cards("strategy"))
def test_resumes_exactly(id):
    assert resumes_exactly(lambda: build(id))


def test_resuming_can_fail():
    assert resumes_exactly(lambda: Replay(160, rows=2))
    assert not resumes_exactly(lambda: Forgetful(160, rows=2))


def test_a_list_of_all_resumes_exactly():
    assert resumes_exactly(lambda: Strategies(build(id) for id in cards("strategy")))


@pytest.mark.parametrize("id", cards("strategy"))
def test_changes_what_is_learned(id):
    model, naive, strategy = fresh_model(), fresh_model(), build(id)
    strategy.attach(model)
    assert learn(model, strategy) != learn(naive, make("none"))


@pytest.mark.parametrize("id", cards("strategy"))
def test_state_is_tensors_and_plain_values_and_its_bytes_are_counted(id):
    model, strategy = fresh_model(), build(id)
    strategy.attach(model)
    learn(model, strategy)
    state = strategy.state_dict()
    assert all(isinstance(v, torch.Tensor | int | float | str) for v in state.values())
    kept = {n: x for n, x in state.items() if isinstance(x, torch.Tensor) and n != "generator"}
    assert strategy.state_bytes() == sum(x.numel() * x.element_size() for x in kept.values()) > 0


@pytest.mark.parametrize("id", cards("strategy"))
def test_leaves_the_global_generator_and_the_batch_alone(id):
    model, strategy = fresh_model(), build(id)
    strategy.attach(model)
    before = torch.get_rng_state()
    batch = stream()[0]
    inputs = batch.inputs.clone()
    learn(model, strategy)
    strategy.collect(batch)
    strategy.predict(model, batch.inputs)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(batch.inputs, inputs)


class Named(Strategy):
    """Writes down which of its hooks was called."""

    def __init__(self, name: str, calls: list[str]):
        self.name, self.calls = name, calls

    def transform_grad(self, parameters):
        self.calls.append(f"{self.name} gradient")

    def after_step(self, parameters):
        self.calls.append(f"{self.name} step")

    def predict(self, forward, x, task=None):
        return forward(x) * 10 + int(self.name)


def test_hooks_run_in_the_order_of_the_list():
    calls: list[str] = []
    both = Strategies([Named("1", calls), Named("2", calls)])
    learn(fresh_model(), both, 0, 1)
    assert calls == ["1 gradient", "2 gradient", "1 step", "2 step"]
    assert both.predict(lambda x: x, torch.tensor(3)).item() == 312


def test_loss_terms_add_up():
    two = Strategies([build("ewc"), build("ewc")])
    model = fresh_model()
    two.attach(model)
    learn(model, two, stop=STEPS - 1)
    context = Context(model, stream()[0], torch.zeros(1), torch.zeros(()))
    parts = [s.loss(context) for s in two.members]
    assert parts[0] > 0
    assert torch.equal(two.loss(context), parts[0] + parts[1])
