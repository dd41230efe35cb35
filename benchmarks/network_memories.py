"""Memories that are networks, beside the implementations that people take: tokens per second, memory, decoding.

    pip install titans-pytorch          # the peer of titans
    git clone https://github.com/test-time-training/ttt-lm-pytorch
    python benchmarks/network_memories.py --ttt ttt-lm-pytorch/ttt.py

Width 512, 8 heads of 64, perceptrons of two layers with 256 hidden features; chunks of 64 tokens (Titans) and 16 (TTT);
float32. One line for each peer that can be imported, and one or two for ours at the same sizes; every cell is measured
in a process of its own, the shortest of several runs, and peers and ours take turns. *Tokens/s*: forward plus backward
of the whole layer; *extra*: how far the peak rises above layer and input; *decoding*: one token after the other.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import remanence  # noqa: F401  (before PyTorch, so that its settings hold)

# isort: split
import torch
from torch import Tensor

WIDTH, HEADS = 512, 8
SIZES = [(1, 2048), (1, 8192), (8, 2048)]
FORMS = {
    "titans, read=anchor": {"read": "anchor"},
    "titans, read=anchor, gate=False, conv=1": {"read": "anchor", "gate": False, "conv": 1},
}
"""titans-pytorch reads one chunk late, has no gate of the layer's width on what is read, and no convolution."""
PAIRS = {
    "titans-pytorch": ("titans", *FORMS),
    "TTT-Linear, its authors'": ("ttt",),
    "TTT-MLP, its authors'": ("ttt-mlp",),
}
"""Peers, and those of ours that take their turns with them."""
SPINNING = {"GOMP_SPINCOUNT": "300000"}
"""For how long PyTorch's threads spin by default; `import remanence` makes it less, which peers would not have."""
State = Any
Layer = Callable[[Tensor, State], tuple[Tensor, State]]


def ours(name: str) -> tuple[torch.nn.Module, Layer]:
    from remanence.memory import make

    layer = make(name.split(",")[0], WIDTH, heads=HEADS, **FORMS.get(name, {}))
    return layer, layer


def titans_pytorch() -> tuple[torch.nn.Module, Layer]:
    from titans_pytorch import NeuralMemory

    layer = NeuralMemory(WIDTH, chunk_size=64, heads=HEADS, dim_head=WIDTH // HEADS)
    return layer, lambda x, state: layer(x, state=state)


def ttt_authors(path: str, name: str) -> tuple[torch.nn.Module, Layer]:
    spec = importlib.util.spec_from_file_location("ttt_authors", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ttt_authors"] = module
    spec.loader.exec_module(module)
    config = module.TTTConfig(hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=1, mini_batch_size=16)
    layer = (module.TTTMLP if "MLP" in name else module.TTTLinear)(config, 0)

    def run(x: Tensor, state: State) -> tuple[Tensor, State]:
        positions = torch.arange(x.shape[1])[None].expand(x.shape[:2])
        return layer(x, position_ids=positions), None

    return layer, run


def build(name: str, path: str) -> tuple[torch.nn.Module, Layer]:
    if name not in PAIRS:
        return ours(name)
    return titans_pytorch() if name == "titans-pytorch" else ttt_authors(path, name)


def peak_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(name: str, batch: int, length: int, path: str, seconds: float) -> dict[str, float]:
    torch.manual_seed(0)
    layer, run = build(name, path)
    weights = list(layer.parameters())
    x = torch.randn(batch, length, WIDTH, requires_grad=True)

    def once(x: Tensor) -> None:
        torch.autograd.grad(run(x, None)[0].sum(), [x, *weights], allow_unused=True)

    once(torch.randn(1, 128, WIDTH, requires_grad=True))  # loads what is loaded only once
    before = peak_memory()
    once(x)
    extra, times = peak_memory() - before, []
    while not times or (len(times) < 25 and sum(times) < seconds):
        began = time.perf_counter()
        once(x)
        times.append(time.perf_counter() - began)
    return {"tokens": batch * length / min(times), "extra": extra, "parameters": sum(w.numel() for w in weights)}


def decode(name: str, path: str, tokens: int = 256) -> dict[str, float]:
    torch.manual_seed(0)
    _, run = build(name, path)
    x, state, times = torch.randn(tokens, 1, 1, WIDTH), None, []
    with torch.no_grad():
        for token in x:
            began = time.perf_counter()
            _, state = run(token, state)
            times.append(time.perf_counter() - began)
    late = sorted(times[tokens // 2 :])
    return {"seconds": late[len(late) // 2]}


def ratio(ours: dict[str, float] | str, theirs: dict[str, float] | str) -> str:
    """Times as many tokens per second, and the share of the memory."""
    if isinstance(ours, str) or isinstance(theirs, str):
        return ""
    return f"{ours['tokens'] / theirs['tokens']:.2f} × ({ours['extra'] / max(theirs['extra'], 1):.2f} ×)"


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--ttt", default="", help="path of the TTT authors' ttt.py")
    ask.add_argument("--seconds", type=float, default=8, help="per cell")
    ask.add_argument("--quick", action="store_true", help="batch 1, 2,048 tokens only")
    ask.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = ask.parse_args()
    if given.one:
        name, batch, length = given.one[0], int(given.one[1]), int(given.one[2])
        found = measure(name, batch, length, given.ttt, given.seconds) if length else decode(name, given.ttt)
        print(json.dumps(found))
        return

    def cell(name: str, batch: int, length: int) -> dict[str, float] | str:
        command = [sys.executable, __file__, "--one", name, str(batch), str(length)]
        command += ["--ttt", given.ttt, "--seconds", str(given.seconds)]
        env = os.environ | (SPINNING if name in PAIRS else {})
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        except subprocess.TimeoutExpired:
            return "over 300 s"
        return json.loads(done.stdout) if not done.returncode else done.stderr.strip().splitlines()[-1][:70]

    sizes = SIZES[:1] if given.quick else SIZES
    print(f"{torch.get_num_threads()} threads, {WIDTH} features, {HEADS} heads.\n")
    print(
        "| layer | parameters | " + " | ".join(f"{b} × {t:,}: tokens/s (extra MB)" for b, t in sizes) + " | decoding |"
    )
    print("|---|---:|" + "---:|" * (len(sizes) + 1))
    for peer, mine in PAIRS.items():
        if "TTT" in peer and not given.ttt:
            continue
        rows: dict[str, list[dict[str, float] | str]] = {name: [] for name in (peer, *mine)}
        for batch, length in sizes:
            for name, cells in rows.items():
                cells.append(cell(name, batch, length))
        for name, cells in rows.items():
            texts = [c if isinstance(c, str) else f"{c['tokens']:,.0f} ({c['extra'] / 1e6:,.0f})" for c in cells]
            one = cell(name, 1, 0) if "TTT" not in name else "—"
            last = one if isinstance(one, str) else f"{1e3 * one['seconds']:.2f} ms"
            count = next((f"{c['parameters']:,.0f}" for c in cells if not isinstance(c, str)), "")
            print(f"| {name} | {count} | " + " | ".join(texts) + f" | {last} |", flush=True)
        theirs = rows.pop(peer)
        for name, cells in rows.items():
            print(f"| {name} / {peer} | | " + " | ".join(map(ratio, cells, theirs)) + " | |", flush=True)


if __name__ == "__main__":
    main()
