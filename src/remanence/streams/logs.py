"""Server logs that are generated: as repetitive, nested and skewed as real ones, with the odd lines known."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import accumulate

PAGES = ("/", "/search", "/cart", "/checkout", "/account", "/help", "/static/app.js", "/static/site.css", "/health")
ITEMS = ("lamp", "kettle", "chair", "atlas", "radio", "compass", "teapot", "ladder", "blanket", "clock")
AGENTS = ("Firefox/128.0", "Chrome/126.0", "Safari/17.5", "curl/8.5.0", "Googlebot/2.1")
TABLES = ("orders", "sessions", "stock", "prices", "users")
WORKERS = ("mailer", "indexer", "thumbnails", "billing")
KNOWN_FAULT = (
    "Traceback (most recent call last):",
    '  File "/srv/shop/handlers.py", line 212, in dispatch',
    "    response = view(request, **route.arguments)",
    '  File "/srv/shop/views/{table}.py", line {number}, in show',
    "    row = {table}.fetch(request.key)",
    "shop.errors.StaleRow: {table} {key} was changed by another session",
)


@dataclass(frozen=True)
class Event:
    """One line of the log, without its line end; `anomaly` names what is odd about it, None for an ordinary line."""

    line: str
    anomaly: str | None = None


def events(seed: int = 0, anomaly_rate: float = 0.002) -> Iterator[Event]:
    """Log lines without end, the same for the same arguments on one Python version.

    Clients are drawn from a Zipf law and browse in sessions; latencies are log-normal; workers report regularly; a
    known fault throws the same stack trace about once in 400 requests, which is ordinary. Before each request, with
    probability `anomaly_rate` in [0, 1], one of six anomalies occurs: its lines carry its name in `Event.anomaly`.
    """
    chance = random.Random(seed)
    clients = [f"{chance.randint(11, 220)}.{chance.randrange(256)}.{chance.randrange(256)}.7" for _ in range(400)]
    zipf = list(accumulate(1 / rank for rank in range(1, len(clients) + 1)))
    clock, request, sessions = datetime(2024, 3, 4, 6, 0, 0), 48210, dict[str, str]()
    while True:
        clock += timedelta(milliseconds=chance.expovariate(1 / 180))
        request += 1
        client = chance.choices(clients, cum_weights=zipf)[0]
        if client not in sessions or chance.random() < 0.05:
            sessions[client] = f"{chance.getrandbits(32):08x}"
        stamp = f"{clock:%Y-%m-%d %H:%M:%S}.{clock.microsecond // 1000:03d}"
        if chance.random() < anomaly_rate:
            name = chance.choice(sorted(ANOMALIES))
            yield from (Event(line, name) for line in ANOMALIES[name](chance, stamp, client, request))
        lines = _visit(chance, stamp, client, sessions[client], request)
        yield from (Event(line) for line in lines)


def encoded(seed: int = 0, size: int = 65536) -> Iterator[bytes]:
    """The lines of `events(seed)` as UTF-8, each ended by a line feed, in pieces of about `size` bytes, without end."""
    kept: list[str] = []
    length = 0
    for event in events(seed):
        kept.append(event.line)
        length += len(event.line) + 1
        if length >= size:
            yield ("\n".join(kept) + "\n").encode()
            kept, length = [], 0


def _visit(chance: random.Random, stamp: str, client: str, session: str, request: int) -> Iterator[str]:
    draw = chance.random()
    if draw < 0.06:
        worker, table = chance.choice(WORKERS), chance.choice(TABLES)
        took = chance.lognormvariate(3, 0.5)
        yield f"{stamp} INFO  worker.{worker} done rows={chance.randrange(20, 400)} table={table} took={took:.1f}ms"
    if 0.06 < draw < 0.075:
        used = chance.randint(41, 46)
        yield f"{stamp} DEBUG gc.heap used={used}% pause={chance.lognormvariate(0.5, 0.3):.2f}ms generation=2"
    page = chance.choices(PAGES, weights=(30, 25, 12, 5, 6, 3, 20, 18, 10))[0]
    item = chance.choices(ITEMS, weights=range(len(ITEMS), 0, -1))[0]
    method = "POST" if page in ("/cart", "/checkout") else "GET"
    target = {"/search": f"/search?q={item}", "/cart": f"/cart/add?item={item}"}.get(page, page)
    status = chance.choices((200, 304, 404), weights=(90, 8, 2))[0]
    took = chance.lognormvariate(2.6, 0.6)
    sent = 40 * _sum_of(target) % 30011 if method == "GET" and "?" not in target else chance.randrange(180, 9000)
    yield (
        f'{stamp} INFO  access {client} "{method} {target}" {status} {sent}B {took:.1f}ms '
        f"session={session} request={request:06d} agent={AGENTS[_sum_of(client) % len(AGENTS)]}"
    )
    if page == "/checkout" and status == 200:
        total = chance.randrange(900, 30000) / 100
        yield f"{stamp} INFO  orders order={request * 7 % 100000:05d} session={session} items=1 total={total:.2f} EUR"
    if draw > 0.9975:
        table, key = chance.choice(TABLES), chance.randrange(10000)
        yield f"{stamp} ERROR request={request:06d} failed"
        yield from (line.format(table=table, key=key, number=40 + len(table)) for line in KNOWN_FAULT)


def _sum_of(text: str) -> int:
    """A small number that depends on the text alone, unlike `hash`, which Python salts at each start."""
    return sum(text.encode())


def _slow(chance: random.Random, stamp: str, client: str, request: int) -> Iterator[str]:
    for table in chance.sample(TABLES, 3):
        yield f"{stamp} WARN  db.pool waited {chance.randint(8000, 30000)}ms for a connection, table={table} queue=128"


def _probe(chance: random.Random, stamp: str, client: str, request: int) -> Iterator[str]:
    path = chance.choice(("/../../etc/passwd", "/search?q=%27%20OR%201%3D1--", "/.git/config", "/wp-login.php"))
    yield f'{stamp} INFO  access {client} "GET {path}" 404 162B 0.9ms session=- request={request:06d} agent=zgrab/0.x'


def _guessing(chance: random.Random, stamp: str, client: str, request: int) -> Iterator[str]:
    for user in chance.sample(("root", "admin", "backup", "oracle", "test", "guest"), 4):
        yield f"{stamp} WARN  auth.login refused user={user} from={client} reason=bad-password"


def _disk(chance: random.Random, stamp: str, client: str, request: int) -> Iterator[str]:
    yield f"{stamp} ERROR store.write [Errno 28] No space left on device: '/var/lib/shop/{chance.choice(TABLES)}.wal'"


def _fault(chance: random.Random, stamp: str, client: str, request: int) -> Iterator[str]:
    yield f"{stamp} ERROR request={request:06d} failed"
    yield "Traceback (most recent call last):"
    yield f'  File "/srv/shop/tax.py", line {chance.randint(10, 99)}, in rate_for'
    yield f"    return RATES[country.{chance.choice(('upper', 'strip', 'casefold'))}()]"
    yield f"KeyError: {chance.choice(('XK', 'AQ', 'EH', 'ZZ'))!r}"


def _clock(chance: random.Random, stamp: str, client: str, request: int) -> Iterator[str]:
    yield f"1970-01-01 00:00:00.000 CRIT  ntp.sync offset=-{chance.getrandbits(40)}us unsynchronised, stepping"


ANOMALIES = {
    "disk-full": _disk,
    "clock-step": _clock,
    "new-fault": _fault,
    "password-guessing": _guessing,
    "probe": _probe,
    "pool-exhausted": _slow,
}
