"""A sequence split over 2 and 4 processes gives what one process gives, and the bytes do not depend on its length."""

from __future__ import annotations

import importlib
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from remanence import ops
from remanence.errors import RemanenceError, ShapeError
from remanence.memory import make
from remanence.memory.base import Memory
from remanence.ops import sequence_parallel as split
from remanence.state import flatten, unflatten

MEMORIES = {
    "linear-attention": {"heads": 2},
    "retnet": {"heads": 2},
    "gla": {"heads": 2, "rank": 3},
    "gated-deltanet": {"heads": 2},
    "griffin": {"heads": 2},
    "hgrn": {},
    "min-lstm-gru": {},
    "mamba2": {"state_size": 3, "head_dim": 4},
    "sliding-window": {"heads": 2, "window": 6},
}


class Shifted(Memory):
    """y_t = x_t + x_{t-1}: nothing but a token shift."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.scale = torch.nn.Parameter(torch.ones(dim))

    def initial_state(self, batch):
        return {"shift": self.scale.new_zeros(batch, self.dim)}

    def forward(self, x, state=None):
        state = self.begin(x, state)
        before = torch.cat([state["shift"][:, None], x[:, :-1]], 1)
        return self.scale * x + before, {"shift": x[:, -1]}


class Bare(Memory):
    """One op and nothing around it; its arguments are shares of the input."""

    def __init__(self, op: str):
        super().__init__()
        self.dim, self.op, self.A = 8, op, torch.nn.Parameter(-torch.ones(2, 3))

    def initial_state(self, batch):
        return {"h": self.A.new_zeros(batch, 2, 3)} if self.op == "mamba" else {"S": self.A.new_zeros(batch, 1, 2, 1)}

    def forward(self, x, state=None):
        from remanence.ops.dplr import dplr
        from remanence.ops.selective_scan import selective_scan

        state = self.begin(x, state)
        if self.op == "mamba":
            u, B, C = x.split([2, 3, 3], -1)
            y, after = selective_scan(u, u.square(), self.A, B, C, state)
            return y.repeat(1, 1, 4), after
        k, a = x[:, None, :, :2], x[:, None, :, 2:4]
        a = a / (1 + a.norm(dim=-1, keepdim=True)) * self.A[0, :2]
        y, after = dplr(k, k, x[:, None, :, 4:5], a, -a, -x[:, None, :, 5:7].square(), state)
        return y[:, 0].repeat(1, 1, 8), after


EXTRA = {"shift": lambda: Shifted(8), "mamba": lambda: Bare("mamba"), "dplr": lambda: Bare("dplr")}


def small(name: str) -> Memory:
    torch.manual_seed(1)
    memory = (EXTRA[name]() if name in EXTRA else make(name, 8, **MEMORIES[name])).double()
    for p in memory.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return memory


def cases(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(2, 24, 8, generator=g, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        state = small(name)(torch.randn(2, 7, 8, generator=g, dtype=torch.float64))[1]
    return x, weight, flatten(state)


def whole(name: str) -> tuple[Tensor, ...]:
    """Outputs, the input's gradient, and the gradients of parameters and state, on one machine."""
    memory, (x, weight, state) = small(name), cases(name)
    x.requires_grad_()
    floats = [t.requires_grad_() for t in state.values() if t.is_floating_point()]
    y, end = memory(x, unflatten(state))
    leaves = [x, *floats, *memory.parameters()]
    loss = (y * weight).sum() + sum(t.square().sum() for t in flatten(end).values() if t.is_floating_point())
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return (y.detach(), *grads, *(t.detach() for t in flatten(end).values()))


def work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{size}", rank=rank, world_size=size)
    calls = count_collectives()
    for name in [*MEMORIES, *EXTRA]:
        memory, (x, weight, state) = small(name), cases(name)
        mine = slice(rank * 24 // size, (rank + 1) * 24 // size)
        x = x[:, mine].clone().requires_grad_()
        floats = [t.requires_grad_() for t in state.values() if t.is_floating_point()]
        y, end = split.run_split(memory, x, unflatten(state))
        leaves = [x, *floats, *memory.parameters()]
        ends = sum(t.square().sum() for t in flatten(end).values() if t.is_floating_point())
        loss = (y * weight[:, mine]).sum() + (ends if rank == size - 1 else 0 * ends)
        d_x, *grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        grads = [grad.contiguous() for grad in grads]
        for grad in grads:
            dist.all_reduce(grad)
        mine_only = [y.detach(), d_x, *(t.detach() for t in flatten(end).values())]
        torch.save((mine_only, grads), f"{folder}/{name}.{size}.{rank}")
    calls.clear()
    torch.save([traffic(calls, T) for T in (3, 50)], f"{folder}/traffic.{size}.{rank}")
    dist.destroy_process_group()


def count_collectives() -> list[tuple[str, int]]:
    calls: list[tuple[str, int]] = []
    gather, reduce = dist.all_gather, dist.all_reduce

    def counted_gather(out, x, group=None):
        calls.append(("all_gather", x.nbytes))
        return gather(out, x, group=group)

    def counted_reduce(x, *args, **kwargs):
        calls.append(("all_reduce", x.nbytes))
        return reduce(x, *args, **kwargs)

    dist.all_gather, dist.all_reduce = counted_gather, counted_reduce
    return calls


def traffic(calls: list[tuple[str, int]], T: int) -> dict[str, list[tuple[str, int]]]:
    g = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(1, 2, T, 4, generator=g, requires_grad=True) for _ in range(3))
    decay, beta = -torch.rand(1, 2, T, generator=g), torch.rand(1, 2, T, generator=g)
    found = {}
    for name, run in {
        "linear": lambda: split.linear_attention(q, k, v),
        "per head": lambda: split.linear_attention(q, k, v, decay),
        "per key": lambda: split.linear_attention(q, k, v, decay[..., None].expand_as(k)),
        "delta": lambda: split.gated_delta_rule(q, 0.3 * k, v, beta, decay),
        "scan": lambda: split.scan(decay.expand(2, 2, T).mT, v[0, :, :, :2]),
    }.items():
        y, _ = run()
        found[name] = [*calls, ("backward", 0)]
        calls.clear()
        y.square().sum().backward()
        found[name] += calls
        calls.clear()
    return found


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    set_forkserver_preload(["remanence.memory", "remanence.ops.sequence_parallel"])
    mp.start_processes(work, (request.param, str(folder)), nprocs=request.param, start_method="forkserver")
    return request.param, folder


def close(got: Tensor, want: Tensor) -> None:
    got, want = got.double(), want.double()
    size = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * (1 + size))


@pytest.mark.parametrize("name", [*MEMORIES, *EXTRA])
def test_ranks_give_what_one_process_gives(ranks, name: str) -> None:
    size, folder = ranks
    y, d_x, *rest = whole(name)
    pieces = [torch.load(folder / f"{name}.{size}.{rank}") for rank in range(size)]
    close(torch.cat([own[0] for own, _ in pieces], 1), y)
    close(torch.cat([own[1] for own, _ in pieces], 1), d_x)
    last, sums = pieces[-1]
    for got, want in zip([*sums, *last[2:]], rest, strict=True):
        close(got, want)


def test_one_collective_per_direction_of_the_same_bytes_at_any_length(ranks) -> None:
    size, folder = ranks
    short, long = torch.load(folder / f"traffic.{size}.{0}")
    assert short == long
    for name, calls in long.items():
        assert [kind for kind, _ in calls] == ["all_gather", "backward", "all_gather"], name
    state = 2 * 4 * 4 * 4
    assert long["linear"][0][1] == state + 2 * 4 * 4  # N and one decay per key feature
    assert long["delta"][0][1] == 2 * state  # N and a dense M


def test_too_short_a_piece_is_refused_in_words() -> None:
    with pytest.raises(ShapeError, match="needs at least 3 tokens, this one has 2"):
        split.causal_conv(torch.zeros(1, 2, 4), torch.zeros(4, 4))


def test_an_op_without_a_split_form_is_refused_in_words() -> None:
    layer = importlib.import_module("remanence.ops.expgate")
    q = torch.zeros(1, 1, 2, 4)
    with split.sequence_parallel(), pytest.raises(RemanenceError, match="'expgate' cannot be split over ranks"):
        layer.expgate(q, q, q, q[..., 0], q[..., 0])


def test_the_pair_is_found_beside_the_local_read(tmp_path: Path) -> None:
    """One rank alone: everything that the split adds is still run, on an op's every argument."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 2, 9, 4, generator=g, dtype=torch.float64) for _ in range(3))
        S = {"S": torch.randn(1, 2, 4, 4, generator=g, dtype=torch.float64)}
        beta, decay = torch.rand(1, 2, 9, generator=g).double(), -5 * torch.rand(1, 2, 9, generator=g).double()
        for T in (0, 1, 9):
            args = [x[:, :, :T] for x in (q, 0.4 * k, v, beta, decay)]
            for mine, theirs, a in [
                (split.gated_delta_rule, ops.gated_delta_rule, args),
                (split.linear_attention, ops.linear_attention, [*args[:3], args[4]]),
            ]:
                (y, end), (want, want_end) = mine(*a, S), theirs(*a, S)
                close(y, want)
                close(end["S"], want_end["S"])
    finally:
        dist.destroy_process_group()
