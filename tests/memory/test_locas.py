import pytest
import torch
from torch import nn
from torch.nn import functional as F

from remanence.errors import UnknownName
from remanence.memory.locas import Locas, Sideway, glu
from remanence.models.language import LanguageModel


def build():
    torch.manual_seed(0)
    model = LanguageModel(
        "2*linear-attention", vocabulary=20, dim=8, ngrams=(), arguments={"linear-attention": {"heads": 2}}
    )
    with torch.no_grad():
        model.head.weight.normal_()
    return model


def text(T=24, rows=2, seed=1):
    return torch.randint(20, (rows, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arguments", [{"init": "top"}, {"init": "random"}, {"init": "gaussian"}, {"variant": "mlp"}])
def test_attached_it_changes_nothing_and_detached_nothing_is_left(arguments):
    model, tokens = build(), text()
    before, weights = model(tokens)[0], {n: p.clone() for n, p in model.named_parameters()}
    side = Locas(model, tokens[:, :8], slots=4, **arguments)
    assert torch.equal(model(tokens)[0], before)
    state = None
    for chunk in tokens.split(8, 1):
        _, state = side.read(chunk, state)
    assert (model(tokens)[0] - before).abs().max() > 1e-6
    assert all(p.grad is None for n, p in model.named_parameters() if n in weights)
    side.detach()
    assert torch.equal(model(tokens)[0], before)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in weights.items()}
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_a_chunk_is_scored_before_it_is_learned_and_state_runs_on():
    model, tokens = build(), text(24)
    side = Locas(model, tokens[:, :8], slots=4)
    logits, _ = model(torch.cat([torch.full((2, 1), 20), tokens[:, :-1]], 1))
    want = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    first, state = side.read(tokens[:, :8], learn=False)
    second, _ = side.read(tokens[:, 8:], state, learn=False)
    torch.testing.assert_close(torch.cat([first, second], 1), want, rtol=1e-4, atol=1e-4)
    learned, _ = side.read(tokens[:, :8])
    assert torch.equal(learned, first)
    assert not torch.equal(side.read(tokens[:, :8], learn=False)[0], first)
    nothing, after = side.read(tokens[:, :0], state)
    assert nothing.shape == (2, 0)
    assert torch.equal(after["last"], state["last"])


def test_the_first_step_moves_what_slots_say_and_nothing_else():
    side = Locas(build(), text(8), slots=4)
    before = [p.clone() for p in side.parameters()]
    side.read(text(8))
    for i, (p, old) in enumerate(zip(side.parameters(), before, strict=True)):
        assert torch.equal(p, old) == (i % 3 != 1)


def test_slots_are_the_most_active_units_at_length_one():
    model, tokens = build(), text(8)
    inputs = []
    mixer = model.blocks[0].mixer
    handle = mixer.register_forward_hook(lambda m, a, out: inputs.append(a[0]))
    side = Locas(model, tokens, slots=3)
    handle.remove()
    gate, value, down = glu(mixer)
    score = (F.silu(inputs[0] @ gate.mT) * (inputs[0] @ value.mT)).abs().mean((0, 1))
    best = score.topk(3).indices
    torch.testing.assert_close(side.sides[0].gate, F.normalize(gate[best], dim=-1))
    torch.testing.assert_close(side.sides[0].key, F.normalize(value[best], dim=-1))
    assert side.sides[0].tau == pytest.approx(down.weight.norm(dim=0).mean().item() / 3)


def test_each_slot_is_cut_to_length_one_by_itself():
    side = Locas(build(), text(8), slots=4, lr=5.0)
    for _ in range(3):
        side.read(text(8))
    for p in side.parameters():
        lengths = p.norm(dim=1)
        assert (lengths <= 1 + 1e-5).all()
        assert lengths.square().sum() > 1.5  # the whole matrix is longer than one


def test_merged_slots_are_units_of_the_network():
    model, tokens = build(), text()
    side = Locas(model, tokens[:, :8], slots=4, lr=0.1)
    for chunk in tokens.split(8, 1):
        side.read(chunk)
    want = model(tokens)[0]
    hidden = side.sides[0].ffn.out.in_features
    side.merge()
    assert not any(isinstance(m, Sideway) for m in model.modules())
    assert model.blocks[0].mixer.out.in_features == hidden + 4
    torch.testing.assert_close(model(tokens)[0], want, rtol=1e-5, atol=1e-5)


def test_networks_in_three_parts_are_known_and_merge_too():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
            self.down_proj = nn.Linear(6, 4, bias=False)

        def forward(self, x):
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    class Model(nn.Module):
        vocabulary = 4

        def __init__(self):
            super().__init__()
            self.embedding, self.ffn = nn.Embedding(5, 4), Three()

        def initial_state(self, rows):
            return {}

        def forward(self, tokens, state):
            return self.ffn(self.embedding(tokens)), state

    torch.manual_seed(0)
    model, tokens = Model(), text(6) % 4
    side = Locas(model, tokens, slots=2, lr=0.1)
    for _ in range(3):
        side.read(tokens)
    want = model(tokens, {})[0]
    side.merge()
    torch.testing.assert_close(model(tokens, {})[0], want)


def test_written_slots_are_compressed_to_what_they_said():
    model, tokens = build(), text(30, rows=1)
    side = Locas(model, variant="mlp")
    side.read(tokens)
    assert all(s.key.shape == (30, 8) for s in side.sides)
    assert side.nbytes() == 2 * 2 * 30 * 8 * 4
    old = side.sides[0]
    A = F.normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(2)), dim=-1) + old.key.mean(0) * 3
    want = old.recall(A).detach()
    side.compress(8)
    kept = side.sides[0]
    assert kept.key.shape == (8, 8)
    agreement = F.cosine_similarity(kept.recall(A), want, dim=-1).mean()
    assert agreement > 0.7
    with torch.no_grad():
        kept.value.neg_()
    assert F.cosine_similarity(kept.recall(A), want, dim=-1).mean() < 0


def test_what_it_refuses():
    model = build()
    with pytest.raises(UnknownName, match="did you mean 'gaussian'"):
        Locas(model, init="gausian")
    with pytest.raises(UnknownName, match="variant of Locas"):
        Locas(model, variant="lora")
    with pytest.raises(ValueError, match="slots must be from 1 to 16"):
        Locas(model, text(), slots=17)
    with pytest.raises(ValueError, match="needs a sample"):
        Locas(model, slots=4)
    with pytest.raises(ValueError, match="no gated feed-forward network"):
        Locas(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="compress needs 'mlp' slots"):
        Locas(model, init="random", slots=4).compress(2)
    with pytest.raises(ValueError, match="ReLU slots cannot become units"):
        Locas(build(), variant="mlp").merge()
