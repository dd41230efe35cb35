"""qwen3_next: gated delta memories, gated full attention in every fourth layer, and mixtures of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.memory.base import Memory
from remanence.memory.gated_deltanet import GatedDeltaNet
from remanence.memory.linear import Linear
from remanence.memory.softmax import SoftmaxAttention
from remanence.models.language import ChannelMixer
from remanence.models.pretrained.mapping import Config, Rule, rotary, same, stacked
from remanence.models.pretrained.model import CentredNorm, PretrainedModel, Residual

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "decoder_sparse_step": 1,
    "num_experts": 0,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}


class GatedAttention(SoftmaxAttention):
    """Full attention whose queries and keys are normalised, and whose output is gated by σ(W_g x).

    Args:
        heads, kv_heads: of queries, and of keys and values; head_dim: features of each.
        rotary: share of each head's features that is turned. Pairs that are not turned have the frequency 0.
        base: the slowest rotary phase turns once in about 2π·base tokens.
        bias: whether the projections have biases; eps: of the norms.

    Shapes: those of `SoftmaxAttention`.
    """

    def __init__(
        self, dim: int, *, heads: int, kv_heads: int, head_dim: int, rotary: float, base: float, bias: bool, eps: float
    ):
        Memory.__init__(self)
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim
        self.qkv = Linear(dim, (heads + 2 * kv_heads) * head_dim, bias=bias)
        self.gate = Linear(dim, heads * head_dim, bias=bias)
        self.out = Linear(heads * head_dim, dim, bias=bias)
        self.q_norm, self.k_norm = CentredNorm(head_dim, eps), CentredNorm(head_dim, eps)
        turned = int(head_dim * rotary)
        pairs = torch.arange(0, turned, 2, dtype=torch.float64) / max(turned, 1)
        self.frequencies = F.pad(base**-pairs, (0, head_dim // 2 - len(pairs)))

    def projected(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        q, k = (norm(h.unflatten(-1, (-1, self.head_dim))) for norm, h in ((self.q_norm, q), (self.k_norm, k)))
        return torch.cat([q.flatten(-2), k.flatten(-2), v], -1)

    def readout(self, y: Tensor, x: Tensor) -> Tensor:
        return self.out(y * self.gate(x).sigmoid())


class Experts(nn.Module):
    """For each token the sum of its `chosen` likeliest experts, SwiGLUs, and of one that all share, gated by σ(w·x).

    Args:
        hidden, shared: width of each expert, and of the shared one.
        normalise: whether the chosen probabilities are made to sum to 1.

    Shapes: [..., dim] to [..., dim].
    """

    def __init__(self, dim: int, *, experts: int, chosen: int, hidden: int, shared: int, normalise: bool):
        super().__init__()
        self.chosen, self.normalise = chosen, normalise
        self.router = Linear(dim, experts, bias=False)
        self.inner = nn.Parameter(torch.randn(experts, 2 * hidden, dim) * dim**-0.5)
        self.outer = nn.Parameter(torch.randn(experts, dim, hidden) * hidden**-0.5)
        self.shared = ChannelMixer(dim, shared)
        self.shared_gate = Linear(dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        share, which = self.router(tokens).softmax(-1, dtype=torch.float32).topk(self.chosen, dim=-1)
        if self.normalise:
            share = share / share.sum(-1, keepdim=True)
        y = self.shared(tokens) * self.shared_gate(tokens).sigmoid()
        for expert in which.unique().tolist():
            at, rank = (which == expert).nonzero(as_tuple=True)
            gate, value = F.linear(tokens[at], self.inner[expert]).chunk(2, dim=-1)
            found = F.linear(F.silu(gate) * value, self.outer[expert])
            y = y.index_add(0, at, found * share[at, rank, None].to(found.dtype))
        return y.view_as(x)


def build(config: Config) -> PretrainedModel:
    """A model of this configuration."""
    config.only("hidden_act", "silu")
    dim, eps, count = config["hidden_size"], config["rms_norm_eps"], config["num_hidden_layers"]
    kinds = config.get("layer_types") or [
        "linear_attention" if (i + 1) % (config.get("full_attention_interval") or 4) else "full_attention"
        for i in range(count)
    ]
    layers: list[Residual] = []
    rules = same("", "model.", {"embedding.weight": "embed_tokens.weight", "norm.weight": "norm.weight"})
    for i in range(count):
        memory, mapped = (_delta if kinds[i] == "linear_attention" else _attention)(config, i)
        mixer, mixed = _mixer(config, i)
        layers += [Residual(CentredNorm(dim, eps), inner) for inner in (memory, mixer)]
        theirs = f"model.layers.{i}."
        rules += same(f"layers.{2 * i}.", theirs, {"norm.weight": "input_layernorm.weight"})
        rules += same(f"layers.{2 * i + 1}.", theirs, {"norm.weight": "post_attention_layernorm.weight"})
        rules += mapped + mixed
    return PretrainedModel(config, layers, CentredNorm(dim, eps), rules, ignored=["mtp."])


def _delta(config: Config, i: int) -> tuple[Memory, list[Rule]]:
    """A gated delta memory. Their rows stand together by the head of their keys: q, k, v and the gate; β and decay."""
    dim, heads, memories = config["hidden_size"], config["linear_num_key_heads"], config["linear_num_value_heads"]
    K, V, taps = config["linear_key_head_dim"], config["linear_value_head_dim"], config["linear_conv_kernel_dim"]
    eps = config["rms_norm_eps"]
    memory = GatedDeltaNet(dim, heads=heads, value_heads=memories, head_dim=K, value_dim=V, conv=taps, eps=eps)
    ours, theirs, values = f"layers.{2 * i}.inner.", f"model.layers.{i}.linear_attn.", memories // heads * V
    rows, pair = heads * 2 * (K + values), memories // heads
    parts = torch.arange(rows).view(heads, -1).split([K, K, values, values], dim=1)
    both = torch.arange(2 * memories).view(heads, -1).split(pair, dim=1)
    channels = heads * 2 * K + memories * V
    return memory, [
        Rule(
            (f"{ours}q.weight", f"{ours}kv.weight", f"{ours}readout.gate.weight"),
            (f"{theirs}in_proj_qkvz.weight",),
            ((rows, dim),),
            torch.cat([p.reshape(-1) for p in parts]),
        ),
        Rule(
            (f"{ours}beta.weight", f"{ours}decay.step.weight"),
            (f"{theirs}in_proj_ba.weight",),
            ((2 * memories, dim),),
            torch.cat([p.reshape(-1) for p in both]),
        ),
        Rule((f"{ours}conv.weight",), (f"{theirs}conv1d.weight",), ((channels, 1, taps),)),
        *same(ours, theirs, {"decay.rate": "A_log", "decay.bias": "dt_bias"}),
        *same(f"{ours}readout.", theirs, {"norm.weight": "norm.weight", "out.weight": "out_proj.weight"}),
    ]


def _attention(config: Config, i: int) -> tuple[Memory, list[Rule]]:
    """Gated attention. Their queries stand beside their gates by head, and the features that turn come first."""
    dim, heads, groups = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    K, bias, eps = config.get("head_dim") or dim // heads, config["attention_bias"], config["rms_norm_eps"]
    base, share = rotary(config)
    memory = GatedAttention(dim, heads=heads, kv_heads=groups, head_dim=K, rotary=share, base=base, bias=bias, eps=eps)
    # our pairs are (j, j + K/2) throughout, theirs (j, j + turned/2) among the features that turn
    turned = int(K * share)
    first, second, still = torch.arange(K).split([turned // 2, turned // 2, K - turned])
    feature = torch.cat([first, still[: len(still) // 2], second, still[len(still) // 2 :]])
    q, gate = torch.arange(2 * heads * K).view(heads, 2, K).unbind(1)
    k, v = (torch.arange(groups * K).view(groups, K) + (2 * heads + n * groups) * K for n in (0, 1))
    order = torch.cat([part.reshape(-1) for part in (q[:, feature], k[:, feature], v, gate)])
    ours, theirs, rows = (
        f"layers.{2 * i}.inner.",
        f"model.layers.{i}.self_attn.",
        (2 * heads * K, groups * K, groups * K),
    )

    def projections(part: str) -> Rule:
        names = tuple(f"{theirs}{n}_proj.{part}" for n in "qkv")
        shapes = tuple((n, dim) if part == "weight" else (n,) for n in rows)
        return Rule((f"{ours}qkv.{part}", f"{ours}gate.{part}"), names, shapes, order)

    norms = [Rule((f"{ours}{n}_norm.weight",), (f"{theirs}{n}_norm.weight",), order=feature) for n in "qk"]
    out = same(f"{ours}out.", f"{theirs}o_proj.", {n: n for n in ("weight", "bias")})
    return memory, [projections("weight"), projections("bias"), *norms, *out]


def _mixer(config: Config, i: int) -> tuple[nn.Module, list[Rule]]:
    """A mixture of experts, or in some layers a SwiGLU."""
    dim, count = config["hidden_size"], config["num_experts"]
    ours, theirs = f"layers.{2 * i + 1}.inner.", f"model.layers.{i}.mlp."

    def swiglu(ours: str, theirs: str, hidden: int) -> list[Rule]:
        inward = stacked(f"{ours}inner.weight", [f"{theirs}{n}_proj.weight" for n in ("gate", "up")], [hidden] * 2, dim)
        return [inward, *same(ours, theirs, {"out.weight": "down_proj.weight"})]

    if i in config["mlp_only_layers"] or not count or (i + 1) % config["decoder_sparse_step"]:
        return ChannelMixer(dim, config["intermediate_size"]), swiglu(ours, theirs, config["intermediate_size"])
    hidden, shared = config["moe_intermediate_size"], config["shared_expert_intermediate_size"]
    chosen, normalise = config["num_experts_per_tok"], config["norm_topk_prob"]
    mixer = Experts(dim, experts=count, chosen=chosen, hidden=hidden, shared=shared, normalise=normalise)
    inner = [f"{theirs}experts.{e}.{n}_proj.weight" for e in range(count) for n in ("gate", "up")]
    outer = [f"{theirs}experts.{e}.down_proj.weight" for e in range(count)]
    return mixer, [
        stacked(f"{ours}inner", inner, [hidden] * len(inner), dim),
        stacked(f"{ours}outer", outer, [dim] * count, hidden),
        *same(ours, theirs, {"router.weight": "gate.weight", "shared_gate.weight": "shared_expert_gate.weight"}),
        *swiglu(f"{ours}shared.", f"{theirs}shared_expert.", shared),
    ]
