"""rwkv: RWKV-4, time mixing and channel mixing in turn."""

from __future__ import annotations

from torch import nn

from remanence.memory.rwkv import RWKV, ChannelMix
from remanence.models.pretrained.mapping import Config, Rule, same
from remanence.models.pretrained.model import PretrainedModel, Residual

DEFAULTS = {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": False}
NORM = ("weight", "bias")
TIME = {"key.weight": "key.weight", "value.weight": "value.weight", "receptance.weight": "receptance.weight"} | {
    "out.weight": "output.weight",
    "decay": "time_decay",
    "bonus": "time_first",
}
CHANNEL = {"key.weight": "key.weight", "value.weight": "value.weight", "receptance.weight": "receptance.weight"}


def build(config: Config) -> PretrainedModel:
    """A model of this configuration. Theirs halves what deep layers add, for float16's sake; the result is the same."""
    dim, count = config["hidden_size"], config["num_hidden_layers"]

    def norm() -> nn.Module:
        return nn.LayerNorm(dim, eps=config["layer_norm_epsilon"])

    layers = []
    rules = same("", "rwkv.", {"embedding.weight": "embeddings.weight"})
    rules += same("norm.", "rwkv.ln_out.", {n: n for n in NORM})
    rules += same("first_norm.", "rwkv.blocks.0.pre_ln.", {n: n for n in NORM})
    for i in range(count):
        width, hidden = config.get("attention_hidden_size"), config.get("intermediate_size")
        layers.append(Residual(norm(), RWKV(dim, width=width, layer=i, layers=count)))
        layers.append(Residual(norm(), ChannelMix(dim, hidden=hidden, layer=i, layers=count)))
        time, channel, block = f"layers.{2 * i}.", f"layers.{2 * i + 1}.", f"rwkv.blocks.{i}."
        rules += same(f"{time}norm.", f"{block}ln1.", {n: n for n in NORM})
        rules += same(f"{channel}norm.", f"{block}ln2.", {n: n for n in NORM})
        rules += same(f"{time}inner.", f"{block}attention.", TIME)
        rules += same(f"{channel}inner.", f"{block}feed_forward.", CHANNEL)
        for ours, theirs, blends in (
            (time, "attention", ("key", "value", "receptance")),
            (channel, "feed_forward", ("key", "receptance")),
        ):
            names = tuple(f"{block}{theirs}.time_mix_{blend}" for blend in blends)
            rules.append(Rule((f"{ours}inner.shift.mix",), names, ((1, 1, dim),) * len(names)))
    return PretrainedModel(config, layers, norm(), rules, first_norm=norm(), their_head="head")
