import dataclasses
import io
import itertools
import random

import numpy as np
import pytest

from remanence import watching
from remanence.errors import CheckpointError, RemanenceError
from remanence.learning import checkpoint
from remanence.streams import logs
from remanence.watching import Line, Places, read_lines, render, top_lines, watch


class Uniform:
    """Gives each byte the same half bit, so that the score rests on the places alone."""

    def observe(self, data):
        return np.full(len(data), 0.5)


def ordinary(count, seed=0):
    chance = random.Random(seed)
    for n in range(count):
        yield (
            f"2024-03-04 06:{n // 60 % 60:02}:{n % 60:02} INFO web GET /page/{chance.randrange(99999)} "
            f"status={chance.choice((200, 200, 200, 304))} took={chance.randrange(1000, 99999)} "
            f"id={chance.getrandbits(64):016x}"
        )


@pytest.fixture(scope="module")
def labelled():
    """2,500 generated lines, which are anomalies, and what `watch` says of each."""
    events = list(itertools.islice(logs.events(seed=2, anomaly_rate=0.006), 2500))
    odd = {n for n, event in enumerate(events, 1) if event.anomaly}
    return events, odd, list(watch(event.line for event in events))


def share_of_anomalies(odd, ranked):
    top = {line.line for line in ranked[: 2 * len(odd)]}
    return len(top & odd) / len(odd)


def test_labelled_anomalies_rank_first_and_length_bits_and_chance_do_not(labelled):
    _, odd, lines = labelled
    assert len(odd) > 15
    assert share_of_anomalies(odd, top_lines(lines, len(lines))) >= 0.8
    shuffled = random.Random(0).sample(lines, len(lines))
    for control in (
        sorted(lines, key=lambda line: -len(line.text)),
        sorted(lines, key=lambda line: -line.bits),
        sorted(lines, key=lambda line: -line.bits_per_byte),
        shuffled,
    ):
        assert share_of_anomalies(odd, control) < 0.6


def share_of_events(odd, ranked):
    """An event is a run of anomalous lines; it is found when one of its lines is."""
    runs = []
    for n in sorted(odd):
        if runs and n - 1 in runs[-1]:
            runs[-1].append(n)
        else:
            runs.append([n])
    top = {line.line for line in ranked[: 2 * len(odd)]}
    return sum(any(n in top for n in run) for run in runs) / len(runs)


def test_most_labelled_events_are_found_whatever_the_seed():
    found, control = [], []
    for seed in range(4):
        events = list(itertools.islice(logs.events(seed), 3000))
        odd = {n for n, event in enumerate(events, 1) if event.anomaly}
        lines = list(watch((event.line for event in events), model=Uniform()))
        found.append(share_of_events(odd, top_lines(lines, len(lines))))
        control.append(share_of_events(odd, sorted(lines, key=lambda line: -len(line.text))))
    assert sum(found) / 4 >= 0.85
    assert sum(control) / 4 < 0.3


def test_the_start_does_not_fill_the_top_list(labelled):
    events, _, lines = labelled
    assert sum(line.line <= 100 and not events[line.line - 1].anomaly for line in top_lines(lines, 20)) <= 1


def test_variable_fields_are_ordinary_and_an_odd_status_is_not():
    lines = list(ordinary(600))
    lines[500] = lines[500].replace("status=200", "status=503").replace("status=304", "status=503")
    found = list(watch(lines, model=Uniform()))
    assert top_lines(found, 1)[0].line == 501
    (span,) = found[500].spans
    assert found[500].text[slice(*span)] == "503"
    assert max(line.score for line in found if line.line != 501) < watching.SURPRISING


def test_a_repeated_surprise_fades():
    lines = list(ordinary(700))
    for at in range(300, 700, 10):
        lines[at] = "2024-03-04 06:00:00 ERROR disk is full, dropping the queue"
    scores = [line.score for line in watch(lines, model=Uniform())][300::10]
    assert scores[0] > watching.SURPRISING
    assert scores[-1] < scores[0] / 2


def test_each_line_is_scored_before_anything_later_is_read():
    asked = 0

    def endless():
        nonlocal asked
        for line in itertools.cycle(ordinary(50)):
            asked += 1
            yield line

    found = watch(endless())
    for n in range(1, 20):
        assert next(found).line == n == asked


def test_the_future_does_not_change_the_past():
    lines = list(ordinary(60))
    assert list(watch([*lines, "something else entirely"]))[:60] == list(watch(lines))


def test_bits_are_the_predictor_s_line_end_included():
    line = next(watch(["abc\n"], model=Uniform()))
    assert (line.bits, line.bits_per_byte, line.text) == (2.0, 0.5, "abc")


def test_bytes_text_ends_and_undecodable_bytes():
    assert list(watch([b"a b\r\n", "c\n", b""])) == list(watch(["a b", "c", ""]))
    line = list(watch([*ordinary(300), b"\xff\xfe boom \xf0\x9f\x92\xa5 caf\xc3\xa9 failed"]))[-1]
    assert line.text == "�� boom 💥 café failed"
    assert all(0 <= start < end <= len(line.text) for start, end in line.spans)
    assert next(watch(["lone \udcff surrogate"])).text == "lone � surrogate"


def test_a_line_of_a_megabyte_survives():
    for long in (b"x" * 1_000_000, b"1 " * 500_000, b"-" * 1_000_000, b"abcdef" * 160_000):
        (line,) = watch([long], model=Uniform())
        assert len(line.text) == len(long)
        assert len(render(line).plain) < 3000


def test_an_endless_line_comes_in_pieces(monkeypatch):
    monkeypatch.setattr(watching, "LONGEST", 4)
    assert list(read_lines(io.BytesIO(b"abcdefghi\nj\n"))) == [b"abcd", b"efgh", b"i\n", b"j\n"]


def test_places_keep_their_size_and_forget_what_was_met_once():
    places = Places(bits=6)
    sizes = [len(t) for t in (places.tag, places.seen, places.new_rate, places.usual, places.count)]
    for n in range(5000):
        places.observe(n * 2654435761 % 2**32, str(n).encode())
    assert [len(t) for t in (places.tag, places.seen, places.new_rate, places.usual, places.count)] == sizes
    assert sum(map(bool, places.count)) < len(places.count) / 2


def test_a_place_knows_its_habits():
    steady, varied = Places(), Places()
    for n in range(300):
        steady.observe(1, b"200")
        varied.observe(1, str(n).encode())
    assert steady.observe(1, b"500") > 6
    assert varied.observe(1, b"500") < 0.1


def test_top_gives_the_best_first_with_a_heap():
    lines = list(ordinary(300))
    lines[200] = "panic: everything is on fire"
    best = list(watch(lines, top=3))
    assert best[0].line == 201
    assert best == top_lines(watch(lines), 3)
    assert [line.score for line in best] == sorted((line.score for line in best), reverse=True)


def test_render_escapes_controls_and_marks_the_odd_part():
    line = Line(7, 80.0, 5.0, 9.0, "ok \x1b[31mboom\x07 [bold]", [(8, 12)])
    text = render(line)
    assert text.plain.endswith("ok \\x1b[31mboom\\x07 [bold]")
    assert "\x1b" not in text.plain
    (span,) = [s for s in text.spans if "reverse" in str(s.style)]
    assert text.plain[span.start : span.end] == "boom"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"lines": [], "top": 0}, "top must be at least 1, got 0"),
        ({"lines": [], "warmup": -1}, "warmup must be 0 or more lines, got -1"),
        ({"lines": [3]}, "a line must be text or bytes, got int"),
    ],
)
def test_wrong_arguments_are_named(arguments, says):
    with pytest.raises(RemanenceError, match=says):
        list(watch(**arguments))


def test_a_saved_watch_goes_on_as_if_it_had_not_stopped(tmp_path):
    lines = [event.line for event in itertools.islice(logs.events(seed=3), 400)]
    whole = list(watch(lines))
    first = watching.Watcher()
    before = list(first.read(lines[:250]))
    first.save(tmp_path / "state")
    second = watching.Watcher()
    list(second.read(["what it learned before is replaced"]))
    second.load(tmp_path / "state")
    after = [dataclasses.replace(line, line=line.line + 250) for line in second.read(lines[250:])]
    assert before + after == whole


def test_a_foreign_state_of_a_watch_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "state"
    watcher, other = watching.Watcher(), watching.Watcher()
    other.places = Places(bits=10)
    other.save(path)
    with pytest.raises(CheckpointError, match="tables of another size"):
        watcher.load(path)
    checkpoint.write(path, {"learner": {}})
    with pytest.raises(CheckpointError, match="not the state of a watch"):
        watcher.load(path)
    path.write_bytes(b"lines of a log, not a state")
    with pytest.raises(CheckpointError, match="damaged"):
        watcher.load(path)
    assert watcher.seen == 0
    assert not any(table.any() for table in watcher.places.arrays().values())
