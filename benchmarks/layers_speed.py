"""Whole layers, forward and backward, in tokens per second, beside what a user would pick instead.

    python benchmarks/layers_speed.py                      # every memory, and the layers of PyTorch
    python benchmarks/layers_speed.py --peers              # and those of transformers (pip install transformers)
    python benchmarks/layers_speed.py --memory mamba gla   # only these

Width 512, float32. Each figure is from a process of its own, the shortest of several runs. *Share* is the FLOPs of
the layer's projections per second over the matrix rate, measured in the same process: what the recurrence, gates
and norms leave of it. *Extra* is how far peak memory rises above the layer and its input.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import remanence  # noqa: F401  (before the first tensor, so that its settings of PyTorch's allocator hold)

WIDTH, HEADS = 512, 8
SIZES = [(1, 2048), (1, 8192), (8, 2048)]
FIRST = lambda y: y[0] if isinstance(y, tuple) else y  # noqa: E731


class Attention(nn.Module):
    """A causal softmax attention layer on PyTorch's fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def torch_peers() -> dict[str, Callable[[], nn.Module]]:
    return {
        "softmax attention (SDPA)": Attention,
        "torch.nn.GRU": lambda: nn.GRU(WIDTH, WIDTH, batch_first=True),
        "torch.nn.LSTM": lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True),
    }


def peers() -> dict[str, Callable[[], nn.Module]]:
    """The layers of transformers at our sizes, in their plain PyTorch form, which is all they have on a CPU."""

    def build(
        family: str, layer: str, config: str, call: Callable[[nn.Module, Tensor], Any] | None = None, **sizes: Any
    ):
        def make() -> nn.Module:
            import importlib

            model = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            settings = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
            made = getattr(settings, config)(hidden_size=WIDTH, **sizes)
            inner = getattr(model, layer)(made, 0)
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
            lambda layer, x: layer(x, torch.arange(x.shape[1])[None], None, torch.arange(x.shape[1]), use_cache=False),
            lru_width=WIDTH, num_attention_heads=HEADS,
        ),
        "RWKV-4": build("rwkv", "RwkvSelfAttention", "RwkvConfig"),
    }  # fmt: skip


def measure(name: str, batch: int, time_steps: int) -> dict[str, float]:
    """Tokens per second, share of the matrix rate and extra bytes of one layer."""
    from remanence.memory import make

    torch.manual_seed(0)
    rivals = torch_peers() | peers()
    arguments = (
        {"heads": HEADS} if name in {"linear-attention", "retnet", "gated-deltanet", "deltanet", "titans"} else {}
    )
    layer = rivals[name]() if name in rivals else make(name, WIDTH, **arguments)
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
        torch.autograd.grad(FIRST(layer(x)), weights, up, allow_unused=True)

    first = torch.randn(1, 70, WIDTH)
    torch.autograd.grad(FIRST(layer(first)).sum(), weights[1:], allow_unused=True)  # loads what is loaded only once
    peak = 2 * 2048**3 / clock(lambda: torch.mm(a, a, out=out), 5, 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once()
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    tokens = batch * time_steps / clock(once, 5, 4)
    peak = max(peak, 2 * 2048**3 / clock(lambda: torch.mm(a, a, out=out), 5, 2))
    flops = 6 * sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    return {"tokens": tokens, "share": flops * tokens / peak, "extra": extra, "peak": peak}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--memory", nargs="+", help="only these (default: every memory of the catalogue)")
    ask.add_argument("--peers", action="store_true", help="also the layers of transformers")
    ask.add_argument("--quick", action="store_true", help="batch 1, 2,048 tokens only")
    ask.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = ask.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], int(given.one[1]), int(given.one[2]))))
        return
    from remanence import catalogue

    sizes = SIZES[:1] if given.quick else SIZES
    names = [*(given.memory or catalogue.cards("memory")), *torch_peers(), *(peers() if given.peers else [])]
    print(f"{torch.get_num_threads()} threads. Tokens per second (share of the matrix rate, extra MB).\n")
    print("| layer | " + " | ".join(f"{b} × {t:,}" for b, t in sizes) + " |")
    print("|---|" + "---:|" * len(sizes))
    for name in names:
        cells = []
        for batch, steps in sizes:
            command = [sys.executable, __file__, "--one", name, str(batch), str(steps)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            except subprocess.TimeoutExpired:
                cells.append("over 120 s")
                continue
            if done.returncode:
                cells.append(done.stderr.strip().splitlines()[-1][:60])
                continue
            found = json.loads(done.stdout)
            cells.append(f"{found['tokens']:,.0f} ({found['share']:.0%}, {found['extra'] / 1e6:,.0f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
