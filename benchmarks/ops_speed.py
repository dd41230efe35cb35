"""How fast the ops are: forward and backward, in tokens per second, beside what they could be replaced by.

    python benchmarks/ops_speed.py            # all sizes: about ten minutes on two cores
    python benchmarks/ops_speed.py --quick    # batch 1, 2,048 tokens: a minute or two

Every figure is the shortest of several runs, float32, width 512 (8 heads of 64). The matrix rate is measured
again beside each op, since other programs may share the machine. FLOPs are the useful ones: the causal half of
a chunk's scores, and nothing that is computed twice.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from remanence import ops

WIDTH, HEADS, CHUNK, WINDOW, CONV = 512, 8, 64, 256, 4
K = WIDTH // HEADS
clock = time.perf_counter
LOOP = 256  # tokens on which the reference loops are timed; their cost per token does not depend on the length

# per token and head, forward and backward, with C = CHUNK and V = K
LINEAR = 3 * (2 * CHUNK * K + 4 * K * K)
DELTA = (5 * CHUNK * K + CHUNK**2 / 3 + 6 * K * K) + (8 * CHUNK * K + 12 * K * K)
ATTENTION = 12 * K  # per pair of a query and a key that it sees


@dataclass
class Case:
    name: str
    op: Callable[..., tuple]
    reference: Callable[..., tuple] | None
    inputs: Callable[[int, int], list[Tensor]]
    flops: Callable[[int], float] = lambda T: 0.0


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def qkv(B: int, T: int) -> list[Tensor]:
    key = F.normalize(torch.randn(B, HEADS, T, K), dim=-1).requires_grad_()
    return [noise(B, HEADS, T, K), key, noise(B, HEADS, T, K)]


def decay(*shape: int) -> Tensor:
    return F.logsigmoid(torch.randn(*shape) + 2).requires_grad_()


def windowed(op: Callable[..., tuple]) -> Callable[..., tuple]:
    return lambda q, k, v: op(q, k, v, window=WINDOW)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> tuple:
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)


CASES = [
    Case("scan", ops.scan, ops.scan_reference, lambda B, T: [decay(B, T, WIDTH), noise(B, T, WIDTH)]),
    Case("linear_attention", ops.linear_attention, ops.linear_attention_reference, qkv, lambda T: HEADS * LINEAR),
    Case(
        "linear_attention, decay per head",
        ops.linear_attention,
        ops.linear_attention_reference,
        lambda B, T: [*qkv(B, T), decay(B, HEADS, T)],
        lambda T: HEADS * LINEAR,
    ),
    Case(
        "linear_attention, decay per key",
        ops.linear_attention,
        ops.linear_attention_reference,
        lambda B, T: [*qkv(B, T), decay(B, HEADS, T, K)],
        lambda T: HEADS * LINEAR,
    ),
    Case(
        "gated_delta_rule",
        ops.gated_delta_rule,
        ops.gated_delta_rule_reference,
        lambda B, T: [*qkv(B, T), torch.rand(B, HEADS, T).requires_grad_(), decay(B, HEADS, T)],
        lambda T: HEADS * DELTA,
    ),
    Case(
        f"window_attention, window {WINDOW}",
        windowed(ops.window_attention),
        windowed(ops.window_attention_reference),
        qkv,
        lambda T: HEADS * ATTENTION * min(WINDOW, T / 2),
    ),
    Case(
        f"causal_conv, width {CONV}",
        ops.causal_conv,
        ops.causal_conv_reference,
        lambda B, T: [noise(B, T, WIDTH), noise(WIDTH, CONV)],
    ),
]
ATTEND = Case("scaled_dot_product_attention", softmax, None, qkv, lambda T: HEADS * ATTENTION * T / 2)


def gru_case() -> Case:
    gru = torch.nn.GRU(WIDTH, WIDTH, batch_first=True)
    weights = list(gru.parameters())
    return Case("torch.nn.GRU", lambda x, *_: gru(x), None, lambda B, T: [noise(B, T, WIDTH), *weights])


def shortest(run: Callable[[], object], runs: int, seconds: float) -> float:
    """The shortest of `runs` runs after a first one, or of as many as begin within `seconds`."""
    run()
    times: list[float] = []
    began = clock()
    while not times or (len(times) < runs and clock() - began < seconds):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times)


def matrix_rate() -> float:
    """FLOPs per second of a 2048 × 2048 float32 product."""
    a, out = torch.randn(2048, 2048), torch.empty(2048, 2048)
    return 2 * 2048**3 / shortest(lambda: torch.mm(a, a, out=out), 5, 2)


def seconds_of(op: Callable[..., tuple], inputs: list[Tensor], budget: float) -> float:
    weight = torch.randn_like(op(*inputs)[0])
    return shortest(lambda: torch.autograd.grad(op(*inputs)[0], inputs, weight), 7, budget)


def table(B: int, T: int, budget: float) -> None:
    print(f"\n### Batch {B}, {T:,} tokens\n")
    print("| op | tokens/s | × loop | × attention | × GRU | share of matrix rate |")
    print("|---|---:|---:|---:|---:|---:|")
    rivals = [(case, B * T / seconds_of(case.op, case.inputs(B, T), budget)) for case in (ATTEND, gru_case())]
    attention, gru = (rate for _, rate in rivals)
    for case in [*CASES, ATTEND, rivals[1][0]]:
        peak = matrix_rate()
        known = {c.name: rate for c, rate in rivals}.get(case.name)
        rate = known or B * T / seconds_of(case.op, case.inputs(B, T), budget)
        peak = max(peak, matrix_rate())
        loop = "–"
        if case.reference is not None:
            loop = f"{rate / (B * LOOP / seconds_of(case.reference, case.inputs(B, LOOP), budget)):.0f}"
        share = f"{case.flops(T) * rate / peak:.0%}" if case.flops(T) and not known else "–"
        print(
            f"| {case.name} | {rate:,.0f} | {loop} | {rate / attention:.1f} | {rate / gru:.1f} | {share} |", flush=True
        )


def copying(B: int, T: int, budget: float) -> None:
    """The scan beside copying its two inputs, into memory at hand and into memory asked for afresh."""
    with torch.no_grad():
        log_decay, b = (x.detach() for x in CASES[0].inputs(B, T))
        into = torch.empty_like(b), torch.empty_like(b)
        copy = shortest(lambda: (into[0].copy_(log_decay), into[1].copy_(b)), 7, budget)
        clone = shortest(lambda: (log_decay.clone(), b.clone()), 7, budget)
        forward = shortest(lambda: ops.scan(log_decay, b), 7, budget)
    both = seconds_of(ops.scan, CASES[0].inputs(B, T), budget)
    print(f"| {B} × {T:,} | {copy * 1e3:.1f} | {clone * 1e3:.1f} | {forward * 1e3:.1f} | {both * 1e3:.1f} |", end="")
    print(f" {forward / copy:.1f} / {forward / clone:.1f} | {both / copy:.1f} / {both / clone:.1f} |", flush=True)


def flatness(lengths: list[int], budget: float) -> None:
    print("\n### Microseconds per token by length, batch 1\n")
    print("| op | " + " | ".join(f"{T // 1024}k" for T in lengths) + " |")
    print("|---|" + "---:|" * len(lengths))
    for case in CASES:
        costs = [seconds_of(case.op, case.inputs(1, T), budget) / T * 1e6 for T in lengths]
        print(f"| {case.name} | " + " | ".join(f"{c:.1f}" for c in costs) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 1, 2,048 tokens, lengths to 8k")
    parser.add_argument("--lengths", type=int, nargs="+", help="only the cost per token at these lengths")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of repeats for each figure (default 2)")
    parser.add_argument("--threads", type=int, help="threads for PyTorch (default: its own choice)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor time, not the clock: for a machine that others use too, with --threads 1",
    )
    args = parser.parse_args()
    if args.cpu_time:
        global clock
        clock = time.process_time
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = [(1, 2048)] if args.quick else [(1, 2048), (1, 8192), (8, 2048), (8, 8192)]
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, ", end="")
    print(f"matrix rate {matrix_rate() / 1e9:.0f} GFLOP/s.")
    print("Processor time. " if args.cpu_time else "", end="")
    print(f"Forward and backward; loops timed on {LOOP} tokens.")
    if args.lengths:
        flatness(args.lengths, args.budget)
        return
    for B, T in sizes:
        table(B, T, args.budget)
    print("\n### The scan beside copying its inputs (milliseconds; ratios to copy / to clone)\n")
    print("| batch × tokens | copy | clone | forward | forward and backward | forward ÷ | both ÷ |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for B, T in sizes:
        copying(B, T, args.budget)
    flatness([2048, 8192] if args.quick else [2048, 4096, 8192, 16384, 32768, 65536], args.budget)


if __name__ == "__main__":
    main()
