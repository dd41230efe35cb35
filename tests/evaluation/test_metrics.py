"""Metrics against values worked out by hand."""

import json
import math
import shutil
import subprocess

import pytest

from remanence.errors import ShapeError
from remanence.evaluation import metrics as m

R = [
    [0.10, 0.20, 0.30],
    [0.90, 0.30, 0.30],
    [0.60, 0.80, 0.50],
    [0.70, 0.50, 0.95],
]
LOSSES = [[1 - score for score in row] for row in R]


def test_averages():
    assert m.average_score(R) == pytest.approx((0.70 + 0.50 + 0.95) / 3)
    assert m.average_score(R, after=2) == pytest.approx(0.70)
    assert m.average_score(LOSSES) == pytest.approx(1 - (0.70 + 0.50 + 0.95) / 3)
    assert m.average_incremental_score(R) == pytest.approx((0.90 + 0.70 + 2.15 / 3) / 3)


def test_forgetting_is_the_fall_from_the_best():
    assert m.forgetting(R) == pytest.approx(((0.90 - 0.70) + (0.80 - 0.50)) / 2)
    assert m.forgetting(R, after=2) == pytest.approx(0.30)
    assert m.forgetting(LOSSES, higher_is_better=False) == pytest.approx(0.25)
    best_later = [R[0], R[1], [0.95, 0.80, 0.50], R[3]]
    assert m.forgetting(best_later) == pytest.approx(((0.95 - 0.70) + (0.80 - 0.50)) / 2)


def test_transfer():
    assert m.backward_transfer(R) == pytest.approx(((0.70 - 0.90) + (0.50 - 0.80)) / 2)
    assert m.backward_transfer(LOSSES, higher_is_better=False) == pytest.approx(-0.25)
    assert m.forward_transfer(R) == pytest.approx(((0.30 - 0.20) + (0.50 - 0.30)) / 2)
    assert m.forward_transfer(R, baseline=[0, 0.25, 0.25]) == pytest.approx((0.05 + 0.25) / 2)
    assert m.forward_transfer(LOSSES, higher_is_better=False) == pytest.approx(0.15)
    assert m.forward_transfer(LOSSES, [1, 0.75, 0.75], higher_is_better=False) == pytest.approx(0.15)


def test_the_worst_case_sees_the_gap_that_the_end_hides():
    curve = [[0.5, 0.1], [0.9, 0.1], [0.2, 0.4], [0.6, 0.5], [0.9, 0.8]]
    assert m.worst_since_learned(curve, [1]) == pytest.approx(0.2)
    assert m.worst_case_score(curve, [1]) == pytest.approx(0.5 * 0.8 + 0.5 * 0.2)
    losses = [[1 - score for score in row] for row in curve]
    assert m.worst_since_learned(losses, [1], higher_is_better=False) == pytest.approx(0.8)
    assert m.worst_case_score(losses, [1], higher_is_better=False) == pytest.approx(0.5 * 0.2 + 0.5 * 0.8)


def test_a_single_task_has_nothing_to_forget():
    one = [[0.1], [0.9]]
    assert m.average_score(one) == 0.9
    for metric in (m.forgetting, m.backward_transfer, m.forward_transfer):
        assert math.isnan(metric(one))
    assert m.worst_case_score([[0.3], [0.7]], []) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: m.forgetting([[1.0, 2.0]]), r"R must be \[tasks \+ 1, tasks\].* got \[1, 2\]"),
        (lambda: m.average_score(R, after=4), "after must be between 1 and the 3 tasks of R, got 4"),
        (lambda: m.forward_transfer(R, [0.1]), r"baseline must be \[tasks=3\], got \[1\]"),
        (lambda: m.worst_since_learned([[0.1, 0.2]], []), "one task more than ends"),
        (lambda: m.worst_since_learned([[0.1, 0.2], [0.1, 0.2]], [1]), r"a row after it \(0 to 0\), got \[1\]"),
    ],
)
def test_wrong_shapes_are_refused(call, says):
    with pytest.raises(ShapeError, match=says):
        call()


def test_prequential_means_over_all_and_over_the_window():
    score = m.Prequential(window=10)
    assert math.isnan(score.bits_per_byte)
    assert math.isnan(score.recent)
    for bits, count in ((80, 10), (0, 0), (20, 5), (5, 5)):
        score.observe(bits, count)
    assert score.bits_per_byte == pytest.approx(105 / 20)
    assert score.recent == pytest.approx(25 / 10)


def test_prequential_goes_on_from_its_state():
    whole, first, second = m.Prequential(7), m.Prequential(7), m.Prequential(7)
    for i in range(20):
        whole.observe(i * 0.3, 1 + i % 3)
        (first if i < 11 else second).observe(i * 0.3, 1 + i % 3)
        if i == 10:
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert (second.bits_per_byte, second.recent) == (whole.bits_per_byte, whole.recent)
    assert len(whole.state_dict()["pieces"]) <= 7


def recorded(*, reload_at=None):
    kept = m.Retention()
    kept.record(0, {"a": 8.0, "b": 8.0})
    kept.record(100, {"a": 2.0, "b": 5.0})
    kept.ended("a", 100)
    if reload_at:
        state = json.loads(json.dumps(kept.state_dict()))
        kept = m.Retention()
        kept.load_state_dict(state)
    kept.record(150, {"a": 3.5, "b": 4.0})
    kept.record(200, {"a": 2.5, "b": 1.5})
    kept.ended("b", 200)
    kept.record(300, {"a": 1.75, "b": 1.6})
    kept.ended("a", 300)
    return kept.summary()


def test_retention_since_the_first_ending():
    assert recorded() == {
        "a": {"when_ended": 2.0, "at_end": 1.75, "worst_since": 3.5},
        "b": {"when_ended": 1.5, "at_end": 1.6, "worst_since": 1.6},
    }
    assert recorded(reload_at=100) == recorded()


def test_a_probe_at_the_ending_may_come_after_its_announcement():
    kept = m.Retention()
    kept.record(50, {"a": 7.0})
    kept.ended("a", 100)
    kept.record(100, {"a": 2.0})
    kept.record(150, {"a": 2.25})
    assert kept.summary()["a"] == {"when_ended": 2.0, "at_end": 2.25, "worst_since": 2.25}


def test_what_is_not_known_is_none():
    kept = m.Retention()
    kept.record(50, {"a": 7.0})
    kept.ended("b", 50)
    assert kept.summary()["a"] == {"when_ended": None, "at_end": 7.0, "worst_since": None}
    assert kept.summary()["b"] == {"when_ended": None, "at_end": None, "worst_since": None}


@pytest.mark.skipif(shutil.which("xz") is None, reason="no xz to compare with")
def test_xz_is_the_command_s_figure():
    data = b"".join(b"line %d of a text that repeats itself\n" % (i * i) for i in range(20_000))
    written = subprocess.run(["xz", "-9e", "-c"], input=data, capture_output=True, check=True).stdout
    assert m.xz_bits_per_byte(data) == pytest.approx(8 * len(written) / len(data), rel=2e-3)


def test_xz_of_nothing_is_no_number():
    assert math.isnan(m.xz_bits_per_byte(b""))
