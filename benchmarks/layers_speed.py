"""Whole layers, forward and backward, in tokens per second, beside what a user would pick instead.

    python benchmarks/layers_speed.py                      # every memory, and the layers of PyTorch
    python benchmarks/layers_speed.py --peers              # and those of transformers (pip install transformers)
    python benchmarks/layers_speed.py --memory mamba gla   # only these
    python benchmarks/layers_speed.py --pairs              # each peer beside our layer of the same kind and size
    python benchmarks/layers_speed.py --pairs --only MiniMax softmax    # the pairs with one of these in a name

Width 512, float32. Each figure is from a process of its own, the shortest of several runs, but for layers that take ten
seconds for one; who takes more than --seconds in all has no figure. *Share* is the FLOPs of
the layer's projections per second over the matrix rate, measured in the same process: what the recurrence, gates
and norms leave of it. *Extra* is how far memory rises at its peak above what was there before the pass, with the layer
and its input: activations, what is kept for the gradients, and the gradients themselves. *In pieces*: the same layer
read by `remanence.memory.in_pieces`, a quarter at a time, keeping what its projections gave: less memory, and somewhat
longer.

The layers of transformers are timed as `pip install transformers` leaves them: in the PyTorch form that they have
for a CPU, which needs no package of kernels. mambapy and the packages of xLSTM and minGRU are not installed for this;
minGRU's scan in log space, which is all that its package does, is written out below.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import remanence  # noqa: F401  (before PyTorch, so that its settings hold)

# isort: split
import torch
from torch import Tensor, nn

WIDTH, HEADS = 512, 8
SIZES = [(1, 2048), (1, 8192), (8, 2048)]
SIZED: dict[str, dict[str, Any]] = {
    name: {"heads": HEADS}
    for name in ("linear-attention", "retnet", "deltanet", "kimi-delta", "lightning-attention-tnl", "griffin",
                 "softmax", "titans", "xlstm-7b", "gla")
} | {"gated-deltanet": {"heads": HEADS, "expand_v": 1}}  # fmt: skip
"""What is not left to a layer's defaults, so that it has its peer's size."""
PAIRS = {
    "MiniMax lightning attention": "lightning-attention-tnl",
    "Qwen3-Next gated delta": "gated-deltanet",
    "Kimi Linear delta": "kimi-delta",
    "Mamba-2": "mamba2",
    "Mamba": "mamba",
    "RecurrentGemma RG-LRU block": "griffin",
    "RWKV-4": "rwkv",
    "xLSTM mLSTM": "xlstm-7b",
    "minGRU": "min-lstm-gru",
    "softmax attention (SDPA)": "softmax",
    "torch.nn.LSTM": "min-lstm",
    "torch.nn.GRU": "min-lstm-gru",
}
"""Each peer, and which of ours does its work."""
PIECES = 4
"""That `in_pieces` reads a sequence in."""
SPINNING = {"GOMP_SPINCOUNT": "300000"}
"""For how long PyTorch's threads spin by default; `import remanence` makes it less, which peers would not have."""
SLOW = 10.0
"""Seconds that a pass is expected to take, from which one pass has to do."""


def first(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


class Attention(nn.Module):
    """A causal softmax attention layer on PyTorch's fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class MinGRUInLogSpace(nn.Module):
    """minGRU by PyTorch's cumulative sums of logarithms (arXiv:2410.01201, appendix B.3), without an output map."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        candidate, gate = self.inward(x).chunk(2, dim=-1)
        positive = torch.where(candidate >= 0, (candidate.relu() + 0.5).log(), nn.functional.logsigmoid(candidate))
        kept = -nn.functional.softplus(gate).cumsum(1)
        written = positive - nn.functional.softplus(-gate)
        return (kept + (written - kept).logcumsumexp(1)).exp()


def torch_peers() -> dict[str, Callable[[], nn.Module]]:
    return {
        "softmax attention (SDPA)": Attention,
        "minGRU": MinGRUInLogSpace,
        "torch.nn.GRU": lambda: nn.GRU(WIDTH, WIDTH, batch_first=True),
        "torch.nn.LSTM": lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True),
    }


def peers() -> dict[str, Callable[[], nn.Module]]:
    """The layers of transformers at our sizes, in their plain PyTorch form, which is all they have on a CPU."""

    def build(
        family: str, layer: str, config: str, call: Callable[[nn.Module, Tensor], Any] | None = None, **sizes: Any
    ):
        def make() -> nn.Module:
            model = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            settings = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
            made = getattr(settings, config)(hidden_size=WIDTH, **sizes)
            inner = getattr(model, layer)(*(made, 0)[: 1 if family == "xlstm" else 2])
            if call is None:
                return inner
            outer = nn.Module()
            outer.inner = inner
            outer.forward = lambda x: call(inner, x)  # type: ignore[method-assign]
            return outer

        return make

    def lightning(layer: nn.Module, x: Tensor) -> Any:
        return layer(x, position_embeddings=None, attention_mask=None)

    heads: dict[str, Any] = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS}
    delta = {"linear_num_value_heads": HEADS, "linear_num_key_heads": HEADS}
    delta |= {"linear_key_head_dim": WIDTH // HEADS, "linear_value_head_dim": WIDTH // HEADS}
    return {
        "MiniMax lightning attention": build(
            "minimax", "MiniMaxLightningAttention", "MiniMaxConfig", lightning, layer_types=["linear_attention"],
            num_hidden_layers=1, **heads,
        ),
        "Qwen3-Next gated delta": build("qwen3_next", "Qwen3NextGatedDeltaNet", "Qwen3NextConfig", **delta),
        "Mamba": build("mamba", "MambaMixer", "MambaConfig"),
        "Mamba-2": build("mamba2", "Mamba2Mixer", "Mamba2Config", num_heads=16, head_dim=64, n_groups=1),
        "RecurrentGemma RG-LRU block": build(
            "recurrent_gemma", "RecurrentGemmaRecurrentBlock", "RecurrentGemmaConfig",
            lambda layer, x: layer(x, torch.arange(x.shape[1])[None], None, use_cache=False),
            lru_width=WIDTH, num_attention_heads=HEADS,
        ),
        "RWKV-4": build("rwkv", "RwkvSelfAttention", "RwkvConfig"),
        "Kimi Linear delta": build(
            "kimi_linear", "KimiLinearDeltaAttention", "KimiLinearConfig", num_hidden_layers=1,
            linear_num_heads=HEADS, linear_head_dim=WIDTH // HEADS,
        ),
        "xLSTM mLSTM": build(
            "xlstm", "xLSTMLayer", "xLSTMConfig", num_heads=HEADS, mode="train", autocast_kernel_dtype="float32",
        ),
    }  # fmt: skip


def give_back_from(size: int) -> None:
    """Blocks of so many bytes come from the system from here on, and go back to it when they are free.

    Then the holes between the blocks of an allocator, which differ from run to run, are not counted as a layer's.
    """
    with contextlib.suppress(OSError, AttributeError):  # not the GNU C library
        library = ctypes.CDLL(None)
        library.mallopt(-3, size)
        library.mallopt(-1, 2 * size)  # of what is free at the heap's end


def peak_memory(run: Callable[[], object]) -> tuple[float, float]:
    """Bytes by which this process grows while it runs, at its peak, and the seconds that it took."""
    with contextlib.suppress(OSError, AttributeError):  # not the GNU C library
        ctypes.CDLL(None).malloc_trim(0)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(field: str) -> int:
        return int(status.read_text().split(f"{field}:")[1].split()[0])

    start = time.perf_counter()
    try:
        before = kilobytes("VmRSS")
        reset.write_text("5")  # the peak begins anew, else what compiling took would hide what the pass takes
        start = time.perf_counter()
        run()
        return (kilobytes("VmHWM") - before) * 1024, time.perf_counter() - start
    except OSError:  # not Linux
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        unit = 1 if sys.platform == "darwin" else 1024
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit, time.perf_counter() - start


def measure(name: str, batch: int, time_steps: int, pieces: int = 1) -> dict[str, float]:
    """Tokens per second, share of the matrix rate and extra bytes of one layer."""
    from remanence.memory import in_pieces, make

    torch.manual_seed(0)
    rivals = torch_peers() | peers()
    layer = rivals[name]() if name in rivals else make(name, WIDTH, **SIZED.get(name, {}))
    x = torch.randn(batch, time_steps, WIDTH, requires_grad=True)
    weights = [x, *layer.parameters()]
    up = torch.randn(batch, time_steps, WIDTH)
    a, out = torch.randn(2048, 2048), torch.empty(2048, 2048)

    def clock(run: Callable[[], object], runs: int, seconds: float) -> float:
        times: list[float] = []
        began = time.perf_counter()
        while not times or (len(times) < runs and time.perf_counter() - began < seconds):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    def once() -> None:
        if pieces > 1:
            y = in_pieces(layer, x, piece=time_steps // pieces, keep="projections")[0]
        else:
            y = first(layer(x))
        torch.autograd.grad(y, weights, up, allow_unused=True)

    def little() -> None:
        torch.autograd.grad(first(layer(x[:1, :128])).sum(), weights[1:], allow_unused=True)

    give_back_from(2**17)
    little()  # loads what is loaded only once
    peak = 2 * 2048**3 / clock(lambda: torch.mm(a, a, out=out), 5, 2)
    slow = clock(little, 2, 2) * batch * time_steps / 128 > SLOW
    if not slow:
        once()
    extra, seconds = peak_memory(once)
    if not slow:
        give_back_from(2**25)  # what the GNU C library comes to by itself
        seconds = clock(once, 5, 4)
    tokens = batch * time_steps / seconds
    peak = max(peak, 2 * 2048**3 / clock(lambda: torch.mm(a, a, out=out), 5, 2))
    flops = 6 * sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    return {"tokens": tokens, "share": flops * tokens / peak, "extra": extra, "peak": peak}


def measured(name: str, sizes: list[tuple[int, int]], seconds: float, pieces: int = 1) -> list[dict[str, float] | str]:
    """What `measure` finds at each size, in processes of their own; in words where it finds nothing."""
    cells: list[dict[str, float] | str] = []
    for batch, steps in sizes:
        command = [sys.executable, __file__, "--one", name, str(batch), str(steps), str(pieces)]
        env = os.environ | (SPINNING if name in PAIRS else {})
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=env)
        except subprocess.TimeoutExpired:
            cells.append(f"over {seconds:.0f} s")
            continue
        if done.returncode:
            fault = done.stderr.strip().splitlines()
            cells.append(fault[-1][:60] if fault else f"ended with {done.returncode}")
        else:
            cells.append(json.loads(done.stdout.splitlines()[-1]))
    return cells


def cell(found: dict[str, float] | str) -> str:
    return found if isinstance(found, str) else (
        f"{found['tokens']:,.0f} ({found['share']:.0%}, {found['extra'] / 1e6:,.0f})"
    )  # fmt: skip


def ratio(ours: dict[str, float] | str, theirs: dict[str, float] | str) -> str:
    """How many times as fast, and which part of the memory."""
    if isinstance(ours, str) or isinstance(theirs, str):
        return "–"
    return f"{ours['tokens'] / theirs['tokens']:.1f} ×, {ours['extra'] / theirs['extra']:.2f}"


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--memory", nargs="+", help="only these (default: every memory of the catalogue)")
    ask.add_argument("--peers", action="store_true", help="also the layers of transformers")
    ask.add_argument("--pairs", action="store_true", help="each peer, ours of its kind, and their ratios")
    ask.add_argument("--only", nargs="+", help="of the pairs, those with one of these words in either name")
    ask.add_argument("--quick", action="store_true", help="batch 1, 2,048 tokens only")
    ask.add_argument("--seconds", type=float, default=90, help="that a layer may take at one size")
    ask.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = ask.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], *map(int, given.one[1:]))))
        return
    from remanence import catalogue

    sizes = SIZES[:1] if given.quick else SIZES
    head = [f"{b} × {t:,}" for b, t in sizes]
    print(f"{torch.get_num_threads()} threads. Tokens per second (share of the matrix rate, extra MB).\n")
    if given.pairs:
        print("| layer | " + " | ".join(head) + " | times as fast as the peer above, share of its memory |")
        print("|---|" + "---:|" * (len(sizes) + 1))
        known: dict[tuple[str, int], list[dict[str, float] | str]] = {}
        for peer, own in PAIRS.items():
            if given.only and not any(word.lower() in name.lower() for word in given.only for name in (peer, own)):
                continue
            theirs = measured(peer, sizes, given.seconds)
            print(f"| **{peer}** | " + " | ".join(map(cell, theirs)) + " | |", flush=True)
            grows = "constant state" in catalogue.find(own, "memory").exempt
            for pieces in (1,) if grows else (1, PIECES):
                ours = known[own, pieces] = known.get((own, pieces)) or measured(own, sizes, given.seconds, pieces)
                row = [f"`{own}`" + ", in pieces" * (pieces > 1), *map(cell, ours), "; ".join(map(ratio, ours, theirs))]
                print("| " + " | ".join(row) + " |", flush=True)
        return
    names = [*(given.memory or catalogue.cards("memory")), *torch_peers(), *(peers() if given.peers else [])]
    print("| layer | " + " | ".join(head) + " |")
    print("|---|" + "---:|" * len(sizes))
    for name in names:
        print(f"| {name} | " + " | ".join(map(cell, measured(name, sizes, given.seconds))) + " |", flush=True)


if __name__ == "__main__":
    main()
