"""The counting model: predict first, then count; and nothing moves that should stand still."""

from __future__ import annotations

import numpy as np
import pytest

from remanence.errors import RemanenceError, StateError, UnknownName
from remanence.models.counting import CountingModel, bit_histories

TEXT = b"".join(
    b"line %d: the %s sees the %s.\n" % (i, (b"cat", b"owl", b"fox")[i % 3], (b"mouse", b"moon")[i % 2])
    for i in range(90)
)


def random_bytes(n: int, seed: int = 0, values: int = 256) -> bytes:
    return np.random.default_rng(seed).integers(0, values, n, dtype=np.uint8).tobytes()


def opinions(n: int, seed: int = 0) -> np.ndarray:
    z = np.random.default_rng(seed).normal(0, 3, (n, 256)).astype(np.float32)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture
def model() -> CountingModel:
    return CountingModel(size="small")


def test_each_byte_is_predicted_from_those_before_it():
    cut = 700
    one, other = CountingModel(size="small"), CountingModel(size="small")
    a = one.observe(TEXT)
    b = other.observe(TEXT[:cut] + random_bytes(300))
    assert np.array_equal(a[:cut], b[:cut])
    assert not np.array_equal(a[cut : cut + 300], b[cut:])


def test_the_neural_opinion_on_later_bytes_changes_nothing_before():
    cut, n = 200, 400
    z = opinions(n)
    changed = z.copy()
    changed[cut:] = opinions(n, seed=1)[cut:]
    a = CountingModel(size="small").observe(TEXT[:n], z)
    b = CountingModel(size="small").observe(TEXT[:n], changed)
    assert np.array_equal(a[:cut], b[:cut])
    assert not np.array_equal(a[cut:], b[cut:])


@pytest.mark.parametrize("cuts", [(0,), (1,), (333, 333), (5, 1000, 1001), (len(TEXT),)])
def test_resumed_at_any_cut_it_goes_on_bit_for_bit(cuts: tuple[int, ...]):
    z = opinions(len(TEXT))
    whole = CountingModel(size="small")
    want = whole.observe(TEXT, z)
    pieces, state = [], CountingModel(size="small").state_dict()
    for a, b in zip((0, *cuts), (*cuts, len(TEXT)), strict=True):
        piece = CountingModel(size="small")
        piece.load_state_dict(state)
        pieces.append(piece.observe(TEXT[a:b], z[a:b]))
        state = piece.state_dict()
    assert np.array_equal(np.concatenate(pieces), want)
    assert same(state, whole.state_dict())


def test_without_learning_only_the_position_moves(model: CountingModel):
    model.observe(TEXT)
    before, position = model.state_dict(), model.position()
    frozen = model.observe(TEXT[::-1], opinions(len(TEXT)), learn=False)
    after = model.state_dict()
    changed = {k for k in before if not np.array_equal(before[k], after[k])}
    assert changed == {"position.now", "position.ring", "position.places", "position.style"}
    model.set_position(position)
    assert same(model.state_dict(), before)
    assert np.array_equal(model.observe(TEXT[::-1], opinions(len(TEXT)), learn=False), frozen)
    model.set_position(position)
    model.observe(TEXT[::-1])
    assert not np.array_equal(model.state_dict()["tables.gate1"], before["tables.gate1"])


@pytest.mark.parametrize("neural", [False, True])
def test_the_distribution_is_what_observe_charges(model: CountingModel, neural: bool):
    model.observe(TEXT, opinions(len(TEXT)) if neural else None)
    z = opinions(1, seed=3) if neural else None
    before = model.state_dict()
    p = model.distribution(z[0] if neural else None)
    assert same(model.state_dict(), before)
    assert p.min() > 0
    assert abs(p.sum() - 1) < 1e-9
    position = model.position()
    for b in (*b"line 9\n", 0, 255):
        model.set_position(position)
        assert abs(model.observe(bytes([b]), z, learn=False)[0] + np.log2(p[b])) < 1e-6


def test_impossible_and_certain_opinions_still_leave_every_byte_possible(model: CountingModel):
    z = np.full((300, 256), -np.inf, np.float32)
    z[:, 0] = 0
    assert np.isfinite(model.observe(TEXT[:300], z)).all()
    assert model.distribution(z[0]).min() > 0


def test_a_network_that_knows_is_believed():
    data = random_bytes(2000)
    z = opinions(2000)
    z[np.arange(2000), np.frombuffer(data, np.uint8)] += 20
    heard = CountingModel(size="small").observe(data, z)
    deaf = CountingModel(size="small").observe(data)
    assert heard[-500:].mean() < 1.0
    assert deaf[-500:].mean() > 7.5


def test_bytes_kept_are_constant(model: CountingModel):
    before = model.nbytes()
    model.observe(random_bytes(20_000))
    assert model.nbytes() == before == sum(a.nbytes for a in model.state_dict().values())
    assert before <= 8 << 20


def test_it_beats_the_entropy_of_single_bytes(model: CountingModel):
    data = np.frombuffer(TEXT, np.uint8)
    p = np.bincount(data, minlength=256) / data.size
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
    assert model.observe(TEXT).mean() < 0.5 * entropy
    noise = random_bytes(4000, values=256)
    assert CountingModel(size="small").observe(noise).mean() > 7.9


def test_a_repeated_random_block_is_remembered_only_within_the_history():
    model = CountingModel(size="small")
    reach = model.position()["ring"].size
    block = random_bytes(reach // 2)
    assert model.observe(block + block)[len(block) + 50 :].mean() < 1.0
    far = random_bytes(3 * reach)
    model = CountingModel(size="small")
    assert model.observe(far + far[:2000])[-1900:].mean() > 4.0


def test_a_fresh_text_begins_without_recent_bytes_and_keeps_what_was_counted(model: CountingModel):
    model.observe(TEXT)
    model.reset_position()
    fresh = model.distribution()
    model.observe(TEXT[:500], learn=False)
    model.reset_position()
    assert np.allclose(fresh, model.distribution())
    assert model.observe(TEXT[:500], learn=False).mean() < 1.5


def test_bit_histories_are_closed_and_count_what_they_saw():
    follow, weight, guess = bit_histories()
    state = 0
    for _ in range(30):
        state = int(follow[2 * state + 1])
    assert weight[state] >= 20
    assert guess[state] > 0.95
    assert guess[follow[2 * state]] < guess[state]
    assert follow[: 2 * np.count_nonzero(weight) + 2].min() > 0


def test_the_compiled_hash_wraps_as_whole_numbers_do():
    from remanence.models import _counting_kernels as k

    m = (1 << 64) - 1
    for a, b in [(0, 1), (1 << 40, 3), (-1, 7), (255, 1 << 62)]:
        x = ((a & m) ^ ((b * int(k._A)) & m)) * int(k._B) & m
        x = (x ^ x >> 31) * int(k._C) & m
        assert int(k._hash(a, b)) & m == x ^ x >> 29


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m.observe("text"), "data must be bytes"),
        (lambda m: m.observe(np.zeros((2, 2), np.uint8)), r"got uint8 \[2, 2\]"),
        (lambda m: m.observe(b"abc", opinions(2)), r"\[3, 256\], got \[2, 256\]"),
        (lambda m: m.distribution(np.full(256, np.nan, np.float32)), "NaN"),
        (lambda m: CountingModel(size="small", neural=False).observe(b"a", opinions(1)), "neural=False"),
        (lambda m: CountingModel(size=3), "10 to 26 bits, got 3"),
    ],
)
def test_wrong_input_is_said_in_a_sentence(model: CountingModel, call, sentence: str):
    with pytest.raises(RemanenceError, match=sentence):
        call(model)


def test_wrong_names_and_foreign_states_are_refused(model: CountingModel):
    with pytest.raises(UnknownName, match="did you mean 'small'"):
        CountingModel(size="smal")
    state = model.state_dict()
    with pytest.raises(StateError, match="another size"):
        CountingModel(size=12).load_state_dict(state)
    with pytest.raises(StateError, match="has no 'position\\.ring'"):
        model.load_state_dict({k: v for k, v in state.items() if k != "position.ring"})
    with pytest.raises(StateError, match="'odd' is not expected"):
        model.load_state_dict({**state, "odd": state["tables.apm"]})
    position = model.position()
    with pytest.raises(StateError, match="has no 'now'"):
        model.set_position({k: v for k, v in position.items() if k != "now"})
