"""The commands: help with an example, one sentence for a fault, and statuses that a script can trust."""

import json
import shlex
import signal
import subprocess
import sys
import time

import pytest

from remanence import catalogue, cli
from remanence.cli import app, main
from remanence.streams import logs

COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands)


@pytest.fixture
def run(monkeypatch, capfdbinary):
    """Runs the program in this process: (status, standard output, standard error)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["remanence", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfdbinary.readouterr()
        return stopped.value.code or 0, out.decode("utf-8", "replace"), err.decode()

    return call


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "text [b]"
    path.write_bytes(next(logs.encoded(seed=1, size=20_000))[:18_000])
    return path


@pytest.fixture(scope="module")
def done(text, tmp_path_factory):
    """A finished run, by the command."""
    out = tmp_path_factory.mktemp("cli") / "run"
    words = ["learn", str(text), "--out", str(out), "--size", "small"]
    ended = subprocess.run(
        [sys.executable, "-c", "from remanence.cli import main; main()", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return out, ended


def refused(result, status, *words):
    """One sentence on standard error, and nothing else anywhere."""
    code, out, err = result
    assert code == status, err
    assert out == ""
    *progress, sentence = err.strip().splitlines()
    assert sentence.startswith("remanence: ")
    assert sentence[-1] in ".?`"
    assert not any("remanence:" in line or "Traceback" in line for line in progress)
    for word in words:
        assert word in sentence


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Example:" in out
    assert f"remanence {command}" in out


def test_the_program_lists_its_commands(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lern"], ["learn"]),
        (["learn"], ["source"]),
        (["learn", "x"], ["--out"]),
        (["learn", "x", "--ouf", "y"], ["--ouf", "--out"]),
        (["learn", "x", "--out", "y", "--bytes", "0"], ["--bytes"]),
        (["learn", "x", "--out", "y", "--bytes", "many"], ["--bytes"]),
        (["generate", "x", "--tokens", "0"], ["--tokens"]),
        (["prove", "titan"], ["'titans'"]),
        (["bench", "mqr"], ["'mqar'"]),
    ],
)
def test_wrong_usage_exits_2(run, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run(*words), 2, *said)
    assert not list(tmp_path.iterdir())


def test_an_unknown_memory_names_the_nearest(run, text, tmp_path):
    refused(run("learn", text, "--out", tmp_path / "r", "--memory", "gated-deltnet"), 2, "'gated-deltanet'")
    assert not (tmp_path / "r").exists()


def test_faults_exit_1_with_one_sentence(run, text, done, tmp_path):
    out, _ = done
    empty = tmp_path / "empty"
    empty.touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").touch()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for words, said in (
        (["learn", empty, "--out", tmp_path / "r"], "is empty"),
        (["learn", tmp_path / "emty", "--out", tmp_path / "r"], "did you mean"),
        (["learn", text, "--out", out, "--size", "small"], "holds a run already"),
        (["learn", text, "--out", tmp_path / "mine"], "is not empty and holds no run"),
        (["learn", text, "--out", tmp_path / "r", "--resume"], "There is no run in"),
        (["learn", text, "--out", out, "--resume"], "size='small', not 'default'"),
        (["learn", text, "--out", out, "--size", "small", "--seed", "3", "--resume"], "seed=0, not 3"),
        (["learn", text, "--out", empty / "r"], "cannot be written to"),
        (["generate", tmp_path / "r"], "There is no run in"),
        (["report", tmp_path / "r"], str(tmp_path / "r")),
        (["watch", tmp_path / "emty"], "did you mean 'empty'"),
        (["systems", "--kind", "memroy"], "memory"),
    ):
        refused(run(*words), 1, said)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert not (tmp_path / "r").exists()


def test_a_checkpoint_cut_in_half(run, done, tmp_path):
    import shutil

    out = shutil.copytree(done[0], tmp_path / "run")
    path = out / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(run("generate", out), 1, "damaged or cut short")


def test_learning_shows_results_on_standard_output(done, text):
    _, ended = done
    assert ended.returncode == 0, ended.stderr
    assert "bits per byte" in ended.stdout
    assert "18,000 bytes" in ended.stdout
    assert "learning from" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_json_is_an_object_per_line_and_nothing_else(run, text, tmp_path):
    code, out, err = run("learn", text, "--out", tmp_path / "r", "--size", "small", "--json")
    *entries, summary = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [e["bytes"] for e in entries][-1] == summary["bytes"] == 18_000


def test_generation_continues_the_prompt_and_repeats(run, done):
    one, two = (run("generate", done[0], "--prompt", "2024-", "--tokens", 20) for _ in range(2))
    assert one == two
    assert one[0] == 0
    assert one[1].startswith("2024-")


def test_the_catalogue_fits_a_narrow_terminal_with_every_name_whole(run, monkeypatch):
    monkeypatch.setattr(cli.console, "width", 80)
    code, out, _ = run("systems", "--kind", "memory")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert {line.split()[0] for line in out.splitlines() if line.strip()} >= set(catalogue.cards("memory"))


def test_the_catalogue_as_json(run):
    code, out, _ = run("systems", "--json")
    assert code == 0
    assert {"id", "title", "year", "family", "kind", "works"} == set(json.loads(out.splitlines()[0]))


def test_ctrl_c_saves_and_the_printed_command_resumes_to_the_same_end(done, text, tmp_path):
    """The bytes come through a pipe that falls silent: Ctrl-C must not wait for the next of them."""
    out = tmp_path / "run"
    words = ["learn", "-", "--out", str(out), "--strategy", "none", "--size", "small"]
    program = [sys.executable, "-c", "from remanence.cli import main; main()"]
    data = text.read_bytes()
    process = subprocess.Popen(
        [*program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdin.write(data[:10_240])
    process.stdin.flush()
    until = time.monotonic() + 60
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.wait(30)
    said = process.stderr.read().decode()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    again = shlex.split(said.split("To go on: ")[1].strip())
    assert again == ["remanence", *words, "--resume"]
    ended = subprocess.run([*program, *again[1:]], input=data[10_240:], capture_output=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr.decode()
    whole = [sys.executable, "-c", "from remanence.cli import main; main()", *words]
    whole[whole.index(str(out))] = str(tmp_path / "whole")
    subprocess.run(whole, input=data, capture_output=True, timeout=60, check=True)
    one, two = (json.loads((d / "summary.json").read_text()) for d in (out, tmp_path / "whole"))
    assert one["bits_per_byte"] == two["bits_per_byte"]
    assert one["bytes"] == two["bytes"] == 18_000


def test_ctrl_c_keeps_what_a_watch_has_learned_and_it_goes_on_from_there(tmp_path):
    lines = next(logs.encoded(seed=2, size=20_000)).splitlines(keepends=True)
    state = tmp_path / "state"
    words = [sys.executable, "-c", "from remanence.cli import main; main()", "watch", "--json"]
    whole = subprocess.run(words, input=b"".join(lines), capture_output=True, timeout=60, check=True)
    words += ["--state", str(state)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(b"".join(lines[:60]))
    process.stdin.flush()
    said = [process.stdout.readline() for _ in range(60)]
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert process.returncode == 130, process.stderr.read()
    rest = subprocess.run(words, input=b"".join(lines[60:]), capture_output=True, timeout=60, check=True)
    scores = [json.loads(line)["score"] for line in [*said, *rest.stdout.splitlines()]]
    assert scores == [json.loads(line)["score"] for line in whole.stdout.splitlines()]
    state.write_bytes(state.read_bytes()[:5000])
    refused = subprocess.run(words, input=b"", capture_output=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert b"damaged or cut short" in refused.stderr


def test_a_reader_that_goes_away_is_no_fault():
    program = f"{shlex.quote(sys.executable)} -c 'from remanence.cli import main; main()' systems --json | head -n 1"
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
