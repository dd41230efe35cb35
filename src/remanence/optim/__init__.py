"""Optimisers and learning-rate schedules."""

from remanence.optim.dynamic_evaluation import DynamicEvaluation, gather_mean_square
from remanence.optim.schedules import EndlessSchedule, InfiniteSchedule

__all__ = ["DynamicEvaluation", "EndlessSchedule", "InfiniteSchedule", "gather_mean_square"]
