"""Every source gives its bytes whole, from any position, and says in one sentence what is wrong with it."""

import gzip
import io
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remanence.errors import StreamError
from remanence.streams import open_source
from remanence.streams.source import Part, Source


def joined(source, *args, **options):
    return b"".join(segment.data for segment in source.read(*args, **options))


@pytest.fixture
def tree(tmp_path):
    """Two subfolders of one domain each and a file that is its own domain."""
    files = {"b/2.txt": b"\xff\x00" * 6000, "b/1.txt": b"1" * 300, "a/x/y": b"y" * 1000, "c.txt": b"c" * 50, "d": b""}
    for name, data in files.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "tree"


def test_a_file_gives_every_byte_and_holds_none_back(tmp_path):
    data = bytes(range(256)) * 10
    (tmp_path / "binary").write_bytes(data)
    source = open_source(str(tmp_path / "binary"))
    assert joined(source) == data
    assert (source.total, source.held_back(), source.name) == (2560, {}, str(tmp_path / "binary"))
    assert {segment.domain for segment in source.read()} == {"binary"}


def test_a_directory_is_its_files_in_order_with_the_tail_of_each_domain_held_back(tree):
    source = open_source(str(tree))
    domains = list(dict.fromkeys(segment.domain for segment in source.read()))
    assert domains == ["a", "b", "c.txt"]
    held = source.held_back()
    assert {d: len(text) for d, text in held.items()} == {"a": 100, "b": 1230, "c.txt": 5}
    whole = {"a": b"y" * 1000, "b": b"1" * 300 + b"\xff\x00" * 6000, "c.txt": b"c" * 50}
    for domain, text in whole.items():
        assert b"".join(s.data for s in source.read() if s.domain == domain) + held[domain] == text
    assert source.total == len(joined(source))


def test_what_is_held_back_reaches_over_small_files(tmp_path):
    for i in range(20):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / f"{i:02d}").write_bytes(bytes([65 + i]) * 10)
    source = open_source(str(tmp_path))
    assert source.held_back() == {"d": b"S" * 10 + b"T" * 10}
    assert joined(source).endswith(b"R" * 10)


def test_no_more_than_8_kb_are_held_back(tmp_path):
    (tmp_path / "large").write_bytes(b"x" * 200_000)
    assert len(open_source(str(tmp_path)).held_back()["large"]) == 8192


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(start=st.integers(0, 14_000), size=st.sampled_from([1, 7, 64, 65536]))
def test_reading_from_anywhere_gives_the_rest(tree, start, size):
    source = open_source(str(tree))
    start = min(start, source.total)
    segments = list(source.read(start, size))
    assert b"".join(s.data for s in segments) == joined(source)[start:]
    assert all(1 <= len(s.data) <= size for s in segments)
    assert [s.domain for s in segments] == sorted(s.domain for s in segments)


def test_gzip_counts_the_bytes_inside(tmp_path):
    data = os.urandom(100_000) + b"end"
    (tmp_path / "log.gz").write_bytes(gzip.compress(data))
    source = open_source(str(tmp_path / "log.gz"))
    assert source.total is None
    assert joined(source) == data
    assert joined(source, 70_001) == data[70_001:]
    assert source.held_back() == {}


def test_a_damaged_gzip_gives_its_good_bytes_then_one_sentence(tmp_path):
    data = os.urandom(300_000)
    path = tmp_path / "log.gz"
    path.write_bytes(gzip.compress(data)[:200_000])
    got: list[bytes] = []
    with pytest.raises(StreamError, match=r"log\.gz is a damaged gzip file: it fails at byte \d+ ") as error:
        got.extend(segment.data for segment in open_source(str(path)).read())
    good = b"".join(got)
    assert good == data[: len(good)]
    assert len(good) > 100_000
    assert f"at byte {len(good)} " in str(error.value)


def test_a_file_that_is_no_gzip_is_refused(tmp_path):
    (tmp_path / "log.gz").write_bytes(b"plain text")
    with pytest.raises(StreamError, match="damaged gzip"):
        open_source(str(tmp_path / "log.gz"))


def with_stdin(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    return open_source("-")


def test_standard_input_goes_on_where_it_stands_unless_told_to_skip(monkeypatch):
    assert joined(with_stdin(monkeypatch, b"abcdef"), 4) == b"abcdef"
    assert joined(with_stdin(monkeypatch, b"abcdef"), 4, skip=True) == b"ef"
    source = with_stdin(monkeypatch, b"abcdef")
    assert (source.total, source.fingerprint(), source.held_back(), source.replayable) == (None, "", {}, False)


def test_standard_input_that_ends_before_the_position_says_so(monkeypatch):
    with pytest.raises(StreamError, match="standard input ended 4 bytes before the position to resume from"):
        joined(with_stdin(monkeypatch, b"abcdef"), 10, skip=True)


def test_a_named_pipe_is_read_like_standard_input(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    keep = os.open(tmp_path / "pipe", os.O_RDWR)
    os.write(keep, b"through the pipe")
    source = open_source(str(tmp_path / "pipe"))
    assert next(source.read()).data == b"through the pipe"
    os.close(keep)


@pytest.mark.parametrize("name", ["empty", "folder"])
def test_an_empty_source_is_refused(tmp_path, name):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "nothing").touch()
    with pytest.raises(StreamError, match=f"{name} is empty"):
        open_source(str(tmp_path / name))


def test_empty_standard_input_is_refused_when_read(monkeypatch):
    with pytest.raises(StreamError, match="standard input is empty"):
        joined(with_stdin(monkeypatch, b""))


def test_a_missing_path_names_the_nearest_that_exists(tmp_path):
    (tmp_path / "letters.txt").write_bytes(b"a")
    with pytest.raises(StreamError, match=r"no file or directory .*lettres\.txt'; did you mean .*letters\.txt'\?"):
        open_source(str(tmp_path / "lettres.txt"))


def test_a_builtin_without_its_prefix_is_recognised():
    with pytest.raises(StreamError, match="did you mean 'builtin:mixed'"):
        open_source("mixed")


def test_a_file_that_shrinks_gives_what_it_had_and_the_position(tmp_path):
    path = tmp_path / "shrinks"
    path.write_bytes(b"x" * 10_000)
    source, got = open_source(str(path)), []
    path.write_bytes(b"x" * 4_000)
    with pytest.raises(StreamError, match="shrank while it was read: it ended at byte 4000 of 10000"):
        got.extend(segment.data for segment in source.read(size=1000))
    assert b"".join(got) == b"x" * 4_000


def test_a_file_that_vanishes_between_two_others_says_where(tree):
    source = open_source(str(tree))
    (tree / "b" / "1.txt").unlink()
    with pytest.raises(StreamError, match="vanished while it was read, at byte 900"):
        joined(source)


def test_a_file_that_grows_ends_where_it_ended_when_opened(tmp_path):
    path = tmp_path / "grows"
    path.write_bytes(b"x" * 100)
    source = open_source(str(path))
    path.write_bytes(b"x" * 200)
    assert len(joined(source)) == 100


def test_an_unreadable_file_says_why(tmp_path, monkeypatch):
    (tmp_path / "secret").write_bytes(b"x")

    def refuse(self, *args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(StreamError, match="secret cannot be read: Permission denied"):
        open_source(str(tmp_path / "secret"))


def test_a_fault_while_reading_says_where():
    def failing(offset, size):
        yield b"good"
        raise OSError(5, "Input/output error")

    source, got = Source("disk", [Part("disk", 10, failing)]), []
    with pytest.raises(StreamError, match="disk cannot be read at byte 4: Input/output error"):
        got.extend(source.read())
    assert [segment.data for segment in got] == [b"good"]


def test_the_fingerprint_tells_sources_apart(tmp_path):
    for name, data in {"a": b"x" * 100, "b": b"x" * 101, "c": b"y" * 100}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_bytes(data)
    prints = {open_source(str(tmp_path / name / "text")).fingerprint() for name in "abc"}
    assert len(prints) == 3
    assert open_source(str(tmp_path / "a" / "text")).fingerprint() in prints
