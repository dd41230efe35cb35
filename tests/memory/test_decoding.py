"""Decoding without gradients, by the compiled steps, is the full pass."""

from unittest.mock import Mock

import pytest
import torch

from remanence import catalogue
from remanence.memory import make
from remanence.memory.hgrn import LowerBounds
from remanence.ops import layer_steps, steps
from remanence.ops.taps import tap
from remanence.state import flatten, fork, unflatten

STEPPED = [
    "gated-deltanet", "deltanet", "kimi-delta", "efla", "deltaproduct", "gla", "linear-attention",
    "retnet", "mamba", "mamba2", "griffin",
    "longhorn", "s7", "min-lstm", "min-lstm-gru", "rwkv6", "rwkv7", "hgrn", "hgrn2", "gateloop", "gsa", "lightnet",
    "titans", "ttt", "ttt-mlp", "rwkv", "rwkv-channel-mix", "xlstm-7b", "lightning-attention-tnl", "aaren",
    "lattice", "mesa", "liger", "lizard", "abc", "softmax", "sliding-window", "neighborhood-attention",
    "dot", "swdt", "tcnca", "test-time-regression", "omega-delta", "swla", "ckconv", "ckconv-block", "memory-caching",
]  # fmt: skip


VARIANTS = [
    ("gated-deltanet", {"value_heads": 4}),
    ("gated-deltanet", {"negative": True, "gate": False}),
    ("gated-deltanet", {"writes": 2}),
    ("deltaproduct", {"writes": 3, "value_heads": 4, "decay": False}),
    ("deltanet", {"conv": 1}),
    ("mamba", {"norm_eps": 1e-5}),
    ("mamba2", {"groups": 1, "step_limit": (0.01, 0.05)}),
    ("mamba2", {"norm_groups": 4}),
    ("kimi-delta", {"bound": -5.0}),
    ("kimi-delta", {"value_heads": 4, "value_dim": 3}),
    ("lightning-attention-tnl", {"lrpe": False, "layer": 1}),
    ("lightning-attention-tnl", {"lrpe": False, "slopes": [0.0, 2.0], "gate_rank": 0, "affine": True}),
    ("softmax", {"kv_heads": 1}),
    ("sliding-window", {"kv_heads": 1, "rotary": 0.5, "bias": True, "out_bias": True}),
    ("sliding-window", {"window": 1}),
    ("neighborhood-attention", {"window": 1, "dilation": 3}),
    ("neighborhood-attention", {"window": 2, "dilation": 3, "heads": 4}),
    ("lattice", {"objective": "encode"}),
    ("lattice", {"objective": "dot", "renormalise": True}),
    ("mesa", {"gate": True, "conv": 2}),
    ("mesa", {"steps": 2}),
    ("liger", {"kv_heads": 4, "mix": (0.3, 0.9)}),
    ("gateloop", {"heads": 8}),
    ("lizard", {"kv_heads": 2, "meta": 0}),
    ("gsa", {"kv_heads": 1, "sharpness": 3.0}),
    ("abc", {"kv_heads": 1}),
    ("hgrn", {"lower_bound": LowerBounds(2, 6), "layer": 1}),
    ("griffin", {"conv": 2}),
    ("hgrn2", {"lower_bound": 0.0, "heads": 4}),
    ("hgrn2", {"lower_bound": LowerBounds(2, 8), "layer": 1}),
    ("xlstm-7b", {"cap": None, "bias": True}),
    ("xlstm-7b", {"key_dim": 2, "value_dim": 6}),
    ("griffin", {"width": 8, "heads": 4}),
    ("retnet", {"heads": 4}),
    ("titans", {"momentum": False, "layers": 3}),
    ("titans", {"bound": None, "residual": False}),
    ("dot", {"window": 1}),
    ("dot", {"window": 9, "conv": 1}),
    ("swdt", {"heads": 4}),
    ("test-time-regression", {"order": "linear"}),
    ("test-time-regression", {"order": "constant", "window": 1}),
    ("test-time-regression", {"weights": "window", "order": "linear", "conv": 1}),
    ("test-time-regression", {"weights": "window", "heads": 4, "ridge": 1e-3}),
    ("omega-delta", {"optimizer": "gradient", "window": 9, "degree": 3}),
    ("omega-delta", {"window": 1, "degree": None, "retention": "none", "bound": None}),
    ("omega-delta", {"dim": 40, "optimizer": "gradient"}),
    ("swla", {"chunk_size": 3, "optimizer": "momentum", "window": 1}),
    ("swla", {"chunk_size": 3, "degree": 2, "gate": False}),
    ("omeganet", {"structure": "matrix", "objective": "dot", "expand": 1}),
    ("ckconv", {"dim": 19, "hidden": 16}),
    ("ckconv", {"horizon": 1, "hidden": 8}),
    ("tcnca", {"kernel": 1, "chunk": 1}),
    ("tcnca", {"move": "ema", "kernel": None, "dilation": None, "layers": None}),
]


@pytest.mark.parametrize(("id", "changed"), [*((id, {}) for id in STEPPED), *VARIANTS])
def test_tokens_one_by_one_are_the_full_pass(monkeypatch, id, changed):
    monkeypatch.setattr(steps, "STEP_FROM", 0)
    torch.manual_seed(0)
    small = {
        name: given for name, given in (catalogue.cards("memory")[id].small | changed).items() if given is not None
    }
    memory = make(id, **small).double()
    x = torch.randn(2, 7, small["dim"], dtype=torch.float64)
    with torch.no_grad():
        want, end = memory(x)
        state, y = None, []
        for token in x.split(1, 1):
            before = None if state is None else fork(state)
            out, after = memory(token, state)
            if state is not None:
                torch.testing.assert_close(state, before, rtol=0, atol=0)
            state = after
            y.append(out)
    torch.testing.assert_close(torch.cat(y, 1), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, end, rtol=1e-9, atol=1e-9)


TOKENS = {
    "gated-deltanet": "delta_token", "deltanet": "delta_token", "kimi-delta": "delta_token", "efla": "delta_token",
    "deltaproduct": "delta_token",
    "gla": "outer_token", "linear-attention": "outer_token", "retnet": "outer_token",
    "xlstm-7b": "exponential_token",
    "hgrn2": "outer_token", "lightnet": "outer_token",
    "softmax": "attention_token", "sliding-window": "attention_token", "neighborhood-attention": "attention_token",
    "griffin": "rg_lru_token", "min-lstm": "min_gru", "hgrn": "tied_token", "gsa": "slots_token", "abc": "slots_token",
    "aaren": "one_query_token", "lattice": "lattice_token", "lizard": "featured_token", "mesa": "least_squares_token",
    "dot": "coefficients_token", "swdt": "coefficients_token",
    "tcnca": "chunk_token", "test-time-regression": "regression_token",
    "omega-delta": "window_token", "swla": "window_token",
    "ckconv": "basis_token",
}  # fmt: skip


@pytest.mark.parametrize(("id", "step"), TOKENS.items())
def test_a_token_takes_one_compiled_step_unless_its_recurrence_is_watched_or_learnt(monkeypatch, id, step):
    monkeypatch.setattr(steps, "STEP_FROM", 0)
    small = catalogue.cards("memory")[id].small
    memory, x, calls = make(id, **small), torch.randn(1, 1, small["dim"]), []
    where = layer_steps if hasattr(layer_steps, step) else steps
    state, taken = memory.initial_state(1), Mock(side_effect=getattr(where, step))
    monkeypatch.setattr(where, step, taken)
    with torch.no_grad():
        memory(x, state)
        assert taken.call_count == 1
        if id != "rwkv":  # whose step lies within its op
            with tap(lambda call: calls.append(call.op) or call.run()):
                memory(x, state)
            assert taken.call_count == 1
            assert calls or id == "softmax"  # whose op is PyTorch's
    before = taken.call_count
    memory(x, state)
    assert taken.call_count == before


def test_of_several_rows_each_is_decoded_as_if_alone(monkeypatch):
    monkeypatch.setattr(steps, "STEP_FROM", 0)
    for id in TOKENS:
        small = catalogue.cards("memory")[id].small
        memory, x = make(id, **small).double(), torch.randn(3, 2, small["dim"], dtype=torch.float64)
        with torch.no_grad():
            together, alone = memory.initial_state(3), [memory.initial_state(1) for _ in range(3)]
            for token in x.split(1, 1):
                y, together = memory(token, together)
                for row, own in enumerate(token.split(1)):
                    out, alone[row] = memory(own, alone[row])
                    torch.testing.assert_close(y[row : row + 1], out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("id", ["gated-deltanet", "griffin", "mesa", "aaren", "lightnet", "gla"])
def test_a_state_of_mixed_precision_is_read_as_it_is(monkeypatch, id):
    torch.manual_seed(0)
    small = catalogue.cards("memory")[id].small
    memory, x = make(id, **small), torch.randn(2, 4, small["dim"])
    with torch.no_grad():
        state = flatten(memory(x[:, :3])[1])
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                continue
            mixed = unflatten({**state, name: tensor.double()})
            monkeypatch.setattr(steps, "STEP_FROM", 10**9)
            want = memory(x[:, 3:], mixed)
            monkeypatch.setattr(steps, "STEP_FROM", 0)
            torch.testing.assert_close(memory(x[:, 3:], mixed), want, rtol=1e-4, atol=1e-5, check_dtype=False)
