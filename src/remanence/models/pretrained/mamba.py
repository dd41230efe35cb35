"""mamba and falcon_mamba: a stack of Mamba blocks; the second normalises step sizes, B and C."""

from __future__ import annotations

from remanence.memory.mamba import Mamba
from remanence.memory.parts import RMSNorm
from remanence.models.pretrained.mapping import Config, Rule, same
from remanence.models.pretrained.model import PretrainedModel, Residual

DEFAULTS = {
    "state_size": 16,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": "auto",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "mixer_rms_eps": 1e-6,
}
MIXER = {n: n for n in ("A_log", "D", "in_proj.weight", "in_proj.bias", "x_proj.weight", "dt_proj.weight")} | {
    n: n for n in ("dt_proj.bias", "out_proj.weight", "out_proj.bias")
}


def build(config: Config) -> PretrainedModel:
    """A model of this configuration."""
    config.only("hidden_act", "silu")
    dim, eps = config["hidden_size"], config["layer_norm_epsilon"]
    width = config.get("intermediate_size") or config["expand"] * dim
    rank, taps = config["time_step_rank"], config["conv_kernel"]

    def layer() -> Residual:
        mixer = Mamba(
            dim,
            width=width,
            states=config["state_size"],
            rank=None if rank == "auto" else rank,
            conv=taps,
            bias=config["use_bias"],
            conv_bias=config["use_conv_bias"],
            norm_eps=config["mixer_rms_eps"] if config["model_type"] == "falcon_mamba" else None,
        )
        return Residual(RMSNorm(dim, eps=eps), mixer)

    rules = same("", "", {"embedding.weight": "backbone.embeddings.weight", "norm.weight": "backbone.norm_f.weight"})
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{i}.inner.", f"backbone.layers.{i}.mixer."
        rules += same(f"layers.{i}.", f"backbone.layers.{i}.", {"norm.weight": "norm.weight"})
        rules += same(ours, theirs, MIXER | {"conv.bias": "conv1d.bias"})
        rules.append(Rule((f"{ours}conv.weight",), (f"{theirs}conv1d.weight",), ((width, 1, taps),)))
    layers = [layer() for _ in range(config["num_hidden_layers"])]
    return PretrainedModel(config, layers, RMSNorm(dim, eps=eps), rules)
