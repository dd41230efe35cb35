"""What is particular to each linear memory; the laws that all obey are tested in tests/laws."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from remanence import catalogue
from remanence.errors import UnknownName
from remanence.evaluation.proofs import linear
from remanence.memory import (
    GLA,
    HGRN,
    GatedDeltaNet,
    Griffin,
    LinearAttention,
    MinGRU,
    MinLSTM,
    RetNet,
    WindowAttention,
    make,
)
from remanence.memory.hgrn import LowerBounds
from remanence.memory.min_lstm_gru import positive
from remanence.memory.parts import DecayGate, ShortConv, l2_norm, merge, rotate, split
from remanence.state import nbytes

ALL = [GLA, HGRN, GatedDeltaNet, Griffin, LinearAttention, MinGRU, MinLSTM, RetNet, WindowAttention]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def x(dim: int, time: int = 9, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, time, dim, dtype=torch.float64)


def test_make_finds_by_name_and_names_the_nearest() -> None:
    assert isinstance(make("griffin", 8), Griffin)
    assert isinstance(make("min-lstm-gru", 8, cell="lstm"), MinLSTM)
    with pytest.raises(UnknownName, match="did you mean 'retnet'"):
        make("retnett", 8)
    with pytest.raises(UnknownName, match="did you mean 'lstm'"):
        make("min-lstm-gru", 8, cell="lst")


@pytest.mark.parametrize("layer", [GLA, GatedDeltaNet, LinearAttention, RetNet, WindowAttention])
def test_heads_that_do_not_divide_are_refused_in_words(layer: type) -> None:
    with pytest.raises(ValueError, match=f"{layer.__name__}: dim must be a positive multiple of .*got dim=30, heads=4"):
        layer(30)


def test_other_arguments_out_of_range_are_refused() -> None:
    for build, words in [
        (lambda: Griffin(30), "multiple of heads"),
        (lambda: HGRN(8, lower_bound=1.0), r"lower_bound must be in \[0, 1\)"),
        (lambda: MinGRU(8, expand=0), "at least 1"),
        (lambda: WindowAttention(8, window=0), "window must be at least 1"),
        (lambda: ShortConv(8, 0), "width must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            build()


def test_retnet_forgets_absolute_position_but_keeps_relative() -> None:
    layer = RetNet(16, heads=2).double()
    tokens = x(16)
    start = layer.initial_state(2)
    far = {**start, "position": start["position"] + 10**9}
    torch.testing.assert_close(layer(tokens, far)[0], layer(tokens, start)[0], rtol=0, atol=1e-8)


def test_constants_are_not_rounded_by_a_change_of_precision() -> None:
    for layer in (RetNet(16), WindowAttention(16)):
        before = layer.frequencies.clone()
        layer.half().double()
        assert torch.equal(layer.frequencies, before)


def test_window_attention_is_full_attention_while_the_window_holds_all() -> None:
    layer = WindowAttention(16, heads=2, window=20).double()
    tokens = x(16, time=20)
    q, k, v = (split(part, 2) for part in layer.qkv(tokens).chunk(3, -1))
    position = torch.zeros(2, dtype=torch.int64)
    q, k = (rotate(part, position, layer.frequencies) for part in (q, k))
    want = layer.out(merge(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
    torch.testing.assert_close(layer(tokens)[0], want, rtol=0, atol=1e-12)


def test_rotation_turns_by_the_distance_even_far_along_the_stream() -> None:
    frequencies = 10000 ** -torch.linspace(0, 1, 4, dtype=torch.float64)
    a, b = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(start: int) -> torch.Tensor:
        return (rotate(a, torch.tensor([start + 5]), frequencies) * rotate(b, torch.tensor([start]), frequencies)).sum()

    torch.testing.assert_close(product(2**30 + 1), product(0), rtol=0, atol=1e-5)
    assert (product(0) - (a * b).sum()).abs() > 1e-2


def test_griffin_writes_the_first_token_of_each_row_whole() -> None:
    layer = Griffin(8).double()
    state = layer.initial_state(2)
    assert state["empty"].tolist() == [True, True]
    assert layer(x(8, time=0), state)[1]["empty"].tolist() == [True, True]
    half = {**state, "empty": torch.tensor([True, False])}
    token = x(8, time=1, batch=1).expand(2, -1, -1)
    h = layer(token, half)[1]["h"]
    assert (h[0].abs() > h[1].abs()).all()
    assert layer(token, half)[1]["empty"].tolist() == [False, False]


def test_griffin_starts_with_decays_on_the_ring() -> None:
    radius = torch.exp(-F.softplus(Griffin(256).base))
    assert 0.9 <= radius.min() < 0.92
    assert 0.99 < radius.max() <= 0.999


def test_hgrn_bounds_rise_with_depth_and_reach_the_layer() -> None:
    bounds = LowerBounds(3, 4)
    bounds.logits.data.normal_(std=3)
    gamma = bounds()
    assert torch.equal(gamma[0], torch.zeros(4))
    assert (gamma.diff(dim=0) >= 0).all()
    assert (gamma < 1).all()
    layer = HGRN(4, lower_bound=bounds, layer=2)
    layer.forget.bias.data.fill_(-50)
    torch.testing.assert_close(layer.log_decay(torch.zeros(1, 1, 4))[0, 0], gamma[2].log())
    layer(torch.randn(1, 5, 4))[0].sum().backward()
    assert bounds.logits.grad is not None
    assert bounds.logits.grad.isfinite().all()


def test_hgrn_keeps_a_shared_bound_in_all_of_its_layers() -> None:
    bounds = LowerBounds(2, 4)
    model = torch.nn.Sequential(*(HGRN(4, lower_bound=bounds, layer=i) for i in range(2)))
    assert sum(p is bounds.logits for p in model.parameters()) == 1


@pytest.mark.parametrize("layer", [MinGRU, MinLSTM])
def test_min_cells_share_out_exactly_what_they_forget(layer: type) -> None:
    cell = layer(4).double()
    keep, write = cell.shares(torch.linspace(-800, 800, 8 * cell.gates, dtype=torch.float64))
    torch.testing.assert_close(keep.exp() + write.exp(), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-15)


def test_min_cells_start_where_the_paper_starts() -> None:
    assert torch.equal(MinGRU(4).initial_state(1)["h"], positive(torch.zeros(1, 4)))
    assert not MinGRU(4, start=0).initial_state(1)["h"].any()


def test_the_decay_gate_starts_between_its_bounds() -> None:
    gate = DecayGate(8, 500)
    g = gate(torch.zeros(1, 1, 8))
    assert -16 * 0.1 <= g.min() < g.max() <= -1e-3 * (1 - 1e-3)


def test_gated_deltanet_reads_back_the_newest_binding() -> None:
    layer = GatedDeltaNet(8, heads=2, head_dim=5, expand_v=3, negative=True)
    assert layer(torch.randn(1, 3, 8))[1]["S"].shape == (1, 2, 5, 15)
    with torch.no_grad():
        layer.beta.weight.fill_(100)
    assert layer.most * layer.beta(torch.ones(1, 1, 8)).sigmoid().min() == 2


def test_unit_vectors_have_a_finite_gradient_at_zero() -> None:
    zero = torch.zeros(3, requires_grad=True)
    l2_norm(zero).sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()
    assert math.isclose(l2_norm(torch.tensor([3.0, 4.0])).norm().item(), 1, rel_tol=1e-6)


def test_state_bytes_are_what_the_docstrings_say() -> None:
    assert nbytes(LinearAttention(16, heads=2).initial_state(1)) == 4 * 2 * 8 * 9
    assert nbytes(GLA(16, heads=2).initial_state(1)) == 4 * 2 * 4 * 8
    assert nbytes(RetNet(16, heads=2).initial_state(1)) == 4 * 2 * 8 * 16 + 8
    assert nbytes(WindowAttention(16, heads=2, window=5).initial_state(1)) == 4 * 2 * 2 * 4 * 8 + 8
    assert nbytes(GatedDeltaNet(16, heads=2).initial_state(1)) == 4 * (2 * 8 * 16 + 3 * 2 * (16 + 16))
    assert nbytes(Griffin(16).initial_state(1)) == 4 * (16 + 3 * 16) + 1


def test_a_convolution_of_one_token_starts_as_the_identity() -> None:
    x = torch.randn(2, 5, 8)
    assert torch.equal(ShortConv(8, 1)(x)[0], x)
    assert not torch.equal(ShortConv(8, 2)(x)[0], x)


@pytest.mark.parametrize("example", [0, 1, 2, 3])
def test_the_examples_of_the_docs_run(example: int) -> None:
    page = Path(__file__).parents[2] / "docs" / "memories.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    exec(compile(blocks[example], str(page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("id", [i for i, p in catalogue.proofs().items() if p.run.__module__ == linear.__name__])
def test_the_proof_holds_and_its_control_does_not(id: str) -> None:
    system, control = catalogue.proofs()[id].run()
    assert system.holds, system.says
    assert not control.holds, control.says


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("T", [0, 1, 2, 30])
def test_a_convolution_of_features_apart_is_that_of_all_of_them(bias, T):
    torch.manual_seed(0)
    conv = ShortConv(7, 4, bias=bias).double()
    if bias:
        torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, T, 7, dtype=torch.float64, requires_grad=True)
    state = {"tail": torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)}
    leaves = [x, state["tail"], *conv.parameters()]
    ys, apart = conv.apart(x.split([2, 5], -1), state, [2, 1, 4], silu=True)
    assert [y.shape[-1] for y in ys] == [2, 1, 4]
    y, whole = conv(x, state, silu=True)
    torch.testing.assert_close(torch.cat(ys, -1), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(apart["tail"], whole["tail"], rtol=0, atol=0)
    found, wanted = (
        torch.autograd.grad(out.sin().sum() + after["tail"].square().sum(), leaves)
        for out, after in ((torch.cat(ys, -1), apart), (y, whole))
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
