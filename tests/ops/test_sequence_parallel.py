"""A sequence split over 2 and 4 processes gives what one process gives, and the bytes do not depend on its length."""

from __future__ import annotations

from functools import partial
from multiprocessing import set_forkserver_preload
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from remanence import catalogue, ops
from remanence.errors import RemanenceError, ShapeError
from remanence.memory import make
from remanence.memory.base import Memory
from remanence.models.language import LanguageModel
from remanence.models.lasp2 import run_split
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


def model() -> LanguageModel:
    given = {"gated-deltanet": {"heads": 2}, "sliding-window": {"heads": 2, "window": 9}}
    lm = LanguageModel("gated-deltanet, griffin, sliding-window", vocabulary=9, dim=8, ngrams=(2, 3), arguments=given)
    lm.head.weight.data.normal_()
    return lm


def registered(name: str) -> Memory:
    card = catalogue.find(name, "memory")
    return card.make(**{**card.small, "dim": 8})


REGISTERED = ["rwkv7", "rwkv6", "kimi-delta", "lru", "s4d", "s7", "lssl", "gsa", "xlstm-7b", "rwkv", "aaren", "mesa"]
EXTRA = {
    **{id: partial(registered, id) for id in REGISTERED},
    "gateloop": lambda: make("gateloop", 8),
    "model": model,
    "shift": lambda: Shifted(8),
    "mamba": lambda: Bare("mamba"),
    "dplr": lambda: Bare("dplr"),
}


def small(name: str) -> Memory:
    torch.manual_seed(1)
    memory = (EXTRA[name]() if name in EXTRA else make(name, 8, **MEMORIES[name])).double()
    for p in memory.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return memory


def cases(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(2)
    x, weight, past = (torch.randn(2, time, 8, generator=g, dtype=torch.float64) for time in (24, 24, 7))
    if name == "model":
        x, past = (torch.randint(9, t.shape[:2], generator=g) for t in (x, past))
        weight = torch.cat([weight, weight[..., :1]], -1)
    with torch.no_grad():
        state = small(name)(past)[1]
    return x, weight, flatten(state)


def whole(name: str) -> tuple[Tensor, ...]:
    """Outputs, the input's gradient, and the gradients of parameters and state, on one machine."""
    memory, (x, weight, state) = small(name), cases(name)
    x.requires_grad_(x.is_floating_point())
    floats = [t.requires_grad_() for t in state.values() if t.is_floating_point()]
    y, end = memory(x, unflatten(state))
    leaves = [*[x][: x.requires_grad], *floats, *memory.parameters()]
    loss = (y * weight).sum() + sum(t.square().sum() for t in flatten(end).values() if t.is_floating_point())
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    grads = grads if x.requires_grad else (x, *grads)
    return (y.detach(), *grads, *(t.detach() for t in flatten(end).values()))


def work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{size}", rank=rank, world_size=size)
    for name in [*MEMORIES, *EXTRA]:
        memory, (x, weight, state) = small(name), cases(name)
        mine = slice(rank * 24 // size, (rank + 1) * 24 // size)
        x = x[:, mine].clone().requires_grad_(x.is_floating_point())
        floats = [t.requires_grad_() for t in state.values() if t.is_floating_point()]
        y, end = run_split(memory, x, unflatten(state))
        leaves = [*[x][: x.requires_grad], *floats, *memory.parameters()]
        ends = sum(t.square().sum() for t in flatten(end).values() if t.is_floating_point())
        loss = (y * weight[:, mine]).sum() + (ends if rank == size - 1 else 0 * ends)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        d_x, *grads = grads if x.requires_grad else (x, *grads)
        grads = [grad.contiguous() for grad in grads]
        for grad in grads:
            dist.all_reduce(grad)
        mine_only = [y.detach(), d_x, *(t.detach() for t in flatten(end).values())]
        torch.save((mine_only, grads), f"{folder}/{name}.{size}.{rank}")
    group = Counted(dist.group.WORLD)
    torch.save([traffic(group, T) for T in (3, 50)], f"{folder}/traffic.{size}.{rank}")
    dist.destroy_process_group()


class Counted:
    """A group that notes what it is asked to do."""

    def __init__(self, group):
        self.group, self.calls = group, []

    def allgather(self, out, x):
        self.calls.append(("allgather", x[0].nbytes))
        return self.group.allgather(out, x)

    def __getattr__(self, name):
        if name not in ("rank", "size"):
            self.calls.append((name, 0))
        return getattr(self.group, name)


def traffic(group: Counted, T: int) -> dict[str, list[tuple[str, int]]]:
    g = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(1, 2, T, 4, generator=g, requires_grad=True) for _ in range(3))
    decay, beta = -torch.rand(1, 2, T, generator=g), torch.rand(1, 2, T, generator=g)
    found = {}
    for name, run in {
        "linear": lambda: split.linear_attention(q, k, v, group=group),
        "per head": lambda: split.linear_attention(q, k, v, decay, group=group),
        "per key": lambda: split.linear_attention(q, k, v, decay[..., None].expand_as(k), group=group),
        "delta": lambda: split.gated_delta_rule(q, 0.3 * k, v, beta, decay, group=group),
        "scan": lambda: split.scan(decay.expand(2, 2, T).mT, v[0, :, :, :2], group=group),
        "complex": lambda: split.complex_scan(torch.complex(q[0], k[0]).sigmoid(), v[0] + 0j, group=group),
        "slots": lambda: split.slots(q, k, v, k.sigmoid(), decay[..., None].expand_as(k), group=group),
        "exponential gates": lambda: split.expgate(q, k, v, decay, beta, group=group),
        "softmax average": lambda: split.softmax_scan(k[0], v[0] + q[0], group=group),
    }.items():
        y, _ = run()
        group.calls.append(("backward", 0))
        y.abs().square().sum().backward()
        found[name] = list(group.calls)
        group.calls.clear()
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
        assert [kind for kind, _ in calls] == ["allgather", "backward", "allgather"], name
    state = 2 * 4 * 4 * 4
    assert long["linear"][0][1] == state + 2 * 4 * 4  # N and one decay per key feature
    assert long["delta"][0][1] == 2 * state  # N and a dense M


def test_too_short_a_piece_is_refused_in_words() -> None:
    with pytest.raises(ShapeError, match="needs at least 3 tokens, this one has 2"):
        split.causal_conv(torch.zeros(1, 2, 4), torch.zeros(4, 4))


def test_an_op_without_a_split_form_is_refused_in_words() -> None:
    with split.sequence_parallel(), pytest.raises(RemanenceError, match="'legs' cannot be split over ranks"):
        ops.legs(torch.zeros(1, 2, 4), 3)


@pytest.mark.parametrize("name", ["gateloop", "lightnet", "lizard", "mom", "softmax", "resona", "titans"])
def test_what_cannot_be_split_is_refused_before_anything_is_sent(name: str) -> None:
    card = catalogue.find(name, "memory")
    torch.manual_seed(0)
    memory = card.make(**card.small)
    with pytest.raises(RemanenceError, match="cannot be split over ranks"):
        run_split(memory, torch.randn(2, 12, memory.dim), group=Nobody())


class Nobody:
    """A group that nobody answers in."""

    def rank(self):
        return 1

    def size(self):
        return 2


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
