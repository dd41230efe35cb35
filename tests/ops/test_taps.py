"""Seeing and changing what layers ask of ops."""

from __future__ import annotations

import importlib
import threading

import pytest
import torch

from remanence import ops
from remanence.memory import make
from remanence.ops.taps import ROLES, Call, tap


def x(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_tap_sees_arguments_by_name_with_their_defaults_and_is_gone_afterwards() -> None:
    seen: list[Call] = []

    def handler(call: Call):
        seen.append(call)
        return call.run()

    q = x(1, 2, 5, 3)
    want = ops.linear_attention(q, q, q)
    with tap(handler):
        got = ops.linear_attention(q, key=q, value=q)
    assert torch.equal(got[0], want[0])
    assert [call.op for call in seen] == ["linear_attention"]
    assert seen[0].arguments["log_decay"] is None
    assert seen[0].arguments["chunk_size"] == 64
    ops.linear_attention(q, q, q)
    assert len(seen) == 1


def test_inner_taps_come_first_and_what_they_call_goes_through_the_outer_ones_only() -> None:
    order: list[str] = []

    def handler(name: str):
        def handle(call: Call):
            order.append(name)
            if name == "inner":
                ops.scan(x(1, 2, 3), x(1, 2, 3))
            return call.run()

        return handle

    with tap(handler("outer")), tap(handler("inner")):
        ops.scan(-x(1, 4, 3).abs(), x(1, 4, 3))
    assert order == ["inner", "outer", "outer"]


def test_a_tap_ends_with_an_error_and_does_not_reach_other_threads() -> None:
    def broken(call: Call):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), tap(broken):
        ops.scan(x(1, 2, 3), x(1, 2, 3))
    ops.scan(x(1, 2, 3), x(1, 2, 3))
    results = []
    with tap(broken):
        thread = threading.Thread(target=lambda: results.append(ops.scan(x(1, 2, 3), x(1, 2, 3))))
        thread.start()
        thread.join()
    assert len(results) == 1


ARGUMENTS = {
    "scan": lambda: {"log_decay": -x(2, 6, 3).abs(), "b": x(2, 6, 3, seed=1)},
    "selective_scan": lambda: {
        "x": x(2, 6, 3),
        "delta": x(2, 6, 3, seed=1).abs(),
        "A": -x(3, 4, seed=2).abs(),
        "B": x(2, 6, 4, seed=3),
        "C": x(2, 6, 4, seed=4),
    },
    "linear_attention": lambda: {**attention(), "log_decay": -x(2, 2, 6, 3, seed=5).abs()},
    "gated_delta_rule": lambda: {
        **attention(),
        "beta": x(2, 2, 6, seed=4).sigmoid(),
        "log_decay": -x(2, 2, 6, seed=5).abs(),
    },
    "dplr": lambda: {
        **attention(),
        "a": -0.3 * x(2, 2, 6, 3, seed=4),
        "b": 0.3 * x(2, 2, 6, 3, seed=4),
        "log_decay": -x(2, 2, 6, 3, seed=5).abs(),
    },
    "expgate": lambda: {**attention(), "log_forget": -x(2, 2, 6, seed=4).abs(), "log_input": x(2, 2, 6, seed=5)},
}


def attention() -> dict[str, torch.Tensor]:
    return {name: 0.5 * x(2, 2, 6, 3, seed=i) for i, name in enumerate(("query", "key", "value"))}


def op(name: str):
    module = importlib.import_module(f"remanence.ops.{name.replace('gated_delta_rule', 'delta')}")
    return getattr(module, name)


@pytest.mark.parametrize("name", ROLES)
def test_a_skipped_token_leaves_the_state_as_it_was_and_still_reads(name: str) -> None:
    arguments, roles = ARGUMENTS[name](), ROLES[name]
    keep = torch.tensor([[True, False, True, True, False, False], [True] * 6])
    state: list = []

    def handler(call: Call):
        state.append(call.run(**call.skipping(keep))[1])
        return call.run()

    with tap(handler):
        op(name)(**arguments)
    (skipped,) = state
    row = {n: t[:1] if t.shape[0] == 2 else t for n, t in arguments.items()}
    fewer = {
        n: t.index_select(roles.time, torch.tensor([0, 2, 3]))
        if t.ndim > roles.time and t.shape[roles.time] == 6
        else t
        for n, t in row.items()
    }
    _, want = op(name)(**fewer)
    _, whole = op(name)(**arguments)
    for path, t in want.items():
        torch.testing.assert_close(skipped[path][:1], t, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(skipped[path][1:], whole[path][1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ROLES)
def test_outputs_are_linear_in_the_value(name: str) -> None:
    arguments, value = ARGUMENTS[name](), ROLES[name].value
    y = op(name)(**arguments)[0]
    twice = op(name)(**{**arguments, value: -2 * arguments[value]})[0]
    torch.testing.assert_close(twice, -2 * y, rtol=1e-9, atol=1e-9)


def test_layers_are_tapped_wherever_they_found_their_op() -> None:
    for name, given in {"gla": {}, "mamba": {}, "rwkv7": {"head_dim": 8}, "xlstm-7b": {}, "griffin": {}}.items():
        torch.manual_seed(0)
        memory = make(name, 32, **given)
        seen: set[str] = set()

        def handler(call: Call, seen: set[str] = seen):
            seen.add(call.op)
            return call.run()

        with tap(handler):
            memory(torch.randn(1, 3, 32))
        assert seen & set(ROLES), name


def test_handlers_see_the_recurrence_alone() -> None:
    """What an op does to its arguments beforehand is done when they see them, and not again."""
    seen: list[Call] = []

    def handler(call: Call):
        seen.append(call)
        return call.run()

    q, k, v, beta = x(1, 2, 40, 4), x(1, 2, 40, 4, seed=1), x(1, 2, 40, 3, seed=2), x(1, 2, 40, seed=3).sigmoid()
    for run in (
        lambda: ops.linear_attention(q, k, v, silu=True),
        lambda: ops.gated_delta_rule(q, k, v, beta, unit=True, scale=0.5),
    ):
        want, _ = run()
        with tap(handler):
            torch.testing.assert_close(run()[0], want, rtol=1e-9, atol=1e-9)
    silu, unit = (call.arguments for call in seen if call.roles)
    for name, given in (("query", q), ("key", k), ("value", v)):
        assert torch.equal(silu[name], torch.nn.functional.silu(given))
    torch.testing.assert_close(unit["query"].norm(dim=-1), 0.5 * torch.ones(1, 2, 40).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(unit["key"].norm(dim=-1), torch.ones(1, 2, 40).double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(unit["value"], v)
