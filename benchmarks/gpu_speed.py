"""How fast the Triton kernels are on a GPU: forward and backward, beside flash-linear-attention's and attention.

    python benchmarks/gpu_speed.py                     # bfloat16, at the shapes of flash-linear-attention's benchmark
    python benchmarks/gpu_speed.py --dtype float32     # products in full float32, without tensor cores

Both sides get the same tensors [batch, time, heads, width], queries unscaled, and take turns; each figure is the
shortest of several runs. The ratio is their time over ours: above 1, ours is faster. Without `pip install
flash-linear-attention` only PyTorch's attention is compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence import ops
from remanence.ops import dispatch

SHAPES = [  # batch, time, heads, width
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (4, 4096, 64, 128),
    (8, 2048, 32, 256),
    (8, 1024, 8, 64),
]
Op = Callable[..., Tensor]


@dataclass
class Case:
    """`ours` and `theirs` take q, k, v, a decay and write strengths, [B, T, H, ...]; `inputs` says which of them."""

    name: str
    ours: Op
    theirs: Op
    inputs: tuple[str, ...]


def heads_first(*x: Tensor) -> tuple[Tensor, ...]:
    """Views, which the kernels read in place."""
    return tuple(y.transpose(1, 2) for y in x)


def outer(q: Tensor, k: Tensor, v: Tensor, *decay: Tensor) -> Tensor:
    return ops.linear_attention(*heads_first(q, k, v, *decay))[0].transpose(1, 2)


def delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return ops.gated_delta_rule(*heads_first(q, k, v, beta, g))[0].transpose(1, 2)


def scan(v: Tensor, g: Tensor) -> Tensor:
    return ops.scan(g.flatten(2), v.flatten(2))[0]


def their_scan(v: Tensor, g: Tensor) -> Tensor:
    from fla.ops.hgrn import fused_recurrent_hgrn

    return fused_recurrent_hgrn(v.flatten(2), g.flatten(2))[0]


def their_outer(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    return (chunk_simple_gla if g.ndim == 3 else chunk_gla)(q, k, v, g, scale=1.0)[0]


def their_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, g, beta, scale=1.0)[0]


CASES = [
    Case("scan", scan, their_scan, ("v", "per key")),
    Case("linear_attention, decay per head", outer, their_outer, ("q", "k", "v", "per head")),
    Case("linear_attention, decay per key", outer, their_outer, ("q", "k", "v", "per key")),
    Case("gated_delta_rule", delta, their_delta, ("q", "k", "v", "per head", "beta")),
]


def draw(B: int, T: int, H: int, D: int, dtype: torch.dtype) -> dict[str, Tensor]:
    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda")

    found = {
        "q": noise(B, T, H, D) * D**-0.5,
        "k": F.normalize(noise(B, T, H, D), dim=-1),
        "v": noise(B, T, H, D),
        "per head": F.logsigmoid(noise(B, T, H) + 2),
        "per key": F.logsigmoid(noise(B, T, H, D) + 2),
        "beta": noise(B, T, H).sigmoid(),
    }
    return {name: x.to(dtype).requires_grad_() for name, x in found.items()}


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*heads_first(q, k, v), is_causal=True, scale=1.0).transpose(1, 2)


def turns(runs: int, *calls: Callable[[], object]) -> list[float]:
    """The shortest seconds of each call, after two first rounds in which kernels are compiled."""
    best = [float("inf")] * len(calls)
    for i in range(runs + 2):
        for j, call in enumerate(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if i >= 2:
                best[j] = min(best[j], start.elapsed_time(end) / 1e3)
    return best


def both_ways(op: Op, x: list[Tensor]) -> Callable[[], object]:
    weight = torch.randn_like(op(*x))
    return lambda: torch.autograd.grad(op(*x), x, weight)


def table(shape: tuple[int, int, int, int], dtype: torch.dtype, runs: int, peers: bool) -> None:
    B, T, H, D = shape
    print(f"\n### Batch {B}, {T:,} tokens, {H} heads of {D}\n")
    print("| op | million tokens/s | × flash-linear-attention | difference from it | × attention |")
    print("|---|---:|---:|---:|---:|")
    x = draw(*shape, dtype)
    attention = both_ways(softmax, [x["q"], x["k"], x["v"]])
    for case in CASES:
        given = [x[name] for name in case.inputs]
        calls = [both_ways(case.ours, given), attention]
        ratio = apart = "–"
        if peers:
            calls.append(both_ways(case.theirs, given))
            with torch.no_grad():
                got, want = case.ours(*given).float(), case.theirs(*given).float()
            apart = f"{((got - want).abs().max() / want.abs().max()).item():.1e}"
        ours, attended, *theirs = turns(runs, *calls)
        if theirs:
            ratio = f"{theirs[0] / ours:.2f}"
        print(f"| {case.name} | {B * T / ours / 1e6:.2f} | {ratio} | {apart} | {attended / ours:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_speed: PyTorch finds no GPU here, so there is nothing to time; ops_speed.py times the CPU.")
    if not dispatch.triton(torch.empty(1, device="cuda")):
        sys.exit("gpu_speed: Triton is not installed; `pip install 'remanence[triton]'` brings it.")
    peers = importlib.util.find_spec("fla") is not None
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {args.dtype}; forward and backward.", end=" ")
    print("" if peers else "flash-linear-attention is not installed, so it is not compared.")
    torch.manual_seed(0)
    for shape in SHAPES:
        table(shape, getattr(torch, args.dtype), args.runs, peers)


if __name__ == "__main__":
    main()
