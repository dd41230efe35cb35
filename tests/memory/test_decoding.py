"""Decoding without gradients, by the compiled steps, is the full pass."""

import pytest
import torch

from remanence import catalogue
from remanence.memory import make
from remanence.ops import steps

STEPPED = [
    "gated-deltanet", "deltanet", "kimi-delta", "gla", "linear-attention", "retnet", "mamba", "mamba2", "griffin",
    "longhorn", "s7", "min-lstm", "min-lstm-gru", "rwkv6", "rwkv7", "hgrn", "hgrn2", "gateloop", "gsa", "lightnet",
    "titans", "ttt", "ttt-mlp",
]  # fmt: skip


VARIANTS = [
    ("gated-deltanet", {"value_heads": 4}),
    ("gated-deltanet", {"negative": True, "gate": False}),
    ("gated-deltanet", {"writes": 2}),
    ("mamba", {"norm_eps": 1e-5}),
    ("titans", {"momentum": False, "layers": 3}),
    ("titans", {"bound": None, "residual": False}),
]


@pytest.mark.parametrize(("id", "changed"), [*((id, {}) for id in STEPPED), *VARIANTS])
def test_tokens_one_by_one_are_the_full_pass(monkeypatch, id, changed):
    monkeypatch.setattr(steps, "STEP_FROM", 0)
    torch.manual_seed(0)
    small = catalogue.cards("memory")[id].small | changed
    memory = make(id, **small).double()
    x = torch.randn(2, 7, small["dim"], dtype=torch.float64)
    with torch.no_grad():
        want, _ = memory(x)
        state, y = None, []
        for token in x.split(1, 1):
            out, state = memory(token, state)
            y.append(out)
    torch.testing.assert_close(torch.cat(y, 1), want, rtol=1e-9, atol=1e-9)
