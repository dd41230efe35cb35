"""States as data: their form, and what is refused."""

import copy

import pytest
import torch

from remanence.errors import StateError
from remanence.memory import make
from remanence.state import check_state, fits, form

LIKE = {"h": torch.zeros(2, 3), "inner": {"count": torch.zeros(2, dtype=torch.int64)}, "off": {}}


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ({"h": torch.zeros(2, 3, dtype=torch.int64)}, "'h' must be floating, got torch.int64"),
        ({"inner": {"count": torch.zeros(2)}}, "'inner.count' must be integer, got torch.float32"),
        ({"inner": {"count": torch.zeros(2, dtype=torch.bool)}}, "must be integer, got torch.bool"),
        ({"h": torch.zeros(2, 3, dtype=torch.complex64)}, "must be floating, got torch.complex64"),
        ({"h": torch.zeros(2, 4)}, "must be \\[2, 3\\], got \\[2, 4\\]"),
        ({"h": {"h": torch.zeros(2, 3)}}, "has no 'h'"),
        ({"more": torch.zeros(2, 3)}, "'more' is not expected"),
    ],
)
def test_names_shapes_and_kinds_are_checked(odd, says):
    with pytest.raises(StateError, match=says):
        check_state("Layer", LIKE | odd, LIKE)
    assert not fits(LIKE | odd, form(LIKE), 2)


def test_precision_may_differ_but_not_the_batch():
    wide = LIKE | {"h": LIKE["h"].double()}
    check_state("Layer", wide, LIKE)
    assert fits(wide, form(LIKE), 2)
    assert not fits(wide, form(LIKE), 3)


def test_decoding_builds_no_initial_state_and_still_refuses_what_is_foreign():
    memory = make("gla", 16)
    _, state = memory(torch.zeros(2, 1, 16))
    for same in (memory, copy.deepcopy(memory), copy.deepcopy(memory).double()):
        same.initial_state = pytest.fail
        same(torch.zeros(2, 1, 16, dtype=next(same.parameters()).dtype), state)
        del same.initial_state
        with pytest.raises(StateError, match="another width or batch"):
            same(torch.zeros(3, 1, 16, dtype=next(same.parameters()).dtype), state)
