"""A million tokens, read by every memory that learns at test time: time per token, state and peak memory.

    python benchmarks/million.py [--tokens 1000000] [--width 64] [--piece 4096] [--memory NAME ...]

Each memory reads random tokens at batch 1 in long pieces, without gradients, on one thread, in a process of its own.
Times are processor time, the least over the pieces of the first and of the last tenth; a ratio of about 1 is flat.
The last but one column is by how much the process's peak memory grew after the first tenth was read. Memories
that grow by declaration read a hundredth, in pieces of 256; their cards say why they grow.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from remanence import catalogue
from remanence.memory import make
from remanence.state import nbytes

SETTINGS = {
    "atlas++": {"expand": 2},
    "hope": {"chunk_size": 64, "maker_chunk_size": 256},
    "self-modifying-titans": {"chunk_size": 64, "maker_chunk_size": 256},
}
"""Smaller members of the dearest memories, so that each takes a few minutes."""


def peak() -> float:
    """The most memory that this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def read(name: str, width: int, tokens: int, piece: int) -> str:
    """A row of the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    memory, g = make(name, width, **SETTINGS.get(name, {})).eval(), torch.Generator().manual_seed(0)
    y, state = memory(torch.randn(1, piece, width, generator=g))  # kernels are compiled before the clock starts
    pieces = max(20, -(-tokens // piece))
    tenth, state, spent, then, bytes_then = pieces // 10, memory.initial_state(1), [], 0.0, 0
    for i in range(pieces):
        x = torch.randn(1, piece, width, generator=g)
        begun = time.process_time()
        y, state = memory(x, state)
        spent.append((time.process_time() - begun) / piece * 1e6)
        if i + 1 == tenth:
            then, bytes_then = peak(), nbytes(state)
    first, last = min(spent[:tenth]), min(spent[-tenth:])
    size = nbytes(state)
    told = "".join(f", {what}={value}" for what, value in SETTINGS.get(name, {}).items())
    cells = [f"`{name}`{told}", f"{pieces * piece:,}", f"{first:.1f}", f"{last:.1f}", f"{last / first:.2f}"]
    cells.append(f"{size:,}" if size == bytes_then else f"{bytes_then:,} to {size:,}")
    cells += [f"{peak() - then:+.1f}", "yes" if bool(y.isfinite().all()) else "NO"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    family = {name: c for name, c in catalogue.cards("memory").items() if c.system.family == "ttm"}
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--tokens", type=int, default=1_000_000)
    ask.add_argument("--width", type=int, default=64)
    ask.add_argument("--piece", type=int, default=4096)
    ask.add_argument("--memory", nargs="+", help="only these", default=[*family])
    given = ask.parse_args()
    print("| memory | tokens | µs per token, first tenth | last tenth | ratio | state bytes | peak grew, MB | finite |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as alone:
        for name in given.memory:
            grows = catalogue.find(name, "memory").exempt.get("constant state")
            tokens = given.tokens // 100 if grows else given.tokens
            row = alone.submit(read, name, given.width, tokens, given.piece if not grows else 256).result()
            print(row, flush=True)


if __name__ == "__main__":
    main()
