"""Shards that need not wait for one another, a past that still reaches them, and queries that find their keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from remanence.catalogue import Check, proof
from remanence.memory.tnt import TNT

SHARD = 16


@proof(
    "tnt",
    "A shard moves nothing in the local memories of the next (so shards train in parallel), and yet moves what is read "
    "there; a query half a length off the keys written is answered exactly. With a global memory that stands still and "
    "raw queries, the shard before is lost, and so is the answer.",
)
def tnt() -> tuple[Check, Check]:
    return _check(all, SHARD, "sum"), _check(any, 2 * SHARD, "none")


def _check(enough: Callable[[tuple[bool, ...]], bool], global_chunk: int, projection: str) -> Check:
    def build(layers: int) -> TNT:
        clocks = {"global_chunk": global_chunk, "shard": SHARD}
        return TNT(32, heads=1, conv=1, layers=layers, local_chunks=(4,), projection=projection, **clocks).double()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        deep, matrix = build(2), build(1)
    local, whole = _reach(deep)
    error = _error(matrix)
    says = f"influence of the shard before {local:.1g} on local memories, {whole:.1g} in all; read error {error:.1g}"
    return Check(enough((local == 0 and whole > 1e-9, error < 1e-10)), says)


def _reach(layer: TNT) -> tuple[float, float]:
    """How the second shard's outputs move with the first shard's inputs: of the local memories, and of the layer."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 2 * SHARD, 32, generator=g, dtype=torch.float64, requires_grad=True)
    steps = torch.full((1, 1, 2 * SHARD), 0.1, dtype=torch.float64)
    inputs = [x[:, None], torch.nn.functional.normalize(x, dim=-1)[:, None], x[:, None], steps]
    near, _ = layer.shards(inputs, layer.fresh(1), 0)
    whole, _ = layer(x)
    ends = near[:, 0, SHARD:], whole[:, SHARD:] - whole[:, SHARD:].detach()
    local, total = (torch.autograd.grad(y.square().sum() + y.sum(), x, retain_graph=True)[0] for y in ends)
    return local[:, :SHARD].abs().max().item(), total[:, :SHARD].abs().max().item()


@torch.no_grad()
def _error(layer: TNT) -> float:
    """Of a memory that knows what 16 orthonormal keys hold, and gives noise elsewhere, asked near those keys."""
    g = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    basis = torch.linalg.qr(normal(32, 32)).Q
    keys, rest = basis[:SHARD], basis[SHARD:]
    off = torch.nn.functional.normalize(normal(SHARD, 32 - SHARD), dim=-1) @ rest
    state = layer.fresh(1)
    matrix = normal(32, 32) * 32**-0.5
    near = state["local"]["0"]
    state["local"]["0"] = {**near, "anchor": {"0": matrix[None, None]}, "weight": {"0": matrix[None, None]}}
    k = torch.cat([keys, 0 * keys])[None, None]  # queries come after all keys were written
    q = torch.cat([keys, keys + 0.5 * off])[None, None]
    read, _ = layer.near([q, k, 0 * k, k.new_zeros(1, 1, 2 * SHARD)], state)
    want = keys + keys @ matrix.mT
    return ((read[0, 0, SHARD:] - want).norm() / want.norm()).item()
