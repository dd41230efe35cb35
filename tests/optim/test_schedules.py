"""Schedules are continuous, never zero, and nothing but their arguments."""

import itertools
import json
import math
from dataclasses import asdict

import pytest

from remanence.optim import EndlessSchedule, InfiniteSchedule

SCHEDULES = [
    EndlessSchedule(warmup=20, scale=30, floor=0.2),
    EndlessSchedule(warmup=0, scale=50),
    InfiniteSchedule(20, 40),
    InfiniteSchedule(20, 40, shape="inverse-sqrt"),
    InfiniteSchedule(20, 40).annealed(100, 50),
]


def largest_jump(schedule, steps: int = 300) -> float:
    rates = [schedule(step) for step in range(steps)]
    return max(abs(a - b) for a, b in itertools.pairwise(rates))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_are_positive_bounded_and_continuous(schedule):
    assert all(0 < schedule(step) <= 1 for step in [*range(300), 10**9])
    assert largest_jump(schedule) < 0.12


def test_a_schedule_that_warms_up_again_is_seen_to_jump():
    assert largest_jump(lambda step: SCHEDULES[2](step % 150)) > 0.2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_its_arguments_are_the_whole_schedule(schedule):
    again = type(schedule)(**json.loads(json.dumps(asdict(schedule))))
    assert [again(step) for step in range(300)] == [schedule(step) for step in range(300)]


def test_endless_phases():
    rate = EndlessSchedule(warmup=9, scale=100, floor=0.25)
    assert [rate(0), rate(4), rate(9)] == [0.1, 0.5, 1.0]
    assert rate(109) == pytest.approx(1 / math.sqrt(2))
    assert rate(10**7) == 0.25


@pytest.mark.parametrize("shape", ["cosine", "inverse-sqrt"])
def test_infinite_phases(shape):
    rate = InfiniteSchedule(9, 20, constant=0.3, shape=shape)
    assert [rate(0), rate(4), rate(9)] == [0.1, 0.5, 1.0]
    middle = 0.65 if shape == "cosine" else 1 - 0.7 * (1 - 1 / math.sqrt(6)) / (1 - 1 / math.sqrt(11))
    assert rate(19) == pytest.approx(middle)
    assert rate(28) > 0.3
    assert rate(29) == rate(10**9) == 0.3


def test_annealing_is_a_copy():
    rate = InfiniteSchedule(9, 20, constant=0.4, minimum=0.1)
    shipped = rate.annealed(50, 10)
    assert shipped(49) == shipped(50) == 0.4
    assert shipped(55) == pytest.approx(0.2)
    assert shipped(60) == shipped(10**6) == pytest.approx(0.1)
    assert rate(60) == 0.4


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: EndlessSchedule(floor=0), "floor"),
        (lambda: EndlessSchedule(floor=math.nan), "floor"),
        (lambda: EndlessSchedule(scale=0), "scale"),
        (lambda: EndlessSchedule(warmup=-1), "warmup"),
        (lambda: InfiniteSchedule(constant=1.5), "constant"),
        (lambda: InfiniteSchedule(constant=0.1, minimum=0.2), "minimum"),
        (lambda: InfiniteSchedule(shape="linear"), "shape"),
        (lambda: InfiniteSchedule(10, 10).annealed(5, 5), "anneal_at"),
        (lambda: InfiniteSchedule(10, 10).annealed(50, 0), "anneal_steps"),
    ],
)
def test_arguments_refused(make, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        make()
