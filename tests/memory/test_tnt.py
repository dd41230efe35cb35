import pytest
import torch
from torch import nn

from remanence.errors import UnknownName
from remanence.evaluation.proofs.tnt import tnt
from remanence.memory.tnt import TNT, refine
from remanence.ops.fast_weight import fast_weight, fast_weight_state
from remanence.state import concat, flatten, nbytes, select

SMALL = {"dim": 8, "heads": 2, "expand": 2, "global_chunk": 5, "local_chunks": (2, 4), "shard": 8}


def build(**changes):
    torch.manual_seed(0)
    return TNT(**{**SMALL, **changes}).double()


def draw(T, batch=2):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, T, 8, generator=g, dtype=torch.float64, requires_grad=True)


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def run(memory, x, cuts):
    pieces, state = [], None
    for part in x.tensor_split(cuts, dim=1):
        y, state = memory(part, state)
        pieces.append(y)
    return torch.cat(pieces, 1), state


@pytest.mark.parametrize("projection", ["sum", "delta", "none"])
@pytest.mark.parametrize("cuts", [[3, 19], [8, 16], [7, 8, 9], list(range(1, 27))])
def test_parallel_shards_are_the_sequence_with_resets(projection, cuts):
    memory, x = build(projection=projection), draw(27)
    want, want_state = memory(x)
    got, got_state = run(memory, x, cuts)
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    leaves = [x, *memory.parameters()]
    close(torch.autograd.grad(got.sin().sum(), leaves), torch.autograd.grad(want.sin().sum(), leaves))


def test_the_local_part_is_a_reset_memory_per_shard():
    memory = build(projection="none", local_chunks=(4,))
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 2, 20, 4, generator=g, dtype=torch.float64) for _ in range(3))
    step = torch.rand(2, 2, 20, generator=g, dtype=torch.float64)
    got, state = memory.shards([q, k, v, step], memory.fresh(2), 0)
    want = []
    for part in zip(*(x.split(8, 2) for x in (q, k, v, step)), strict=True):
        start = fast_weight_state(list(memory.starts[1]), 2, momentum=False)
        y, end = fast_weight(*part, start, chunk_size=4, residual=True, bound=0.5)
        want.append(y)
    close(got, torch.cat(want, 2))
    close(flatten(state["local"]["0"]), flatten(end))


def test_every_start_learns_from_every_shard():
    memory, x = build(global_chunk=2), draw(24)
    for at in (0, 8, 16):
        y, _ = memory(x)
        for start in memory.starts:
            grads = torch.autograd.grad(y[:, at : at + 8].sin().sum(), list(start), retain_graph=True)
            assert all(g.abs().max() > 0 for g in grads)


def test_the_global_memory_is_read_as_its_chunk_began():
    """Within the first chunk nothing that was written to it is read."""
    memory, x = build(global_chunk=16, local_chunks=(), conv=1), draw(20)
    y, _ = memory(x)
    (grad,) = torch.autograd.grad(y[:, 8].sum(), x, retain_graph=True)
    assert not grad[:, :8].any()
    (grad,) = torch.autograd.grad(y[:, 17].sum(), x)
    assert grad[:, :8].abs().max() > 1e-6


def test_the_delta_projection_leaves_a_written_key_as_it_is():
    memory = build(projection="delta", local_chunks=(4,))
    k = nn.functional.normalize(torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(3)).double(), dim=-1)
    state = memory.fresh(1)
    for name in ("anchor", "weight"):
        state["local"]["0"][name] = {i: torch.zeros_like(W) for i, W in state["local"]["0"][name].items()}
    y, _ = memory.near([k, k, k, k.new_zeros(1, 2, 6)], state)  # an empty network gives back its query
    close(y, k)
    summed, _ = build(projection="sum", local_chunks=(4,)).near([k, k, k, k.new_zeros(1, 2, 6)], state)
    assert (summed - k).abs().max() > 0.1


def test_rows_may_stand_at_different_positions_and_nothing_grows():
    memory, x = build(), draw(30)
    mixed = concat([select(memory(x[:, :3])[1], 0), select(memory(x[:, :14])[1], 1)])
    y, after = memory(torch.stack([x[0, 3:19], x[1, 14:]]), mixed)
    close(y[0], memory(x[:, :19])[0][0, 3:])
    close(y[1], memory(x)[0][1, 14:])
    assert nbytes(after) == nbytes(memory.initial_state(2))


def test_refining_halves_every_layer_down_to_one():
    model = nn.Sequential(build(), nn.Linear(8, 8), build(local_chunks=(1, 8)))
    state = model[0](draw(9))[1]
    assert refine(model) == [(1, 2), (1, 4)]
    assert refine(model) == [(1, 1), (1, 2)]
    assert refine(model) == [(1, 1), (1, 1)]
    model[0](draw(9), state)
    y, _ = model[0](draw(9))
    close(run(model[0], draw(9), [4])[0], y)


def test_a_monotonous_loud_stream_stays_finite():
    memory = build(projection="sum").float()
    with torch.no_grad():
        y, state = memory(10 * draw(1).float().expand(2, 300, 8))
    assert y.isfinite().all()
    assert all(t.isfinite().all() for t in flatten(state).values())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"local chunks must divide the shard of 8, got \(3,\)"):
        build(local_chunks=(3,))
    with pytest.raises(ValueError, match=r"all sizes must be at least 1, got .*global_chunk=0"):
        build(global_chunk=0)
    with pytest.raises(UnknownName, match="did you mean 'delta'"):
        build(projection="delt")


def test_the_proof():
    system, control = tnt()
    assert system.holds
    assert not control.holds
