"""Multi-query recall by memories that hold the same number of bytes.

    OMP_NUM_THREADS=1 python benchmarks/recall_at_bytes.py --picture recall.png           # the table of the docs
    OMP_NUM_THREADS=1 python benchmarks/recall_at_bytes.py --only gla mamba2 --bytes 8192 --dim 64 --steps 300
    python benchmarks/recall_at_bytes.py --table runs.jsonl --picture recall.png          # of what was printed before

Two layers, fresh sequences in every batch: `--pairs` keys, each bound `--times` times to a value, a pause, then each
key again, whose latest value is the answer. Each memory gets the arguments, of those in `SIZES`, with which a stack
of two comes nearest to the bytes asked for. All have the same width, channel mixers, optimiser, rate and batches, and
none a convolution: a key and its value are one token (`--apart --times 1` makes them two), so that no layer need look
back to find the pair. Softmax attention, whose state grows, is there for comparison. A row is printed as JSON as soon
as it is measured; the table at the end gives means over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.nn.functional import one_hot

from remanence import state
from remanence.evaluation.benchmarks.picture import draw
from remanence.evaluation.benchmarks.tasks import Batch, Recall
from remanence.evaluation.benchmarks.training import Entry, run_benchmark
from remanence.memory import make

HEADS = {"heads": (1, 2, 4, 8, 16, 32)}
DELTA = {**HEADS, "conv": (1,)}
SIZES: dict[str, dict[str, tuple[Any, ...]]] = {
    "softmax": {"heads": (2,)},
    "kimi-delta": DELTA,
    "gated-deltanet": {**DELTA, "expand_v": (1,)},
    "deltanet": DELTA,
    "mamba2": {"expand": (1,), "state_size": tuple(range(1, 65)), "conv": (1,)},
    "gla": HEADS,
    "hgrn2": HEADS,
    "rwkv6": HEADS,
    "retnet": HEADS,
    "linear-attention": HEADS,
    "gsa": {"heads": (1, 2, 4), "slots": tuple(range(2, 65))},
    "mamba": {"width": (32, 64), "states": tuple(range(1, 65)), "conv": (1,)},
    "sliding-window": {"heads": (2,), "window": tuple(range(2, 130))},
    "hgrn": {},
}
ONCE = ("softmax", "hgrn")
"""Those whose state has one size: they are measured at the first of the sizes only."""
SHOWN = ("softmax", "gated-deltanet", "deltanet", "mamba2", "gla", "retnet", "linear-attention")


@dataclass(frozen=True)
class Rebound(Recall):
    """`Recall` in which each key is bound `times` times, in random order, and asked for its latest value.

    Key and value are one token. `chance` is that of who knows all values of the key, and not which came last.
    """

    times: int = 2

    @property
    def chance(self) -> float:
        return 1 / self.times

    def draw(self, batch: int, generator: torch.Generator) -> Batch:
        def shuffled(many: int) -> torch.Tensor:
            return torch.rand(batch, many, generator=generator).argsort(1)

        told = self.times * self.pairs
        keys, which = shuffled(self.symbols)[:, : self.pairs], shuffled(told) % self.pairs
        values = torch.randint(self.symbols, (batch, told), generator=generator) + self.symbols
        latest = torch.zeros_like(keys).scatter_reduce(1, which, torch.arange(told).expand_as(which), "amax")
        order = shuffled(self.pairs)
        pause = torch.full((batch, self.pause), 2 * self.symbols)
        first = torch.cat([keys.gather(1, which), pause, keys.gather(1, order)], 1)
        inputs = one_hot(first, self.vocabulary).float()
        inputs[:, :told] += one_hot(values, self.vocabulary)
        targets = torch.zeros_like(first)
        targets[:, -self.pairs :] = values.gather(1, latest.gather(1, order))
        mask = (torch.arange(first.shape[1]) >= told + self.pause).expand_as(first)
        return Batch(inputs, targets, mask)


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


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of each memory at each size and number of steps, their seeds averaged, with the extremes."""
    groups: dict[tuple[int, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["wanted_bytes"], row["memory"], row["steps"]), []).append(row)
    merged = []
    for group in groups.values():
        shares = [row["accuracy"] for row in group]
        averages = {name: fmean(row[name] for row in group) for name in ("accuracy", "longer", "loss")}
        merged.append(group[0] | averages | {"least": min(shares), "most": max(shares), "seeds": len(group)})
    return merged


def show(rows: list[dict[str, Any]]) -> None:
    """The means as a table, best first within a size."""
    print("\n| memory | bytes | steps | recalled | least to most | loss, bits | seeds |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in sorted(means(rows), key=lambda row: (row["wanted_bytes"], -row["accuracy"])):
        spread = f"{row['least']:.2f}–{row['most']:.2f}"
        cells = [row["memory"], f"{row['state_bytes']:,}", str(row["steps"]), f"{row['accuracy']:.3f}", spread]
        print("| " + " | ".join([*cells, f"{row['loss']:.2f}", str(row["seeds"])]) + " |")


def picture(rows: list[dict[str, Any]], path: str, title: str) -> None:
    shown = ("task", "memory", "accuracy", "longer", "loss", "chance", "state_bytes", "parameters", "seconds")
    draw([{name: row[name] for name in shown} for row in means(rows)], path, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, nargs="+", default=[4096, 8192], help="of state, all layers together")
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SHOWN), metavar="MEMORY")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--symbols", type=int, default=16)
    parser.add_argument("--times", type=int, default=2, help="how often each key is bound")
    parser.add_argument("--pause", type=int, default=0)
    parser.add_argument("--rate", type=float, default=7e-3)
    parser.add_argument("--apart", action="store_true", help="a key and its value are two tokens (with --times 1)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--picture", help="write this picture at the end")
    parser.add_argument("--table", type=Path, help="read rows from this file, and train nothing")
    given = parser.parse_args()
    if given.apart and given.times != 1:
        parser.error("--apart needs --times 1")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if given.table:
        rows = [json.loads(line) for line in given.table.read_text().splitlines() if line.startswith("{")]
    else:
        asked = (given.pairs, given.pause, given.symbols)
        task = {"mqar": Recall(*asked, not given.apart) if given.times == 1 else Rebound(*asked, True, given.times)}
        how = {"steps": given.steps, "batch": given.batch, "rate": given.rate, "dim": given.dim}
        for seed, wanted, name in itertools.product(given.seeds, given.bytes, given.only):
            if name in ONCE and wanted != given.bytes[0]:
                continue
            (row,) = run_benchmark(task, [entry(name, wanted, given.dim, 2)], seed=seed, **how)
            rows.append({"wanted_bytes": wanted, "seed": seed, "steps": given.steps} | row)
            print(json.dumps(rows[-1]), flush=True)
    show(rows)
    if given.picture:
        picture(rows, given.picture, "recall at equal bytes of state, two layers")


if __name__ == "__main__":
    main()
