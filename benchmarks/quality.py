"""Quality of one pass: bits per byte of `learn`, of its counts alone, and of the compressors that are installed.

python benchmarks/quality.py SOURCE ...        (default: builtin:docs-then-source)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from remanence import learn
from remanence.evaluation.metrics import xz_bits_per_byte
from remanence.models.counting import CountingModel
from remanence.streams import open_source

COMPRESSORS = {
    "7z PPMd": ["7z", "a", "-m0=PPMd:mem=256m:o=16", "-bso0", "-bsp0", "{out}", "{data}"],
    "zpaq -m5": ["zpaq", "add", "{out}.zpaq", "{data}", "-m5"],
}


def compressed(command: list[str], data: bytes) -> float | None:
    """Bits per byte under an installed program; None where it is missing."""
    if not shutil.which(command[0]):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data")
        path.write_bytes(data)
        subprocess.run([c.format(out=f"{folder}/out", data=path) for c in command], check=True, capture_output=True)
        archive = next(p for p in Path(folder).iterdir() if p.name.startswith("out"))
        return 8 * archive.stat().st_size / len(data)


def main(sources: list[str]) -> None:
    for source in sources:
        data = b"".join(segment.data for segment in open_source(source).read())
        print(f"\n{source}: {len(data):,} bytes, bits per byte")
        print(f"  {'xz -9e':<22}{xz_bits_per_byte(data):.3f}")
        for name, command in COMPRESSORS.items():
            bits = compressed(command, data)
            print(f"  {name:<22}{f'{bits:.3f}' if bits else 'not installed'}")
        counts = CountingModel()
        counts.observe(b"compiled before the clock starts")
        counts, began = CountingModel(), time.perf_counter()
        bits = counts.observe(np.frombuffer(data, np.uint8)).mean()
        speed = len(data) / (time.perf_counter() - began) / 1000
        print(f"  {'counts alone':<22}{bits:.3f}   {speed:.1f} kB/s")
        with tempfile.TemporaryDirectory() as folder:
            s = learn(source, Path(folder, "run"))
            speed, memory = s["bytes_per_second"] / 1000, s["peak_rss_bytes"] / 1e6
            print(f"  {'remanence learn':<22}{s['bits_per_byte']:.3f}   {speed:.1f} kB/s, at most {memory:.0f} MB")


if __name__ == "__main__":
    main(sys.argv[1:] or ["builtin:docs-then-source"])
