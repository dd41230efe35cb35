"""Checkpoints: one safetensors file with a JSON header, written atomically, read without running code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from remanence.errors import CheckpointError

FORMAT = "remanence-checkpoint-1"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def pack(tree: Any, tensors: dict[str, Tensor], prefix: str = "") -> Any:
    """A JSON-ready copy of nested dicts and lists, with every tensor and array moved to `tensors` by path."""
    if isinstance(tree, Mapping):
        return {str(k): pack(v, tensors, f"{prefix}/{k}") for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [pack(v, tensors, f"{prefix}/{i}") for i, v in enumerate(tree)]
    if isinstance(tree, np.ndarray):
        # numpy has unsigned types that many torch functions lack, but safetensors carries them bit by bit
        tensors[prefix] = torch.from_numpy(np.ascontiguousarray(tree).reshape(-1).view(np.uint8))
        return {"$array": prefix, "dtype": tree.dtype.str, "shape": list(tree.shape)}
    if isinstance(tree, Tensor):
        tensors[prefix] = tree.detach().contiguous()
        return {"$tensor": prefix}
    return tree


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack` (mappings come back with string keys, tuples as lists)."""
    if isinstance(tree, list):
        return [unpack(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$array" in tree:
        raw = tensors[tree["$array"]].numpy()
        return raw.view(np.dtype(tree["dtype"])).reshape(tree["shape"])
    return {k: unpack(v, tensors) for k, v in tree.items()}


def write(path: Path, tree: Any) -> None:
    """Write nested dicts of tensors, arrays and JSON values, so that `path` is always a whole checkpoint.

    The file is written beside its place, flushed to the disk, and renamed; a failure leaves the old one.
    Raises: `CheckpointError` when the disk refuses it (full, read-only).
    """
    tensors: dict[str, Tensor] = {}
    header = json.dumps(pack(tree, tensors))
    temporary = path.with_name(f"{path.name}.part")
    try:
        with open(temporary, "wb") as f:
            _write_safetensors(f, tensors, {"format": FORMAT, "tree": header})
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "the one before it is intact" if path.exists() else "none was written before"
        raise CheckpointError(f"The checkpoint {path} could not be written ({error}); {kept}.") from None


def _write_safetensors(f: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """The safetensors format, one tensor at a time: the library's own writer holds a second copy of everything."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, t in tensors.items():
        start, end = end, end + t.numel() * t.element_size()
        entries[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    f.write(len(header).to_bytes(8, "little") + header)
    for t in tensors.values():
        # one number of a slice calls itself contiguous with a stride of more than 1
        flat = t.reshape(-1).as_strided((t.numel(),), (1,))
        f.write(flat.view(torch.uint8).numpy().data)


def read(path: Path) -> Any:
    """What `write` wrote.

    Raises: `CheckpointError` when the file is missing, cut, damaged or not a checkpoint.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint at {path}.")
    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{path} is not a checkpoint of this program (it is not {FORMAT}).")
            tensors = {name: f.get_tensor(name) for name in f.offset_keys()}
            return unpack(json.loads(header["tree"]), tensors)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"The checkpoint {path} is damaged or cut short ({error}).") from None
