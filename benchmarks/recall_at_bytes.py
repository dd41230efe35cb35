"""Multi-query recall by memories that hold the same number of bytes.

    OMP_NUM_THREADS=1 python benchmarks/recall_at_bytes.py --picture recall.png           # the table of the docs
    OMP_NUM_THREADS=1 python benchmarks/recall_at_bytes.py --only gla mamba2 --bytes 8192 --rates 3e-3 --seeds 0
    python benchmarks/recall_at_bytes.py --table runs.jsonl --picture recall.png          # of what was printed before

Two layers, fresh sequences in every batch: `--pairs` keys, each bound `--times` times to a value, in random order,
then each key again, whose latest value is the answer. Each memory gets the arguments, of those in `SIZES`, with which
a stack of two comes nearest to the bytes asked for. All have the same width, optimiser and batches, no channel mixers
(as in Zoology, arXiv:2312.04927; `--mixers` adds them) and no convolution: a key and its value are one token
(`--apart --times 1` makes them two), so that no layer need look back to find the pair. Of `--rates` each memory takes
the one with which it recalls most after the first seed. Softmax attention, whose state grows, is there for comparison.
A row is printed as JSON as soon as it is measured; the table at the end gives means over the seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from remanence import state
from remanence.evaluation.benchmarks.picture import draw
from remanence.evaluation.benchmarks.tasks import Rebound, Recall
from remanence.evaluation.benchmarks.training import Entry, run_benchmark
from remanence.memory import make

HEADS = {"heads": (1, 2, 4, 8, 16, 32)}
DELTA = {**HEADS, "conv": (1,)}
SIZES: dict[str, dict[str, tuple[Any, ...]]] = {
    "softmax": {"heads": (2,)},
    "kimi-delta": DELTA,
    "gated-deltanet": {**DELTA, "expand_v": (1,)},
    "deltanet": DELTA,
    "mamba2": {"expand": (1,), "head_dim": (8,), "state_size": tuple(range(1, 65)), "conv": (1,)},
    "gla": HEADS,
    "hgrn2": HEADS,
    "rwkv6": HEADS,
    "retnet": HEADS,
    "linear-attention": HEADS,
    "gsa": {"heads": (1, 2, 4), "slots": tuple(range(2, 65))},
    "mamba": {"width": (64,), "states": tuple(range(1, 65)), "conv": (1,)},
    "sliding-window": {"heads": (2,), "window": tuple(range(2, 130))},
    "hgrn": {},
}
ONCE = ("softmax", "hgrn")
"""Those whose state has one size: they are measured at the first of the sizes only."""
SHOWN = ("softmax", "gated-deltanet", "deltanet", "mamba2", "gla", "retnet", "linear-attention", "mamba", "hgrn")


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


def measure(given: argparse.Namespace, name: str, wanted: int) -> Iterator[dict[str, Any]]:
    """A row per run: each rate with the first seed, then the best of them with the others."""
    asked = (given.pairs, given.pause, given.symbols)
    task = {"mqar": Recall(*asked, not given.apart) if given.times == 1 else Rebound(*asked, given.times)}
    sized = entry(name, wanted, given.dim, 2)

    def run(seed: int, rate: float) -> dict[str, Any]:
        how = {"steps": given.steps, "batch": given.batch, "rate": rate}
        (row,) = run_benchmark(task, [sized], seed=seed, dim=given.dim, mixers=given.mixers, **how)
        return {"wanted_bytes": wanted, "seed": seed, **how} | row

    first, *others = given.seeds
    tried = []
    for rate in given.rates:
        tried.append(run(first, rate))
        yield tried[-1]
    best = max(tried, key=lambda row: row["accuracy"])["rate"]
    for seed in others:
        yield run(seed, best)


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each memory at each size and number of steps, at the rate with most seeds (of several, the best): the means."""
    groups: dict[tuple[int, str, int], dict[float, list[dict[str, Any]]]] = {}
    for row in rows:
        rates = groups.setdefault((row["wanted_bytes"], row["memory"], row["steps"]), {})
        rates.setdefault(row["rate"], []).append(row)
    merged = []
    for by_rate in groups.values():
        group = max(by_rate.values(), key=lambda own: (len(own), fmean(row["accuracy"] for row in own)))
        shares = [row["accuracy"] for row in group]
        averages = {name: fmean(row[name] for row in group) for name in ("accuracy", "longer", "loss")}
        merged.append(group[0] | averages | {"shares": shares})
    return merged


def show(rows: list[dict[str, Any]]) -> None:
    """The means as a table, best first within a size."""
    print("\n| memory | bytes | rate | recalled | of seeds | twice the pairs | loss, bits |")
    print("|---|---:|---:|---:|---|---:|---:|")
    for row in sorted(means(rows), key=lambda row: (row["wanted_bytes"], -row["accuracy"])):
        seeds = ", ".join(f"{share:.3f}" for share in row["shares"])
        cells = [row["memory"], f"{row['state_bytes']:,}", f"{row['rate']:g}", f"{row['accuracy']:.3f}", seeds]
        print("| " + " | ".join([*cells, f"{row['longer']:.3f}", f"{row['loss']:.2f}"]) + " |")


def picture(rows: list[dict[str, Any]], path: str, title: str) -> None:
    shown = ("task", "memory", "accuracy", "longer", "loss", "chance", "state_bytes", "parameters", "seconds")
    draw([{name: row[name] for name in shown} for row in means(rows)], path, title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, nargs="+", default=[8192, 16384], help="of state, all layers together")
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SHOWN), metavar="MEMORY")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--symbols", type=int, default=16)
    parser.add_argument("--times", type=int, default=2, help="how often each key is bound")
    parser.add_argument("--pause", type=int, default=0)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 5e-3])
    parser.add_argument("--mixers", action="store_true", help="a channel mixer after each memory")
    parser.add_argument("--apart", action="store_true", help="a key and its value are two tokens (with --times 1)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--picture", help="write this picture at the end")
    parser.add_argument("--table", type=Path, nargs="+", help="read rows from these files, and train nothing")
    given = parser.parse_args()
    if given.apart and given.times != 1:
        parser.error("--apart needs --times 1")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if given.table:
        lines = [line for path in given.table for line in path.read_text().splitlines()]
        rows = [json.loads(line) for line in lines if line.startswith("{")]
    else:
        for wanted, name in itertools.product(given.bytes, given.only):
            if name in ONCE and wanted != given.bytes[0]:
                continue
            for row in measure(given, name, wanted):
                rows.append(row)
                print(json.dumps(row), flush=True)
    show(rows)
    if given.picture:
        picture(rows, given.picture, "recall at equal bytes of state, two layers")


if __name__ == "__main__":
    main()
