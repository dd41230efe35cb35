import pytest
import torch

from remanence.catalogue import cards
from remanence.errors import StateError, UnknownName
from remanence.memory import make
from remanence.memory.memory_caching import BLOCK, READERS, MemoryCaching
from remanence.ops.taps import tap
from remanence.state import concat, flatten, fork, nbytes, select

BASES = {
    "linear-attention": {"heads": 2},
    "titans": {"heads": 2, "expand": 2, "chunk_size": 3},
    "ttt-mlp": {"heads": 2, "chunk_size": 3},
    "mesa": {"heads": 2},
    "mamba": {},
    "sliding-window": {"heads": 2, "window": 3},
}
BY_QUERY = [*BASES][:4]


def build(memory, variant="gated", **changes):
    torch.manual_seed(0)
    return MemoryCaching(8, memory=memory, arguments=BASES[memory], variant=variant, segment=4, **changes).double()


def draw(T, batch=2, seed=1):
    return torch.randn(batch, T, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def in_pieces(memory, x, cuts):
    out, state = [], None
    for piece in x.tensor_split(cuts, 1):
        y, state = memory(piece, state)
        out.append(y)
    return torch.cat(out, 1), state


CASES = [(m, "gated", {}) for m in BASES] + [(m, "soup", {}) for m in BY_QUERY]
CASES += [("titans", "sparse", {"top": 1}), ("mamba", "sparse", {"top": 1}), ("titans", "residual", {})]
CASES += [("ttt-mlp", "gated", {"independent": True}), ("mamba", "average", {"max_segments": 2})]


@pytest.mark.parametrize("name", ["linear-attention", "gated-deltanet", "mesa", "titans", "ttt", "ttt-mlp"])
@pytest.mark.parametrize("read", [1, 4, 5])
def test_a_reader_finds_in_a_state_what_the_op_read_of_it(name, read):
    torch.manual_seed(0)
    memory, found = make(name, 8, **BASES.get(name, {"heads": 2})).double(), []

    def compare(call):
        if call.op not in READERS:
            return call.run()
        (y, after), reader = call.run(), READERS[call.op]
        found.append((reader.read(call.arguments, reader.weights(call.arguments, after)), y))
        return y, after

    _, state = memory(draw(read))
    with tap(compare):
        memory(draw(1, seed=2), state)
    ((got, want),) = found
    close(got, want)


@pytest.mark.parametrize(("memory", "variant", "changes"), CASES)
def test_any_memory_any_variant_any_cut(memory, variant, changes):
    caching, x = build(memory, variant, **changes), draw(15).requires_grad_()
    want, want_state = caching(x)
    got, state = in_pieces(caching, x, [1, 2, 8, 11])
    close(got, want)
    close(flatten(state), flatten(want_state))
    leaves = [x, caching.score.weight]
    mine, theirs = (torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True) for y in (got, want))
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b)


@pytest.mark.parametrize("memory", BASES)
def test_within_the_first_segment_it_is_the_memory_itself(memory):
    caching, x = build(memory), draw(9)
    close(caching(x[:, :4])[0], caching.memory(x[:, :4])[0])
    assert (caching(x)[0][:, 4:] - caching.memory(x)[0][:, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("memory", BASES)
def test_growth_is_as_declared(memory):
    caching = build(memory).float()
    blank = nbytes(caching.initial_state(2)["memory"])
    fixed = nbytes(caching.initial_state(2)) - blank
    sizes = set()
    for T in (0, 3, 4, 16, 17, 60):
        state = caching(draw(T).float())[1]
        room = BLOCK * -(-(T // 4) // BLOCK)
        assert state["means"].shape == (2, room, 8)
        assert all(t.shape[1] == room for t in flatten(state["kept"]).values())
        grown = nbytes(state) - fixed - nbytes(state["memory"])
        sizes.add(grown / room if room else None)
    sizes.discard(None)
    assert len(sizes) == 1
    assert nbytes(build(memory, max_segments=3)(draw(60))[1]) == nbytes(build(memory, max_segments=3)(draw(4))[1])


def test_only_what_is_read_is_kept():
    kept = build("titans")(draw(4))[1]["kept"]["0"]
    assert {n: tuple(t.shape) for n, t in kept.items()} == {"0": (2, BLOCK, 2, 8, 4), "1": (2, BLOCK, 2, 4, 8)}


def test_a_soup_of_matrices_is_the_gated_mix_and_of_networks_it_is_not():
    for memory, equal in {"linear-attention": True, "titans": False, "mesa": False}.items():
        gated, soup = build(memory), build(memory, "soup")
        x = draw(14)
        gap = (gated(x)[0] - soup(x)[0]).abs().max()
        assert gap < 1e-12 if equal else gap > 1e-6


def test_sparse_reads_those_it_scores_highest_and_all_where_there_are_few():
    x = draw(23)
    close(build("titans", "sparse", top=5)(x)[0], build("titans")(x)[0])
    caching = build("titans", "sparse", top=2)
    state = caching(x)[1]
    gates = caching._gates(x, x, state["means"], state["pos"] // 4)
    full = build("titans")._gates(x, x, state["means"], state["pos"] // 4)
    assert ((gates > 0).sum(-1) == 3).all()
    best = full[..., :-1].topk(2).indices
    assert (gates.gather(-1, best) > 0).all()


def test_the_mean_of_the_live_segment_runs():
    caching, x = build("linear-attention"), draw(7)
    state = caching(x)[1]
    close(state["means"][:, -1], x[:, :4].mean(1))
    close(state["sum"], x[:, 4:].sum(1))
    other = x.clone()
    other[:, 6] += 1
    close(caching(other)[0][:, :6], caching(x)[0][:, :6])


def test_averaged_states_need_no_training():
    caching, x = build("linear-attention", "average"), draw(9)
    y = caching(x)[0]
    with torch.no_grad():
        caching.score.weight.normal_()
    close(caching(x)[0], y)


def test_rows_of_different_lengths_stand_side_by_side():
    caching, x = build("mesa"), draw(30)
    mixed = concat(caching.level([select(caching(x[:, :3])[1], 0), select(caching(x[:, :22])[1], 1)]))
    before = fork(mixed)
    y, _ = caching(torch.stack([x[0, 3:9], x[1, 22:28]]), mixed)
    close(y, torch.stack([caching(x)[0][0, 3:9], caching(x)[0][1, 22:28]]))
    close(flatten(mixed), flatten(before))


def test_what_it_refuses():
    with pytest.raises(UnknownName, match="did you mean 'gated'"):
        MemoryCaching(8, variant="gatted")
    with pytest.raises(ValueError, match="a soup mixes what queries read, but Mamba has no recurrence"):
        build("mamba", "soup")
    with pytest.raises(ValueError, match="width 8, got 16"):
        MemoryCaching(8, memory=make("linear-attention", 16))
    with pytest.raises(ValueError, match="at least 1, got segment=0"):
        MemoryCaching(8, segment=0)
    caching = build("linear-attention")
    state = caching(draw(3))[1]
    with pytest.raises(StateError, match="0 segments cannot be at token 9"):
        caching(draw(3), {**state, "pos": torch.full((2,), 9)})
    assert cards("memory")["memory-caching"].exempt
