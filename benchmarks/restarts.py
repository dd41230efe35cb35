"""Exact restart: kill a run with SIGKILL at random moments, resume it each time, compare with one that ran through.

python benchmarks/restarts.py [--kills N] [--bytes N]        (default: 20 kills, 400 kB, small model)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from remanence import learn
from remanence.learning import checkpoint

CLOCK = ("seconds", "bytes_per_second", "peak_rss_bytes")
"""What the machine decides, not the run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--bytes", type=int, default=400_000)
    asked = parser.parse_args()
    settings: dict[str, Any] = {"size": "small", "bytes": asked.bytes, "strategy": "replay,ewc"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["remanence.api"])
    chance, kills = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        seconds = learn("builtin:mixed", whole, **settings)["seconds"]
        while kills < asked.kills:
            options = settings | {"resume": (killed / "run.json").exists(), "checkpoint_seconds": 0.2}
            process = context.Process(target=learn, args=("builtin:mixed", killed), kwargs=options)
            before, began = _position(killed), time.monotonic()
            process.start()
            # at first it loads: the clock of the kill starts when it writes or a moment has passed
            process.join(1.0 + chance.random() * 2 * seconds / asked.kills)
            if not process.is_alive():
                break
            process.kill()
            process.join()
            kills += 1
            print(f"kill {kills:>2} after {time.monotonic() - began:.1f} s, from byte {before:,}", flush=True)
        learn("builtin:mixed", killed, resume=True, **settings)
        same = _weights(whole, killed) and _summary(whole) == _summary(killed)
    print(f"{kills} kills: final weights and summary {'equal, bit for bit' if same else 'DIFFER'}")
    raise SystemExit(not same)


def _position(run: Path) -> int:
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    try:
        return json.loads(lines[-1])["bytes"]
    except (IndexError, ValueError):
        return 0


def _weights(*runs: Path) -> bool:
    one, two = (checkpoint.read(run / "checkpoint.safetensors")["learner"] for run in runs)
    found: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    for tree, tensors in zip((one, two), found, strict=True):
        checkpoint.pack(tree, tensors)
    return found[0].keys() == found[1].keys() and all(torch.equal(t, found[1][name]) for name, t in found[0].items())


def _summary(run: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads((run / "summary.json").read_text()).items() if k not in CLOCK}


if __name__ == "__main__":
    main()
