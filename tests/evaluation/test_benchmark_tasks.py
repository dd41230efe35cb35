"""The tasks beyond the first ones: answers found in another way, what a guess gets, tables and pictures."""

import math
import re
from collections import Counter

import pytest
import torch

from remanence.errors import UnknownName
from remanence.evaluation import benchmarks
from remanence.evaluation.benchmarks.curves import Lags, Stretched
from remanence.evaluation.benchmarks.disjointness import Disjointness
from remanence.evaluation.benchmarks.picture import draw, show
from remanence.evaluation.benchmarks.retrieval import Count, Index, IsTree, NextLetter
from remanence.evaluation.benchmarks.selectivity import Selectivity
from remanence.evaluation.benchmarks.tasks import GroupedBatch, Parity, Rebound, Recall, score
from remanence.evaluation.benchmarks.training import Entry, examine, run_benchmark
from remanence.streams.grammar import Grammar

TASKS = [
    Lags(8, 5),
    Lags(8, 5, only=4),
    Stretched(Recall(3, 4, 6)),
    Recall(3, 4, 6, together=True),
    Rebound(3, 2, 6, times=3),
    Disjointness(2, 5, 12),
    Disjointness(3, 5, 12, "long", repeat=True),
    Index(20, 6),
    Index(20, 6, retrieval=True),
    NextLetter(10, 16),
    NextLetter(20, 16, retrieval=True),
    NextLetter(20, 8, retrieval=True, gram=3),
    Count(20, 5),
    Count(20, 5, retrieval=True),
    IsTree(6, 9),
    Selectivity(Grammar(5, 2, 3), 20),
]
each = pytest.mark.parametrize("task", TASKS, ids=repr)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def is_tree(edges):
    nodes = {a for edge in edges for a in edge}
    seen, todo = set(), [next(iter(nodes))]
    while todo:
        here = todo.pop()
        seen.add(here)
        todo += [b for edge in edges for a, b in (edge, edge[::-1]) if a == here and b not in seen]
    return len(seen) == len(edges) + 1


def answer(task, tokens):
    """The one answer at the end of a row, from what the row says."""
    if isinstance(task, Disjointness):
        tokens = tokens[len(tokens) // 2 :] if task.repeat else tokens
        cut = tokens.index(task.symbols)
        (shared,) = set(tokens[:cut]) & set(tokens[cut + 1 : -1])
        return shared
    text, rest = tokens[: tokens.index(task.symbols)], tokens[tokens.index(task.symbols) + 1 :]
    if isinstance(task, Index):
        a, b, c, d = (x - task.extra for x in rest[:4])
        return text[64 * a + 16 * b + 4 * c + d]
    if isinstance(task, NextLetter):
        n = task.gram - 1
        (place,) = [i for i in range(len(text) - n + 1) if text[i : i + n] == rest[:n]]
        return text[place + n]
    if isinstance(task, Count):
        return task.extra + text.count(rest[0])
    return task.extra + is_tree(list(zip(text[::2], text[1::2], strict=True)))


@each
def test_shapes_ranges_and_seeds(task):
    before = torch.get_rng_state()
    first, again, other = (task.draw(6, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.inputs, other.inputs)
    assert first.mask.any(1).all()
    assert first.inputs.shape[:2] == first.targets.shape == first.mask.shape
    for examined in (task, *task.exams.values(), task.longer()):
        drawn = examined.draw(6, generator(3))
        assert examined.vocabulary == task.vocabulary or isinstance(task, Lags)
        assert 0 <= int(drawn.targets.min()) <= int(drawn.targets.max()) < examined.vocabulary
        if not drawn.inputs.is_floating_point():
            assert 0 <= int(drawn.inputs.min()) <= int(drawn.inputs.max()) < examined.vocabulary
    assert 0 < task.chance < 1


@each
def test_who_reads_the_inputs_can_answer_everything(task):
    drawn = task.draw(60, generator(4))
    inputs, targets, mask = drawn[:3]
    if isinstance(task, Recall):
        for row, answers in zip(inputs, targets, strict=True):
            told = [tuple(token.nonzero()[:, 0].tolist()) for token in row[:3]]
            assert all(len(pair) == 2 for pair in told)
            assert answers[-3:].tolist() == [dict(told)[int(key)] for key in row[-3:].argmax(-1)]
            assert (row[3:].sum(-1) == 1).all()
        return
    if isinstance(task, Rebound):
        for row, answers in zip(inputs, targets, strict=True):
            told = [tuple(token.nonzero()[:, 0].tolist()) for token in row[:9]]
            assert sorted(Counter(key for key, _ in told).values()) == [3, 3, 3]
            assert answers[-3:].tolist() == [dict(told)[int(key)] for key in row[-3:].argmax(-1)]
            assert (row[9:].sum(-1) == 1).all()
        return
    if isinstance(task, Selectivity):
        symbols = torch.where(inputs.sum(-1) > 0, inputs.argmax(-1), -1)
        assert torch.equal(task.grammar.track(symbols), targets)
        return
    for row, asked in zip(inputs.tolist(), mask, strict=True):
        n = inputs.tolist().index(row)
        if isinstance(task, Lags):
            for t in asked.nonzero()[:, 0].tolist():
                lag = task.lags[row[t] - task.symbols]
                assert task.only in (None, lag)
                assert targets[n, t] == row[task.length - lag]
        elif isinstance(task, Stretched):
            for t in asked.nonzero()[:, 0].tolist():
                assert targets[n, t] == row[row.index(row[t]) + 1]
        else:
            assert targets[n, -1] == answer(task, row)


@pytest.mark.parametrize("task", [Index(20, 6), NextLetter(10, 16), NextLetter(20, 8, gram=3), Count(20, 5)], ids=repr)
def test_a_search_brings_the_answer_near_and_without_it_the_rows_are_the_same(task):
    found = type(task)(**{**vars(task), "retrieval": True}).draw(40, generator(5))
    plain = task.draw(40, generator(5))
    assert torch.equal(found.targets[:, -1], plain.targets[:, -1])
    width = task.widest()
    for row, target in zip(found.inputs.tolist(), found.targets[:, -1].tolist(), strict=True):
        shown = [t for t in row[-1 - width : -1] if t != task.symbols + 2]
        assert (task.extra + len(shown) if isinstance(task, Count) else shown[0]) == target


def test_bits_are_those_of_the_texts():
    assert Index(10, 4).bits == 20
    texts = {tuple(sorted(Counter(format(i, "04b")).items())) for i in range(16)}
    assert math.isclose(Count(4, 2).bits, math.log2(len(texts)))


def test_half_of_the_graphs_are_trees():
    targets = IsTree(7, 12).draw(400, generator(6)).targets[:, -1] - IsTree(7, 12).extra
    assert 0.4 < targets.double().mean() < 0.6


def test_the_order_of_the_sets_is_the_one_asked_for():
    for first, cut in (("short", 2), ("long", 6)):
        inputs = Disjointness(2, 6, 12, first).draw(20, generator(7)).inputs
        assert (inputs[:, cut] == 12).all()
    cuts = (Disjointness(2, 6, 12).draw(200, generator(7)).inputs == 12).int().argmax(1)
    assert 0.3 < (cuts == 2).double().mean() < 0.7
    task = Disjointness(2, 6, 12, repeat=True)
    inputs = task.draw(20, generator(7)).inputs
    assert torch.equal(inputs[:, :10], inputs[:, 10:])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Disjointness(first="shrot"), "'short', 'long' or 'either'"),
        (lambda: Disjointness(8, 20, 20), "short \\+ long"),
        (lambda: Index(0), "length=0"),
        (lambda: IsTree(3), "4 ≤ length"),
        (lambda: benchmarks.parse_settings(["pairs"]), "pairs=16"),
        (lambda: draw([], "x.png"), "nothing to draw"),
        (lambda: draw([{"task": "t"}], "x.pgn"), ".png, .svg or .pdf"),
    ],
)
def test_bad_input_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_a_group_answers_once_by_its_mean():
    logits = torch.log(torch.tensor([[[0.9, 0.1], [0.4, 0.6], [0.1, 0.9], [0.2, 0.8]]]))
    one = torch.ones(1, 4, dtype=torch.bool)
    batch = GroupedBatch(torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.long), one, torch.tensor([[0, 0, 1, 1]]))
    assert score(logits, batch) == (1, 2)
    assert score(logits, batch._replace(mask=one & (torch.arange(4) != 0))) == (0, 2)


def test_stretched_exams_are_longer_and_gaps_wider():
    lengths = [exam.draw(1, generator(0)).inputs.shape[1] for exam in Stretched(Parity(8)).exams.values()]
    assert lengths == [8, 16, 32, 64]
    task = Selectivity(Grammar(5, 2, 3, gap=0.3), 30, stretches=(2,))
    silence = [
        int((exam.draw(8, generator(0)).inputs.sum(-1) == 0).sum()) / exam.length for exam in task.exams.values()
    ]
    assert list(task.exams) == ["accuracy", "longer", "gap ×2"]
    assert silence[2] > 1.1 * silence[0]


def test_settings_reach_the_benchmark_and_unknown_ones_are_named():
    settings = benchmarks.parse_settings(["length=4", "steps=1", "dim=8", "retrieval=true", "layers=1"])
    rows = benchmarks.run("rnn-in-context-retrieval", ["min-lstm"], **settings)
    assert [row["task"] for row in rows] == ["index", "recall", "cgram", "count", "is-tree"]
    with pytest.raises(UnknownName, match="did you mean 'pairs'"):
        benchmarks.run("mqar", ["min-lstm"], pars=3)


def test_a_model_learns_the_states_of_a_grammar_better_than_the_symbols_tell_them():
    task = {"grammar": Selectivity(Grammar(5, 4, 3, gap=0.0, starts=2, seed=1), 16)}
    (row,) = run_benchmark(task, ["min-lstm"], steps=120, dim=16, layers=1, batch=16, rate=2e-2)
    assert row["accuracy"] > row["chance"] + 0.2
    assert 0 < row["loss"] < 1  # of log2(13) bits; the symbol alone leaves more than one


def test_the_loss_is_in_bits_per_answer():
    class Even:
        def __call__(self, inputs):
            return torch.zeros(*inputs.shape[:2], task.vocabulary), None

    for task in (Parity(8), Recall(3, 4, 6, together=True)):
        _, bits = examine(Even(), task, batches=2, batch=3, seed=0)
        assert bits == pytest.approx(math.log2(task.vocabulary))


def test_patterns_and_entries_take_part_and_a_growing_state_is_measured_after_reading():
    rows = run_benchmark(
        {"parity": Parity(6)},
        ["min-lstm, sliding-window", Entry("wide", "min-lstm", dim=16)],
        steps=1,
        batch=2,
        dim=8,
        layers=1,
    )
    assert [row["memory"] for row in rows] == ["min-lstm, sliding-window window=8", "wide"]
    assert rows[0]["state_bytes"] > rows[1]["state_bytes"] > 0


def test_a_benchmark_of_sizes_has_a_row_for_each_and_a_picture(tmp_path):
    rows = benchmarks.run("recall-at-bytes", ["min-lstm", "gla"], steps=1, widths=[8, 16], pairs=2, symbols=4, layers=1)
    assert [row["memory"] for row in rows] == ["min-lstm dim=8", "min-lstm dim=16", "gla dim=8", "gla dim=16"]
    assert rows[3]["state_bytes"] == 4 * rows[2]["state_bytes"]
    draw(rows, tmp_path / "recall.png", "recall")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    draw(rows, tmp_path / "recall.svg")
    assert len(re.findall("min-lstm|gla", (tmp_path / "recall.svg").read_text())) >= 2
    (table,) = show(rows)
    assert table.row_count == 4


def test_who_knows_the_values_of_a_key_but_not_which_came_last_gets_chance():
    task = Rebound(4, 0, 32, times=2)
    inputs, targets, mask = task.draw(500, generator(8))
    told = inputs[:, :8, :32] @ inputs[:, 8:, :32].transpose(1, 2) > 0  # [row, what was told, query]: the same key
    first, last = (told.int() * w[:, None] for w in (torch.arange(8, 0, -1), torch.arange(1, 9)))
    values = inputs[:, :8, 32:].argmax(-1) + 32
    early, late = (values.gather(1, when.argmax(1)) for when in (first, last))
    assert torch.equal(late, targets[mask].view(500, 4))
    assert abs(float((early == late).float().mean()) / 2 + 1 / 2 - task.chance) < 0.03  # values agree by chance
