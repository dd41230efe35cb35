"""Lines that surprise: each is predicted, scored, and only then learned, in constant memory."""

from __future__ import annotations

import heapq
import math
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from remanence.errors import CheckpointError, RemanenceError

SURPRISING = 4.0
"""Bits beyond the usual from which a line is worth showing."""
LONGEST = 1 << 20
"""Bytes of a line that `read_lines` takes at once; what is longer goes on as the next line."""
LOOKED_AT = 8192
"""Bytes of a line whose tokens are scored; the rest is predicted and learned, but cannot raise the score."""
MARKED = 2.5
"""Bits beyond the usual from which a token of a surprising line is marked."""
UNEXPECTED = 12.0
"""Bits of the byte predictor from which a word of a surprising line is marked, though its place is not known."""

# Letters are words. Fields are what varies by nature: numbers with their separators, dates, addresses, hex ids.
_DAY, _MONTH = rb"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)", rb"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
_FIELD = (
    rb"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
    rb"|0x[0-9a-fA-F]+"
    rb"|(?<![A-Za-z0-9])(?=[a-fA-F]*[0-9])[0-9a-fA-F]{6,}(?![A-Za-z0-9])"
    rb"|(?:" + _DAY + rb",? +)?(?:" + _MONTH + rb" +)?(?:(?<=[_=\s(,:\[])-)?[0-9]+(?:[-.:,/_][0-9]+)*"
)
_LETTER = rb"A-Za-z\x80-\xff"
_TOKEN = re.compile(
    rb"[^0-9" + _LETTER + rb"]*(?:(?P<field>" + _FIELD + rb")|(?P<word>[" + _LETTER + rb"]+))"
    rb"|(?P<rest>[^0-9" + _LETTER + rb"]+)\Z"
)
SHORT = 4  # a longer field (a clock, an address, an id) says nothing by being new; a status or a level does


@dataclass(frozen=True)
class Line:
    """One line as it was met.

    Attributes:
        line: its number, from 1.
        bits: what its bytes cost the predictor, the line end included.
        bits_per_byte: the same for each byte.
        score: bits by which its tokens are rarer than is usual where they stand, less what lines lately have. About
            0 for an ordinary line, negative in restless times; from `SURPRISING` on it is worth a look.
        text: the line without its end; what is not UTF-8 became U+FFFD.
        spans: character offsets (start, end) into `text` of the surprising parts, in order, apart from each other.
    """

    line: int
    bits: float
    bits_per_byte: float
    score: float
    text: str
    spans: list[tuple[int, int]]


class Places:
    """How often which token stood where, in tables of fixed size.

    A *place* is what precedes a token. For each place: how many tokens were seen there, how often lately one was new,
    and the usual bits. A new token costs −log2 of the rate of new ones, so it is dear after "status: " and cheap
    where names stand; a known one costs −log2 of its share, but never more than a new one. What counts is the excess
    over the place's usual cost. A place never met has no habits, so nothing there is surprising: neither the
    start of a log nor the words after the first odd one.

    Args:
        bits: log2 of the number of places; there are eight times as many counters of tokens.
        memory: tokens over which a place's rate and usual cost are averaged.
    """

    def __init__(self, bits: int = 17, memory: int = 200):
        size = 1 << bits
        self.memory = memory
        self.tag, self.seen = array("I", bytes(4 * size)), array("f", bytes(4 * size))
        self.new_rate, self.usual = array("f", bytes(4 * size)), array("f", bytes(4 * size))
        self.count = array("H", bytes(16 * size))
        self.fresh = 0

    def observe(self, place: int, token: bytes) -> float:
        """Bits by which `token` is rarer than is usual at `place` (a 32-bit hash); then it is learned."""
        at, counter = place & (len(self.tag) - 1), crc32(token, place) & (len(self.count) - 1)
        if self.tag[at] != place:
            self.seen[at] *= 0.75  # a busy place withstands a few strangers of the same slot
            if self.seen[at] >= 1:
                return 0.0
            self.tag[at], self.seen[at], self.new_rate[at], self.usual[at] = place, 0.0, 0.5, 0.0
        seen, count = self.seen[at], self.count[counter]
        bits = -math.log2(min(1.0, max(self.new_rate[at], count / (seen + 1)))) if seen else 0.0
        excess = max(0.0, bits - self.usual[at])
        step = 1 / (min(seen, self.memory) + 2)
        self.new_rate[at] += step * ((count == 0) - self.new_rate[at])
        self.usual[at] += step * (bits - self.usual[at])
        self.seen[at] = seen + 1
        self.count[counter] = min(count + 1, 65535)
        self.fresh += count == 0
        if self.fresh > len(self.count) // 8 or count >= 65535:
            self._age()
        return excess

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The live tables by name."""
        kinds = {"tag": np.uint32, "seen": np.float32, "new_rate": np.float32, "usual": np.float32, "count": np.uint16}
        return {name: np.frombuffer(getattr(self, name), kind) for name, kind in kinds.items()}

    def _age(self) -> None:
        """Halve all counts: tokens met once are forgotten, and the tables never fill up."""
        counts, seen = np.frombuffer(self.count, np.uint16), np.frombuffer(self.seen, np.float32)
        counts >>= 1
        seen *= 0.5
        self.fresh = 0


class Watcher:
    """What `watch` has learned of its lines so far: it reads on, and can be saved.

    Args:
        model: what predicts the bytes; anything with `observe(data: bytes)` that gives bits per byte and learns.
            By default a small `CountingModel` (constant memory, under 8 MB).
        warmup: lines after which a score counts half of what it would count much later.

    Raises: `RemanenceError` if `warmup` is negative.
    """

    def __init__(self, model: Any = None, *, warmup: int = 50):
        if warmup < 0:
            raise RemanenceError(f"watch: warmup must be 0 or more lines, got {warmup}.")
        if model is None:
            from remanence.models.counting import CountingModel

            model = CountingModel(size="small", neural=False)
        self.model, self.warmup = model, warmup
        self.places, self.usual, self.seen = Places(), 4.0, 0

    def read(self, lines: Iterable[str | bytes]) -> Iterator[Line]:
        """Each line with how surprising it was; they are numbered from 1."""
        for number, line in enumerate(lines, 1):
            yield self.observe(line, number)

    def observe(self, line: str | bytes, number: int = 1) -> Line:
        """Predict and score one line, then learn it. Raises: `RemanenceError` for what is neither text nor bytes."""
        if not isinstance(line, str | bytes):
            raise RemanenceError(f"watch: a line must be text or bytes, got {type(line).__name__}.")
        raw = (line.encode("utf-8", "surrogateescape") if isinstance(line, str) else line).rstrip(b"\r\n")
        cost = self.model.observe(raw + b"\n")
        found = _tokens(raw, self.places)
        self.seen += 1
        # The root of the sum of squares: one odd word counts fully, many slightly odd ones do not add up to it.
        surprise = math.sqrt(sum(token.excess**2 for token in found))
        score = (surprise - self.usual) * self.seen / (self.seen + self.warmup)
        self.usual += (surprise - self.usual) / min(self.seen + 1, 200)
        bits = float(cost.sum())
        spans = _spans(raw, found, cost) if score >= SURPRISING / 2 else []
        return Line(number, bits, bits / cost.size, score, raw.decode("utf-8", "replace"), spans)

    def save(self, path: str | Path) -> None:
        """Write all that was learned, atomically. Raises: `CheckpointError` when the disk refuses it."""
        from remanence.learning import checkpoint

        arrays = {"places": self.places.arrays(), "model": self.model.arrays()}
        numbers = {"fresh": self.places.fresh, "usual": self.usual, "seen": self.seen}
        checkpoint.write(Path(path), {"watch": arrays | numbers})

    def load(self, path: str | Path) -> None:
        """Go on with what `save` wrote. Raises: `CheckpointError`, changing nothing, when it is not of a watcher."""
        from remanence.learning import checkpoint

        tree = checkpoint.read(Path(path)).get("watch")
        if tree is None:
            raise CheckpointError(f"{path} is a checkpoint, but not the state of a watch.")
        own = self.places.arrays()
        if own.keys() != tree["places"].keys() or any(own[n].shape != tree["places"][n].shape for n in own):
            raise CheckpointError(f"{path} is the state of a watch with tables of another size.")
        self.model.load_state_dict(tree["model"])
        for name, table in own.items():
            table[:] = tree["places"][name]
        self.places.fresh, self.usual, self.seen = tree["fresh"], tree["usual"], tree["seen"]


def watch(
    lines: Iterable[str | bytes], *, top: int | None = None, model: Any = None, warmup: int = 50
) -> Iterator[Line]:
    """Each line with how surprising it was, given all before it; yields as they arrive, also from an endless pipe.

    Args:
        lines: text or bytes, with or without their line ends.
        top: only the so many most surprising ones, best first, once the lines have ended.
        model, warmup: see `Watcher`, which does the same and can be saved.

    Raises: `RemanenceError` if `top` is below 1, `warmup` negative, or a line neither text nor bytes.

    >>> list(watch([]))
    []
    """
    if top is not None and top < 1:
        raise RemanenceError(f"watch: top must be at least 1, got {top}.")
    found = Watcher(model, warmup=warmup).read(lines)
    return found if top is None else iter(top_lines(found, top))


class _Token(NamedTuple):
    start: int
    end: int
    excess: float
    word: bool


def _tokens(raw: bytes, places: Places) -> list[_Token]:
    """Each token with its bits beyond the usual; the places learn them.

    A token is met in three places: after the one before it, after the two before it, and after the whole line so
    far. In all of them fields stand as their form alone, so that a place is the same whatever the numbers were.
    """
    found = []
    before, earlier, prefix = 1, 2, 3
    for match in _TOKEN.finditer(raw[:LOOKED_AT]):
        kind = match.lastgroup or "rest"
        start, end = match.span(kind)
        token = match[kind] if kind == "field" else match[0]
        form = crc32(b"#", crc32(raw[match.start() : start])) if kind == "field" else crc32(token)
        # The form first, then which value the field has: a number where a word should be is odd in itself.
        stands = (crc32(b"1", before), crc32(b"2", before ^ (earlier << 1 & 0xFFFFFFFF)), crc32(b"3", prefix))
        shape = form.to_bytes(4, "little")
        excess = sum(places.observe(place, shape) for place in stands) / 3
        if kind == "field" and end - start <= SHORT:
            excess += sum(places.observe(crc32(shape, place), token) for place in stands) / 3
        found.append(_Token(start, end, excess, kind == "word"))
        before, earlier, prefix = form, before, crc32(shape, prefix)
    return found


def _spans(raw: bytes, found: list[_Token], cost: NDArray[np.float64]) -> list[tuple[int, int]]:
    """The odd tokens, and the words beside them that the byte predictor did not expect either, as characters."""
    joined: list[tuple[int, int]] = []
    for start, end, excess, word in found:
        if excess < MARKED and not (word and cost[start:end].sum() >= UNEXPECTED):
            continue
        if joined and not raw[joined[-1][1] : start].strip():
            start = joined.pop()[0]
        joined.append((start, end))
    return [(_characters(raw[:start]), _characters(raw[:end])) for start, end in joined]


def _characters(raw: bytes) -> int:
    return len(raw.decode("utf-8", "replace"))


def top_lines(lines: Iterable[Line], k: int) -> list[Line]:
    """The `k` lines of highest score, best first (the earlier of two equals); keeps no more than `k` of them."""
    return heapq.nlargest(k, lines, key=lambda line: (line.score, -line.line))


def read_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of an open binary file or pipe as they arrive, in pieces of at most `LONGEST` bytes."""
    return iter(lambda: file.readline(LONGEST), b"")


def render(line: Line, width: int = 2000) -> Text:
    """The line for a terminal: number, score, and the text with its surprising parts highlighted.

    Control characters are shown escaped (`\\x1b`), so that a log cannot take over the terminal. A text of more than
    `width` characters is cut, with the number of those left out.
    """
    style = "bold red" if line.score >= 2 * SURPRISING else "yellow" if line.score >= SURPRISING else "dim"
    out = Text.assemble((f"{line.line:>7} ", "dim"), (f"{line.score:+6.1f} ", style))
    at = 0
    for start, end in [*line.spans, (width, width)]:
        start, end = min(start, width), min(end, width)
        out.append(_visible(line.text[at:start]))
        out.append(_visible(line.text[start:end]), "bold reverse" if line.score >= SURPRISING else "bold")
        at = end
    if len(line.text) > width:
        out.append(f" … and {len(line.text) - width} more characters", "dim")
    return out


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
