import pytest

from remanence.errors import UnknownName
from remanence.models.hybrid import hybrid_stack
from remanence.models.language import LanguageModel, parse_pattern


def drawn(*args, **kwargs):
    letters = {"gla": "L", "sliding-window": "F"}
    return "".join(letters[name] for name in parse_pattern(hybrid_stack("gla", "sliding-window", *args, **kwargs)))


@pytest.mark.parametrize(
    ("ratio", "placement", "layers", "want"),
    [
        ("3:1", "last-of-group", 8, "LLLFLLLF"),
        ("3:1", "first-of-group", 8, "FLLLFLLL"),
        ("3:1", "bottom", 8, "FFLLLLLL"),
        ("3:1", "middle", 8, "LLLFFLLL"),
        ("3:1", "top", 8, "LLLLLLFF"),
        ("3:1", "last-of-group", 6, "LLLFLL"),
        ("1:2", "last-of-group", 3, "LFF"),
        ("1:0", "last-of-group", 3, "LLL"),
        ("0:1", "top", 3, "FFF"),
        ("24:1", "last-of-group", 25, 24 * "L" + "F"),
    ],
)
def test_stacks(ratio, placement, layers, want):
    assert drawn(ratio, placement, layers=layers) == want


def test_a_stack_is_a_model():
    model = LanguageModel(hybrid_stack("min-lstm", "sliding-window", "1:1", layers=2), dim=8)
    assert [type(m).__name__ for m in model.memories] == ["MinLSTM", "WindowAttention"]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"ratio": "three"}, "'3:1'"),
        ({"ratio": "0:0"}, "'3:1'"),
        ({"placement": "last"}, "last-of-group"),
        ({"ratio": "6:1", "layers": 4}, "at least 7 layers"),
    ],
)
def test_impossible_stacks_are_refused(how, said):
    with pytest.raises(ValueError, match=said):
        hybrid_stack("gla", "sliding-window", **how)


def test_unknown_members_suggest_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'gla'"):
        hybrid_stack("glaa", "sliding-window")
