"""How another library's tensors become ours, and how they go back: reading and writing a folder of weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from remanence.errors import CheckpointError

Shape = tuple[int, ...]
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@dataclass(frozen=True)
class Rule:
    """Which of their tensors hold the same numbers as which of ours.

    Their numbers, one tensor after the other, are ours, one tensor after the other; `order` says where there are rows
    to be rearranged: row i of ours is row `order[i]` of theirs, when both are cut into as many rows as it is long.
    `shapes` are those of their tensors; left out where one tensor has the shape of one of ours.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    shapes: tuple[Shape, ...] = ()
    order: Tensor | None = None

    def taken(self, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors, with the shapes of `own`, from theirs."""
        flat = torch.cat([given[name].reshape(-1) for name in self.theirs])
        if self.order is not None:
            flat = flat.view(len(self.order), -1)[self.order].reshape(-1)
        pieces = flat.split([own[name].numel() for name in self.ours])
        return {n: p.reshape(own[n].shape).clone() for n, p in zip(self.ours, pieces, strict=True)}

    def given(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors from ours."""
        flat = torch.cat([own[name].detach().reshape(-1) for name in self.ours])
        if self.order is not None:
            flat = flat.view(len(self.order), -1)[self.order.argsort()].reshape(-1)
        shapes = self.forms(own)
        pieces = flat.split([prod(shape) for shape in shapes.values()])
        return {n: p.reshape(s).clone() for (n, s), p in zip(shapes.items(), pieces, strict=True)}

    def forms(self, own: Mapping[str, Tensor]) -> dict[str, Shape]:
        """The shapes of their tensors, by name."""
        shapes = self.shapes or (tuple(own[self.ours[0]].shape),)
        return dict(zip(self.theirs, shapes, strict=True))


def same(ours: str, theirs: str, names: Mapping[str, str]) -> list[Rule]:
    """A rule for each pair of names (ours: theirs) below two prefixes."""
    return [Rule((ours + a,), (theirs + b,)) for a, b in names.items()]


def stacked(ours: str, theirs: Sequence[str], rows: Sequence[int], columns: int | None = None) -> Rule:
    """Their matrices (or vectors, without `columns`) one upon another."""
    return Rule((ours,), tuple(theirs), tuple((n,) if columns is None else (n, columns) for n in rows))


class Config(dict[str, Any]):
    """What config.json says, over what the architecture takes for granted; a lack is named."""

    def __missing__(self, name: str) -> Any:
        raise CheckpointError(f"{CONFIG} does not say {name!r}, which a {self.get('model_type')} model needs.")

    def only(self, name: str, *known: Any) -> None:
        """Refuse a setting that our layers do not have."""
        if name in self and self[name] not in known:
            wanted = " or ".join(map(repr, known))
            raise CheckpointError(f"{CONFIG} says {name} = {self[name]!r}; only {wanted} can be loaded.")


def number(given: Any) -> float:
    """A number of config.json, which writes what JSON has no word for as `{"__float__": "Infinity"}`."""
    return float(given["__float__"]) if isinstance(given, dict) else float(given)


def rotary(config: Config) -> tuple[float, float]:
    """The base of the rotary phases, and the share of features that is turned, in the old and the new spelling."""
    told = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = Config({**config, **told, "rope_type": told.get("rope_type", told.get("type", "default"))})
    given.only("rope_type", "default")
    return float(given.get("rope_theta", 10000.0)), float(given.get("partial_rotary_factor", 1.0))


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"There is no {CONFIG} in {folder}: a model is a local folder with it and {WEIGHTS}.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}).") from None


@contextmanager
def opened(folder: Path) -> Iterator[dict[str, Any]]:
    """Open the weights of a folder: each tensor's name with the file that holds it."""
    try:
        if (folder / INDEX).is_file():
            places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        elif (folder / WEIGHTS).is_file():
            with safe_open(folder / WEIGHTS, framework="pt") as f:
                places = dict.fromkeys(f.keys(), WEIGHTS)
        else:
            raise CheckpointError(f"There is no {WEIGHTS} in {folder}; weights in other formats are not read.")
        files = {name: safe_open(folder / name, framework="pt") for name in set(places.values())}
        yield {tensor: files[name] for tensor, name in places.items()}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"The weights in {folder} are damaged or incomplete ({error}).") from None


def read(folder: Path, rules: Iterable[Rule], own: Mapping[str, Tensor], ignored: Sequence[str]) -> dict[str, Tensor]:
    """Our tensors from a folder of theirs.

    Raises: `CheckpointError` that names what is missing, too much, or of another shape.
    """
    rules = list(rules)
    want = {name: shape for rule in rules for name, shape in rule.forms(own).items()}
    with opened(folder) as files:
        extra = [n for n in files if n not in want and not n.startswith(tuple(ignored))]
        faults = [_named("it has no", [n for n in want if n not in files]), _named("it also has", extra)]
        if any(faults):
            raise CheckpointError(f"The weights in {folder} do not fit: {'; '.join(filter(None, faults))}.")
        for name, shape in want.items():
            if tuple(got := files[name].get_slice(name).get_shape()) != shape:
                raise CheckpointError(f"The weights in {folder} do not fit: {name!r} must be {list(shape)}, got {got}.")
        taken: dict[str, Tensor] = {}
        for rule in rules:
            taken |= rule.taken({name: files[name].get_tensor(name) for name in rule.theirs}, own)
    return taken


def write(folder: Path, config: Mapping[str, Any], rules: Iterable[Rule], own: Mapping[str, Tensor]) -> None:
    """Write a folder that the other library loads; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    theirs: dict[str, Tensor] = {}
    for rule in rules:
        theirs |= rule.given(own)
    part = folder / f"{WEIGHTS}.part"
    save_file(theirs, part, metadata={"format": "pt"})
    os.replace(part, folder / WEIGHTS)
    (folder / INDEX).unlink(missing_ok=True)  # of a checkpoint in several files, which this one replaces
    part = folder / f"{CONFIG}.part"
    part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, folder / CONFIG)


def _named(says: str, names: Sequence[str], most: int = 4) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{says} {', '.join(map(repr, sorted(names)[:most]))}{more}"
