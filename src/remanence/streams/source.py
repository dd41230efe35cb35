"""Where the bytes of a run come from: a file, a directory, standard input, a gzip file, or a built-in stream."""

from __future__ import annotations

import gzip
import hashlib
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from remanence.errors import StreamError, nearest

HELD_BACK = 8192
HEAD = 65536


@dataclass(frozen=True)
class Segment:
    """Consecutive bytes of one domain; never empty."""

    data: bytes
    domain: str


@dataclass(frozen=True)
class Part:
    """A stretch of one domain: `length` bytes (None: until they end); `open(offset, size)` gives them from `offset`."""

    domain: str
    length: int | None
    open: Callable[[int, int], Iterator[bytes]]

    @classmethod
    def of_bytes(cls, domain: str, data: bytes) -> Part:
        return cls(domain, len(data), lambda offset, size: (data[i : i + size] for i in range(offset, len(data), size)))


class Source:
    """A stream of bytes in known order, readable again from any position.

    Attributes:
        name: as it was given to `open_source`.
        parts: what the stream consists of, in order; only the last may have no known length.
        total: bytes of the stream, None when unknown (standard input, pipes, gzip).
        replayable: whether the bytes can be read a second time; False for standard input and pipes.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[Part],
        held_back: Callable[[], dict[str, bytes]] = dict,
        *,
        identity: str = "",
        replayable: bool = True,
    ):
        self.name, self.parts, self.replayable = name, list(parts), replayable
        lengths = [part.length for part in self.parts]
        self.total = None if None in lengths else sum(length or 0 for length in lengths)
        self._held_back, self._identity = held_back, identity

    def read(self, start: int = 0, size: int = 65536, *, skip: bool = False) -> Iterator[Segment]:
        """The segments from stream position `start` on, each of 1 to `size` bytes and of one domain.

        A source that is not `replayable` stands where the last reader left it, so `start` is only the number from
        which positions are counted. With `skip=True` it is taken to stand at its beginning (the same pipe, filled
        anew), and its first `start` bytes are read and thrown away.

        Raises: `StreamError` with the position at which the source failed; segments given before it stay good.
        """
        position, first = start, 0
        if not self.replayable:
            first = 0 if skip else start
        for part in self.parts:
            end = None if part.length is None else first + part.length
            if end is None or position < end:
                for data in self._pieces(part, first, position, size):
                    yield Segment(data, part.domain)
                    position += len(data)
                if end is not None and position < end:
                    raise StreamError(
                        f"{self.name} shrank while it was read: it ended at byte {position} of {self.total}."
                    )
            first = position if end is None else end
        if position == 0:
            raise StreamError(f"{self.name} is empty: there is nothing to learn from.")

    def _pieces(self, part: Part, first: int, position: int, size: int) -> Iterator[bytes]:
        try:
            for data in part.open(position - first, size):
                if part.length is not None:
                    data = data[: first + part.length - position]
                if not data:
                    return
                for i in range(0, len(data), size):
                    yield data[i : i + size]
                position += len(data)
        except FileNotFoundError:
            raise StreamError(f"{self.name} vanished while it was read, at byte {position}.") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise StreamError(f"{self.name} is a damaged gzip file: it fails at byte {position} ({error}).") from None
        except OSError as error:
            raise StreamError(f"{self.name} cannot be read at byte {position}: {error.strerror or error}.") from None

    def held_back(self) -> dict[str, bytes]:
        """For each domain its text that is not part of the stream; {} where every byte counts (file, pipe, gzip)."""
        try:
            return self._held_back()
        except OSError as error:
            raise StreamError(f"The held-back text of {self.name} cannot be read: {error.strerror or error}.") from None

    def fingerprint(self) -> str:
        """Recognises the same source at resume: a hash of names, lengths, the first 64 kB; "" if not replayable."""
        if not self.replayable:
            return ""
        digest = hashlib.sha256(self._identity.encode())
        digest.update(repr([(part.domain, part.length) for part in self.parts]).encode())
        left = HEAD
        for segment in self.read(size=HEAD):
            digest.update(segment.data[:left])
            left -= len(segment.data)
            if left <= 0:
                break
        return digest.hexdigest()


def open_source(spec: str) -> Source:
    """The source that `spec` names: a path, `-` (standard input), or `builtin:NAME` with `:BYTES` at will.

    A directory is all its regular files in the order of their names; the domain of a file is the first name of its
    path below the directory: its subfolder, or itself. The last 8 kB of each domain, at most a tenth, are held back.

    Raises: `StreamError` when there is no such source, it is empty, or it cannot be read.
    """
    if spec == "-":
        return _pipe("standard input", lambda: sys.stdin.buffer)
    if spec.startswith("builtin:"):
        from remanence.streams.builtin import builtin

        return builtin(spec.removeprefix("builtin:"))
    path = Path(spec)
    try:
        if not path.exists():
            raise StreamError(_missing(spec, path))
        if path.is_dir():
            return _directory(spec, path)
        if not path.is_file():
            return _pipe(spec, lambda: path.open("rb"))
        if path.suffix == ".gz":
            return _gzip(spec, path)
        return _file(spec, path)
    except OSError as error:
        raise StreamError(f"{spec} cannot be read: {error.strerror or error}.") from None


def _missing(spec: str, path: Path) -> str:
    from remanence.streams.builtin import NAMES

    if spec in NAMES:
        return f"There is no file or directory {spec!r}; did you mean 'builtin:{spec}'?"
    while not path.parent.exists():
        path = path.parent
    close = nearest(path.name, os.listdir(path.parent) if path.parent.is_dir() else [])
    hint = f"; did you mean {str(path.with_name(close))!r}?" if close else f" in {str(path.parent.absolute())!r}."
    return f"There is no file or directory {spec!r}{hint}"


def _pieces_of(path: Path, offset: int, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while data := file.read(size):
            yield data


def _file_part(domain: str, path: Path, length: int) -> Part:
    return Part(domain, length, lambda offset, size: _pieces_of(path, offset, size))


def _file(spec: str, path: Path) -> Source:
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
    if not length:
        raise StreamError(f"{spec} is empty: there is nothing to learn from.")
    return Source(spec, [_file_part(path.name, path, length)])


def _gzip(spec: str, path: Path) -> Source:
    def pieces(offset: int, size: int) -> Iterator[bytes]:
        with gzip.open(path, "rb") as file:
            while offset > 0:
                skipped = len(file.read1(min(offset, HEAD)))
                if not skipped:
                    raise EOFError("it is shorter than the position to resume from")
                offset -= skipped
            while data := file.read1(size):
                yield data

    source = Source(spec, [Part(path.stem, None, pieces)], identity=str(path.stat().st_size))
    next(source.read(size=1))
    return source


def _pipe(name: str, stream: Callable[[], BinaryIO]) -> Source:
    def pieces(offset: int, size: int) -> Iterator[bytes]:
        pipe = stream()
        read = getattr(pipe, "read1", pipe.read)
        while offset > 0:
            skipped = len(read(min(offset, HEAD)))
            if not skipped:
                raise StreamError(f"{name} ended {offset} bytes before the position to resume from.")
            offset -= skipped
        while data := read(size):
            yield data

    return Source(name, [Part(name, None, pieces)], replayable=False)


def _directory(spec: str, path: Path) -> Source:
    def refuse(error: OSError) -> None:
        raise error

    files = [Path(folder, name) for folder, _, names in os.walk(path, onerror=refuse) for name in names]
    sized: dict[str, list[tuple[Path, int]]] = {}
    for file in sorted((f for f in files if f.is_file()), key=lambda f: f.relative_to(path).parts):
        with file.open("rb") as opened:
            length = os.fstat(opened.fileno()).st_size
        if length:
            sized.setdefault(file.relative_to(path).parts[0], []).append((file, length))
    if not sized:
        raise StreamError(f"{spec} is empty: no file in this directory has a byte to learn from.")
    parts: list[Part] = []
    tails: dict[str, list[tuple[Path, int, int]]] = {}
    for domain, members in sized.items():
        left = min(HELD_BACK, sum(length for _, length in members) // 10)
        kept: list[Part] = []
        for file, length in reversed(members):
            tail = min(left, length)
            left -= tail
            if tail:
                tails.setdefault(domain, []).insert(0, (file, length - tail, tail))
            if length > tail:
                kept.insert(0, _file_part(domain, file, length - tail))
        parts += kept

    def held_back() -> dict[str, bytes]:
        return {d: b"".join(_stretch(*tail) for tail in stretches) for d, stretches in tails.items()}

    return Source(spec, parts, held_back)


def _stretch(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)
