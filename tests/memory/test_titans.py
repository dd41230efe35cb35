import pytest
import torch

from remanence.errors import UnknownName
from remanence.evaluation.proofs.titans import _decay, _told
from remanence.memory.atlas import Atlas, OmegaNet
from remanence.memory.titans import Titans, TitansMAC, TitansMAG, TitansMAL
from remanence.state import concat, flatten, fork, nbytes, select

SMALL = {
    Titans: {"dim": 8, "heads": 2, "expand": 2, "chunk_size": 4},
    TitansMAL: {"dim": 8, "heads": 2, "window": 5, "persistent": 3, "expand": 2, "chunk_size": 4},
    TitansMAG: {"dim": 8, "heads": 2, "window": 5, "persistent": 3, "expand": 2, "chunk_size": 4},
    TitansMAC: {"dim": 8, "heads": 2, "segment": 4, "persistent": 3, "expand": 2},
}
EVERY = pytest.mark.parametrize("kind", SMALL)


def build(kind, **changes):
    torch.manual_seed(0)
    return kind(**{**SMALL[kind], **changes}).double()


def draw(T, batch=2):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, T, 8, generator=g, dtype=torch.float64, requires_grad=True)


def run(memory, x, cuts, state=None):
    pieces = []
    for part in x.tensor_split(cuts, dim=1):
        y, state = memory(part, state)
        pieces.append(y)
    return torch.cat(pieces, 1), state


def grads(memory, x, y, state):
    g = torch.Generator().manual_seed(2)
    parts = [y, *(t for t in flatten(state).values() if t.is_floating_point())]
    total = sum((t * torch.randn(t.shape, generator=g, dtype=t.dtype)).sum() for t in parts)
    return torch.autograd.grad(total, [x, *memory.parameters()])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@EVERY
@pytest.mark.parametrize("cuts", [[5], [0, 4, 4], [1, 2, 3, 11], list(range(1, 13))])
def test_any_cut_gives_the_same(kind, cuts):
    memory, x = build(kind), draw(13)
    want, want_state = memory(x)
    got, got_state = run(memory, x, cuts)
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    close(grads(memory, x, got, got_state), grads(memory, x, want, want_state))


@EVERY
def test_a_lost_state_is_noticed(kind):
    memory, x = build(kind), draw(13)
    want, _ = memory(x)
    tail, _ = memory(x[:, 6:])
    assert (tail - want[:, 6:]).abs().max() > 1e-3


@EVERY
def test_every_parameter_receives_a_gradient(kind):
    memory, x = build(kind), draw(9)
    for name, grad in zip(["x", *dict(memory.named_parameters())], grads(memory, x, *memory(x)), strict=True):
        assert grad.abs().max() > 0, name


@EVERY
def test_the_future_is_not_seen(kind):
    memory, x = build(kind), draw(11)
    want, _ = memory(x)
    for t in (2, 5, 10):
        other = x.detach().clone()
        other[:, t] += 1
        got, _ = memory(other)
        assert torch.equal(got[:, :t], want[:, :t])
        assert (got[:, t] - want[:, t]).abs().max() > 1e-3


@EVERY
def test_rows_may_stand_at_different_positions(kind):
    memory, x = build(kind), draw(12)
    mixed = concat([select(memory(x[:, :3])[1], 0), select(memory(x[:, :6])[1], 1)])
    before = fork(mixed)
    y, after = memory(torch.stack([x[0, 3:9], x[1, 6:]]), mixed)
    close(y[0], memory(x[:, :9])[0][0, 3:])
    close(y[1], memory(x)[0][1, 6:])
    close(flatten(select(after, 1)), flatten(select(memory(x)[1], 1)))
    close(flatten(mixed), flatten(before))
    assert nbytes(after) == nbytes(memory.initial_state(2))


@EVERY
def test_a_monotonous_loud_stream_stays_finite(kind):
    memory = build(kind).float()
    with torch.no_grad():
        y, state = memory(10 * draw(1).float().expand(2, 600, 8))
    assert y.isfinite().all()
    assert all(t.isfinite().all() for t in flatten(state).values())


@pytest.mark.parametrize("changes", [{"layers": 1}, {"layers": 4}, {"momentum": False}, {"chunk_size": 1}])
def test_variants_resume(changes):
    memory, x = build(Titans, **changes), draw(9)
    want, want_state = memory(x)
    got, got_state = run(memory, x, [3, 8])
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    assert ("momentum" in got_state["net"]) == changes.get("momentum", True)


def test_a_segment_of_one_and_half_precision():
    memory, x = build(TitansMAC, segment=1), draw(5)
    close(run(memory, x, [2])[0], memory(x)[0])
    for kind in SMALL:
        y, state = build(kind).bfloat16()(x.bfloat16())
        assert y.dtype == torch.bfloat16
        assert {t.dtype for t in flatten(state).values()} == {torch.float32, torch.int64}


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="dim must be a positive multiple of heads, got dim=10, heads=4"):
        Titans(10)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got layers=2, expand=4, chunk_size=0"):
        Titans(8, chunk_size=0)


COMPOSED = [
    (TitansMAG, {"inner": "atlas", "feature_dim": 2}),
    (TitansMAL, {"inner": "omega-delta"}),
    (TitansMAC, {"inner": "atlas", "feature_dim": 2, "persistent": 0}),
    (TitansMAC, {"inner": "yaad"}),
    (TitansMAC, {"inner": "swla"}),
]


@pytest.mark.parametrize(("kind", "changes"), COMPOSED)
def test_other_memories_in_the_compositions_resume(kind, changes):
    given = {name: value for name, value in SMALL[kind].items() if name not in ("expand", "chunk_size")}
    torch.manual_seed(0)
    memory, x = kind(**(given | changes)).double(), draw(11)
    want, want_state = memory(x)
    got, got_state = run(memory, x, [1, 3, 9])
    close(got, want)
    close(flatten(got_state), flatten(want_state))
    close(grads(memory, x, got, got_state), grads(memory, x, want, want_state))
    other = x.detach().clone()
    other[:, 6] += 1
    assert torch.equal(memory(other)[0][:, :6], want[:, :6])


def test_the_inner_memory_is_the_one_that_was_asked_for():
    """Atlas beside a window, and the queries of what it recalls as wide as its keys before they are lifted."""
    memory = build(TitansMAG, inner="atlas", feature_dim=3)
    assert isinstance(memory.memory, Atlas)
    assert memory.memory.features.features == 10
    context = build(TitansMAC, inner="omeganet", feature_dim=3)
    assert isinstance(context.memory, OmegaNet)
    assert context.query.out_features == 6
    assert context.memory.chunk_size == context.segment == 4
    x = draw(9)
    assert (memory(x)[0] - build(TitansMAG)(x)[0]).abs().max() > 1e-3
    with pytest.raises(UnknownName, match="did you mean 'atlas'"):
        build(TitansMAG, inner="atlass")
    with pytest.raises(ValueError, match="TitansMAL: inner must be a memory that is a FastWeightMemory, got 'retnet'"):
        build(TitansMAL, inner="retnet")
    with pytest.raises(ValueError, match="TitansMAC: a segment is a chunk of the inner memory, and 'omega-delta' has"):
        build(TitansMAC, inner="omega-delta")


def test_decay_turns_to_a_map_that_has_changed():
    assert _decay(True) <= 0.06
    assert _decay(False) >= 0.4


def test_noise_takes_the_place_of_the_pause_alone():
    batch = _told(50, 3, torch.Generator().manual_seed(0))
    noise = batch.inputs[:, 8:58]
    assert batch.inputs.shape == (3, 62)
    assert bool((noise >= 8).all())
    assert noise.unique().tolist() == [8, 9, 10, 11]
    assert bool((batch.inputs[:, :8] < 8).all())
    assert bool((batch.targets[batch.mask] >= 4).all())
