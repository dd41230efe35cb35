"""Optimisers, clocks that give each part of a model its own pace, and learning-rate schedules."""

from remanence.optim.adamw import AdamW
from remanence.optim.block_adam import BlockAdam
from remanence.optim.clocks import Clock, Clocks, clocked
from remanence.optim.delta_gradient_descent import DeltaGradientDescent
from remanence.optim.dynamic_evaluation import DynamicEvaluation, gather_mean_square
from remanence.optim.gradient_memory import GradientMemory, deep_momentum, delta_momentum, preconditioned_momentum
from remanence.optim.m3 import M3
from remanence.optim.schedules import EndlessSchedule, InfiniteSchedule

__all__ = [
    "M3",
    "AdamW",
    "BlockAdam",
    "Clock",
    "Clocks",
    "DeltaGradientDescent",
    "DynamicEvaluation",
    "EndlessSchedule",
    "GradientMemory",
    "InfiniteSchedule",
    "clocked",
    "deep_momentum",
    "delta_momentum",
    "gather_mean_square",
    "preconditioned_momentum",
]
