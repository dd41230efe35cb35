import math

import pytest
import torch

from remanence.errors import UnknownName
from remanence.evaluation import benchmarks
from remanence.evaluation.benchmarks.tasks import S5, Copying, Parity, Recall, permutations, products
from remanence.evaluation.benchmarks.training import accuracy, run_benchmark

TASKS = [Recall(4, 6, 8), Parity(12), S5(6), Copying(5, 8)]
each = pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def solve(task, inputs):
    """The right answers, found from the inputs alone in another way than the task makes them."""
    answers = torch.zeros_like(inputs)
    for row, tokens in enumerate(inputs.tolist()):
        held = list(range(5))
        for t, token in enumerate(tokens):
            if isinstance(task, Recall):
                first = tokens.index(token)
                answers[row, t] = tokens[first + 1] if t >= len(tokens) - task.pairs else 0
            elif isinstance(task, Parity):
                answers[row, t] = tokens[: t + 1].count(1) % 2
            elif isinstance(task, S5):
                held = [held[place] for place in permutations()[token].tolist()]
                answers[row, t] = permutations().tolist().index(held)
            elif t >= task.length:
                answers[row, t] = tokens[t - task.length]
    return answers


@each
def test_data_are_equal_from_one_seed_and_leave_the_global_generator_alone(task):
    before = torch.get_rng_state()
    first, again, other = (task.draw(3, generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.inputs, other.inputs)
    assert torch.equal(before, torch.get_rng_state())


@each
def test_shapes_and_ranges(task):
    for which in (task, task.longer()):
        inputs, targets, mask = which.draw(7, generator(0))
        assert inputs.shape == targets.shape == mask.shape
        assert inputs.dtype == targets.dtype == torch.int64
        assert mask.dtype == torch.bool
        assert int(inputs.min()) >= 0
        assert max(int(inputs.max()), int(targets.max())) < which.vocabulary == task.vocabulary
        assert mask.any(1).all()
    assert task.longer().draw(1, generator(0)).inputs.shape[1] > task.draw(1, generator(0)).inputs.shape[1]


@each
def test_who_reads_the_inputs_can_answer_everything(task):
    inputs, targets, mask = task.draw(20, generator(3))
    assert torch.equal(solve(task, inputs)[mask], targets[mask])


@each
def test_a_guess_gets_chance(task):
    inputs, targets, mask = task.draw(3000, generator(4))
    if isinstance(task, Recall):  # the best guess: any of the values that were told
        told = inputs[:, 1 : 2 * task.pairs : 2]
        guess = told.gather(1, torch.randint(task.pairs, inputs.shape, generator=generator(5)))
    elif isinstance(task, S5):
        assert task.chance == 1 / 120
        inputs, targets, mask = S5(60, first=50).draw(3000, generator(4))
        guess = torch.randint(120, inputs.shape, generator=generator(5))
    else:
        guess = torch.randint(round(1 / task.chance), inputs.shape, generator=generator(5))
    n = int(mask.sum())
    share = float((guess == targets)[mask].float().mean())
    assert abs(share - task.chance) < 4 * math.sqrt(task.chance * (1 - task.chance) / n)


def test_the_answer_is_not_in_the_inputs_where_it_is_asked():
    inputs, targets, mask = Recall(4, 6, 8).draw(50, generator(6))
    assert (inputs[mask] < 8).all()
    assert (targets[mask] >= 8).all()
    assert (inputs[:, 8:14] == 16).all()
    inputs, _, mask = Copying(5, 8).draw(50, generator(6))
    assert (inputs[mask] >= 8).all()


def test_longer_asks_what_no_training_saw():
    for task in (Parity(12), S5(6)):
        mask = task.longer().draw(2, generator(0)).mask
        assert mask.shape[1] == 2 * task.length
        assert not mask[:, : task.length].any()
        assert mask[:, task.length :].all()


def test_arguments_reach_the_memory():
    options = {"steps": 1, "batch": 2, "dim": 8, "layers": 1}
    rows = [
        run_benchmark(
            {"copying": Copying(2, 3)}, ["sliding-window"], arguments={"sliding-window": {"window": w}}, **options
        )[0]
        for w in (2, 5)
    ]
    assert rows[0]["state_bytes"] < rows[1]["state_bytes"]
    assert [row["memory"] for row in rows] == ["sliding-window window=2", "sliding-window window=5"]


def test_the_moves_make_the_whole_group():
    assert permutations().shape == (120, 5)
    assert torch.equal(products()[0], torch.arange(120))
    assert all(len(set(row)) == 120 for row in products().tolist())
    assert len(set(S5(60).draw(200, generator(0)).targets[:, -20:].flatten().tolist())) == 120


def test_accuracy_counts_masked_positions_only():
    class Oracle:
        def __call__(self, inputs):
            return torch.nn.functional.one_hot(solve(task, inputs), task.vocabulary).float(), None

    class Blind:
        def __call__(self, inputs):
            return torch.zeros(*inputs.shape, task.vocabulary), None

    for task in TASKS:
        assert accuracy(Oracle(), task, batches=1, batch=8, seed=0) == 1
    task = Recall(4, 6, 8)
    assert accuracy(Blind(), task, batches=1, batch=8, seed=0) == 0


def test_a_run_has_a_row_for_each_memory_and_repeats_itself():
    def figures():
        rows = run_benchmark(
            {"copying": Copying(2, 3)}, ["min-lstm", "sliding-window"], steps=3, batch=4, dim=8, layers=1, seed=1
        )
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    rows = figures()
    assert [row["memory"].split()[0] for row in rows] == ["min-lstm", "sliding-window"]
    assert all(0 <= row["accuracy"] <= 1 and row["parameters"] > 0 and row["state_bytes"] > 0 for row in rows)
    assert rows == figures()


def test_several_seeds_give_means_and_how_far_single_ones_lie():
    settings = {"steps": 2, "batch": 4, "dim": 8, "layers": 1, "pairs": 2, "pause": 2}
    single = [benchmarks.run("mqar", ["min-lstm", "gla"], seed=seed, **settings) for seed in (3, 4, 5)]
    rows = benchmarks.run("mqar", ["min-lstm", "gla"], seed=3, seeds=3, **settings)
    assert [row["memory"] for row in rows] == [row["memory"] for row in single[0]]
    for row, *own in zip(rows, *single, strict=True):
        losses = [one["loss"] for one in own]
        assert row["loss"] == pytest.approx(sum(losses) / 3)
        assert row["spread"]["loss"] == pytest.approx(max(abs(loss - row["loss"]) for loss in losses))
        assert row["spread"]["loss"] > 0
        assert row["state_bytes"] == own[0]["state_bytes"]
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        benchmarks.run("mqar", ["gla"], seeds=0)


def test_a_vector_memory_learns_to_copy_one_letter_and_untrained_it_does_not():
    task = {"copying": Copying(1, 4)}
    options = {"dim": 16, "layers": 1, "batch": 32, "rate": 1e-2}
    (trained,) = run_benchmark(task, ["min-lstm"], steps=60, **options)
    (raw,) = run_benchmark(task, ["min-lstm"], steps=1, **{**options, "rate": 1e-9})
    assert trained["accuracy"] > 0.9
    assert raw["accuracy"] < 0.6


def test_names_and_misspelt_names():
    assert {"copying", "mqar", "recall-at-bytes", "selectivbench", "state-tracking"} <= set(benchmarks.names())
    with pytest.raises(UnknownName, match="did you mean 'mqar'"):
        benchmarks.run("mqra")
    with pytest.raises(UnknownName, match="did you mean 'gated-deltanet'"):
        benchmarks.run("mqar", ["gated-delta-net"])
