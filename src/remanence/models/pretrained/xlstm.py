"""xlstm: the xLSTM-7B stack, a matrix LSTM and a SwiGLU in turn."""

from __future__ import annotations

from remanence.memory.parts import RMSNorm
from remanence.memory.xlstm import MLSTM
from remanence.models.language import ChannelMixer
from remanence.models.pretrained.mapping import Config, Rule, same, stacked
from remanence.models.pretrained.model import PretrainedModel, Residual

DEFAULTS = {
    "qk_dim_factor": 0.5,
    "v_dim_factor": 1.0,
    "gate_soft_cap": 15.0,
    "output_logit_soft_cap": 30.0,
    "norm_eps": 1e-6,
    "eps": 1e-6,
    "ffn_proj_factor": 2.667,
    "ffn_round_up_to_multiple_of": 64,
    "weight_mode": "single",
    "tie_word_embeddings": False,
}


def build(config: Config) -> PretrainedModel:
    """A model of this configuration."""
    config.only("use_bias", False)
    config.only("weight_mode", "single", "fused")
    if "embedding_dim" in config:
        config.setdefault("hidden_size", config["embedding_dim"])
    dim, heads, eps = config["hidden_size"], config["num_heads"], config["norm_eps"]
    keys, values = int(dim * config["qk_dim_factor"]), int(dim * config["v_dim_factor"])
    unit = config["ffn_round_up_to_multiple_of"]
    hidden = int((dim * config["ffn_proj_factor"] + unit - 1) // unit * unit)
    count = config.get("num_blocks") or config["num_hidden_layers"]

    layers = []
    rules = same("", "backbone.", {"embedding.weight": "embeddings.weight", "norm.weight": "out_norm.weight"})
    for i in range(count):
        memory = MLSTM(
            dim,
            heads=heads,
            key_dim=keys,
            value_dim=values,
            cap=config["gate_soft_cap"],
            norm_eps=eps,
            eps=config["eps"],
        )
        layers.append(Residual(RMSNorm(dim, eps=eps), memory))
        layers.append(Residual(RMSNorm(dim, eps=eps), ChannelMixer(dim, hidden)))
        ours, mixer = f"layers.{2 * i}.inner.", f"layers.{2 * i + 1}.inner."
        block = f"backbone.blocks.{i}."
        rules += same(f"layers.{2 * i}.", block, {"norm.weight": "norm_mlstm.weight"})
        rules += same(f"layers.{2 * i + 1}.", block, {"norm.weight": "norm_ffn.weight"})
        rules += same(ours, f"{block}mlstm_layer.", {"norm.weight": "multihead_norm.weight"})
        rules += same(ours, f"{block}mlstm_layer.", {"out.weight": "out_proj.weight"})
        rules += same(mixer, f"{block}ffn.", {"out.weight": "proj_down.weight"})
        rules += _inward(config, ours, mixer, block, (keys, keys, values, values), hidden)
    return PretrainedModel(config, layers, RMSNorm(dim, eps=eps), rules, cap=config["output_logit_soft_cap"])


def _inward(config: Config, ours: str, mixer: str, block: str, widths: tuple[int, ...], hidden: int) -> list[Rule]:
    """The projections that their layers keep apart ("single") or as ours do ("fused")."""
    layer, dim, heads = f"{block}mlstm_layer.", config["hidden_size"], config["num_heads"]
    if config["weight_mode"] == "fused":
        gates = {f"gates.{n}": f"ifgate_preact.{n}" for n in ("weight", "bias")}
        fused = same(ours, layer, {"qkvo.weight": "qkv_opreact.weight"} | gates)
        return fused + same(mixer, f"{block}ffn.", {"inner.weight": "proj_up_gate_z.weight"})
    apart = [f"{layer}{n}gate_preact" for n in "if"]
    up = [f"{block}ffn.{n}.weight" for n in ("proj_up_gate", "proj_up")]
    return [
        stacked(f"{ours}qkvo.weight", [f"{layer}{n}.weight" for n in ("q", "k", "v", "ogate_preact")], widths, dim),
        stacked(f"{ours}gates.weight", [f"{n}.weight" for n in apart], [heads, heads], dim),
        stacked(f"{ours}gates.bias", [f"{n}.bias" for n in apart], [heads, heads]),
        stacked(f"{mixer}inner.weight", up, [hidden, hidden], dim),
    ]
