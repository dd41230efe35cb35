"""The learner: it predicts before it learns, restarts exactly, and a fault leaves it as it was."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from remanence.continual import EWC, Replay, Strategy
from remanence.continual.base import Batch
from remanence.errors import CheckpointError, RemanenceError
from remanence.learning import Learner, checkpoint
from remanence.models.counting import CountingModel
from remanence.models.language import LanguageModel
from remanence.optim.adamw import AdamW
from remanence.state import flatten

SEGMENT = 16


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def language(dim=16, pattern="gated-deltanet"):
    torch.manual_seed(0)
    return LanguageModel(pattern, dim=dim, ngram_rows=64)


def learner(counts=False, strategies=(), **options):
    return Learner(language(), counts=CountingModel(size=10) if counts else None, strategies=strategies, **options)


def guards():
    return [Replay(4096), EWC(10.0, every=2)]


def pieces(seed=0, count=6, rows=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(97, 105, (rows, count * SEGMENT), generator=g).split(SEGMENT, dim=1)


def tensors(tree):
    found = {}
    checkpoint.pack(tree, found)
    return {name: t.clone() for name, t in found.items()}


def assert_same(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("counts", [False, True])
def test_what_comes_later_does_not_change_the_bits_before(counts):
    ours, others = list(pieces()), list(pieces())
    others[-1] = 200 - others[-1]
    one, two = learner(counts, guards()), learner(counts, guards())
    bits = [(one.observe(a).bits, two.observe(b).bits) for a, b in zip(ours, others, strict=True)]
    assert all(torch.equal(a, b) for a, b in bits[:-1])
    assert not torch.equal(*bits[-1])


def test_within_a_segment_a_byte_is_predicted_from_those_before_it_only():
    tokens = pieces(count=1)[0]
    changed = tokens.clone()
    changed[0, 9:] = 7
    warm = pieces(seed=3)
    for counts in (False, True):
        bits = []
        for segment in (tokens, changed):
            one = learner(counts)
            for piece in warm:
                one.observe(piece)
            bits.append(one.observe(segment).bits[0])
        assert torch.equal(bits[0][:9], bits[1][:9])
        assert not torch.equal(bits[0][9:], bits[1][9:])


def test_the_first_segment_is_scored_by_the_untrained_model():
    untouched, tokens = language(), pieces()[0]
    nn.init.normal_(untouched.head.weight)
    one = Learner(copy.deepcopy(untouched))
    outcome = one.observe(tokens)
    inputs = torch.cat([torch.tensor([[256]]), tokens[:, :-1]], 1)
    with torch.no_grad():
        logits, _ = untouched(inputs)
    nats = nn.functional.cross_entropy(logits[0], tokens[0], reduction="none")
    torch.testing.assert_close(outcome.bits[0], nats.double() / math.log(2))
    assert outcome.loss == pytest.approx(nats.mean().item(), abs=1e-5)
    assert not torch.equal(one.model.head.weight, untouched.head.weight)


def test_it_learns():
    one, tokens = learner(), pieces(count=1)[0]
    bits = [one.observe(tokens).bits.mean().item() for _ in range(60)]
    assert bits[0] == pytest.approx(8)
    assert bits[-1] < 5


@pytest.mark.parametrize("counts", [False, True])
def test_restart_is_exact(tmp_path, counts):
    first = learner(counts, guards())
    stream = pieces(count=10)
    for piece in stream[:6]:
        first.observe(piece)
    first.boundary("a")
    first.save(tmp_path / "checkpoint")
    torch.manual_seed(999)
    second = learner(counts, guards())
    second.load(tmp_path / "checkpoint")
    assert_same(first.state_dict(), second.state_dict())
    a, b = ([who.observe(piece).bits for piece in stream[6:]] for who in (first, second))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    # the global generator is one for both, so it alone is left out
    one, two = ({k: v for k, v in who.state_dict().items() if k != "generator"} for who in (first, second))
    assert_same(one, two)
    assert list(first.generate(b"ab", 8, seed=1)) == list(second.generate(b"ab", 8, seed=1))


def test_restart_with_an_optimizer_of_torch(tmp_path):
    def make():
        model = language()
        return Learner(model, torch.optim.AdamW(model.parameters(), 1e-3))

    first, second, stream = make(), make(), pieces()
    for piece in stream[:3]:
        first.observe(piece)
    first.save(tmp_path / "checkpoint")
    second.load(tmp_path / "checkpoint")
    for piece in stream[3:]:
        assert torch.equal(first.observe(piece).bits, second.observe(piece).bits)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("ask", ["evaluate", "generate", "abandoned"])
def test_asking_disturbs_nothing(counts, ask):
    one, two = learner(counts, guards()), learner(counts, guards())
    stream = pieces()
    for piece in stream[:4]:
        one.observe(piece)
        two.observe(piece)
    before, random = tensors(one.state_dict()), torch.get_rng_state()
    if ask == "evaluate":
        assert math.isfinite(one.evaluate(pieces(seed=5)[0], segment=7))
    elif ask == "generate":
        assert len(list(one.generate(b"abc", 12, temperature=1.0))) == 12
    else:
        talk = one.generate(b"abc", 12)
        next(talk)
        talk.close()
    assert torch.equal(random, torch.get_rng_state())
    after = tensors(one.state_dict())
    assert before.keys() == after.keys()
    assert not [name for name in before if not torch.equal(before[name], after[name])]
    for piece in stream[4:]:
        assert torch.equal(one.observe(piece).bits, two.observe(piece).bits)


def test_evaluate_starts_from_an_empty_state_whatever_was_read():
    one, tokens = learner(learning=False), pieces(seed=5)[0]
    fresh = one.evaluate(tokens)
    for piece in pieces():
        one.observe(piece)
    assert one.evaluate(tokens) == fresh


def test_generation_follows_seed_and_temperature():
    one = learner(counts=True)
    for piece in pieces():
        one.observe(piece)
    greedy = [list(one.generate(b"a", 10, temperature=0, seed=s)) for s in (0, 1)]
    assert greedy[0] == greedy[1]
    sampled = [list(one.generate(b"a", 40, temperature=1.0, seed=s)) for s in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(ValueError, match="temperature"):
        next(one.generate(temperature=-1))


def test_frozen_weights_do_not_move_but_states_do():
    one = learner(learning=False, strategies=guards())
    weights = {n: p.clone() for n, p in one.model.named_parameters()}
    states = []
    for piece in pieces():
        one.observe(piece)
        states.append({n: t.clone() for n, t in flatten(one.state).items()})
    one.boundary("a")
    assert all(torch.equal(p, weights[n]) for n, p in one.model.named_parameters())
    assert any(not torch.equal(states[0][n], states[-1][n]) for n in states[0])
    assert one.step == 0


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_raises_and_leaves_the_weights(what):
    class Poison(Strategy):
        armed = False

        def loss(self, context):
            return context.loss * math.nan if self.armed and what == "loss" else None

        def transform_grad(self, parameters):
            if self.armed and what == "gradient":
                parameters["head.weight"].grad.fill_(math.inf)

    poison = Poison()
    one, stream = learner(strategies=[poison]), pieces()
    for piece in stream[:3]:
        one.observe(piece)
    weights = {n: p.clone() for n, p in one.model.named_parameters()}
    moments = tensors(one.optimizer.state_dict())
    poison.armed = True
    with pytest.raises(RemanenceError, match=f"{what} stopped being finite at step 3"):
        one.observe(stream[3])
    assert all(torch.equal(p, weights[n]) for n, p in one.model.named_parameters())
    assert all(torch.equal(t, moments[n]) for n, t in tensors(one.optimizer.state_dict()).items())
    assert one.step == 3


@pytest.mark.parametrize("make", [AdamW, torch.optim.SGD])
def test_an_optimizer_that_refuses_its_state_leaves_everything_as_it_was(make):
    def fresh(many=False):
        model = language()
        groups = [{"params": [p]} for p in model.parameters()] if many else model.parameters()
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9) if make is torch.optim.SGD else AdamW([*groups])
        return Learner(model, optimizer, [Replay(4096)], counts=CountingModel(size=10))

    one, other = fresh(), fresh(many=make is torch.optim.SGD)
    one.observe(pieces(1)[0])
    other.observe(pieces(2)[0])
    before, tree = tensors(one.state_dict()), copy.deepcopy(other.state_dict())
    if make is AdamW:
        tree["optimizer"]["lr"].append(1.0)
    with pytest.raises(CheckpointError):
        one.load_state_dict(tree)
    after = tensors(one.state_dict())
    assert not [name for name in before if not torch.equal(before[name], after[name])]


def test_a_foreign_checkpoint_is_refused_and_nothing_changes(tmp_path):
    path = tmp_path / "checkpoint"
    Learner(language(dim=24)).save(path)
    one = learner(strategies=[Replay(4096)])
    one.observe(pieces()[0])
    before = tensors(one.state_dict())

    def refused(match):
        with pytest.raises(CheckpointError, match=match) as error:
            one.load(path)
        assert str(error.value).count("\n") == 0
        after = tensors(one.state_dict())
        assert not [name for name in before if not torch.equal(before[name], after[name])]

    refused("another model.*embedding.weight")
    learner(counts=True, strategies=[Replay(4096)]).save(path)
    refused("whether they count")
    learner(strategies=guards()).save(path)
    refused("Replay, EWC.*has Replay")
    checkpoint.write(path, {"something": 1})
    refused("not one of a learner")


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path, one = tmp_path / "checkpoint", learner()
    one.save(path)
    whole = path.read_bytes()
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"damaged or cut short"):
            one.load(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        one.load(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        one.load(path)


def test_checkpoints_carry_any_nesting(tmp_path):
    tree = {
        "a": [torch.arange(3), {"b": np.arange(4, dtype=np.uint16).reshape(2, 2)}],
        "n": None,
        "x": 0.1,
        "scalar": np.array(3, np.uint32),
        "empty": np.zeros((0, 3), np.float32),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "word": "é",
    }
    checkpoint.write(tmp_path / "c", tree)
    back = checkpoint.read(tmp_path / "c")
    assert torch.equal(back["a"][0], tree["a"][0])
    assert torch.equal(back["half"], tree["half"])
    for got, want in (
        (back["a"][1]["b"], tree["a"][1]["b"]),
        (back["scalar"], tree["scalar"]),
        (back["empty"], tree["empty"]),
    ):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert (got == want).all()
    assert (back["n"], back["x"], back["word"]) == (None, 0.1, "é")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path, one = tmp_path / "c", learner()
    one.save(path)
    whole = path.read_bytes()
    one.observe(pieces()[0])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*before it is intact"):
        one.save(path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    with pytest.raises(CheckpointError, match="none was written before"):
        one.save(tmp_path / "d")


def test_a_classifier_learns_from_batches():
    torch.manual_seed(0)
    one = Learner(nn.Linear(4, 2), strategies=[Replay(4096, rows=4)])
    x = torch.randn(64, 8, 4)
    y = (x[..., 0] > 0).long()
    bits = [one.observe(Batch(a, b, len(a), "t")).bits for a, b in zip(x, y, strict=True)]
    assert all(b.shape == (8,) for b in bits)
    assert torch.cat(bits[-8:]).mean() < torch.cat(bits[:8]).mean()
    assert one.state is None
    assert one.state_bytes == 0
    assert one.kept_bytes > 0


def test_rows_of_a_batch_are_streams_of_their_own():
    stream = pieces(rows=2)
    both = learner(learning=False)
    alone = learner(learning=False)
    for piece in stream:
        together = both.observe(piece).bits[1:]
        torch.testing.assert_close(together, alone.observe(piece[1:]).bits)


@pytest.mark.parametrize("need", ["pretrained", "features", "task_id_test"])
def test_a_strategy_whose_needs_a_stream_cannot_meet_is_refused(need):
    class Needy(Strategy):
        needs = frozenset({need, "boundaries"})

    with pytest.raises(RemanenceError, match=f"Needy needs {need}"):
        learner(strategies=[Replay(4096), Needy()])
    Needy.needs = frozenset({"task_id_train", "boundaries"})
    learner(strategies=[Needy()])


def test_the_schedule_scales_the_rates():
    one = learner(schedule=lambda step: 0.0)
    weights = {n: p.clone() for n, p in one.model.named_parameters()}
    for piece in pieces():
        one.observe(piece)
    assert all(torch.equal(p, weights[n]) for n, p in one.model.named_parameters())


def test_a_checkpoint_takes_one_number_of_a_slice(tmp_path):
    tokens = torch.arange(12).reshape(3, 4)
    checkpoint.write(tmp_path / "c", {"last": tokens[:1, -1], "odd": torch.zeros(1, 3, dtype=torch.bfloat16)})
    assert checkpoint.read(tmp_path / "c")["last"].tolist() == [3]
