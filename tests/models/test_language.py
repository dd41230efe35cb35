"""The language model: patterns, states, and causality of the whole stack."""

import pytest
import torch

from remanence import state as states
from remanence.errors import StateError, UnknownName
from remanence.models.language import LanguageModel, parse_pattern


def model(pattern="gated-deltanet, sliding-window", dim=16, **options):
    torch.manual_seed(0)
    made = LanguageModel(pattern, dim=dim, ngram_rows=64, **options)
    torch.nn.init.normal_(made.head.weight)
    return made


def tokens(time=20, rows=1, seed=0):
    return torch.randint(0, 256, (rows, time), generator=torch.Generator().manual_seed(seed))


def test_patterns():
    assert parse_pattern("2*atlas++, gla") == ["atlas++", "atlas++", "gla"]
    assert parse_pattern("2*gla, sliding-window") == ["gla", "gla", "sliding-window"]
    assert parse_pattern("gla") == ["gla"]
    for wrong in ("", "2*", "gla,,gla", "gla gla", "0*gla", "*gla"):
        with pytest.raises(ValueError, match="pattern"):
            parse_pattern(wrong)


def test_an_unknown_layer_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'gated-deltanet'"):
        LanguageModel("gated-deltnet", dim=16)


def test_arguments_reach_the_memory_they_name():
    assert model(arguments={"sliding-window": {"window": 4}}).initial_state(1)["layers"]["1"]["k"].shape[2] == 3


@torch.no_grad()
def test_it_reads_in_pieces_as_in_one():
    one, text = model(), tokens()
    whole, end = one(text)
    state, parts = None, []
    for piece in text.split([1, 0, 7, 12], dim=1):
        out, state = one(piece, state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    for name, t in states.flatten(end).items():
        torch.testing.assert_close(states.flatten(state)[name], t, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_prediction_looks_at_nothing_later():
    one, text = model(), tokens()
    changed = text.clone()
    changed[0, 11:] = 3
    a, b = one(text)[0], one(changed)[0]
    torch.testing.assert_close(a[:, :11], b[:, :11])
    assert not torch.allclose(a[:, 11:], b[:, 11:])


def test_it_alters_no_state_that_it_was_given():
    one = model()
    _, state = one(tokens())
    before = states.fork(state)
    one(tokens(seed=1), state)
    assert all(torch.equal(t, states.flatten(before)[n]) for n, t in states.flatten(state).items())


def test_its_state_survives_a_file(tmp_path):
    one = model()
    _, state = one(tokens())
    states.save(state, tmp_path / "state")
    back = states.load(tmp_path / "state")
    one.check_state(back, 1)
    assert torch.equal(one(tokens(seed=1), back)[0], one(tokens(seed=1), state)[0])


def test_the_state_of_another_model_is_refused(tmp_path):
    one = model()
    one.check_state(one.initial_state(2), 2)
    for other, batch, match in (
        (model(dim=32), 2, "another width or batch"),
        (model("2*gated-deltanet"), 2, "another (layer|model)"),
        (model("gated-deltanet"), 2, "another (layer|model)"),
        (model(), 3, "another width or batch"),
    ):
        with pytest.raises(StateError, match=match):
            one.check_state(other.initial_state(batch), 2)
    with pytest.raises(StateError, match="another model"):
        one.check_state({"h": torch.zeros(1)}, 1)
    path = tmp_path / "state"
    states.save(one.initial_state(1), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StateError, match="damaged"):
        states.load(path)


def test_a_state_that_grew_is_still_its_own():
    model = LanguageModel("softmax", dim=16)
    state = model(torch.randint(256, (2, 70)))[1]
    model.check_state(state, 2)
    with pytest.raises(StateError):
        model.check_state(state, 3)


def test_layers_know_their_depth():
    first, second = LanguageModel("2*lightning-attention-tnl", dim=16).memories
    assert not torch.equal(first.slopes, second.slopes)


def test_layers_of_one_stack_share_a_context():
    torch.manual_seed(0)
    model = LanguageModel("2*rwkv7", dim=128, ngrams=()).double()
    torch.nn.init.normal_(model.head.weight)
    for memory in model.memories:
        for p in memory.parameters():
            p.data += 0.1 * torch.randn_like(p)
    tokens = torch.randint(256, (1, 9))
    whole, _ = model(tokens)
    first, state = model(tokens[:, :4])
    rest, _ = model(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    for block in model.blocks:
        block.shares = False
    assert not torch.allclose(model(tokens)[0], whole)
