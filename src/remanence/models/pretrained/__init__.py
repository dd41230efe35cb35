"""Published models of other libraries: loaded from their folders, run, trained, and saved back.

`load(folder)` reads `config.json` and `model.safetensors` as Hugging Face's `transformers` writes them, without that
library; `save(model, folder)` writes what it loads again. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from remanence.errors import unknown
from remanence.models.pretrained import mapping
from remanence.models.pretrained.mapping import Config
from remanence.models.pretrained.model import PretrainedModel

__all__ = ["ARCHITECTURES", "PretrainedModel", "from_config", "load", "save"]

ARCHITECTURES: Mapping[str, str] = {
    "mamba": "mamba",
    "falcon_mamba": "mamba",
    "mamba2": "mamba2",
    "rwkv": "rwkv",
    "xlstm": "xlstm",
    "recurrent_gemma": "recurrent_gemma",
    "qwen3_next": "qwen3_next",
}
"""Where each `model_type` of a config.json is built."""


def from_config(config: Mapping[str, Any]) -> PretrainedModel:
    """A model of this configuration with weights of its own; the global random generator is left as it was.

    Raises: `UnknownName` for an architecture that is not among `ARCHITECTURES`, `CheckpointError` for a setting that is
        missing or that our layers do not have.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise unknown("architecture", kind, ARCHITECTURES)
    room = importlib.import_module(f"{__name__}.{ARCHITECTURES[kind]}")
    with torch.random.fork_rng(devices=[]):
        model: PretrainedModel = room.build(Config({**room.DEFAULTS, **config}))
    model.config = dict(config)
    return model.eval()


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> PretrainedModel:
    """The model in a folder, in the precision in which it was stored (or in `dtype`), in evaluation mode.

    Raises: `CheckpointError` that names the tensors which are missing, too much or of another shape, or what else is
        wrong with the files; `UnknownName` for another architecture.
    """
    folder = Path(folder)
    model = from_config(mapping.read_config(folder))
    taken = mapping.read(folder, model.rules, model.state_dict(), model.ignored)
    model.load_state_dict(taken, strict=False, assign=True)  # not strict: a tied head comes with the embedding
    model.tie()
    return model if dtype is None else model.to(dtype)


def save(model: PretrainedModel, folder: str | Path) -> None:
    """Write a folder that `transformers` and `load` read. Raises: `OSError` when the disk refuses it."""
    mapping.write(Path(folder), model.config, model.rules, model.state_dict())
