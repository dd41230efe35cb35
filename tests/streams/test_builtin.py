"""The built-in streams: their phases, that they are the same each time, and their faults."""

import sys

import pytest

from remanence.errors import StreamError
from remanence.streams import builtin, open_source


def joined(source, *args):
    return b"".join(segment.data for segment in source.read(*args))


def test_mixed_has_three_large_domains_and_comes_back_to_the_first_with_new_text():
    source = open_source("builtin:mixed")
    assert [(part.domain, part.length) for part in source.parts] == [
        ("prose", 160_000),
        ("source", 160_000),
        ("logs", 160_000),
        ("prose", 160_000),
    ]
    data = joined(source)
    assert len(data) == source.total == 640_000
    first, last = data[:160_000], data[480_000:]
    seen = set(first.split(b"\n\n"))
    again = [paragraph for paragraph in last.split(b"\n\n") if paragraph in seen]
    assert sum(map(len, again)) < 100


def test_held_back_text_is_not_in_the_stream():
    source = open_source("builtin:mixed")
    data, held = joined(source), source.held_back()
    assert {domain: len(text) for domain, text in held.items()} == {"prose": 8192, "source": 8192, "logs": 8192}
    for text in held.values():
        assert not any(text[i : i + 400] in data for i in range(0, 7600, 400))


@pytest.mark.parametrize("spec", ["mixed:3000", "docs-then-source:5000", "prose:4000", "source:4000", "logs:9000"])
def test_reading_on_from_anywhere_gives_the_same_bytes(spec):
    whole = joined(open_source(f"builtin:{spec}"))
    for start in (0, 1, 2999, 3000, 3777):
        assert joined(open_source(f"builtin:{spec}"), start, 333) == whole[start:]


def test_only_streams_of_several_domains_hold_text_back():
    assert open_source("builtin:prose:4000").held_back() == {}
    assert set(open_source("builtin:docs-then-source:4000").held_back()) == {"prose", "source"}


def test_the_benchmark_stream_has_its_1_3_megabytes():
    assert open_source("builtin:docs-then-source").total == 1_300_000


def test_logs_may_be_long_without_being_kept():
    source = open_source("builtin:logs:50000000")
    assert source.total == 50_000_000
    assert len(next(source.read(100_000)).data) <= 65536


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mixd", "no built-in stream called 'mixd'; did you mean 'builtin:mixed'"),
        ("zzzzzzz", "known: mixed, docs-then-source, prose, source, logs"),
        ("mixed:few", "positive number of bytes, got 'few'"),
        ("mixed:0", "positive number of bytes, got '0'"),
    ],
)
def test_a_wrong_name_or_length_is_refused(spec, says):
    with pytest.raises(StreamError, match=says):
        open_source(f"builtin:{spec}")


def test_a_stripped_python_is_said_to_be_one(monkeypatch, tmp_path):
    builtin.prose.cache_clear()
    builtin.source_code.cache_clear()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(StreamError, match="has no pydoc_data"):
        open_source("builtin:mixed")
    with pytest.raises(StreamError, match="has no library sources"):
        open_source("builtin:source")
