"""Microseconds per token and state bytes of every memory, after more and more tokens have been read.

    python benchmarks/decoding.py [--long] [--width 512] [--threads 1] [--memory NAME ...]

*Products* is the time of the layer's own vector-matrix products alone, one after another, and × how many times as
long the first step takes. *Last / first* is the ratio of the last time to the first: about 1 is flat. Each time is the
least of several runs of one-token steps, without gradients, at batch 1; runs at different lengths take turns, so that a
change of the machine's load does not look like a change with length.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch

from remanence import catalogue
from remanence.memory import Memory, make
from remanence.memory.parts import Derived
from remanence.state import State, fork, nbytes

CHUNK = 2048


def read(memory: Memory, state: State, tokens: int, source: torch.Generator) -> State:
    """The state after `tokens` more, read in long pieces."""
    for start in range(0, tokens, CHUNK):
        state = memory(torch.randn(1, min(CHUNK, tokens - start), memory.dim, generator=source), state)[1]
    return fork(state)


def microseconds(memory: Memory, state: State, steps: int) -> float:
    """Of one step, averaged over `steps` that follow each other."""
    x = torch.randn(steps, 1, 1, memory.dim)
    begun = time.perf_counter()
    for token in x:
        _, state = memory(token, state)
    return (time.perf_counter() - begun) / steps * 1e6


Maps = list[tuple[torch.Tensor, torch.Tensor]]


def products(memory: Memory) -> Maps:
    """The layer's matrices that every token meets, each with a vector for it; those of blocks are [blocks, in, out].

    Of complex ones, real and imaginary parts, an axis of two, stand side by side. Of what a layer derives from its
    parameters those are counted that are matrices of one state each, [states, N, N]: dense transitions.
    """
    maps = {id(m.weight): m.weight for m in memory.modules() if isinstance(m, torch.nn.Linear)}
    for p in memory.parameters():
        pair = p.ndim == 3 and 2 in p.shape[1:]
        matrix = p.flatten(0, 1) if pair and p.shape[1] == 2 else p.flatten(1) if pair else p
        if matrix.ndim in (2, 3) and min(matrix.shape[-2:]) >= 32:
            maps[id(p)] = matrix
    for m in memory.modules():
        for derived in vars(m).values():
            made = derived.made if isinstance(derived, Derived) else None
            for part in made if isinstance(made, tuple) else (made,):
                if isinstance(part, torch.Tensor) and part.ndim == 3 and part.shape[1] == part.shape[2]:
                    maps[id(part)] = part
    return [
        (w.detach(), torch.randn(1, w.shape[1]) if w.ndim == 2 else w.new_ones(w.shape[0], 1, w.shape[1]))
        for w in maps.values()
    ]


def microseconds_of(maps: Maps, runs: int) -> float:
    begun = time.perf_counter()
    for _ in range(runs):
        for weight, vector in maps:
            if weight.ndim == 2:
                torch.nn.functional.linear(vector, weight)
            else:
                torch.bmm(vector, weight)
    return (time.perf_counter() - begun) / runs * 1e6


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--long", action="store_true", help="read up to a million tokens")
    ask.add_argument("--width", type=int, default=512)
    ask.add_argument("--threads", type=int, default=1)
    ask.add_argument("--steps", type=int, default=50)
    ask.add_argument("--repeats", type=int, default=7)
    ask.add_argument("--memory", nargs="+", help="only these", default=[*catalogue.cards("memory")])
    given = ask.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    marks = [0, 1_000, 100_000] + [1_000_000] * given.long
    print("| memory | " + " | ".join(f"µs at {n:,}" for n in marks) + " | products | × | last / first | state bytes |")
    print("|---|" + "--:|" * (len(marks) + 4))
    for name in given.memory:
        torch.manual_seed(0)
        memory = make(name, given.width)
        source = torch.Generator().manual_seed(0)
        states = [memory.initial_state(1)]
        for before, mark in itertools.pairwise(marks):
            states.append(read(memory, states[-1], mark - before, source))
        microseconds(memory, states[0], 5)
        maps = products(memory)
        microseconds_of(maps, 5)
        runs = [
            [*(microseconds(memory, s, given.steps) for s in states), microseconds_of(maps, given.steps)]
            for _ in range(given.repeats)
        ]
        *times, alone = [min(column) for column in zip(*runs, strict=True)]
        sizes = sorted({nbytes(s) for s in states})
        cells = [f"{t:.0f}" for t in (*times, alone)] + [f"{times[0] / alone:.1f}" if maps else "–"]
        cells += [f"{times[-1] / times[0]:.2f}", " to ".join(f"{n:,}" for n in sizes)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
