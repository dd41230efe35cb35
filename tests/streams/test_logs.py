"""Generated logs: the same for a seed, skewed as real ones, their anomalies rare, varied and labelled."""

from collections import Counter
from itertools import islice

from remanence.streams import logs


def lines(n, **options):
    return list(islice(logs.events(**options), n))


def test_a_seed_gives_the_same_lines_and_another_gives_others():
    assert lines(500, seed=1) == lines(500, seed=1)
    assert lines(500, seed=1) != lines(500, seed=2)


def test_pieces_are_the_lines_whatever_their_size():
    wanted = "".join(event.line + "\n" for event in lines(300)).encode()
    for size in (1, 1000):
        got = b""
        for piece in logs.encoded(size=size):
            got += piece
            if len(got) >= len(wanted):
                break
        assert got[: len(wanted)] == wanted


def test_anomalies_are_rare_labelled_and_of_all_kinds():
    events = lines(40_000)
    kinds = Counter(event.anomaly for event in events)
    ordinary = kinds.pop(None)
    assert set(kinds) == set(logs.ANOMALIES)
    assert 0.98 < ordinary / len(events) < 0.999
    assert all("No space left" not in event.line for event in events if event.anomaly is None)


def test_without_anomalies_the_known_fault_still_throws_its_stack_trace():
    events = lines(5_000, anomaly_rate=0)
    assert {event.anomaly for event in events} == {None}
    assert 3 < sum(event.line.startswith("Traceback") for event in events) < 40


def test_clients_follow_zipf():
    clients = Counter(e.line.split()[4] for e in lines(20_000) if " access " in e.line)
    counts = sorted(clients.values(), reverse=True)
    assert counts[0] > 5 * counts[9] > 25 * counts[200] / 5
