"""Replay keeps a uniform sample of the past within its budget."""

import pytest
import torch

from remanence.continual import Batch, Replay, Strategies, make, parse_bytes
from remanence.errors import StateError, UnknownName


def tokens(first: int, rows: int = 1, time: int = 4) -> Batch:
    """Rows of shifted tokens; the first token says which row it is."""
    x = (torch.arange(first, first + rows)[:, None] + torch.arange(time + 1)) % 256
    return Batch(x[:, :-1], x[:, 1:], rows)


def names(batch: Batch) -> list[int]:
    return batch.inputs[batch.fresh :, 0].tolist()


@pytest.mark.parametrize(
    ("text", "amount"),
    [(1, 1), ("4096", 4096), ("512kB", 512_000), (" 8 MB ", 8_000_000), ("1.5KiB", 1536), ("2GB", 2 * 10**9)],
)
def test_amounts_of_bytes(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "", "-8MB", "MB", "0", "0.1B", "8 M B"])
def test_amounts_refused(wrong):
    with pytest.raises(ValueError, match="amount of bytes"):
        parse_bytes(wrong)


def test_unit_refused_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'MB'"):
        parse_bytes("8MBs")


def test_arguments_refused():
    with pytest.raises(ValueError, match="rows must be at least 1"):
        Replay(rows=0)
    with pytest.raises(ValueError, match="4 bytes cannot hold one segment of 5 bytes"):
        Replay(4).collect(tokens(0))
    with pytest.raises(UnknownName, match="did you mean 'replay'"):
        make("repaly")


def test_none_changes_nothing():
    batch = tokens(0)
    assert make("none").collect(batch) is batch
    assert make("none").state_bytes() == 0


def test_bytes_are_kept_as_bytes_and_come_back_as_they_were():
    replay, batch = Replay(50), tokens(97)
    replay.collect(batch)
    assert replay.capacity == 10
    assert replay.state_bytes() == 50
    again = replay.collect(tokens(5))
    assert torch.equal(again.inputs[1:], batch.inputs)
    assert torch.equal(again.targets[1:], batch.targets)
    assert again.inputs.dtype == torch.int64
    assert again.fresh == 1


def test_images_and_labels_come_back_as_they_were():
    replay = Replay("1kB", rows=3)
    x, y = torch.randn(2, 3, 4), torch.tensor([1, 300])
    replay.collect(Batch(x, y, 2))
    assert replay.capacity == 1000 // (12 * 4 + 8)
    again = replay.collect(Batch(x + 1, y, 2))
    for image, label in zip(again.inputs[2:], again.targets[2:], strict=True):
        assert torch.equal(image, x[(y == label).nonzero()[0, 0]])


def test_a_segment_is_never_replayed_before_it_was_predicted():
    replay = Replay(1000, rows=8)
    for i in range(40):
        mixed = replay.collect(tokens(i))
        assert all(name < i for name in names(mixed))
        assert len(names(mixed)) == (8 if i else 0)


def test_only_fresh_rows_are_stored():
    first, second = Replay(1000, rows=4), Replay(1000, rows=2)
    both = Strategies([first, second])
    sizes = [len(both.collect(tokens(i)).inputs) for i in range(5)]
    assert sizes == [1, 7, 7, 7, 7]
    assert first.seen == second.seen == 5


def test_budget_and_memory_are_constant():
    replay = Replay(64)
    for i in range(200):
        replay.collect(tokens(i, rows=3))
        assert replay.state_bytes() == 60 <= replay.budget
    assert replay.seen == 600
    assert replay.filled == 12


def chi_square(replay: type[Replay], runs: int = 200, read: int = 40) -> float:
    """Of the counts with which each of `read` segments is kept in one of 10 slots, over many seeds."""
    counts = torch.zeros(read)
    for seed in range(runs):
        r = replay(50, seed=seed)
        for i in range(read):
            r.collect(tokens(i))
        counts[r.kept["tokens"][:, 0].long()] += 1
    expected = runs * 10 / read
    return float(((counts - expected) ** 2 / expected).sum())


class Newest(Replay):
    """The control: always stores, so the past fades."""

    def _store(self, segments):
        for row in segments["tokens"]:
            self.seen += 1
            slot = self.seen - 1
            if slot >= self.capacity:
                slot = int(torch.randint(self.capacity, (), generator=self.generator))
            self.kept["tokens"][slot] = row


def test_every_segment_is_equally_likely_to_be_kept():
    # 39 degrees of freedom: 99.99% of uniform samples lie below 82
    assert chi_square(Replay) < 82 < chi_square(Newest)


def test_rows_of_another_length_pass_by():
    replay = Replay(50)
    replay.collect(tokens(0))
    for time in (1, 2, 3, 9):
        odd = tokens(7, time=time)
        assert replay.collect(odd) is odd
    assert replay.seen == 1


def test_a_row_that_begins_the_stream_is_not_stored():
    replay = Replay(50)
    x = tokens(1).inputs.clone()
    x[0, 0] = 256
    replay.collect(Batch(x, tokens(1).targets, 1))
    assert replay.seen == 0
    assert replay.kept["tokens"].dtype == torch.uint8
    replay.collect(tokens(1))
    assert replay.seen == 1


def test_the_vocabulary_of_the_model_decides_the_type():
    model = torch.nn.Linear(1, 1)
    model.vocabulary = 1000
    replay = Replay(200)
    replay.attach(model)
    replay.collect(tokens(0))
    assert replay.kept["tokens"].dtype == torch.int32
    assert replay.capacity == 10


def test_tokens_that_outgrow_the_first_batch_are_refused():
    replay = Replay(50)
    replay.collect(tokens(0))
    large = tokens(0)
    with pytest.raises(ValueError, match="tokens up to 304 do not fit"):
        replay.collect(Batch(large.inputs + torch.tensor([0, 300, 300, 300]), large.targets + 300, 1))


def test_targets_that_stop_being_shifted_are_refused():
    replay = Replay(50)
    replay.collect(tokens(0))
    with pytest.raises(ValueError, match="shifted"):
        replay.collect(Batch(tokens(0).inputs, tokens(9).targets, 1))


@pytest.mark.parametrize("cut", [0, 1, 7, 30])
def test_exact_resume_at_any_point(cut):
    whole, half = Replay(50, rows=3), Replay(50, rows=3)
    for i in range(cut):
        whole.collect(tokens(i))
        half.collect(tokens(i))
    resumed = Replay(50, rows=3, seed=99)
    resumed.load_state_dict(half.state_dict())
    half.collect(tokens(200))  # what the state was taken from lives on apart from it
    for i in range(cut, cut + 30):
        assert names(whole.collect(tokens(i))) == names(resumed.collect(tokens(i)))


def test_a_state_of_another_budget_is_refused():
    with pytest.raises(StateError, match="budget of 60 bytes, the state 50"):
        Replay(60).load_state_dict(Replay(50).state_dict())


def test_the_global_generator_is_left_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    replay = Replay(50)
    for i in range(30):
        replay.collect(tokens(i))
    assert torch.equal(before, torch.get_rng_state())
