import pytest
import torch

from remanence.streams.grammar import Grammar

GRAMMARS = [
    Grammar(),
    Grammar(9, 6, 4, gap=0.6, gap_prob=0.5),
    Grammar(9, 6, 4, gap=0.6, distractors=True, density=0.2, seed=3),
    Grammar(6, 0, 1, gap=0.0),
    Grammar(12, 11, 3, gap=0.4, gap_start=10, seed=5),
]


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("grammar", GRAMMARS, ids=repr)
def test_the_hidden_state_follows_from_the_past_and_gaps_never_touch_it(grammar):
    drawn = grammar.draw(20, 80, generator(0))
    assert torch.equal(grammar.track(drawn.symbols), drawn.states)
    begins = drawn.elements.diff(dim=1, prepend=drawn.elements[:, :1] - 1) == 1
    before = torch.cat([torch.zeros(20, 1, dtype=torch.long), drawn.states[:, :-1]], 1)
    assert (grammar.table[before, drawn.symbols.clamp(min=0)][begins] == drawn.states[begins]).all()
    gaps = ~begins
    assert (drawn.states == before)[gaps].all()
    if grammar.distractors:
        assert (drawn.symbols[gaps] >= 0).any()
        assert (grammar.table[drawn.states, drawn.symbols.clamp(min=0)][gaps & (drawn.symbols >= 0)] == -1).all()
    else:
        assert (drawn.symbols[gaps] == -1).all()
        assert (drawn.inputs[gaps] == 0).all()
    assert (drawn.inputs.argmax(-1) == drawn.symbols)[begins].all()


def test_tables_allow_one_copy_per_symbol_and_all_states_end():
    grammar = Grammar(8, 5, 4, density=0.2, seed=1)
    table, symbol = grammar.table, grammar.symbol_of
    assert table.shape == (1 + 5 * 4 + 2, 8)
    for s in range(8):
        to = table[:, s][table[:, s] >= 0]
        assert (symbol[to] == s).all()
    assert (table[0, 0] == -1).all()
    assert (table[0] >= 0).sum() == grammar.starts
    chain = grammar.chain.matrix_power(200)
    assert (chain[:, 0] > 0).all()
    assert torch.allclose(grammar.stationary @ grammar.chain, grammar.stationary, atol=1e-12)
    assert not torch.equal(Grammar(8, 5, 4, density=0.2, seed=2).table, table)


def test_the_density_of_transitions_grows_with_the_copies():
    tables = [Grammar(20, 10, 2, density=0.3, seed=s).table[1:] >= 0 for s in range(10)]
    share = torch.stack(tables).double().mean((0, 1))
    assert abs(share[1:11].mean() - 0.6) < 0.05
    assert abs(share[11:].mean() - 0.3) < 0.05


def test_gaps_have_the_lengths_and_places_asked_for():
    def gaps(**how):
        drawn = Grammar(9, 4, 4, **how).draw(50, 400, generator(1))
        counts = [row.bincount()[:-1] - 1 for row in drawn.elements]
        return torch.cat(counts), counts

    lengths, _ = gaps(gap=0.5)
    assert sorted(lengths.unique().tolist()) == [1, 2, 3, 4, 5]
    assert gaps(gap=0.5, fixed_gap=True)[0].unique().tolist() == [5]
    assert gaps(gap=0.0)[0].unique().tolist() == [0]
    lengths, _ = gaps(gap=0.1, gap_prob=0.25)
    assert 0.2 < lengths.double().mean() < 0.3
    _, rows = gaps(gap=0.2, gap_start=30)
    assert all((row[:30] == 0).all() and (row[30:] > 0).all() for row in rows)


def test_noise_is_uniform_and_added():
    quiet, noisy = (Grammar(noise=n).draw(8, 50, generator(2)) for n in (0.0, 0.2))
    assert (quiet.inputs.sum(-1) <= 1).all()
    rest = noisy.inputs - torch.nn.functional.one_hot(noisy.symbols + 1, 10)[..., 1:]
    assert float(rest.min()) >= -1e-6
    assert 0.19 < float(rest.max()) <= 0.2 + 1e-6
    assert abs(float(rest.mean()) - 0.1) < 0.005


def test_the_floor_is_what_the_best_guess_from_the_symbol_gets():
    grammar = Grammar(9, 6, 4, gap=0.0)
    best = torch.stack([torch.where(grammar.symbol_of == s, grammar.stationary, -1).argmax() for s in range(9)])
    drawn = grammar.draw(100, 400, generator(3))
    late = slice(100, None)
    share = float((best[drawn.symbols] == drawn.states)[:, late].double().mean())
    assert abs(share - grammar.floor) < 0.02
    assert Grammar(6, 0, 1).floor == pytest.approx(1)


@pytest.mark.parametrize(
    "how", [{"ambiguities": 9}, {"depth": 0}, {"starts": 9}, {"gap": -1.0}, {"gap_prob": 2.0}, {"noise": -0.1}]
)
def test_impossible_grammars_are_refused(how):
    with pytest.raises(ValueError, match="Grammar"):
        Grammar(**how)


def test_a_density_that_leaves_no_way_out_says_so():
    with pytest.raises(ValueError, match="raise density"):
        _ = Grammar(density=0.0).table
