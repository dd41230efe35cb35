"""Which memory should be `learn`'s default? The main job with each of them: bits per byte, and processor time.

    OMP_NUM_THREADS=1 python benchmarks/choose_default.py                    # all candidates, a short stream
    OMP_NUM_THREADS=1 python benchmarks/choose_default.py --streams builtin:mixed:60000 --memories hgrn gla
    OMP_NUM_THREADS=1 python benchmarks/choose_default.py --table runs.jsonl # what was printed before, as a table

Every memory gets the network that `learn --memory NAME` makes: the same width, the arguments, optimiser, strategy and
counts of `learn`. Each runs in a process of its own, whose first two segments, on another learner, are for compiling.
Rows are printed as JSON as they come, and a table at the end.

Speed is in bytes per second of processor time, the counts' included, so that other work on the machine does not decide.
"saved" is what the network is worth: bits taken off the counts alone, per second of processor time that it costs
beyond them. A star marks the front: no other memory of the table needs fewer bits and is as fast.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from remanence.api import SIZES, Settings, _segments
from remanence.catalogue import cards
from remanence.errors import RemanenceError
from remanence.models.counting import CountingModel
from remanence.streams import open_source

COUNTS = "counts alone"
CANDIDATES = (
    *("gated-deltanet", "kimi-delta", "deltanet", "gla", "hgrn2", "retnet", "mamba2", "xlstm-7b", "rwkv6", "rwkv7"),
    *("griffin", "hgrn", "min-lstm-gru", "gsa", "titans", "yaad", "dla", "omeganet", "ttt", "mesa"),
)


def count(source: str) -> dict[str, Any]:
    """The counts without a network."""
    data = np.frombuffer(b"".join(segment.data for segment in open_source(source).read()), np.uint8)
    CountingModel().observe(data[:64])
    counts, began = CountingModel(), time.process_time()
    bits = counts.observe(data).mean()
    return {"bits": float(bits), "alone": math.nan, "cpu_seconds": time.process_time() - began, "bytes": len(data)}


def run(source: str, memory: str) -> dict[str, Any]:
    """The job of `learn`, without its reports and checkpoints."""
    torch.set_num_threads(1)
    settings, segment = Settings(source, memory), SIZES["default"]["segment"]
    read = list(_segments(open_source(source), 0, segment))
    warm = settings.learner()
    for piece, domain in read[:2]:
        warm.observe(_tokens(piece), domain)
    del warm
    learner, logits = settings.learner(), []
    learner.model.register_forward_hook(lambda _, __, out: logits.append(out[0].detach()))
    bits = alone = seconds = 0.0
    before = read[0][1]
    for piece, domain in read:
        tokens, began = _tokens(piece), time.process_time()
        if domain != before:
            learner.boundary(before)
        bits += float(learner.observe(tokens, domain).bits.sum())
        seconds += time.process_time() - began
        alone += float(F.cross_entropy(logits[0][0], tokens[0], reduction="sum")) / math.log(2)
        logits.clear()
        before = domain
    total = sum(len(piece) for piece, _ in read)
    return {
        "bits": bits / total,
        "alone": alone / total,
        "cpu_seconds": seconds,
        "bytes": total,
        "state_bytes": learner.state_bytes,
        "parameters": learner.parameters,
    }


def measure(source: str, memory: str) -> dict[str, Any]:
    """A row of the table."""
    row = {"stream": source, "memory": memory} | (count(source) if memory == COUNTS else run(source, memory))
    return row | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _tokens(piece: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(piece, np.uint8).astype(np.int64))[None]


def table(rows: list[dict[str, Any]]) -> None:
    """A table per stream, fewest bits first."""
    for stream in dict.fromkeys(row["stream"] for row in rows):
        own = sorted((row for row in rows if row["stream"] == stream), key=lambda row: row["bits"])
        base = next(row for row in own if row["memory"] == COUNTS)
        fastest = math.inf
        print(f"\n`{stream}`, {base['bytes']:,} bytes\n")
        print("| memory | bits/byte | network alone | kB per CPU s | saved per s | parameters | state, kB | peak, MB |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|")
        for row in own:
            star, seconds = " *" if row["cpu_seconds"] < fastest else "", row["cpu_seconds"]
            fastest = min(fastest, seconds)
            cells = [f"{row['memory']}{star}", f"{row['bits']:.4f}", "", f"{row['bytes'] / seconds / 1000:.2f}"]
            if row["memory"] == COUNTS:
                cells += ["", "", "", f"{row['peak_bytes'] / 1e6:.0f}"]
            else:
                cells[2] = f"{row['alone']:.3f}"
                saved = (base["bits"] - row["bits"]) * row["bytes"] / (seconds - base["cpu_seconds"])
                cells += [f"{saved:.0f}", f"{row['parameters']:,}", f"{row['state_bytes'] / 1000:.0f}"]
                cells += [f"{row['peak_bytes'] / 1e6:.0f}"]
            print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memories", nargs="+", default=list(CANDIDATES), metavar="PATTERN")
    parser.add_argument("--streams", nargs="+", default=["builtin:mixed:12000"], metavar="SOURCE")
    parser.add_argument("--table", type=Path, help="read rows from this file, and run nothing")
    given = parser.parse_args()
    if given.table:
        table([json.loads(line) for line in given.table.read_text().splitlines() if line.startswith("{")])
        return
    rows = []
    cards("memory")
    # a fresh process for each row, for its peak of memory; forked, so that all has been imported once, here
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for source in given.streams:
            for memory in [COUNTS, *given.memories]:
                try:
                    rows.append(pool.apply(measure, (source, memory)))
                except RemanenceError as error:
                    print(f"{memory}: {error}", file=sys.stderr, flush=True)
                else:
                    print(json.dumps(rows[-1]), flush=True)
    table(rows)


if __name__ == "__main__":
    main()
