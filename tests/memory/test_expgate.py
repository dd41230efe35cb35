"""What is particular to mLSTM, RWKV-4, Aaren, the slot memories and the attentions; the laws are in tests/laws."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import catalogue
from remanence.errors import ShapeError, StateError, UnknownName
from remanence.evaluation.proofs import expgate as proofs
from remanence.memory.aaren import Aaren
from remanence.memory.base import Memory, ragged
from remanence.memory.gsa import ABC, GSA
from remanence.memory.liger import Liger
from remanence.memory.lizard import Lizard
from remanence.memory.neighborhood import NeighborhoodAttention
from remanence.memory.parts import merge, rotate, split
from remanence.memory.rwkv import RWKV, ChannelMix
from remanence.memory.softmax import SoftmaxAttention, with_room
from remanence.memory.xlstm import MLSTM
from remanence.ops.neighborhood import neighborhood_attention_reference
from remanence.state import concat, nbytes

LAYERS = [MLSTM, RWKV, ChannelMix, Aaren, GSA, ABC, SoftmaxAttention, NeighborhoodAttention, Liger, Lizard]
HEADED = [MLSTM, Aaren, GSA, ABC, SoftmaxAttention, NeighborhoodAttention, Liger, Lizard]
every = pytest.mark.parametrize("layer", LAYERS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def x(dim: int, time: int = 9, batch: int = 2) -> Tensor:
    return torch.randn(batch, time, dim, dtype=torch.float64)


def shaken(memory: Memory) -> Memory:
    for p in memory.double().parameters():
        p.data += 0.3 * torch.randn_like(p)
    return memory


@pytest.mark.parametrize("layer", HEADED)
def test_heads_that_do_not_divide_are_refused_in_words(layer: type[Memory]) -> None:
    with pytest.raises(ValueError, match=f"{layer.__name__}: dim must be a positive multiple of .*heads=4"):
        layer(30)


def test_other_arguments_out_of_range_are_refused() -> None:
    for build, words in [
        (lambda: RWKV(8, layer=2, layers=2), "layer must be one of 0 to layers - 1, got layer=2, layers=2"),
        (lambda: GSA(8, slots=0), "GSA: slots must be at least 1, got 0"),
        (lambda: SoftmaxAttention(16, kv_heads=3), "kv_heads must divide heads, got kv_heads=3, heads=4"),
        (lambda: NeighborhoodAttention(16, dilation=0), "window and dilation must be at least 1, got 64 and 0"),
        (lambda: Liger(16, window=0), "window and slots must be at least 1, got window=0"),
        (lambda: Lizard(16, features=3), "features an even number above 0, .*features=3"),
    ]:
        with pytest.raises(ValueError, match=words):
            build()
    with pytest.raises(UnknownName, match="did you mean 'gsa'"):
        Liger(16, gate="gas")


# The published models, written out as loops over their recurrences.


def test_mlstm_is_the_published_block() -> None:
    """With biases, as Hugging Face's xlstm has them: soft caps, eps after the maximum, LayerNorm per head."""
    heads, K, V = 2, 3, 5
    layer = shaken(MLSTM(8, heads=heads, key_dim=6, value_dim=10, bias=True, cap=2.0, norm_eps=1e-3, eps=1e-2))
    tokens = x(8, 12)
    q, k, v, o = layer.qkvo(tokens).split([6, 6, 10, 10], -1)
    i, f = (2 * torch.tanh(layer.gates(tokens) / 2)).split(heads, -1)
    C, n, m = torch.zeros(2, heads, K, V).double(), torch.zeros(2, heads, K).double(), torch.zeros(2, heads).double()
    out = []
    for t in range(12):
        q_t, k_t, v_t = (part[:, t].view(2, heads, -1) for part in (q, k, v))
        log_f = F.logsigmoid(f[:, t])
        new = torch.maximum(log_f + m, i[:, t])
        keep, write = (log_f + m - new).exp(), (i[:, t] - new).exp()
        C = keep[..., None, None] * C + write[..., None, None] * k_t[..., :, None] * v_t[..., None, :]
        n = keep[..., None] * n + write[..., None] * k_t
        m = new
        q_t = q_t / K**0.5
        size = torch.maximum((q_t * n).sum(-1).abs(), (-m).exp()) + 1e-2
        h = (q_t[..., None] * C).sum(2) / size[..., None]
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt()
        out.append(o[:, t].sigmoid() * (h.flatten(1) * layer.norm.weight + layer.norm.bias))
    y, state = layer(tokens)
    torch.testing.assert_close(y, layer.out(torch.stack(out, 1)))
    torch.testing.assert_close(state, {"C": C, "n": n, "m": m})


def test_rwkv_is_the_published_block() -> None:
    """As Hugging Face's rwkv: (numerator, denominator, maximum) started at (0, 0, −10³⁸)."""
    layer, channels = shaken(RWKV(6, width=4, layer=1, layers=3)), shaken(ChannelMix(6, hidden=7, layer=1, layers=3))
    tokens = x(6, 12)
    before = F.pad(tokens, (0, 0, 1, 0))[:, :-1]
    k, v, r = (tokens * mu + before * (1 - mu) for mu in layer.shift.mix)
    k, v, r = layer.key(k), layer.value(v), layer.receptance(r).sigmoid()
    num, den, top = torch.zeros(2, 4).double(), torch.zeros(2, 4).double(), torch.full((2, 4), -1e38).double()
    out = []
    for t in range(12):
        now = torch.maximum(top, k[:, t] + layer.bonus)
        a, b = (top - now).exp(), (k[:, t] + layer.bonus - now).exp()
        out.append((a * num + b * v[:, t]) / (a * den + b))
        faded = top - layer.decay.exp()
        top = torch.maximum(faded, k[:, t])
        a, b = (faded - top).exp(), (k[:, t] - top).exp()
        num, den = a * num + b * v[:, t], a * den + b
    y, state = layer(tokens)
    torch.testing.assert_close(y, layer.out(r * torch.stack(out, 1)))
    torch.testing.assert_close(state, {"shift": tokens[:, -1], "w": num, "u": den, "m": top})
    k, r = (tokens * mu + before * (1 - mu) for mu in channels.shift.mix)
    want = channels.receptance(r).sigmoid() * channels.value(channels.key(k).relu() ** 2)
    torch.testing.assert_close(channels(tokens)[0], want)


def test_rwkv_starts_with_decays_and_blends_over_depth() -> None:
    first, last = RWKV(64, layer=0, layers=4), RWKV(64, layer=3, layers=4)
    assert first.decay[0] == -5
    assert first.decay[-1] == 3
    assert (first.decay[1:-1] > last.decay[1:-1]).all()
    torch.testing.assert_close(first.shift.mix[0], torch.arange(64) / 64)
    torch.testing.assert_close(last.shift.mix[1], (torch.arange(64) / 64) ** 0.25 + 0.3)
    assert sorted({round(u, 4) for u in first.bonus.tolist()}) == [round(math.log(0.3) + d, 4) for d in (-0.5, 0, 0.5)]


def test_mlstm_starts_almost_closed_and_remembering() -> None:
    bias = MLSTM(16, heads=4).gates.bias
    assert bias[:4].tolist() == [-10] * 4
    torch.testing.assert_close(bias[4:], torch.tensor([3.0, 4, 5, 6]))
    assert MLSTM(16).norm.bias is None


def test_aaren_cannot_be_asked() -> None:
    """Its output depends on what was read, and on the order of tokens not at all: the last one asks for nothing."""
    layer = Aaren(8, heads=2).double()
    tokens = x(8)
    shuffled = tokens[:, torch.randperm(9)]
    torch.testing.assert_close(layer(tokens)[0][:, -1], layer(shuffled)[0][:, -1])


def test_abc_holds_softmax_averages() -> None:
    layer = ABC(8, heads=2, slots=3).double()
    tokens = x(8)
    shares = split(layer.gate(tokens), 2).softmax(2)
    _, k, v = (split(part, 2) for part in F.silu(layer.qkv(tokens)).chunk(3, -1))
    _, state = layer(tokens)
    torch.testing.assert_close(state["K"], shares.mT @ k)
    torch.testing.assert_close(state["V"], shares.mT @ v)


def test_gsa_keeps_what_it_does_not_take() -> None:
    layer = GSA(8, heads=2, slots=3, sharpness=8).double()
    w, log_decay, _ = layer.write(x(6), {})
    torch.testing.assert_close(w + log_decay.exp(), torch.ones_like(w))


@pytest.mark.parametrize("layer", [GSA, ABC])
def test_grouped_queries_read_the_slots_that_copies_would_hold(layer: type[Memory]) -> None:
    few, many = shaken(layer(16, heads=4, kv_heads=2, slots=5)), layer(16, heads=4, slots=5).double()
    q, k, v = few.qkv.weight.split(few.widths)
    copied = [part.unflatten(0, (2, -1)).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v, few.gate.weight)]
    many.load_state_dict({**few.state_dict(), "qkv.weight": torch.cat([q, *copied[:2]]), "gate.weight": copied[2]})
    tokens = x(16, 20)
    y, state = few(tokens[:, :13])
    rest, end = few(tokens[:, 13:], state)
    torch.testing.assert_close(torch.cat([y, rest], 1), many(tokens)[0])
    assert {n: t.shape for n, t in end.items()} == {n: t.shape for n, t in few.initial_state(2).items()}
    assert state["K"].shape == (2, 2, 5, 4)
    with pytest.raises(ValueError, match="kv_heads must divide heads=4, got 3"):
        layer(16, heads=4, kv_heads=3)


def test_softmax_attention_shares_keys_and_values_between_heads() -> None:
    layer = SoftmaxAttention(16, heads=4, kv_heads=2).double()
    tokens = x(16, 70)
    q, k, v = layer.project(tokens)
    start = torch.zeros(2, dtype=torch.int64)
    q, k = (rotate(part, start, layer.frequencies) for part in (q, k))
    k, v = (part[:, [0, 0, 1, 1]] for part in (k, v))
    want = layer.out(merge(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
    y, state = layer(tokens)
    torch.testing.assert_close(y, want)
    assert state["keys"].shape == (2, 2, 128, 4)


def test_a_growing_state_grows_by_blocks_and_takes_rows_of_any_length() -> None:
    layer = SoftmaxAttention(8, heads=2).double()
    assert nbytes(layer.initial_state(1)) == 8
    rooms = [layer(x(8, n))[1]["keys"].shape[2] for n in (1, 64, 65)]
    assert rooms == [64, 64, 128]
    tokens, more = x(8, 70), x(8, 3)
    long, short = layer(tokens[:1])[1], layer(tokens[1:, :5])[1]
    with pytest.raises(StateError, match="differ"):
        concat([long, short])
    both = concat([long, with_room(short, 128)])
    y, _ = layer(more, both)
    torch.testing.assert_close(y[:1], layer(more[:1], long)[0])
    torch.testing.assert_close(y[1:], layer(more[1:], short)[0])
    uneven, _ = ragged(layer, more, [3, 1], both)
    torch.testing.assert_close(uneven[1, :1], y[1, :1])


def test_a_growing_state_that_lost_tokens_is_refused() -> None:
    layer = SoftmaxAttention(8, heads=2)
    _, state = layer(torch.randn(1, 5, 8))
    with pytest.raises(StateError, match="a state of 64 tokens cannot be at position 99"):
        layer(torch.randn(1, 1, 8), {**state, "position": torch.tensor([99])})
    with pytest.raises(ShapeError, match="One token per row"):
        layer(torch.randn(1, 8))


@pytest.mark.parametrize("dilation", [1, 2, 3])
def test_neighbourhoods_are_the_ops_causal_axis(dilation: int) -> None:
    layer = NeighborhoodAttention(8, heads=2, window=3, dilation=dilation).double()
    tokens = x(8, 20)
    q, k, v = (split(part, 2) for part in layer.qkv(tokens).chunk(3, -1))
    start = torch.zeros(2, dtype=torch.int64)
    q, k = (rotate(part, start, layer.frequencies) for part in (q, k))
    want = neighborhood_attention_reference(q, k, v, window=3, dilation=dilation, causal=True)
    torch.testing.assert_close(layer(tokens)[0], layer.out(merge(want)))


def test_liger_reads_a_decay_out_of_its_keys() -> None:
    layer = Liger(8, heads=2, mix=(1.0, 0.0)).double()
    tokens = x(8, 20)
    q, k, v = layer.project(tokens)
    G = (F.logsigmoid(k) / 16).cumsum(2)
    kept = (G[:, :, :, None] - G[:, :, None]).exp()
    scores = torch.einsum("bhik,bhjk,bhijk->bhij", q.softmax(-1), k.softmax(-1), kept)
    torch.testing.assert_close(layer(tokens)[0], layer.out(merge(scores.tril() @ v)))


@pytest.mark.parametrize("gate", ["gla", "hgrn2", "gsa"])
def test_liger_has_no_parameters_of_its_own(gate: str) -> None:
    base = SoftmaxAttention(16, heads=4, kv_heads=2).double()
    layer = Liger(16, heads=4, kv_heads=2, gate=gate, slots=3, mix=(0.0, 1.0), window=20).double()
    layer.load_state_dict(base.state_dict())
    tokens = x(16, 20)
    torch.testing.assert_close(layer(tokens)[0], base(tokens)[0])
    pieces = torch.cat([layer(tokens[:, :7])[0], layer(tokens[:, 7:], layer(tokens[:, :7])[1])[0]], 1)
    torch.testing.assert_close(pieces, layer(tokens)[0])


def test_lizard_is_one_softmax_like_average() -> None:
    """The closed form: window, meta tokens and past, each token counted by its weights, under one normaliser."""
    layer = shaken(Lizard(8, heads=2, window=4, features=6, meta=2))
    tokens = x(8, 15)
    q, k, v = layer.project(tokens)
    start = torch.zeros(2, dtype=torch.int64)
    turned, seen = (rotate(part, start, layer.frequencies) for part in (q, k))
    t = torch.arange(15)
    near = (turned @ seen.mT / 2).exp() * ((t[:, None] >= t) & (t[:, None] < t + 4))
    meta = (turned @ layer.meta[0].mT / 2).exp()
    phi_q, phi_k = (torch.cat([p, -p], -1).exp() for p in (q @ layer.query_map, k @ layer.key_map))
    G = F.logsigmoid(layer.forget(tokens)).mT.cumsum(-1)
    past = (phi_q @ phi_k.mT) * (G[..., :, None] - G[..., None, :]).exp().tril()
    total = (near + past).sum(-1, keepdim=True) + meta.sum(-1, keepdim=True)
    want = layer.out(merge(((near + past) @ v + meta @ layer.meta[1]) / total))
    torch.testing.assert_close(layer(tokens)[0], want)


def test_state_bytes_are_what_the_docstrings_say() -> None:
    assert nbytes(MLSTM(16, heads=2).initial_state(1)) == 4 * (2 * 4 * 8) + 8 * (2 * 4 + 2)
    assert nbytes(RWKV(16).initial_state(1)) == 4 * 3 * 16 + 8 * 16
    assert nbytes(Aaren(16, heads=2).initial_state(1)) == 4 * (16 + 2) + 8 * 2
    assert nbytes(GSA(16, heads=2, slots=5).initial_state(1)) == 4 * 2 * 2 * 5 * 8
    assert nbytes(ABC(16, heads=2, slots=5).initial_state(1)) == 4 * (2 * 2 * 5 * 8 + 2 * 5)
    assert nbytes(NeighborhoodAttention(16, heads=2, window=5, dilation=3).initial_state(1)) == 4 * 2 * 2 * 12 * 8 + 8
    assert nbytes(Liger(16, heads=4, kv_heads=2, window=5).initial_state(1)) == 4 * 2 * (4 * 4 + 2 * 4 * 4) + 8


@pytest.mark.parametrize("id", [i for i, p in catalogue.proofs().items() if p.run.__module__ == proofs.__name__])
def test_the_proof_holds_and_its_control_does_not(id: str) -> None:
    system, control = catalogue.proofs()[id].run()
    assert system.holds, system.says
    assert not control.holds, control.says


def test_the_examples_of_the_docs_run() -> None:
    page = Path(__file__).parents[2] / "docs" / "exponential-gates.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(page), "exec"), {"__name__": "example"})
