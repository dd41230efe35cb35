"""The workshop: which rows there are, what the columns measure, and what is said of answers that cannot go together."""

import json

import pytest
import torch
from typer.testing import CliRunner

from remanence.cli import app
from remanence.errors import RemanenceError, StreamError, UnknownName
from remanence.evaluation import benchmarks
from remanence.evaluation.benchmarks.bare import BareMemory, Finder, Pairs, recall
from remanence.evaluation.benchmarks.picture import draw, show
from remanence.evaluation.benchmarks.space import ANSWERS, CENTRE, NAMED, around, grid, prequential, title
from remanence.evaluation.benchmarks.training import Entry
from remanence.memory.fast_weight import ROWS
from remanence.ops.fast_weight import fast_weight, fast_weight_state

TINY = {"steps": 1, "batch": 2, "dim": 8, "bytes": 40, "heads": 2, "pairs": 3, "times": 2, "parity": 4}


def drawn(task, seed=0, batch=50):
    return task.draw(batch, 8, 2, torch.Generator().manual_seed(seed))


def test_by_default_every_answer_is_given_once_and_the_rest_are_the_centres():
    rows = around()
    assert rows[0] == CENTRE
    for question, answers in ANSWERS.items():
        assert {row[question] for row in rows} == set(answers) - NAMED
    assert all(sum(row[q] != CENTRE[q] for q in CENTRE) == 1 for row in rows[1:])
    assert len({title(row) for row in rows}) == len(rows) == 1 + sum(len(a) - 1 for a in ANSWERS.values()) - len(NAMED)
    assert {a for answers in ANSWERS.values() for a in answers} > NAMED


def test_answers_given_are_crossed():
    rows = grid({"structure": ["matrix", "mlp"], "chunk_size": [1, 16]})
    assert [title(row) for row in rows] == [
        "structure=matrix chunk_size=1",
        "structure=matrix",
        "chunk_size=1",
        "centre (mlp squared decay gradient 16 after)",
    ]


def test_a_row_has_four_scores_bytes_and_time_and_repeats_itself():
    def rows():
        found = benchmarks.run("space", structure="matrix", chunk_size=[1, 4], seed=3, **TINY)
        return [{name: value for name, value in row.items() if name != "seconds"} for row in found]

    first = rows()
    assert [row["memory"] for row in first] == ["structure=matrix chunk_size=1", "structure=matrix chunk_size=4"]
    for row in first:
        assert list(row)[1:] == ["recall", "noisy recall", "tracking", "longer", "bits_per_byte", "state_bytes"]
        assert all(0 <= row[name] <= 1 for name in ("recall", "noisy recall", "tracking", "longer"))
        assert row["bits_per_byte"] > 0
    # weights and anchor, one 4×4 matrix for each head, the last three tokens before the convolution, the position
    assert first[0]["state_bytes"] == 4 * (2 * 2 * 4 * 4 + 3 * 3 * 8) + 8
    assert first == rows()


def test_what_cannot_go_together_is_listed_with_its_reason():
    rows = benchmarks.run("space", structure="vector", optimizer="gradient,muon", quick=True, **TINY)
    assert rows[0]["recall"] >= 0
    assert rows[1]["memory"] == "structure=vector optimizer=muon"
    assert "needs a matrix" in rows[1]["not_measured"]
    tables = show(rows)
    assert [table.row_count for table in tables] == [1, 1]


def test_published_rows_take_part_by_name():
    (row,) = benchmarks.run("space", ["delta-rule"], **TINY)
    assert row["memory"] == "delta-rule"
    with pytest.raises(UnknownName, match="did you mean 'yaad'"):
        benchmarks.run("space", ["yad"], **TINY)
    assert {"titans", "yaad"} <= set(ROWS)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"structure": "matrx"}, UnknownName, "did you mean 'matrix'"),
        ({"chunk_size": "1,none"}, ValueError, "a number of tokens"),
        ({"chunk_size": 0}, ValueError, "a number of tokens"),
        ({"byts": 10}, UnknownName, "did you mean 'bytes'"),
        ({"stream": "builtin:prse"}, StreamError, "did you mean 'builtin:prose'"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(settings, error, said):
    with pytest.raises(error, match=said):
        benchmarks.run("space", **settings)


def test_a_memory_that_diverges_says_so_and_keeps_its_other_scores(monkeypatch, tmp_path):
    from remanence.evaluation.benchmarks import space

    def diverges(task, arguments, **how):
        if arguments["read"] == "before" and not task.corrupted:
            raise RemanenceError("by token 7 its steps are too large.")
        return 0.5

    monkeypatch.setattr(space, "recall", diverges)
    rows = benchmarks.run("space", structure="matrix", read="before,after", **TINY)
    assert [row.get("recall") for row in rows] == [None, 0.5, None]
    assert [row.get("noisy recall") for row in rows] == [0.5, 0.5, None]
    assert rows[2] == {
        "memory": "structure=matrix read=before",
        "not_measured": "recall: by token 7 its steps are too large.",
    }
    assert "–" in list(show(rows)[0].columns[1].cells)
    draw(rows, tmp_path / "space.svg")


def test_pairs_are_told_as_often_as_said_and_asked_for_only_then():
    task = Pairs(3, 4)
    x, values, answer, mask = drawn(task)
    asked, told, value = x.chunk(3, -1)
    same = (value[:, :, None] - values[:, None]).square().sum(-1) == 0
    assert torch.equal(same.sum(1), torch.full((50, 3), 4))
    assert not mask[:, :6].any()
    assert mask[:, 6:].float().mean() > 0.9
    for row, t in mask.nonzero().tolist():
        before = told[row, : t + 1]
        at = int((before == asked[row, t]).all(-1).nonzero()[0])
        assert torch.equal(value[row, at], values[row, answer[row, t]])


def test_outliers_are_as_many_and_as_long_as_said():
    task, dirty = Pairs(), Pairs(corrupted=0.1, outlier=10.0)
    clean, noisy = drawn(task), drawn(dirty)
    assert torch.equal(clean.values, noisy.values)
    hit = (clean.x != noisy.x).any(-1)
    assert 0.07 < float(hit.float().mean()) < 0.13
    assert not (clean.x != noisy.x)[..., :16].any()
    per_head = noisy.x[..., 16:].unflatten(-1, (2, 4)).norm(dim=-1)
    assert 7 < float(per_head[hit].mean()) < 12
    assert 0.8 < float(per_head[~hit].mean()) < 1.2


def test_the_bare_memory_is_the_op_on_the_keys_and_values_given():
    torch.manual_seed(0)
    memory = BareMemory(8, heads=2, structure="matrix", objective="huber", chunk_size=4, bound=None)
    x = torch.randn(3, 10, 24)
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in x.chunk(3, -1))
    q, k = (torch.nn.functional.normalize(part, dim=-1) for part in (q, k))
    gates = memory.gate(x)
    assert all(torch.equal(gate, gate[:1, :, :1].expand_as(gate)) for gate in gates.values())
    start = fast_weight_state(list(memory.start), 3, momentum=False, thresholds=True)
    y, _ = fast_weight(
        q,
        k,
        v,
        gates["step"],
        start,
        retain_log=gates["retain_log"],
        threshold=gates["threshold"],
        chunk_size=4,
        objective=memory.objective,
        bound=None,
    )
    torch.testing.assert_close(memory(x)[0], y.transpose(1, 2).flatten(2))
    assert {name.split(".")[0] for name, _ in memory.named_parameters()} == {"start", "gates"}


def test_a_memory_that_writes_nothing_only_guesses():
    how = {"dim": 16, "steps": 0, "batch": 4, "rate": 1e-2, "seed": 0}
    answers = {"structure": "matrix", "heads": 2, "chunk_size": 2, "bound": 1.0}
    task = Pairs(4, 6)
    assert recall(task, {**answers, "max_step": 1.0}, **how) > 0.8
    assert abs(recall(task, {**answers, "max_step": 1e-9}, **how) - 1 / 4) < 0.05


def test_gates_learn_by_way_of_the_recall():
    torch.manual_seed(0)
    model = Finder(BareMemory(8, heads=2, structure="matrix", optimizer="momentum"))
    x, values, answer, mask = drawn(Pairs(3, 4))
    torch.nn.functional.cross_entropy(model(x, values)[mask], answer[mask]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_bits_are_those_of_the_streams_first_bytes(tmp_path):
    same, other = tmp_path / "same", tmp_path / "other"
    same.write_bytes(b"a" * 2000)
    other.write_bytes(torch.randint(256, (2000,), generator=torch.Generator().manual_seed(0)).byte().numpy().tobytes())
    entry = Entry("row", "fast-weight", arguments={"fast-weight": {"structure": "matrix", "heads": 2}})
    how = {"dim": 8, "layers": 1, "rate": 3e-2, "seed": 0}
    bits = {path.name: prequential(entry, str(path), 2000, **how) for path in (same, other)}
    assert bits["same"] < 5 < 7.9 < bits["other"]
    assert prequential(entry, str(same), 64, **how) == pytest.approx(8)  # nothing is learned before the first segment


def test_the_command_prints_one_table_and_json_and_draws(tmp_path):
    words = [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
    words = ["bench", "space", *words, "--set", "structure=matrix", "--set", "read=after,anchor"]
    table = CliRunner().invoke(app, words).stdout
    assert {"recall", "noisy", "tracking", "bits", "state", "seconds"} <= set(table.split())
    assert table.count("structure=matrix") == 2
    picture = tmp_path / "space.png"
    listed = CliRunner().invoke(app, [*words, "--json", "--picture", str(picture)])
    rows = [json.loads(line) for line in listed.stdout.splitlines()]
    assert [row["memory"] for row in rows] == ["structure=matrix", "structure=matrix read=anchor"]
    assert picture.stat().st_size > 1000


def test_nothing_measured_is_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([{"memory": "vector", "not_measured": "why"}], tmp_path / "space.png")


def test_progress_tells_each_row():
    told = []
    benchmarks.run(
        "space", structure="matrix", read="after,before", on_progress=lambda *said: told.append(said), **TINY
    )
    assert told == [("structure=matrix", 1, 2), ("structure=matrix read=before", 2, 2)]
