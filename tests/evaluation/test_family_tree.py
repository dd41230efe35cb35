import pytest

from remanence import catalogue
from remanence.evaluation.diagnostics import family_tree
from remanence.evaluation.diagnostics.family_tree import COSTS, KIN, TAGS, Member, family, tree, walk
from remanence.evaluation.diagnostics.reductions import REDUCTIONS


@pytest.mark.parametrize("pair", REDUCTIONS, ids=" = ".join)
def test_a_member_with_its_change_undone_is_its_relative(pair):
    undone, kept = REDUCTIONS[pair]()
    assert undone < 1e-9
    assert kept > 1e-2


def test_every_system_of_the_family_has_a_place():
    members = family()
    missing = [s.id for s in catalogue.systems().values() if s.family == "linear" and s.id not in members]
    assert set(missing) <= {"survey-s4", "mqar", "state-tracking", "copying"}
    for id, member in members.items():
        assert id in catalogue.systems()
        assert bool(member.parents) == bool(member.change), f"{id}: parents and change go together"
        assert set(member.parents) <= set(members)
        assert member.tag in TAGS
    assert {kin.primitive for kin in KIN.values()} <= set(COSTS)


def test_each_member_stands_once_below_its_first_parent():
    walked = list(walk(family()))
    assert len({m.id for _, m in walked}) == len(walked) == len(family())
    path = []
    for depth, member in walked:
        path[depth:] = [member.id]
        assert member.parents[:1] == tuple(path[depth - 1 : depth] if depth else [])


def test_nothing_is_told_twice():
    told = {c.system.id for c in catalogue.cards().values() if c.parents}
    assert [id for id in told & KIN.keys() if KIN[id].parents or KIN[id].change] == []


def test_cards_go_before_the_table(monkeypatch):
    monkeypatch.setitem(KIN, "mamba2", family_tree.Kin("outer", "selective", ("softmax",), "nonsense"))
    assert family()["mamba2"].parents == ("mamba",)


def test_circles_and_strangers_are_named():
    def member(id, *parents):
        return Member(id, parents, "", "LTI", "", "")

    with pytest.raises(ValueError, match="a, b descend from themselves"):
        list(walk({"a": member("a", "b"), "b": member("b", "a")}))
    with pytest.raises(ValueError, match="no 'x', which 'a' names"):
        list(walk({"a": member("a", "x")}))


def test_the_tree_as_text():
    lines = tree()
    assert "softmax [attention; 4 w K flops, 2 w K numbers]" in lines
    (gla,) = [line for line in lines if line.lstrip().startswith("gla ")]
    assert gla.startswith("      gla [selective; 5 K V flops, K V numbers]: the decay is chosen by the input")
