"""Documents fetch their own blocks; nothing else is read, trained or moved."""

import pytest
import torch
from torch import nn

from remanence.errors import ShapeError, StateError
from remanence.learning import Learner
from remanence.models.hierarchical_memories import ClusterTree, HierarchicalMemories, MemoryBank, forgo, side_units
from remanence.models.language import LanguageModel
from remanence.optim import AdamW, BlockAdam, Clock, Clocks
from remanence.state import concat, flatten, select


def documents(seed=0):
    """Six documents in each of nine clusters: three groups far apart, of three near each other."""
    g = torch.Generator().manual_seed(seed)
    centres = 20 * torch.randn(3, 1, 5, generator=g) + 2 * torch.randn(3, 3, 5, generator=g)
    return centres.view(9, 5).repeat_interleave(6, 0) + 0.05 * torch.randn(54, 5, generator=g)


def tree():
    return ClusterTree(5, branch=3, levels=2).fit(documents())


def model(sparse=False):
    torch.manual_seed(0)
    anchor = LanguageModel("2*gla", vocabulary=11, dim=8, ngrams=(), arguments={"gla": {"heads": 2}})
    nn.init.normal_(anchor.head.weight, std=0.3)
    return HierarchicalMemories(anchor, tree(), (2, 3), sparse=sparse)


def filled(sparse=False):
    made = model(sparse)
    with torch.no_grad():
        for p in made.bank.parameters():
            p.normal_(std=0.3)
    return made


def tokens(time=6, rows=2):
    return torch.randint(11, (rows, time), generator=torch.Generator().manual_seed(1))


def test_routes_find_the_clusters():
    routes = tree().route(documents())
    assert torch.equal(routes[:, 0], routes[:, 1] // 3)
    groups = routes.view(9, 6, 2)
    assert (groups == groups[:, :1]).all()
    assert len(groups[:, 0, 1].unique()) == 9
    assert len(groups[:, 0, 0].unique()) == 3
    with pytest.raises(ShapeError, match="embeddings"):
        tree().route(torch.zeros(2, 4))


def test_new_blocks_change_nothing_and_filled_ones_do():
    for made, same in ((model(), True), (filled(), False)):
        state = made.routed(made.initial_state(2), documents()[[0, 40]])
        y, after = made(tokens(), state)
        want, inner = made.model(tokens())
        assert torch.equal(y, want) == same
        if same:
            assert all(
                torch.equal(a, b)
                for a, b in zip(flatten(after["model"]).values(), flatten(inner).values(), strict=True)
            )


def test_side_units_are_their_formula():
    x, w = torch.randn(3, 4, 8), torch.randn(3, 3, 5, 8)
    y = side_units(x, w)
    for b in range(3):
        gate, up, down = w[b]
        want = (nn.functional.silu(x[b] @ gate.T) * (x[b] @ up.T)) @ down
        torch.testing.assert_close(y[b], want)
    torch.testing.assert_close(side_units(x[:, 0], w), y[:, 0])


@pytest.mark.parametrize("sparse", [False, True])
def test_what_was_not_fetched_has_no_gradient_and_stays_as_it_was(sparse):
    made = filled(sparse)
    optimizer = BlockAdam(made.bank.parameters(), 0.01)
    for at in (0, 40, 0):
        state = made.routed(made.initial_state(1), documents()[[at]])
        before = [table.detach().clone() for table in made.bank.tables]
        moments = [optimizer.state[table]["first"].clone() for table in made.bank.tables]
        optimizer.zero_grad()
        made(tokens(rows=1), state)[0].square().sum().backward()
        optimizer.step()
        for level, table in enumerate(made.bank.tables):
            gradient = table.grad.to_dense() if sparse else table.grad
            own = torch.arange(len(table)) == state["route"][0, level]
            assert table.grad.is_sparse == sparse
            assert torch.equal(gradient.any(1), own)
            assert torch.equal((table.detach() != before[level]).any(1), own)
            assert torch.equal((optimizer.state[table]["first"] != moments[level]).any(1), own)
        assert made.bank.generic.grad is None


def test_sparse_and_dense_gradients_take_the_same_steps_as_adam():
    ends = []
    for kind in ("dense", "sparse", "adam"):
        made = filled(kind == "sparse")
        tables = list(made.bank.tables)
        make = (
            (lambda ps: torch.optim.Adam(ps, 0.01, betas=(0.9, 0.98)))
            if kind == "adam"
            else lambda ps: BlockAdam(ps, 0.01)
        )
        optimizer = make(tables)
        for _ in range(4):
            optimizer.zero_grad()
            made(tokens(), made.routed(made.initial_state(2), documents()[[0, 40]]))[0].square().sum().backward()
            optimizer.step()
        ends.append([t.detach() for t in tables])
    for a, b, c in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


def test_rows_have_routes_of_their_own_and_forgo_them():
    made = filled()
    state = made.routed(made.initial_state(3), documents()[[0, 20, 40]])
    state["route"][1] = -1
    y, after = made(tokens(rows=3), state)
    for i in range(3):
        alone, _ = made(tokens(rows=3)[i : i + 1], select(state, i))
        torch.testing.assert_close(alone[0], y[i])
    generic, _ = made(tokens(rows=3), made.initial_state(3))
    torch.testing.assert_close(generic[1], y[1])
    assert (generic[0] - y[0]).abs().max() > 1e-3
    assert torch.equal(concat([select(after, [0]), select(after, [1, 2])])["route"], state["route"])
    gone = forgo(torch.zeros(17000, 2, dtype=torch.long), 1 / 17, torch.Generator().manual_seed(0))
    assert 900 < (gone[:, 0] == -1).sum() < 1100
    assert torch.equal(gone[:, 0], gone[:, 1])


def test_it_resumes_and_refuses_foreign_states():
    made, text = filled(), tokens(9)
    state = made.routed(made.initial_state(2), documents()[[0, 40]])
    want, _ = made(text, state)
    first, between = made(text[:, :4], state)
    torch.testing.assert_close(torch.cat([first, made(text[:, 4:], between)[0]], 1), want)
    foreign = [made.initial_state(3), {"model": state["model"]}, {**state, "route": state["route"][:, :1]}]
    for wrong in [*foreign, {**state, "route": state["route"].float()}]:
        with pytest.raises(StateError):
            made(text, wrong)


def test_a_learner_trains_it_and_restarts_exactly(tmp_path):
    def learner():
        made = filled()
        rest = [p for n, p in made.named_parameters() if not n.startswith("bank.tables")]
        one = Learner(made, Clocks(Clock(rest, 1, AdamW), Clock([*made.bank.tables], 2, BlockAdam)))
        one.state = made.routed(made.initial_state(1), documents()[[40]])
        return one

    text = tokens(60, 1).split(6, dim=1)
    whole = learner()
    for piece in text[:5]:
        whole.observe(piece)
    whole.save(tmp_path / "cut")
    back = learner()
    back.load(tmp_path / "cut")
    ends = [torch.cat([who.observe(piece).bits for piece in text[5:]], 1) for who in (whole, back)]
    assert torch.equal(*ends)


def test_tables_on_disk_are_the_same_and_learn_there(tmp_path):
    made = filled()
    state = made.routed(made.initial_state(2), documents()[[0, 40]])
    want, _ = made(tokens(), state)
    made.bank.on_disk(tmp_path)
    assert torch.equal(made(tokens(), state)[0], want)
    optimizer = BlockAdam(made.bank.tables, 0.01)
    made(tokens(), state)[0].square().sum().backward()
    optimizer.step()
    table = made.bank.tables[1]
    kept = torch.from_file(str(tmp_path / "level2.bin"), size=table.numel()).view(table.shape)
    assert torch.equal(kept, table)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="branch=0"):
        MemoryBank(8, (2,), branch=0)
    with pytest.raises(ValueError, match="levels=0"):
        ClusterTree(5, levels=0)
    with pytest.raises(ValueError, match=r"2 levels, but ranks are \(1,\)"):
        HierarchicalMemories(model().model, tree(), (1,))
    with pytest.raises(ValueError, match="betas"):
        BlockAdam([nn.Parameter(torch.zeros(2, 2))], betas=(1.0, 0.5))
