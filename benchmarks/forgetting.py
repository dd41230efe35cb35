"""Forgetting: held-back bits per byte of each domain when it ended and at the end, with and without strategies.

python benchmarks/forgetting.py [--bytes N] [STRATEGY ...]        (default: replay none)
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from remanence import learn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("strategies", nargs="*", default=["replay", "none"])
    parser.add_argument("--source", default="builtin:mixed")
    parser.add_argument("--bytes", type=int)
    asked = parser.parse_args()
    print(f"{'strategy':<10}{'domain':<10}{'when ended':>11}{'at end':>9}{'change':>9}{'worst since':>13}")
    for strategy in asked.strategies:
        with tempfile.TemporaryDirectory() as folder:
            summary = learn(asked.source, Path(folder, "run"), strategy=strategy, bytes=asked.bytes)
        for domain, r in summary["retention"].items():
            if r["when_ended"] is None:
                continue
            change = r["at_end"] - r["when_ended"]
            print(
                f"{strategy:<10}{domain:<10}{r['when_ended']:>11.3f}{r['at_end']:>9.3f}{change:>+9.3f}{r['worst_since']:>13.3f}"
            )
        print(
            f"{strategy:<10}{'stream':<10}{summary['bits_per_byte']:>11.3f} bits per byte at "
            f"{summary['bytes_per_second'] / 1000:.1f} kB/s, {summary['kept_bytes'] / 1e6:.1f} MB kept"
        )


if __name__ == "__main__":
    main()
