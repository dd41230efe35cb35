"""A run from end to end: what it writes, that it restarts exactly, and what faults do to it."""

import io
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from remanence import api, generate, learn
from remanence.errors import CheckpointError, RemanenceError, StreamError, UnknownName
from remanence.learning import checkpoint
from remanence.streams import logs
from remanence.streams.source import Part, Source

NOISE = {"seconds", "bytes_per_second", "rss_bytes", "peak_rss", "peak_rss_bytes"}
DOMAINS = {"a-log": 24_000, "b-text": 20_000}
QUICK = {"size": "small", "strategy": "replay,ewc"}


def text(seed, size):
    made = b""
    for piece in logs.encoded(seed=seed):
        made += piece
        if len(made) >= size:
            return made[:size]
    raise AssertionError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two domains, the second of another kind than the first."""
    root = tmp_path_factory.mktemp("source") / "texts"
    root.mkdir()
    for seed, (name, size) in enumerate(DOMAINS.items()):
        data = text(seed, size)
        (root / name).write_bytes(data if seed == 0 else bytes((b * 7 + 3) % 251 for b in data))
    return root


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory, as_shipped):
    """An uninterrupted run: its directory and what it returned."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, learn(str(folder), out, **QUICK)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(text(5, 20_000))
    return path


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def still(value):
    """Without what the clock and the machine decide."""
    if isinstance(value, dict):
        return {k: still(v) for k, v in value.items() if k not in NOISE}
    return [still(v) for v in value] if isinstance(value, list) else value


def assert_same_run(a, b):
    one, two = (checkpoint.read(d / api.CHECKPOINT) for d in (a, b))
    found = [{}, {}]
    for tree, tensors in zip((one, two), found, strict=True):
        checkpoint.pack(tree["learner"], tensors)
    assert found[0].keys() == found[1].keys()
    assert not [name for name, t in found[0].items() if not torch.equal(t, found[1][name])]
    assert still(one["progress"]) == still(two["progress"])
    assert still(json.loads((a / "summary.json").read_text())) == still(json.loads((b / "summary.json").read_text()))
    assert still(lines(a)) == still(lines(b))


def test_the_files_have_what_was_promised(whole, folder):
    out, summary = whole
    assert {p.name for p in out.iterdir()} == {
        "checkpoint.safetensors", "metrics.jsonl", "report.html", "run.json", "summary.json",
    }  # fmt: skip
    fields = "bytes bits_per_byte bits_per_byte_now domain seconds rss_bytes state_bytes kept_bytes"
    for line in lines(out):
        assert set(fields.split()) <= line.keys()
    fields = "bytes bits_per_byte seconds bytes_per_second peak_rss_bytes state_bytes kept_bytes parameters retention"
    assert set(fields.split()) <= summary.keys()
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["bytes"] == sum(size - size // 10 if size < 81920 else 0 for size in DOMAINS.values())
    assert 0 < summary["bits_per_byte"] < 8
    assert summary["parameters"] > 0
    assert [d["domain"] for d in summary["domains"]] == list(DOMAINS)


def test_the_bits_sum_up(whole):
    out, summary = whole
    before, bits = 0, 0.0
    for line in lines(out):
        bits += line["bits_per_byte_now"] * (line["bytes"] - before)
        before = line["bytes"]
        assert bits / before == pytest.approx(line["bits_per_byte"])
    assert before == summary["bytes"]
    assert bits / before == pytest.approx(summary["bits_per_byte"])


def test_state_and_kept_bytes_do_not_move(whole):
    assert len(lines(whole[0])) > 3
    assert len({line["state_bytes"] for line in lines(whole[0])}) == 1
    # EWC takes its three copies once, when the first domain ends
    assert len({line["kept_bytes"] for line in lines(whole[0])}) == 2


def test_retention_of_each_domain(whole):
    retention = whole[1]["retention"]
    assert set(retention) == set(DOMAINS)
    for scores in retention.values():
        assert all(0 < scores[name] < 16 for name in ("when_ended", "at_end"))
        assert scores["worst_since"] is None or scores["worst_since"] >= scores["at_end"] - 1e-9
    assert retention["b-text"]["when_ended"] == retention["b-text"]["at_end"]


def test_every_byte_of_a_single_file_counts_and_none_is_held_back(file, tmp_path):
    summary = learn(str(file), tmp_path / "run", size="small")
    assert summary["bytes"] == 20_000
    assert summary["retention"] == {}
    assert summary["xz_bits_per_byte"] > 0


def test_a_run_stops_after_so_many_bytes(file, tmp_path):
    assert learn(str(file), tmp_path / "run", size="small", bytes=5_001)["bytes"] == 5_001


def test_generation_leaves_the_run_as_it_is(whole):
    out, _ = whole
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    one, two, three = (bytes(generate(out, b"2024", 30, seed=s)) for s in (0, 0, 1))
    assert one == two != three
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_to_resume_what_is_finished_changes_nothing(whole, folder):
    out, summary = whole
    again = learn(str(folder), out, resume=True, **QUICK)
    assert still(again) == still(summary)


def start(source, out, **options):
    """A run in a process of its own, forked from a server that has loaded everything, with no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["remanence.api", "remanence.models._counting_kernels", "remanence.evaluation.report"]
    )
    process = context.Process(target=learn, args=(str(source), out), kwargs=QUICK | options)
    process.start()
    return process


def test_killed_at_random_moments_and_resumed_a_run_ends_the_same(whole, folder, tmp_path):
    out, chance, killed = tmp_path / "killed", random.Random(1), 0
    for _ in range(4):
        process = start(folder, out, checkpoint_seconds=0.05, resume=(out / "run.json").exists())
        until = time.monotonic() + 60
        while not (out / api.CHECKPOINT).exists() and time.monotonic() < until:
            time.sleep(0.01)
        process.join(0.1 + chance.random() * whole[1]["seconds"] / 3)
        if process.is_alive():
            process.kill()
            killed += 1
        process.join()
    assert (out / api.CHECKPOINT).exists()
    assert killed
    learn(str(folder), out, resume=True, **QUICK)
    assert_same_run(whole[0], out)


def test_an_interrupted_run_is_saved_and_ends_the_same(file, tmp_path):
    data, before = file.read_bytes(), signal.getsignal(signal.SIGINT)
    plain = Source("text", [Part.of_bytes("text", data)])
    learn(plain, tmp_path / "whole", **QUICK)
    with pytest.raises(KeyboardInterrupt):
        learn(plain, tmp_path / "run", on_progress=lambda _: os.kill(os.getpid(), signal.SIGINT), **QUICK)
    assert api.Run.open(tmp_path / "run").progress.position == 8192
    learn(plain, tmp_path / "run", resume=True, **QUICK)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_file_that_shrinks_while_it_is_read_loses_nothing_of_what_was_read(file, tmp_path):
    data = file.read_bytes()

    def shrink(entry):
        file.write_bytes(data[:100])

    class Slow(Source):
        def read(self, start=0, size=65536, *, skip=False):
            return super().read(start, 1024, skip=skip)

    def short(offset, size):
        for at in range(offset, len(data), size):
            with file.open("rb") as f:
                f.seek(at)
                yield f.read(size)

    source = Slow("text", [Part("text", len(data), short)])
    with pytest.raises(StreamError, match="shrank while it was read: it ended at byte"):
        learn(source, tmp_path / "run", on_progress=shrink, **QUICK)
    position = api.Run.open(tmp_path / "run").progress.position
    assert position >= 8192
    file.write_bytes(data)
    learn(source, tmp_path / "whole", **QUICK)
    learn(source, tmp_path / "run", resume=True, **QUICK)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_file_that_vanishes_while_it_is_read(tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    for name in "ab":
        (root / name).write_bytes(text(5, 12_000))
    with pytest.raises(StreamError, match="vanished while it was read, at byte 10800"):
        learn(str(root), tmp_path / "run", on_progress=lambda _: (root / "b").unlink(missing_ok=True), size="small")
    assert api.Run.open(tmp_path / "run").progress.position > 8000


def test_a_file_removed_under_an_open_run_is_still_read_to_its_end(file, tmp_path):
    summary = learn(str(file), tmp_path / "run", on_progress=lambda _: file.unlink(missing_ok=True), size="small")
    assert summary["bytes"] == 20_000
    assert summary["xz_bits_per_byte"] is None


@pytest.mark.parametrize("where", ["checkpoint", "metrics", "summary"])
def test_a_full_disk_keeps_the_last_checkpoint(file, tmp_path, monkeypatch, where):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    out, seen, real = tmp_path / "run", [], api.Run.save

    def save(run):
        seen.append(run.progress.position)
        if where == "checkpoint" and len(seen) == 2:
            monkeypatch.setattr("remanence.learning.checkpoint._write_safetensors", full)
        real(run)
        if where == "metrics" and len(seen) == 1:
            monkeypatch.setattr("json.dumps", full)

    monkeypatch.setattr(api.Run, "save", save)
    if where == "summary":
        write = api._write_json
        monkeypatch.setattr(api, "_write_json", lambda p, v: full() if p.name == "summary.json" else write(p, v))
    with pytest.raises(RemanenceError, match="No space left on device") as error:
        learn(str(file), out, checkpoint_seconds=0, **QUICK)
    assert "intact" in str(error.value)
    monkeypatch.undo()
    assert not list(out.glob("checkpoint*.part"))
    assert api.Run.open(out).progress.position == (20_000 if where == "summary" else 8192)
    learn(str(file), out, resume=True, **QUICK)
    learn(str(file), tmp_path / "whole", **QUICK)
    assert_same_run(tmp_path / "whole", out)


def test_a_disk_that_refuses_the_checkpoint_for_good(file, tmp_path):
    """A file size limit is the nearest to a full disk that a test may make."""
    asked = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000,) * 2);"
        f"sys.argv = ['remanence', 'learn', {str(file)!r}, '--out', {str(tmp_path / 'run')!r}, '--size', 'small'];"
        "from remanence.cli import main; main()"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"run.json", "metrics.jsonl"}


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(file, tmp_path, monkeypatch):
    out, real = tmp_path / "run", api.Learner.observe

    def observe(learner, tokens, task=None):
        if learner.step == 40:
            learner.model.head.bias.data.fill_(math.nan)
        return real(learner, tokens, task)

    monkeypatch.setattr(api.Learner, "observe", observe)
    with pytest.raises(RemanenceError, match="stopped being finite at step 40"):
        learn(str(file), out, checkpoint_seconds=0, **QUICK)
    monkeypatch.undo()
    assert api.Run.open(out).progress.position == 8192
    learn(str(file), out, resume=True, **QUICK)
    learn(str(file), tmp_path / "whole", **QUICK)
    assert_same_run(tmp_path / "whole", out)


def test_binary_bytes_are_bytes_like_others(tmp_path):
    (tmp_path / "binary").write_bytes(bytes(random.Random(0).randbytes(9_000)))
    summary = learn(str(tmp_path / "binary"), tmp_path / "run", size="small")
    assert summary["bytes"] == 9_000
    assert 7.9 < summary["bits_per_byte"] < 9


def test_a_checkpoint_cut_in_half_is_refused_and_kept(whole, folder, tmp_path):
    import shutil

    out = shutil.copytree(whole[0], tmp_path / "run")
    path = out / api.CHECKPOINT
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for ask in (lambda: learn(str(folder), out, resume=True, **QUICK), lambda: list(generate(out, b"", 1))):
        with pytest.raises(CheckpointError, match="damaged or cut short"):
            ask()
    checkpoint.write(path, {"learner": {}})
    with pytest.raises(CheckpointError, match="not one of a run"):
        list(generate(out))


def test_what_is_refused_before_anything_is_written(whole, folder, tmp_path):
    out, source = tmp_path / "run", str(folder)
    for options, kind, match in (
        ({"memory": "gated-deltnet"}, UnknownName, "did you mean 'gated-deltanet'"),
        ({"memory": "Gated-DeltaNet"}, UnknownName, "did you mean 'gated-deltanet'"),
        ({"strategy": "reply"}, UnknownName, "did you mean 'replay'"),
        ({"size": "smal"}, UnknownName, "did you mean 'small'"),
        ({"bytes": 0}, ValueError, "at least 1"),
        ({"memory": "2*, gla"}, ValueError, "A pattern reads like"),
    ):
        with pytest.raises(kind, match=match):
            learn(source, out, **options)
    (tmp_path / "empty").touch()
    with pytest.raises(StreamError, match="is empty"):
        learn(str(tmp_path / "empty"), out)
    with pytest.raises(RemanenceError, match="There is no run in"):
        learn(source, out, resume=True)
    with pytest.raises(RemanenceError, match="There is no run in"):
        list(generate(out))
    assert not out.exists()


def test_a_pipe_that_gives_nothing_leaves_nothing(tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    for out in (tmp_path / "new" / "run", there):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(StreamError, match="is empty"):
            learn("-", out, size="small")
    assert [*tmp_path.iterdir()] == [there]
    assert not [*there.iterdir()]


def test_a_directory_that_is_taken_is_left_alone(whole, folder, tmp_path):
    before = {p.name: p.read_bytes() for p in whole[0].iterdir()}
    with pytest.raises(RemanenceError, match="holds a run already: pass --resume"):
        learn(str(folder), whole[0], **QUICK)
    for options, match in (
        ({"seed": 1}, "began with seed=0, not 1"),
        ({"memory": "gla"}, "began with memory='default', not 'gla'"),
        ({"strategy": "none"}, "began with strategy='replay,ewc', not 'none'"),
        ({"bytes": 5}, "began with bytes=None, not 5"),
    ):
        with pytest.raises(RemanenceError, match=match):
            learn(str(folder), whole[0], resume=True, **QUICK | options)
    assert {p.name: p.read_bytes() for p in whole[0].iterdir()} == before
    (tmp_path / "note").write_text("mine")
    with pytest.raises(RemanenceError, match="is not empty and holds no run"):
        learn(str(folder), tmp_path, **QUICK)
    with pytest.raises(RemanenceError, match="is not empty and holds no run"):
        learn(str(folder), tmp_path / "note", **QUICK)
    with pytest.raises(RemanenceError, match="cannot be written to"):
        learn(str(folder), tmp_path / "note" / "run", **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["note"]


def test_a_source_that_changed_is_not_resumed(file, tmp_path):
    learn(str(file), tmp_path / "run", size="small")
    file.write_bytes(b"other" + file.read_bytes()[5:])
    with pytest.raises(RemanenceError, match="its contents changed"):
        learn(str(file), tmp_path / "run", size="small", resume=True)


def test_a_damaged_run_json_is_refused(file, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"settings": {"colour": 1}}')
    with pytest.raises(RemanenceError, match="is damaged"):
        learn(str(file), tmp_path / "run", resume=True)
