"""What is particular to each delta rule, to Lattice and to the mixture; the laws of all are tested in tests/laws."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from remanence import catalogue
from remanence.errors import UnknownName
from remanence.evaluation.proofs import delta
from remanence.memory import (
    EFLA,
    GLA,
    RWKV7,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    KimiDelta,
    Lattice,
    MoM,
    make,
)
from remanence.memory.kimi_delta import FeatureDecay
from remanence.memory.mom import balancing
from remanence.models.language import LanguageModel
from remanence.state import nbytes

IDS = ["deltanet", "deltaproduct", "efla", "gated-deltanet", "kimi-delta", "lattice", "mom", "rwkv7"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def x(dim: int, time: int = 9, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, time, dim, dtype=torch.float64)


def shaken(layer: torch.nn.Module) -> torch.nn.Module:
    layer.double()
    for p in layer.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return layer


def small(id: str, dim: int, **changes: object):
    """Defaults of the papers but for the heads of RWKV-7, which are 64 wide."""
    return make(id, dim, **({"head_dim": 4} if id == "rwkv7" else {}), **changes)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: DeltaNet(30), "DeltaNet: dim must be a positive multiple of heads, got dim=30, heads=4"),
        (lambda: GatedDeltaNet(32, value_heads=6), "value_heads must be a multiple of heads, got 6 and heads=4"),
        (lambda: DeltaProduct(32, writes=0), "DeltaProduct: writes must be at least 1, got 0"),
        (lambda: KimiDelta(32, bound=1.0), "bound must be a log decay below 0, got 1.0"),
        (lambda: RWKV7(96), "dim must be a positive multiple of head_dim, got 96 and 64"),
        (lambda: RWKV7(64, layer=2, layers=2), "layer must be from 0 to layers - 1, got layer=2 and layers=2"),
        (lambda: Lattice(32, slots=0), "slots must be at least 1, got 0"),
        (lambda: MoM(32, memories=2, top=3), "top must be from 1 to memories, got top=3 and memories=2"),
    ],
)
def test_arguments_out_of_range_are_refused_in_words(build, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        build()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Lattice(32, objective="decod"), "did you mean 'decode'"),
        (lambda: MoM(32, memory="gated-deltanat"), "did you mean 'gated-deltanet'"),
        (lambda: MoM(32, tied=["decay.rat"]), "did you mean 'decay.rate'"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(build, words: str) -> None:
    with pytest.raises(UnknownName, match=words):
        build()


def test_state_bytes_are_what_the_docstrings_say() -> None:
    assert nbytes(DeltaNet(16, heads=2).initial_state(1)) == 4 * (2 * 8 * 8 + 3 * 3 * 16)
    assert nbytes(DeltaProduct(16, heads=2, writes=3).initial_state(1)) == 4 * (2 * 8 * 16 + 3 * 2 * (4 * 8 + 3 * 16))
    assert nbytes(KimiDelta(16, heads=2, value_heads=4).initial_state(1)) == 4 * (4 * 8 * 8 + 3 * (2 * 16 + 32))
    assert nbytes(RWKV7(16, head_dim=8).initial_state(1)) == 4 * (2 * 8 * 8 + 16)
    assert nbytes(Lattice(16, heads=2, slots=3).initial_state(1)) == 4 * (2 * 3 * 8 + 3 * 2 * (3 + 3 + 8))


def plain_gated_delta(layer: GatedDeltaNet, inputs: torch.Tensor) -> torch.Tensor:
    """The layer of Qwen3-Next, token by token and head by head, from its equations; eps 1e-6 everywhere."""
    B, T, _ = inputs.shape
    H, K, V = layer.heads, layer.head_dim, layer.value_dim
    shared = layer.value_heads // H
    projected = torch.cat([layer.q(inputs), layer.kv(inputs)], -1)
    padded = F.pad(projected.mT, (3, 0))
    mixed = F.silu(F.conv1d(padded, layer.conv.weight[:, None], groups=padded.shape[1])).mT
    beta = layer.beta(inputs).sigmoid()
    g = -layer.decay.rate.exp() * F.softplus(layer.decay.step(inputs) + layer.decay.bias)
    rows = []
    for b in range(B):
        S = torch.zeros(layer.value_heads, K, V, dtype=inputs.dtype)
        for t in range(T):
            heads = []
            for h in range(layer.value_heads):
                q, k = (mixed[b, t, i * H * K :][(h // shared) * K :][:K] for i in range(2))
                q, k = (p * (p.square().sum() + 1e-6) ** -0.5 for p in (q, k))
                v = mixed[b, t, 2 * H * K :][h * V :][:V]
                S[h] = g[b, t, h].exp() * S[h]
                S[h] = S[h] + beta[b, t, h] * torch.outer(k, v - S[h].mT @ k)
                o = S[h].mT @ q * K**-0.5
                o = o * (o.square().mean() + 1e-6) ** -0.5 * layer.readout.norm.weight
                heads.append(o)
            rows.append(torch.cat(heads) * F.silu(layer.readout.gate(inputs[b, t])))
    return layer.readout.out(torch.stack(rows).view(B, T, -1))


def test_gated_deltanet_can_be_the_layer_of_qwen3_next() -> None:
    layer = shaken(GatedDeltaNet(12, heads=2, value_heads=6, head_dim=5, value_dim=7, eps=1e-6))
    inputs = x(12)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs)[0], plain_gated_delta(layer, inputs), rtol=0, atol=1e-12)


def test_the_delta_rules_are_one_rule_with_other_arguments() -> None:
    plain = DeltaNet(16, heads=2).double()
    inputs = x(16, time=40)
    once = DeltaProduct(16, heads=2, writes=1, negative=False, expand_v=1, decay=False, gate=False).double()
    once.load_state_dict(plain.state_dict())
    assert torch.equal(once(inputs)[0], plain(inputs)[0])
    gated = GatedDeltaNet(16, heads=2, expand_v=1, gate=False).double()
    gated.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(gated(inputs)[0], plain(inputs)[0])
    gated.decay.rate.data.fill_(-50)
    torch.testing.assert_close(gated(inputs)[0], plain(inputs)[0], rtol=0, atol=1e-9)


def test_deltaproduct_writes_in_order_and_forgets_once() -> None:
    layer = shaken(DeltaProduct(8, heads=1, writes=3, conv=1))
    inputs = x(8, time=4, batch=1)
    y, state = layer.recall(inputs)
    projected = torch.cat([layer.q(inputs), layer.kv(inputs)], -1)
    mixed = F.silu(projected * layer.conv.weight[:, 0])[0]
    q, k, v = mixed.split([8, 24, 48], -1)
    S = torch.zeros(8, 16, dtype=torch.float64)
    for t in range(4):
        S = layer.decay(inputs)[0, 0, t].exp() * S
        for j in range(3):
            key = k[t, 8 * j :][:8]
            key = key * (key.square().sum() + 1e-6).rsqrt()
            strength = 2 * layer.beta(inputs)[0, t, j].sigmoid()
            S = S + strength * torch.outer(key, v[t, 16 * j :][:16] - S.mT @ key)
        query = q[t] * (q[t].square().sum() + 1e-6).rsqrt() * 8**-0.5
        torch.testing.assert_close(y[0, 0, t], S.mT @ query, rtol=0, atol=1e-12)
    torch.testing.assert_close(state["S"][0, 0], S, rtol=0, atol=1e-12)


def test_efla_becomes_the_delta_rule_for_short_keys_and_saturates_for_long_ones() -> None:
    layer = EFLA(4, heads=1).double()
    beta = torch.tensor([[[0.3, 0.3, 0.3]]], dtype=torch.float64)
    lengths = torch.tensor([0.0, 1e-5, 50.0], dtype=torch.float64)
    key = lengths[:, None] * torch.eye(4, dtype=torch.float64)[0]
    key = key[None, None].requires_grad_()
    k, strength = layer.write(key, beta)
    assert torch.equal(k, key)
    torch.testing.assert_close(strength[0, 0, :2], beta[0, 0, :2], rtol=1e-9, atol=0)
    torch.testing.assert_close(strength[0, 0, 2] * 2500, torch.tensor(1.0, dtype=torch.float64))
    strength.sum().backward()
    assert key.grad.isfinite().all()


def test_kimi_delta_is_gated_deltanet_where_all_features_decay_alike() -> None:
    kimi = KimiDelta(16, heads=2).double()
    gated = GatedDeltaNet(16, heads=2, expand_v=1).double()
    both = {n: p for n, p in kimi.state_dict().items() if n.split(".")[0] in ("q", "kv", "conv", "beta")}
    gated.load_state_dict(both, strict=False)
    kimi.decay.step[1].weight.data.zero_()
    kimi.decay.bias.data.fill_(0.3)
    kimi.decay.rate.data.fill_(0.1)
    gated.decay.step.weight.data.zero_()
    gated.decay.bias.data.fill_(0.3)
    gated.decay.rate.data.fill_(0.1)
    inputs = x(16, time=70)
    for a, b in zip(kimi.recall(inputs)[0], gated.recall(inputs)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_feature_decays_start_and_stay_between_their_bounds() -> None:
    g = FeatureDecay(8, 50, 10, 4)(torch.zeros(1, 1, 8))
    assert g.shape == (1, 50, 1, 10)
    assert -16 * 0.1 <= g.min() < g.max() <= -1e-3 * (1 - 1e-3)
    bounded = FeatureDecay(8, 5, 3, 4, bound=-5.0)(1000 * torch.randn(1, 200, 8))
    assert -5 <= bounded.min() < -4.9
    assert bounded.max() <= 0


def test_rwkv7_is_its_equations() -> None:
    layer = shaken(RWKV7(8, head_dim=4, layer=1, layers=3, rank=2))
    inputs, first = x(8, time=7, batch=1), x(8, time=7, batch=1)
    y, _ = layer(inputs, None, {"rwkv7 values": first})
    S, before = torch.zeros(2, 4, 4, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for t in range(7):
        now = inputs[0, t]
        r, w, k, v, a, g = (now + mu * (before - now) for mu in layer.mix)
        v = layer.v(v).lerp(first[0, t], layer.value_mix(v).sigmoid()).view(2, 4)
        rate, k, r = layer.rate(a).sigmoid().view(2, 4), layer.k(k).view(2, 4), layer.r(r).view(2, 4)
        removed = F.normalize(k * layer.removal.view(2, 4), dim=-1)
        written = k * (1 + (rate - 1) * layer.replacement.view(2, 4))
        decay = torch.exp(-math.exp(-0.5) * layer.decay(w).sigmoid()).view(2, 4)
        read = torch.einsum("hk,hkv->hv", removed, S)
        S = decay[..., None] * S - (removed * rate)[..., None] * read[:, None] + written[..., None] * v[:, None]
        o = torch.einsum("hk,hkv->hv", r, S)
        o = layer.norm(o.reshape(1, 8))[0].view(2, 4) + (r * written * layer.bonus).sum(-1, keepdim=True) * v
        want = layer.out(o.reshape(8) * layer.gate(g))
        torch.testing.assert_close(y[0, t], want, rtol=0, atol=1e-12)
        before = now


def test_rwkv7_layers_hand_their_values_on_in_the_context() -> None:
    first, second = (shaken(RWKV7(8, head_dim=4, layer=i, layers=2, rank=2)) for i in range(2))
    inputs, context = x(8), {}
    first(inputs, None, context)
    assert context["rwkv7 values"].shape == inputs.shape
    assert not torch.allclose(second(inputs, None, context)[0], second(inputs)[0])
    kept = context["rwkv7 values"].clone()
    second(inputs, None, context)
    assert torch.equal(context["rwkv7 values"], kept)


def test_rwkv7_starts_where_its_authors_start() -> None:
    layer = RWKV7(128, layer=1, layers=4)
    assert not layer.out.weight.any()
    assert not layer(torch.randn(1, 5, 128))[0].any()
    w = layer.decay(torch.randn(128)).sigmoid()
    assert w.min() < 0.01 < 0.9 < w.max()
    assert layer.decay.down.weight.shape == (32, 128)


@pytest.mark.parametrize("objective", ["encode", "dot"])
def test_the_other_objectives_of_lattice_resume_too(objective: str) -> None:
    layer = shaken(Lattice(8, heads=2, slots=3, objective=objective, renormalise=True))
    inputs = x(8, time=70)
    y, end = layer(inputs)
    first, state = layer(inputs[:, :33])
    rest, state = layer(inputs[:, 33:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), y, rtol=0, atol=1e-9)
    torch.testing.assert_close(state["S"], end["S"], rtol=0, atol=1e-9)


def test_a_member_of_a_mixture_reads_its_own_tokens_as_if_there_were_no_others() -> None:
    layer = shaken(MoM(8, memories=3, top=1, shared=False, memory="gla", heads=2))
    inputs = x(8, time=20)
    y, state = layer(inputs)
    _, chosen, weights = layer.route(inputs)
    assert chosen.sum(-1).eq(1).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 20, dtype=torch.float64))
    for name, member in layer.each():
        for row in range(2):
            mine = chosen[row, :, int(name)]
            alone, after = member(inputs[row : row + 1, mine])
            torch.testing.assert_close(y[row, mine], alone[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(state[name]["S"][row], after["S"][0], rtol=0, atol=1e-12)


def test_mixing_comes_before_one_common_readout_for_the_delta_family() -> None:
    layer = shaken(MoM(8, memories=2, top=2, heads=2))
    inputs = x(8, time=11)
    weights = layer.route(inputs)[2]
    shared, one, two = (layer.members[n].recall(inputs)[0] for n in ("shared", "0", "1"))
    mixed = shared + weights[:, None, :, :1] * one + weights[:, None, :, 1:] * two
    torch.testing.assert_close(layer(inputs)[0], layer.readout(mixed, inputs), rtol=0, atol=1e-12)


def test_a_mixture_ties_what_it_says_and_nothing_else() -> None:
    members = [m for _, m in MoM(16, memories=3).each()]
    a, b = members[0], members[-1]
    assert a.q is b.q
    assert a.conv is b.conv
    assert a.decay.rate is b.decay.rate
    assert a.kv is not b.kv
    assert a.decay.step is not b.decay.step
    loose = [m for _, m in MoM(16, memories=3, tied=()).each()]
    assert loose[0].q is not loose[1].q


def test_any_memory_may_be_mixed() -> None:
    for memory, arguments in [("griffin", {}), ("retnet", {"heads": 2}), (lambda dim: GLA(dim, heads=1), {})]:
        layer = shaken(MoM(8, memory=memory, **arguments))
        y, state = layer(x(8))
        assert layer(x(8, time=1), state)[0].shape == (2, 1, 8)
        assert y.shape == (2, 9, 8)


def test_the_balance_is_least_where_all_memories_are_used_alike() -> None:
    layer = MoM(8, memories=4, top=2).double()
    inputs = x(8, time=500)
    even = layer.balance(inputs)
    layer.router.weight.data[0] = 5 * layer.router.weight.data[0].abs()
    uneven = layer.balance(inputs.abs())
    assert abs(even.item() - 2) < 0.2
    assert uneven > even + 0.5
    uneven.backward()
    assert layer.router.weight.grad.any()


def test_a_training_loop_gets_the_balance_of_every_mixture_in_a_stack() -> None:
    model = LanguageModel("mom, gated-deltanet, mom", vocabulary=9, dim=8, arguments={"mom": {"heads": 2}})
    read: list[torch.Tensor] = []
    for m in model.modules():
        if isinstance(m, MoM):
            m.register_forward_hook(lambda _, args, __: read.append(args[0]))
    with balancing(model) as terms:
        model(torch.arange(9)[None])
    routers = [m for m in model.modules() if isinstance(m, MoM)]
    assert len(terms) == len(routers) == 2
    torch.testing.assert_close(
        torch.stack(terms), torch.stack([m.balance(x) for m, x in zip(routers, read, strict=True)])
    )
    sum(terms).backward()
    assert all(m.router.weight.grad.any() for m in routers)
    model(torch.arange(9)[None])  # outside of the block nothing is kept
    assert len(terms) == 2


def test_the_example_of_the_docs_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "delta-rules.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("id", [i for i, p in catalogue.proofs().items() if p.run.__module__ == delta.__name__])
def test_the_proof_holds_and_its_control_does_not(id: str) -> None:
    system, control = catalogue.proofs()[id].run()
    assert system.holds, system.says
    assert not control.holds, control.says
