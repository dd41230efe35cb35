"""The learner: predict, score, then learn; and what it writes to the disk."""

from remanence.learning.learner import Learner, Outcome

__all__ = ["Learner", "Outcome"]
