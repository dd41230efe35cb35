"""Where data comes from."""

from remanence.streams.source import Segment, Source, open_source

__all__ = ["Segment", "Source", "open_source"]
