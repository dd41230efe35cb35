"""Decoding of the state spaces and their kin by one compiled call is the full pass, and is left where it may not be."""

from importlib import import_module
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from remanence import catalogue
from remanence.memory import make
from remanence.ops import steps
from remanence.ops.taps import tap
from remanence.state import flatten, fork, tree_map, unflatten

TOKENS = {
    "mamba": ("selective_scan", "token"), "longhorn": ("selective_scan", "token"),
    "s4d": ("complex_scan", "diagonal_token"), "stablessm": ("complex_scan", "diagonal_token"),
    "lru": ("complex_scan", "shared_token"), "s5": ("complex_scan", "shared_token"),
    "s7": ("complex_scan", "chosen_token"), "hippo": ("hippo", "token"), "lssl": ("dense_ssm", "token"),
    "jrt": ("recurrence_steps", "taylor"),
    "mamba2": ("recurrence_steps", "mamba2"), "rwkv": ("recurrence_steps", "rwkv"),
    "rwkv6": ("recurrence_steps", "rwkv6"), "rwkv7": ("recurrence_steps", "rwkv7"),
}  # fmt: skip
VARIANTS = [
    ("hippo", {"measure": "legt"}), ("lssl", {"order": 7, "outputs": 1}),
    ("mamba2", {"norm_groups": 4, "conv_bias": False}), ("mamba2", {"groups": 1, "step_limit": (0.01, 0.05)}),
    ("mamba2", {"conv": 2}), ("rwkv6", {"layer": 1, "decay_rank": 5}), ("rwkv7", {"layer": 1, "layers": 2, "rank": 5}),
    ("mamba", {"norm_eps": 1e-5}), ("mamba", {"conv": 1}), ("longhorn", {"conv": 3, "conv_bias": False}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    """Tokens of any size take the compiled form."""
    torch.manual_seed(0)
    monkeypatch.setattr(steps, "STEP_FROM", 0)


def counted(monkeypatch, id):
    op, name = TOKENS[id]
    kernels = import_module(f"remanence.ops.{op}").kernels
    taken = Mock(side_effect=getattr(kernels, name))
    monkeypatch.setattr(kernels, name, taken)
    return taken


@pytest.mark.parametrize(("id", "changed"), [*((id, {}) for id in TOKENS), *VARIANTS])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_tokens_one_by_one_are_the_full_pass(monkeypatch, id, changed, dtype, near):
    small = catalogue.cards("memory")[id].small | changed
    small |= {"prefix": 2} if id == "jrt" else {}  # which must come in one piece, the first
    memory, taken = make(id, **small).to(dtype), counted(monkeypatch, id)
    x = torch.randn(3, 9, small["dim"], dtype=dtype)
    with torch.no_grad():
        (_, state), (want, end) = memory(x[:, :2]), memory(x)
        y = []
        for token in x[:, 2:].split(1, 1):
            before = fork(state)
            out, after = memory(token, state)
            torch.testing.assert_close(state, before, rtol=0, atol=0)
            state = after
            y.append(out)
    assert taken.call_count == 7
    torch.testing.assert_close(torch.cat(y, 1), want[:, 2:], rtol=near, atol=near)
    torch.testing.assert_close(state, end, rtol=near, atol=near)


@pytest.mark.parametrize("id", TOKENS)
def test_watched_or_learning_layers_take_the_other_form(monkeypatch, id):
    small = catalogue.cards("memory")[id].small
    memory, taken, x = make(id, **small), counted(monkeypatch, id), torch.randn(1, 1, small["dim"])
    state, calls = memory.initial_state(1), []
    memory(x, state)
    assert not taken.called
    with torch.no_grad(), tap(lambda call: calls.append(call.op) or call.run()):
        memory(x, state)
    assert calls or id == "hippo"  # whose cell is no op that can be tapped
    assert not taken.called or id == "lssl"  # whose step lies within its op


@pytest.mark.parametrize("part", ["step_size", "x_proj", "dt_proj"])
def test_parts_that_somebody_listens_to_or_replaced_are_called(monkeypatch, part):
    memory, x, seen = make("mamba", 6).eval(), torch.randn(1, 1, 6), Mock(return_value=None)
    taken = counted(monkeypatch, "mamba")
    with torch.no_grad():
        hook = getattr(memory, part).register_forward_hook(seen)
        want, _ = memory(x)
        hook.remove()
        assert seen.called
        setattr(memory, part, nn.Sequential(getattr(memory, part)))
        memory(x, memory.initial_state(1))
        assert not taken.called
        setattr(memory, part, getattr(memory, part)[0])
        y, _ = memory(x)
    assert taken.called
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("id", TOKENS)
def test_a_state_of_two_precisions_goes_on(id):
    """A kernel writes in one precision: a part of the state in another must not be taken for it."""
    small = catalogue.cards("memory")[id].small
    memory, x = make(id, **small), torch.randn(2, 1, small["dim"])
    with torch.no_grad():
        _, state = memory(x)
        want, end = memory(x, state)
        for path, part in flatten(state).items():
            if part.dtype == torch.float32:
                y, after = memory(x, unflatten({**flatten(state), path: part.double()}))
                torch.testing.assert_close(y.float(), want, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(
                    tree_map(Tensor.double, after), tree_map(Tensor.double, end), rtol=1e-4, atol=1e-4
                )
