"""Constant memory: bytes of state, kept bytes and process memory along a long stream, small model.

python benchmarks/constant_memory.py [--bytes N]        (default: 20 MB of generated logs)
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from remanence import learn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=20_000_000)
    asked = parser.parse_args()
    seen: list[dict[str, Any]] = []
    every = asked.bytes // 20

    def note(entry: dict[str, Any]) -> None:
        if not seen or entry["bytes"] - seen[-1]["bytes"] >= every or entry["bytes"] == asked.bytes:
            seen.append(entry)
            row = [entry[k] for k in ("bytes", "state_bytes", "kept_bytes", "rss_bytes")]
            print("".join(f"{v:>14,}" for v in row), flush=True)

    print("".join(f"{name:>14}" for name in ("bytes", "state", "kept", "process")))
    with tempfile.TemporaryDirectory() as folder:
        learn("builtin:logs", Path(folder, "run"), size="small", bytes=asked.bytes, on_progress=note)
    after = next(e for e in seen if e["bytes"] >= 1_000_000 or e is seen[-1])
    grown = seen[-1]["rss_bytes"] - after["rss_bytes"]
    print(f"process memory from {after['bytes']:,} to {seen[-1]['bytes']:,} bytes: {grown / 1e6:+.1f} MB")


if __name__ == "__main__":
    main()
