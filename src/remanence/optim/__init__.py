"""Optimisers and learning-rate schedules."""

from remanence.optim.schedules import EndlessSchedule, InfiniteSchedule

__all__ = ["EndlessSchedule", "InfiniteSchedule"]
