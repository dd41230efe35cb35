"""What is particular to each outer-product memory; the laws that all obey are tested in tests/laws."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from remanence import catalogue
from remanence.errors import UnknownName
from remanence.evaluation.proofs import outer
from remanence.memory.attention import WindowAttention
from remanence.memory.base import Memory
from remanence.memory.gateloop import GateLoop
from remanence.memory.griffin import Griffin
from remanence.memory.hgrn import LowerBounds
from remanence.memory.hgrn2 import HGRN2
from remanence.memory.jrt import PrefixLinearAttention, mask_prefix, prefix_loss, read_twice, taylor_features
from remanence.memory.lightnet import LightNet, running_logsumexp
from remanence.memory.lightning import LightningAttention, head_slopes, lightning_attention
from remanence.memory.mamba2 import Mamba2
from remanence.memory.recurrentgemma import RecurrentGemma
from remanence.memory.rwkv6 import RWKV6
from remanence.ops.taps import tap
from remanence.state import flatten, nbytes

MAKERS: dict[str, Callable[[], Memory]] = {
    "lightning": lambda: LightningAttention(16, layer=1, layers=3),
    "lightning-lrpe": lambda: LightningAttention(16, layer=1, layers=3, lrpe=True, gate_rank=0, affine=True),
    "mamba2": lambda: Mamba2(16, state_size=6, head_dim=8),
    "mamba2-groups": lambda: Mamba2(16, state_size=6, head_dim=8, groups=2, bias=True, step_limit=(0.01, 0.5)),
    "gateloop": lambda: GateLoop(16),
    "gateloop-heads": lambda: GateLoop(16, heads=4),
    "hgrn2": lambda: HGRN2(16, lower_bound=0.2),
    "rwkv6": lambda: RWKV6(16, mix_rank=4, decay_rank=4),
    "lightnet": lambda: LightNet(16, gate_rank=4),
    "jrt": lambda: PrefixLinearAttention(16, features=4, prefix=6),
    "attention": lambda: WindowAttention(16, kv_heads=2, head_dim=6, rotary=0.7, bias=True, out_bias=True, window=7),
    "recurrentgemma": lambda: RecurrentGemma(16, layers=4, heads=2, window=7, hidden=20),
}
every = pytest.mark.parametrize("name", [*MAKERS])


def made(name: str, shake: float = 0.3) -> Memory:
    """The memory in float64, away from its initialisation."""
    torch.manual_seed(0)
    memory = MAKERS[name]().double()
    for p in memory.parameters():
        p.data += shake * torch.randn_like(p)
    return memory


def tokens(time: int = 9, batch: int = 2, dim: int = 16) -> Tensor:
    source = torch.Generator().manual_seed(1)
    return torch.randn(batch, time, dim, generator=source, dtype=torch.float64)


def near(got: Tensor, want: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@every
def test_resumption_also_of_the_settings_that_the_laws_do_not_build(name: str) -> None:
    memory, x = made(name), tokens(75).requires_grad_()
    whole, end = memory(x)
    pieces, state = [], None
    for piece in x.split([8, 0, 1, 61, 5], dim=1):  # the first holds all of jrt's prefix
        y, state = memory(piece, state)
        pieces.append(y)
    near(torch.cat(pieces, 1), whole)
    assert state is not None
    for path, t in flatten(end).items():
        near(flatten(state)[path].to(t.dtype), t)
    leaves = [x, *memory.parameters()]
    for got, want in zip(
        *(torch.autograd.grad(y.sin().sum(), leaves) for y in (torch.cat(pieces, 1), whole)), strict=True
    ):
        near(got, want, 1e-8 * (1 + want.abs().max().item()))


def test_arguments_out_of_range_are_refused_in_words() -> None:
    for build, words in [
        (lambda: LightningAttention(30), "positive multiple of heads, got dim=30, heads=4"),
        (lambda: LightningAttention(8, layer=3, layers=3), r"layer must be in \[0, layers\), got layer=3"),
        (lambda: LightningAttention(8, slopes=[1.0, 2.0]), "slopes must be 4 numbers"),
        (lambda: LightningAttention(8, heads=1, slopes=[-1.0]), "at least 0"),
        (lambda: lightning_attention(*[torch.ones(1, 1, 2, 2)] * 3, torch.ones(1), tile=0), "tile must be at least 1"),
        (lambda: Mamba2(8, head_dim=5), "head_dim and norm_groups must divide expand·dim = 16, .* got head_dim=5"),
        (lambda: Mamba2(8, head_dim=4, groups=3), "groups the heads, got .* groups=3"),
        (lambda: GateLoop(9, heads=2), "positive multiple of heads"),
        (lambda: HGRN2(8, lower_bound=1.0), r"lower_bound must be in \[0, 1\)"),
        (lambda: RWKV6(9), "positive multiple of heads"),
        (lambda: LightNet(9), "positive multiple of heads"),
        (lambda: PrefixLinearAttention(8, prefix=-1), "prefix must be at least 0"),
        (lambda: read_twice(), "at least one piece"),
        (lambda: WindowAttention(8, kv_heads=3), "kv_heads must divide heads = 4, got 3"),
        (lambda: WindowAttention(8, head_dim=3), "rotary must be a share"),
        (lambda: WindowAttention(8, window=0), "window must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            build()
    with pytest.raises(UnknownName, match="did you mean 'attention'"):
        RecurrentGemma(8, layers=1, heads=2, pattern=["atention"])


def test_state_bytes_are_what_the_docstrings_say() -> None:
    assert nbytes(LightningAttention(16).initial_state(1)) == 4 * 4 * 4 * 4
    assert nbytes(LightningAttention(16, lrpe=True).initial_state(1)) == 4 * 4 * 8 * 4 + 8
    assert nbytes(Mamba2(64).initial_state(1)) == 4 * (2 * 128 * 64 + 3 * (128 + 2 * 128))
    assert nbytes(GateLoop(16).initial_state(1)) == 4 * 16 * 2
    assert nbytes(HGRN2(16, heads=2).initial_state(1)) == 4 * 2 * 8 * 8
    assert nbytes(RWKV6(16, heads=2).initial_state(1)) == 4 * (2 * 8 * 8 + 16)
    assert nbytes(LightNet(16, heads=2).initial_state(1)) == 4 * (2 * 8 * 8 + 16)
    assert nbytes(PrefixLinearAttention(16, heads=2).initial_state(1)) == 4 * 2 * 153 * 9 + 1
    assert nbytes(WindowAttention(16, kv_heads=1, window=5).initial_state(1)) == 4 * 2 * 4 * 4 + 8


# Lightning attention


def test_slopes_are_geometric_and_interleave_between_powers_of_two() -> None:
    near(head_slopes(4), torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256], dtype=torch.float64))
    near(head_slopes(1), torch.tensor([2.0**-8], dtype=torch.float64))
    near(head_slopes(3), torch.tensor([1 / 16, 1 / 256, 1 / 4], dtype=torch.float64))
    assert len(set(head_slopes(12).tolist())) == 12


def test_lightning_decays_by_head_and_layer() -> None:
    for layer, share in [(0, 1 + 1e-5), (1, 0.5 + 1e-5), (2, 1e-5)]:
        near(LightningAttention(8, layer=layer, layers=3).slopes, head_slopes(4) * share)
    near(LightningAttention(8).slopes, head_slopes(4) * 1e-5)  # a layer alone is a top layer
    layer = LightningAttention(8, slopes=[0, 0.1, 0.2, 0.3])
    before = layer.slopes.clone()
    layer.half().double()
    assert torch.equal(layer.slopes, before)


def test_lightning_is_its_quadratic_form() -> None:
    layer, x = made("lightning-lrpe"), tokens(40)
    q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in F.silu(layer.qkv(x)).chunk(3, -1))
    i = torch.arange(40, dtype=torch.float64)
    apart = i[:, None] - i
    turned = torch.einsum("bhik,bhjk,hijk->bhij", q, k, (apart[..., None] * layer.frequencies[:, :, None]).cos())
    y = (turned * torch.exp(-layer.slopes[:, None, None] * apart)).tril() @ v
    normed = F.rms_norm(y.transpose(1, 2).flatten(2), (16,), eps=1e-6) * layer.norm.weight
    near(layer(x)[0], layer.out(normed * layer.gate(x).sigmoid()))


def test_lightning_knows_its_place_far_along_the_stream() -> None:
    layer, x = made("lightning-lrpe"), tokens()
    start = layer.initial_state(2)
    far = {**start, "position": start["position"] + 10**8}
    near(layer(x, far)[0], layer(x, start)[0], 1e-6)
    assert (layer(x[:, 1:], far)[0] - layer(x, far)[0][:, 1:]).abs().max() > 1e-3


@pytest.mark.parametrize("tile", [1, 5, 64, 10**6])
def test_tiles_change_nothing(tile: int) -> None:
    q, k, v = torch.randn(3, 2, 3, 33, 4, dtype=torch.float64)
    want, state = lightning_attention(q, k, v, head_slopes(3), tile=7)
    got, other = lightning_attention(q, k, v, head_slopes(3), tile=tile)
    near(got, want)
    near(other["S"], state["S"])


# Mamba-2


def test_mamba2_is_the_loop_with_groups_limits_biases_and_grouped_norm() -> None:
    layer, x = made("mamba2-groups"), tokens(20)
    z, mixed, step = layer.inward(x).split([32, 32 + 2 * 12, 4], dim=-1)
    padded = F.pad(mixed, (0, 0, 3, 0))
    mixed = sum(padded[:, j : j + 20] * layer.conv.weight[:, j] for j in range(4)) + layer.conv.bias
    u, B, C = F.silu(mixed).split([32, 12, 12], dim=-1)
    step = F.softplus(step + layer.step_bias).clamp(0.01, 0.5)
    assert (step == 0.5).any()
    h, y = torch.zeros(2, 4, 8, 6, dtype=torch.float64), []
    for t in range(20):
        v = u[:, t].view(2, 4, 8)
        b, c = (part[:, t].view(2, 2, 6).repeat_interleave(2, 1) for part in (B, C))
        decay = torch.exp(-layer.rate.exp() * step[:, t])[..., None, None]
        h = decay * h + step[:, t, :, None, None] * v[..., None] * b[:, :, None]
        y.append((h * c[:, :, None]).sum(-1) + layer.skip[:, None] * v)
    gated = (torch.stack(y, 1).flatten(2) * F.silu(z)).unflatten(-1, (2, 16))
    normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    near(layer(x)[0], layer.out(layer.scale * normed.flatten(2)))


def test_mamba2_starts_with_steps_and_rates_in_their_ranges() -> None:
    layer = Mamba2(512)
    assert (layer.rate.exp() >= 1).all()
    assert (layer.rate.exp() <= 16).all()
    steps = F.softplus(layer.step_bias)
    assert 0.99e-3 < steps.min() < steps.max() < 1.01e-1
    assert (Mamba2(24).heads, Mamba2(512).heads, Mamba2(24).widths) == (3, 16, (48, 128, 128))


# GateLoop


@pytest.mark.parametrize("name", ["gateloop", "gateloop-heads"])
def test_gateloop_is_the_complex_loop(name: str) -> None:
    layer, x = made(name), tokens(50)
    state = layer(tokens(3))[1]
    K = layer.head_dim
    heads = (layer.heads, K)
    q, k, v = (part.unflatten(-1, heads) for part in layer.qkv(x).chunk(3, -1))
    w = torch.complex(*layer.transition(x).chunk(2, -1)).unflatten(-1, heads)
    a = torch.polar(w.abs().sigmoid(), w.angle())
    S = torch.complex(*state["S"].chunk(2, dim=2))
    y = []
    for t in range(50):
        S = a[:, t, :, :, None] * S + k[:, t, :, :, None] * v[:, t, :, None]
        y.append((q[:, t, :, :, None] * S.real).sum(2).flatten(1))
    got, after = layer(x, state)
    near(got, layer.out(torch.stack(y, 1) * F.silu(layer.gate(x))))
    near(after["S"], torch.cat([S.real, S.imag], 2))


def test_gateloop_has_a_gradient_where_its_transition_is_zero_and_slows_it() -> None:
    grads = []
    for share in (1.0, 0.5):
        torch.manual_seed(0)
        layer = GateLoop(4, gate_gradient=share).double()
        layer.transition.weight.data.zero_()
        layer.transition.bias.data[:] = torch.tensor([0.0, 0, 0, 0.3, 0, 0, 0, 0.4])
        layer(tokens(7, dim=4))[0].square().sum().backward()
        grads.append(layer.transition.bias.grad)
    assert grads[0].isfinite().all()
    assert grads[0][3] != 0
    near(grads[1], 0.5 * grads[0])


# HGRN2


def test_hgrn2_keeps_at_least_its_bound_and_shares_it() -> None:
    bounds = LowerBounds(3, 8).double()
    bounds.logits.data.normal_()
    layer = HGRN2(8, heads=2, lower_bound=bounds, layer=2).double()
    near(layer.log_decay(torch.full((1, 1, 8), -50.0, dtype=torch.float64))[0, 0], bounds()[2].log())
    layer(tokens(dim=8))[0].sum().backward()
    assert bounds.logits.grad is not None
    first = HGRN2(8, heads=2, lower_bound=bounds, layer=0).double()
    f = tokens(dim=8)
    near(first.log_decay(f), F.logsigmoid(f))
    near(HGRN2(8, heads=2).double().log_decay(f), F.logsigmoid(f))


def test_hgrn2_is_the_loop() -> None:
    layer, x = made("hgrn2"), tokens(30)
    q, f, v = (part.unflatten(-1, (4, 4)) for part in layer.qfv(x).chunk(3, -1))
    keep = 0.2 + 0.8 * f.sigmoid()
    S, y = torch.zeros(2, 4, 4, 4, dtype=torch.float64), []
    for t in range(30):
        S = keep[:, t, :, :, None] * S + (1 - keep[:, t, :, :, None]) * v[:, t, :, None]
        y.append((F.silu(q[:, t, :, :, None]) / 2 * S).sum(2).flatten(1))
    near(layer(x)[0], layer.out(layer.norm(torch.stack(y, 1))))


# RWKV-6


def test_rwkv6_is_the_loop() -> None:
    layer, x = made("rwkv6"), tokens(30)
    before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    blended = []
    for i in range(5):  # w, k, v, r, g
        low = torch.tanh((x + (before - x) * layer.mix_all) @ layer.mix_down)[..., 4 * i : 4 * i + 4]
        blended.append(x + (before - x) * (layer.mix[i] + low @ layer.mix_up[i]))
    w, k, v, r, g = blended
    keep = torch.exp(-torch.exp(layer.decay_base + torch.tanh(w @ layer.decay_down) @ layer.decay_up))
    r, k, v, keep = (part.unflatten(-1, (4, 4)) for part in (layer.receptance(r), layer.key(k), layer.value(v), keep))
    S, y = torch.zeros(2, 4, 4, 4, dtype=torch.float64), []
    for t in range(30):
        kv = k[:, t, :, :, None] * v[:, t, :, None]
        read = S + layer.bonus[:, 0, :, None] * kv
        y.append((r[:, t, :, :, None] * read).sum(2).flatten(1))
        S = keep[:, t, :, :, None] * S + kv
    normed = F.group_norm(torch.stack(y, 1).flatten(0, 1), 4, layer.norm.weight, layer.norm.bias, eps=64e-5)
    near(layer(x)[0], layer.out(normed.view_as(x) * F.silu(layer.gate(g))))
    near(layer(x)[1]["S"], S)


def test_rwkv6_reads_one_token_alike_whether_or_not_its_op_is_watched() -> None:
    layer, x = made("rwkv6"), tokens(8)
    _, state = layer(x[:, :7])
    seen = []
    with tap(lambda call: seen.append(call.op) or call.run()):
        y, after = layer(x[:, 7:], state)
    want, end = layer(x[:, 7:], state)
    near(y, want)
    near(after["S"], end["S"])
    assert seen == ["linear_attention", "normalise"]


def test_rwkv6_starts_by_its_place_in_the_stack() -> None:
    bottom, top = RWKV6(16), RWKV6(16, layer=3, layers=4)
    assert bottom.decay_base[0] == top.decay_base[0] == -6
    assert bottom.decay_base[-1] == top.decay_base[-1] == -1
    assert (top.decay_base[1:-1] < bottom.decay_base[1:-1]).all()  # deeper layers remember longer
    assert not bottom.mix_down.any()
    assert bottom.mix[1, 0] == 1


# LightNet


def test_running_logsumexp_is_torchs_also_in_its_gradient() -> None:
    x = (20 * tokens(200)).requires_grad_()
    start = tokens(1)[:, 0].requires_grad_()
    want = torch.cat([start[:, None], x], 1).logcumsumexp(1)[:, 1:]
    got = running_logsumexp(x, start)
    near(got, want)
    for a, b in zip(*(torch.autograd.grad(z.sin().sum(), (x, start)) for z in (got, want)), strict=True):
        near(a, b)
    nothing = torch.full((2, 16), -1e30, dtype=torch.float64)
    near(running_logsumexp(x, nothing), x.logcumsumexp(1))
    assert running_logsumexp(x[:, :0], start).shape == (2, 0, 16)


def test_lightnet_reads_a_whole_image_without_order_and_as_its_last_token_does() -> None:
    layer, x = made("lightnet"), tokens(30)
    whole = layer.whole(x)
    near(whole[:, -1], layer(x)[0][:, -1])
    order = torch.randperm(30)
    near(layer.whole(x[:, order]), whole[:, order])
    near(layer.whole(x.view(2, 5, 6, 16)), whole.view(2, 5, 6, 16))


# Just read twice


def test_taylor_features_approximate_the_exponential_to_second_order() -> None:
    q, k = tokens(9), tokens(9).flip(1)
    s = (q * k).sum(-1) / 4
    near((taylor_features(q) * taylor_features(k)).sum(-1), 1 + s + s**2 / 2)
    assert taylor_features(q).shape[-1] == 1 + 16 + 136


def test_prefix_linear_attention_is_its_formula() -> None:
    layer, x = made("jrt"), tokens(15)
    q, k = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in layer.qk(x).chunk(2, -1))
    ke, v, ve = (part(x).unflatten(-1, (4, 4)).transpose(1, 2) for part in (layer.prefix_k, layer.v, layer.prefix_v))

    def scores(keys: Tensor) -> Tensor:
        s = q @ keys.mT / 2
        return 1 + s + s**2 / 2

    causal, prefix = scores(k).tril(), scores(ke[:, :, :6])
    y = (causal @ v + prefix @ ve[:, :, :6]) / (causal.sum(-1, keepdim=True) + prefix.sum(-1, keepdim=True))
    near(layer(x)[0], layer.out(y.transpose(1, 2).flatten(2)))


def test_each_row_has_a_prefix_of_its_own_and_only_one() -> None:
    layer, x = made("jrt"), tokens(10)
    state = layer.initial_state(2)
    assert not layer(x[:, :0], state)[1]["begun"].any()
    begun = {**layer(x[:, :4], state)[1]}
    assert begun["begun"].all()
    mixed = {name: torch.stack([begun[name][0], state[name][1]]) for name in state}
    y = layer(x[:, 4:], mixed)[0]
    near(y[:1], layer(x[:1, 4:], {n: t[:1] for n, t in begun.items()})[0])
    near(y[1:], layer(x[1:, 4:])[0])


def test_read_twice_repeats_tokens_and_embeddings() -> None:
    context, question = torch.tensor([[1, 2, 3]]), torch.tensor([[9]])
    assert read_twice(context, question).tolist() == [[1, 2, 3, 9, 1, 2, 3, 9]]
    assert read_twice(context, times=3).shape == (1, 9)
    assert read_twice(tokens(3), tokens(2)).shape == (2, 10, 16)


def test_the_prefix_is_masked_and_scored_where_it_was_hidden() -> None:
    text = torch.randint(1, 20, (4, 400))
    inputs, hidden = mask_prefix(text, 300, 0, torch.Generator().manual_seed(0))
    assert not hidden[:, 300:].any()
    assert 0.12 < hidden[:, :300].float().mean() < 0.18
    assert (inputs[hidden] == 0).all()
    assert torch.equal(inputs[~hidden], text[~hidden])
    logits = torch.randn(4, 400, 20)
    after = -logits.log_softmax(-1)[:, 300:-1].gather(2, text[:, 301:, None]).mean()
    filled = -logits.log_softmax(-1).gather(2, text[..., None])[..., 0][hidden].mean()
    near(prefix_loss(logits, text, hidden, 300), after + 0.25 * filled, 1e-5)
    near(prefix_loss(logits, text, torch.zeros_like(hidden), 300), after, 1e-5)


# RecurrentGemma and its parts


def test_shared_keys_and_partial_phases_are_full_attention_in_the_window() -> None:
    layer = WindowAttention(
        16, heads=4, kv_heads=2, head_dim=8, rotary=0.5, window=20, bias=True, out_bias=True
    ).double()
    x = tokens(20)
    q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in layer.qkv(x).split([32, 16, 16], -1))

    def turn(part: Tensor) -> Tensor:
        angle = torch.arange(20, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.01], dtype=torch.float64)
        a, b, rest = part[..., :2], part[..., 2:4], part[..., 4:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)

    y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=True)
    near(layer(x)[0], layer.out(y.transpose(1, 2).flatten(2)))


def test_attention_without_phases_has_no_positions() -> None:
    layer, x = WindowAttention(16, window=30, rotary=0.0).double(), tokens(20)
    order = [*torch.randperm(19).tolist(), 19]
    near(layer(x[:, order])[0][:, -1], layer(x)[0][:, -1])


def test_recurrentgemma_repeats_its_pattern_and_has_the_published_sizes() -> None:
    kinds = [type(m) for m in RecurrentGemma(8, layers=5, heads=2).memories]
    assert kinds == [Griffin, Griffin, WindowAttention, Griffin, Griffin]
    with torch.device("meta"):
        small, large = RecurrentGemma(2560), RecurrentGemma(4096, layers=38)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (small, large)]
    assert [round(n / 1e9, 1) for n in sizes] == [2.0, 7.5]


@pytest.mark.parametrize(("dim", "heads"), [(2560, 10), (4096, 16), (512, 2), (300, 3), (96, 1), (1036, 7)])
def test_recurrentgemma_has_heads_of_at_most_256_features_at_any_width(dim: int, heads: int) -> None:
    with torch.device("meta"):
        model = RecurrentGemma(dim, layers=3, hidden=8)
    assert [m.heads for m in model.memories if isinstance(m, WindowAttention)] == [heads]


def test_recurrentgemma_says_which_widths_have_heads() -> None:
    with pytest.raises(ValueError, match="dim must be a positive multiple of 4 unless heads are given, got dim=6"):
        RecurrentGemma(6)


def test_recurrentgemma_blocks_add_to_the_stream() -> None:
    layer = RecurrentGemma(8, layers=3, heads=2, window=4).double()
    for block in layer.blocks:
        for last in (block.memory.out, block.mixer.out):
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
    x = tokens(dim=8)
    near(layer(x)[0], x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


# What the docs say, and the proofs


def test_the_examples_of_the_docs_run() -> None:
    page = Path(__file__).parents[2] / "docs" / "outer-products.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("id", [i for i, p in catalogue.proofs().items() if p.run.__module__ == outer.__name__])
def test_the_proof_holds_and_its_control_does_not(id: str) -> None:
    system, control = catalogue.proofs()[id].run()
    assert system.holds, system.says
    assert not control.holds, control.says
