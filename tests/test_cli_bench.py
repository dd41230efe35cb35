"""`bench` and `systems --tree`: what they list, take and refuse."""

import json

import pytest
from typer.testing import CliRunner

from remanence.cli import app


def run(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


def test_without_a_name_the_benchmarks_are_listed():
    listed = run("bench", "--json")
    names = [json.loads(line)["benchmark"] for line in listed.stdout.splitlines()]
    assert listed.exit_code == 0
    assert {"mqar", "hybrid", "selectivbench", "memory-curve", "set-disjointness", "recall-at-bytes"} <= set(names)
    assert all(name in run("bench").stdout for name in names)


def test_rows_a_table_and_a_picture(tmp_path):
    how = ["--memory", "min-lstm", "--set", "steps=1", "--set", "dim=8", "--set", "layers=1", "--set", "batch=2"]
    done = run("bench", "set-disjointness", *how, "--json", "--picture", tmp_path / "sets.png")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["task"] for row in rows] == ["once", "twice"]
    assert list(rows[0])[2:5] == ["short first", "long first", "loss"]
    assert rows[0]["state_bytes"] == 32
    assert (tmp_path / "sets.png").stat().st_size > 1000
    table = run("bench", "memory-curve", *how)
    assert table.exit_code == 0
    assert "lag" in table.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "mqar", "--set", "pairs"], "pairs=16"),
        (["bench", "mqar", "--set", "pars=2"], "did you mean 'pairs'"),
        (["bench", "hybrid", "--set", "placement=last"], "last-of-group"),
    ],
)
def test_wrong_settings_are_explained(words, said):
    failed = run(*words)
    assert failed.exit_code != 0
    assert said in str(failed.exception)


def test_the_tree_names_parents_and_costs():
    lines = run("systems", "--tree").stdout.splitlines()
    (mamba2,) = [line for line in lines if line.strip().startswith("mamba2 ")]
    assert "selective" in mamba2
    assert "one decay per head" in mamba2
    entries = [json.loads(line) for line in run("systems", "--tree", "--json").stdout.splitlines()]
    assert len(entries) == len(lines)
    assert next(e for e in entries if e["id"] == "mamba2")["parents"] == ["mamba"]
