"""Recoding corrects what is carried on, exactly as its formula says, and resumes anywhere."""

import math

import pytest
import torch

from remanence.errors import RemanenceError
from remanence.learning import Learner
from remanence.models.recoding import LSTMModel, Recoding
from remanence.state import flatten, tree_map

ERRORS = ["surprisal", "power", "entropy", "ensemble"]
EVERY = pytest.mark.parametrize("error", ERRORS)


def build(error, **changes):
    torch.manual_seed(0)
    return Recoding(LSTMModel(7, 6, 2), error, **{"step": 0.5, "samples": 3, **changes}).double()


def draw(T, batch=2):
    return torch.randint(8, (batch, T), generator=torch.Generator().manual_seed(1))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@EVERY
def test_any_cut_gives_the_same_also_without_gradients(error):
    model, tokens = build(error), draw(9)
    want, end = model(tokens)
    for cuts in ([4], [0, 1, 1, 8]):
        pieces, state = [], None
        for part in tokens.tensor_split(cuts, dim=1):
            with torch.no_grad():
                y, state = model(part, state)
            assert not y.requires_grad
            pieces.append(y)
        close(torch.cat(pieces, 1), want)
        close(flatten(state), flatten(tree_map(torch.detach, end)))
    for p in model.parameters():
        p.requires_grad_(False)
    close(model(tokens)[0], want)


@EVERY
def test_a_step_of_zero_is_the_model_and_another_is_not(error):
    model, tokens = build(error, step=0.0), draw(9)
    plain = torch.stack([model.decode(model.model(tokens[:, : t + 1])[1]) for t in range(9)], 1)
    close(model(tokens)[0], plain)
    assert (build(error)(tokens)[0] - plain).abs().max() > 1e-6


@pytest.mark.parametrize("error", ["surprisal", "power"])
def test_states_take_the_step_of_their_gradient(error):
    """Against numeric differences, in both layers: the second layer's error reaches the first through its gates."""
    model = build(error)
    net, token, target = model.model, torch.tensor([3]), torch.tensor([5])
    start = net(draw(3, 1))[1]
    now = model._advance(token, start)
    after = model.recode(now, target)

    def delta(change):  # of the first layer's h, from which the second layer's step follows
        x = now["h"]["0"].detach() + change
        i, f, o, g = net.cells[1](torch.cat([x, start["h"]["1"]], -1)).chunk(4, -1)
        h = o.sigmoid() * (f.sigmoid() * start["c"]["1"] + i.sigmoid() * g.tanh()).tanh()
        p = net.head(h).softmax(-1)[0, 5]
        return (-p.log() if error == "surprisal" else p**-p - 1).item()

    for j in range(6):
        e = 1e-5 * torch.eye(6, dtype=torch.float64)[j]
        slope = (delta(e) - delta(-e)) / 2e-5
        assert after["h"]["0"][0, j].item() == pytest.approx(now["h"]["0"][0, j].item() - 0.5 * slope, abs=1e-8)
    assert all((after[a][b] - now[a][b]).abs().max() > 1e-5 for a in "hc" for b in "01")


def test_tokens_do_not_know_their_successors_but_are_corrected_by_them():
    model, tokens = build("surprisal"), draw(6)
    want, _ = model(tokens)
    other = tokens.clone()
    other[:, 3] = (tokens[:, 3] + 1) % 7
    got, _ = model(other)
    assert torch.equal(got[:, :3], want[:, :3])
    assert (got[:, 4:] - want[:, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("step", ["learned", "predicted"])
def test_steps_learn_and_corrections_are_constants(step):
    model = build("surprisal", step=step)
    model(draw(5))[0].square().sum().backward()
    for name, p in model.size.named_parameters():
        assert p.grad.abs().max() > 0, name
    assert build("power", step="learned").size(torch.zeros(1, 6).double()).item() == pytest.approx(5.0)


def test_an_ensemble_is_held_to_its_anchors():
    model = build("ensemble")
    assert model.penalty(1.0) == 0
    with torch.no_grad():
        model.heads[1].bias.add_(2.0)
    assert model.penalty(0.3).item() == pytest.approx(0.3 / 3 * 2 * math.sqrt(7))
    close(model.decode(model.model(draw(2))[1]).exp().sum(-1), torch.ones(2).double())


@EVERY
def test_it_learns_and_restarts_exactly(tmp_path, error):
    text = torch.randint(7, (1, 48), generator=torch.Generator().manual_seed(3)).split(6, dim=1)

    def learner():
        return Learner(build(error, step="learned").float())

    whole = learner()
    for piece in text[:4]:
        whole.observe(piece)
    whole.save(tmp_path / "cut")
    back = learner()
    back.load(tmp_path / "cut")
    ends = [torch.cat([who.observe(piece).bits for piece in text[4:]], 1) for who in (whole, back)]
    assert torch.equal(*ends)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="error must be one of surprisal, power, entropy, ensemble, got 'loss'"):
        Recoding(LSTMModel(7, 6), "loss")
    with pytest.raises(ValueError, match="step must be a number"):
        build("power", step="big")

    class Apart(LSTMModel):
        def forward(self, tokens, state=None):
            logits, state = super().forward(tokens, state)
            return logits, tree_map(lambda t: t.detach().clone().requires_grad_(), state)

        def features(self, state):
            return self.embedding.weight[:2]

    with pytest.raises(RemanenceError, match="not computed from the state"):
        Recoding(Apart(7, 6))(draw(3))
