"""Stacks of memories, and the fast learner that counts."""

from remanence.models.language import LanguageModel, parse_pattern

__all__ = ["LanguageModel", "parse_pattern"]
