"""recurrent_gemma: Griffin's recurrent blocks and local attention, each followed by a GeGLU."""

from __future__ import annotations

import torch

from remanence.memory.attention import WindowAttention
from remanence.memory.base import Memory
from remanence.memory.griffin import Griffin
from remanence.memory.recurrentgemma import GatedMLP
from remanence.models.pretrained.mapping import Config, Rule, rotary, same, stacked
from remanence.models.pretrained.model import CentredNorm, PretrainedModel, Residual

DEFAULTS = {
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "rms_norm_eps": 1e-6,
    "block_types": ["recurrent", "recurrent", "attention"],
    "attention_bias": False,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": True,
}
RECURRENT = {
    "conv.bias": "conv_1d.bias",
    "input_gate.weight": "rg_lru.input_gate_weight",
    "decay_gate.weight": "rg_lru.recurrent_gate_weight",
    "base": "rg_lru.recurrent_param",
    "out.weight": "linear_out.weight",
    "out.bias": "linear_out.bias",
}


def build(config: Config) -> PretrainedModel:
    """A model of this configuration."""
    config.only("hidden_activation", "gelu_pytorch_tanh")
    dim, heads, eps = config["hidden_size"], config["num_attention_heads"], config["rms_norm_eps"]
    width, hidden, taps = config.get("lru_width") or dim, config["intermediate_size"] // 2, config["conv1d_width"]
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or dim // heads
    base, share = rotary(config)

    def memory(kind: str) -> Memory:
        if kind == "recurrent":
            return Griffin(dim, width=width, heads=heads, conv=taps)
        return WindowAttention(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=config["attention_window_size"],
            base=base,
            rotary=share,
            bias=config["attention_bias"],
            out_bias=True,
        )

    layers = []
    rules = same("", "model.", {"embedding.weight": "embed_tokens.weight", "norm.weight": "final_norm.weight"})
    for i in range(config["num_hidden_layers"]):
        kind = config["block_types"][i % len(config["block_types"])]
        layers += [Residual(CentredNorm(dim, eps), inner) for inner in (memory(kind), GatedMLP(dim, hidden))]
        ours, mixer, theirs = f"layers.{2 * i}.", f"layers.{2 * i + 1}.", f"model.layers.{i}."
        rules += same(ours, theirs, {"norm.weight": "temporal_pre_norm.weight"})
        rules += same(mixer, theirs, {"norm.weight": "channel_pre_norm.weight"})
        rules += same(f"{mixer}inner.out.", f"{theirs}mlp_block.down_proj.", {n: n for n in ("weight", "bias")})
        rules += _linear(f"{mixer}inner.inward", f"{theirs}mlp_block.", ("gate_proj", "up_proj"), (hidden, hidden), dim)
        ours, theirs = f"{ours}inner.", f"{theirs}temporal_block."
        if kind == "recurrent":
            rules += same(ours, theirs, RECURRENT)
            rules += _linear(f"{ours}inward", theirs, ("linear_y", "linear_x"), (width, width), dim)
            rules.append(Rule((f"{ours}conv.weight",), (f"{theirs}conv_1d.weight",), ((width, 1, taps),)))
            for our, their in (("input_gate", "input"), ("decay_gate", "recurrent")):
                name, shape = f"{theirs}rg_lru.{their}_gate_bias", (heads, width // heads)
                rules.append(Rule((f"{ours}{our}.bias",), (name,), (shape,)))
        else:
            rows = tuple(n * head_dim for n in (heads, kv_heads, kv_heads))
            rules += _linear(f"{ours}qkv", theirs, ("q_proj", "k_proj", "v_proj"), rows, dim)
            rules += same(f"{ours}out.", f"{theirs}o_proj.", {n: n for n in ("weight", "bias")})
    # the embedding's scale is rounded to bfloat16 in the published models
    scale = torch.tensor(dim**0.5, dtype=torch.bfloat16).item()
    return PretrainedModel(config, layers, CentredNorm(dim, eps), rules, scale=scale, cap=config["logits_soft_cap"])


def _linear(ours: str, prefix: str, names: tuple[str, ...], rows: tuple[int, ...], dim: int) -> list[Rule]:
    weights, biases = ([f"{prefix}{name}.{part}" for name in names] for part in ("weight", "bias"))
    return [stacked(f"{ours}.weight", weights, rows, dim), stacked(f"{ours}.bias", biases, rows)]
