"""Multi-query recall by memories that hold the same number of bytes.

    OMP_NUM_THREADS=1 python benchmarks/recall_at_bytes.py                  # all memories, at 4 and at 16 kB
    OMP_NUM_THREADS=1 python benchmarks/recall_at_bytes.py --only gla mamba2 --bytes 4096 --steps 300

Two layers of width 64, 20,000 sequences: `--pairs` keys and values, a pause, then each key again. Each memory gets
the arguments, of those in `SIZES`, with which a stack of two comes nearest to the bytes asked for, its convolution
tails among them. Softmax attention, whose state grows, is there for comparison. A row is printed as soon as it is
measured. With `--together` a key and its value are one token, so that no layer need look back to find the pair.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from typing import Any

from remanence import state
from remanence.evaluation.benchmarks.picture import draw
from remanence.evaluation.benchmarks.tasks import Recall
from remanence.evaluation.benchmarks.training import Entry, run_benchmark
from remanence.memory import make

HEADS = {"heads": (1, 2, 4, 8, 16, 32)}
CONV = {"heads": (1, 2, 4), "head_dim": tuple(range(2, 65, 2))}
SIZES: dict[str, dict[str, tuple[Any, ...]]] = {
    "softmax": {},
    "gated-deltanet": {**CONV, "expand_v": (1,)},
    "kimi-delta": CONV,
    "deltanet": CONV,
    "mamba2": {"expand": (1,), "state_size": tuple(range(1, 65))},
    "mamba": {"width": (64, 128), "states": tuple(range(1, 65))},
    "gla": HEADS,
    "hgrn2": HEADS,
    "gsa": {"heads": (1, 2, 4), "slots": tuple(range(2, 65))},
    "retnet": HEADS,
    "rwkv6": HEADS,
    "linear-attention": HEADS,
    "sliding-window": {"heads": (4,), "window": tuple(range(2, 130))},
    "hgrn": {},
}


def choices(name: str) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*SIZES[name].values()):
        yield dict(zip(SIZES[name], values, strict=True))


def entry(name: str, wanted: int, dim: int, layers: int) -> Entry:
    """The memory's size that comes nearest to `wanted` bytes in all layers together."""

    def miss(arguments: dict[str, Any]) -> float:
        try:
            return abs(layers * state.nbytes(make(name, dim, **arguments).initial_state(1)) - wanted)
        except ValueError:  # heads that do not divide
            return float("inf")

    arguments = min(choices(name), key=miss)
    told = "".join(f" {k}={v}" for k, v in arguments.items())
    return Entry(f"{name}{told}", name, arguments={name: arguments})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, nargs="+", default=[4096, 16384], help="of state, all layers together")
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES), metavar="MEMORY")
    parser.add_argument("--steps", type=int, default=625)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--symbols", type=int, default=32)
    parser.add_argument("--pause", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--together", action="store_true", help="a key and its value are one token")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", help="write this picture at the end")
    given = parser.parse_args()
    task = {"mqar": Recall(given.pairs, given.pause, given.symbols, given.together)}
    rows = []
    for wanted in given.bytes:
        for name in given.only:
            if not SIZES[name] and wanted != given.bytes[0]:
                continue
            one = entry(name, wanted, 64, 2)
            (row,) = run_benchmark(task, [one], steps=given.steps, batch=given.batch, rate=given.rate, seed=given.seed)
            rows.append({"wanted_bytes": wanted} | row)
            print(json.dumps(rows[-1]), flush=True)
    if given.picture:
        draw(rows, given.picture, "recall at bytes")


if __name__ == "__main__":
    main()
