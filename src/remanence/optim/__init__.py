"""Optimisers, clocks that give each part of a model its own pace, and learning-rate schedules."""

from remanence.optim.adamw import AdamW
from remanence.optim.clocks import Clock, Clocks, clocked
from remanence.optim.dynamic_evaluation import DynamicEvaluation, gather_mean_square
from remanence.optim.schedules import EndlessSchedule, InfiniteSchedule

__all__ = [
    "AdamW",
    "Clock",
    "Clocks",
    "DynamicEvaluation",
    "EndlessSchedule",
    "InfiniteSchedule",
    "clocked",
    "gather_mean_square",
]
