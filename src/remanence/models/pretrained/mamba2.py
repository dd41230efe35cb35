"""mamba2: a stack of Mamba-2 blocks."""

from __future__ import annotations

from remanence.memory.mamba2 import Mamba2
from remanence.memory.parts import RMSNorm
from remanence.models.pretrained.mapping import Config, Rule, number, same
from remanence.models.pretrained.model import PretrainedModel, Residual

DEFAULTS = {
    "state_size": 128,
    "head_dim": 64,
    "expand": 2,
    "conv_kernel": 4,
    "n_groups": 8,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_limit": [0.0, float("inf")],
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}
MIXER = {
    "inward.weight": "in_proj.weight",
    "inward.bias": "in_proj.bias",
    "conv.bias": "conv1d.bias",
    "rate": "A_log",
    "step_bias": "dt_bias",
    "skip": "D",
    "scale": "norm.weight",
    "out.weight": "out_proj.weight",
    "out.bias": "out_proj.bias",
}


def build(config: Config) -> PretrainedModel:
    """A model of this configuration."""
    config.only("hidden_act", "silu")
    dim, eps, taps = config["hidden_size"], config["layer_norm_epsilon"], config["conv_kernel"]
    low, high = (number(n) for n in config["time_step_limit"])

    def layer() -> Residual:
        mixer = Mamba2(
            dim,
            expand=config["expand"],
            state_size=config["state_size"],
            head_dim=config["head_dim"],
            groups=config["n_groups"],
            conv=taps,
            conv_bias=config["use_conv_bias"],
            bias=config["use_bias"],
            step_limit=(low, high),
            eps=eps,
        )
        return Residual(RMSNorm(dim, eps=eps), mixer)

    mixed = config["expand"] * dim + 2 * config["n_groups"] * config["state_size"]
    rules = same("", "", {"embedding.weight": "backbone.embeddings.weight", "norm.weight": "backbone.norm_f.weight"})
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{i}.inner.", f"backbone.layers.{i}.mixer."
        rules += same(f"layers.{i}.", f"backbone.layers.{i}.", {"norm.weight": "norm.weight"})
        rules += same(ours, theirs, MIXER)
        rules.append(Rule((f"{ours}conv.weight",), (f"{theirs}conv1d.weight",), ((mixed, 1, taps),)))
    layers = [layer() for _ in range(config["num_hidden_layers"])]
    return PretrainedModel(config, layers, RMSNorm(dim, eps=eps), rules)
