"""Streams made from what every CPython has, so that a first run needs no download and no data is shipped.

`prose` is the language reference in `pydoc_data.topics`, without the paragraphs that repeat an earlier one; `source`
is the code of well-known standard library modules; `logs` is generated (see `logs.py`). All are the same bytes
at each run of the same Python version.
"""

from __future__ import annotations

import math
import platform
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path

from remanence.errors import StreamError, nearest
from remanence.streams import logs
from remanence.streams.source import HELD_BACK, Part, Source

PHASE = 160_000
MODULES = """
    argparse ast asyncio/base_events calendar collections/__init__ configparser copy csv dataclasses datetime difflib
    dis doctest email/message enum fractions functools heapq http/client http/server inspect ipaddress json/decoder
    logging/__init__ mailbox multiprocessing/pool optparse os pathlib pdb pickle platform plistlib pydoc random
    selectors shutil smtplib socket ssl statistics subprocess tarfile tempfile textwrap threading tokenize traceback
    turtle typing unittest/mock unittest/case urllib/parse urllib/request uuid weakref xml/dom/minidom zipfile
""".split()  # noqa: SIM905 - sixty names read better as one text
STREAMS = {
    "mixed": (("prose", PHASE), ("source", PHASE), ("logs", PHASE), ("prose", PHASE)),
    "docs-then-source": (("prose", 360_000), ("source", 940_000)),
    "prose": (("prose", 10**6),),
    "source": (("source", 10**7),),
    "logs": (("logs", 20_000_000),),
}
"""Domain and most bytes of each phase, by stream; a phase is shorter where its domain has less text."""
NAMES = tuple(STREAMS)


@cache
def prose() -> bytes:
    """The topics of Python's language reference in the order of their names; later copies of a paragraph left out."""
    try:
        topics = import_module("pydoc_data.topics").topics
    except ImportError:
        raise StreamError("This Python has no pydoc_data, so the built-in prose is missing; give a file.") from None
    paragraphs = chain.from_iterable(re.split(r"\n\n+", topics[name].strip("\n")) for name in sorted(topics))
    return "\n\n".join(dict.fromkeys(paragraphs)).encode()


@cache
def source_code() -> bytes:
    """The code of `MODULES`, in their order; modules that this Python version lacks are left out."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / f"{module}.py" for module in MODULES]
    code = b"".join(file.read_bytes() for file in files if file.is_file())
    if not code:
        raise StreamError(f"This Python has no library sources in {str(library)!r}; give a file.")
    return code


TEXTS = {"prose": prose, "source": source_code}


def builtin(spec: str) -> Source:
    """The built-in stream NAME or NAME:BYTES, BYTES being the length of each phase instead of the default.

    In streams with several domains the text of each domain after its last phase is held back, 8 kB at most and
    at most a tenth of what the domain gives. A domain that comes back goes on where it left off: no byte comes twice.

    Raises: `StreamError` when there is no such stream, BYTES is not a positive number, or this Python was stripped.
    """
    name, _, given = spec.partition(":")
    if name not in STREAMS:
        close = nearest(name, NAMES)
        hint = f"did you mean 'builtin:{close}'?" if close else f"known: {', '.join(NAMES)}."
        raise StreamError(f"There is no built-in stream called {name!r}; {hint}")
    if given and not (given.isdecimal() and int(given) > 0):
        raise StreamError(f"The phase length of builtin:{name} must be a positive number of bytes, got {given!r}.")
    phases = [(domain, int(given or length)) for domain, length in STREAMS[name]]
    domains = [domain for domain, _ in phases]
    parts: list[Part] = []
    held: dict[str, bytes] = {}
    begins = dict.fromkeys(domains, 0)
    for domain, wanted in phases:
        share = 1 / domains.count(domain)
        available = math.inf if domain == "logs" else len(TEXTS[domain]())
        tail = min(HELD_BACK, int(min(wanted / share, available) / 10)) if len(begins) > 1 else 0
        length = int(min(wanted, (available - tail) * share))
        parts.append(_part(domain, begins[domain], length))
        begins[domain] += length
        if tail:
            held[domain] = b"".join(_part(domain, begins[domain], tail).open(0, tail))
    return Source(f"builtin:{spec}", parts, lambda: held, identity=platform.python_version())


def _part(domain: str, begin: int, length: int) -> Part:
    if domain != "logs":
        return Part.of_bytes(domain, TEXTS[domain]()[begin : begin + length])
    return Part(domain, length, lambda offset, size: _generated(begin + offset, length - offset, size))


def _generated(begin: int, length: int, size: int) -> Iterator[bytes]:
    for data in logs.encoded(size=size):
        wanted = data[begin : begin + length]
        begin = max(0, begin - len(data))
        length -= len(wanted)
        if wanted:
            yield wanted
        if not length:
            return
