"""Checkpoints without pickle, written so that a kill at any moment leaves the last good one.

Lightning hands over one nested dictionary; its tensors go into a safetensors file and its structure, as JSON, into that
file's header.
"""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pixelwise.errors import DataError, PixelwiseError
from pixelwise.files import atomic_path

LAST_NAME = "last.safetensors"


class SafeCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as safetensors, atomically."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        tensors: dict[str, Tensor] = {}
        structure = json.dumps(_pack(checkpoint, tensors))
        try:
            with atomic_path(path) as part:
                save_file(tensors, part, metadata={"checkpoint": structure})
        except (OSError, SafetensorError) as error:
            raise PixelwiseError(
                f"{path}: the checkpoint cannot be written ({error}). The previous one is untouched: make room on the disk "
                "and continue with --resume."
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The nested dictionary of a checkpoint, its tensors on the CPU."""
    try:
        with safe_open(path, framework="pt") as file:
            structure = json.loads((file.metadata() or {})["checkpoint"])
            state = _unpack(structure, file.get_tensor)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        return state
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: is not a checkpoint that can be read ({error}).") from error


def checkpoint_step(path: Path) -> int:
    """The optimiser steps done when the checkpoint was written; 0 where there is none."""
    if not path.is_file():
        return 0
    step = read_checkpoint(path).get("global_step")
    if not isinstance(step, int):
        raise DataError(f"{path}: is not a checkpoint of a training run (it names no step).")
    return step


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON that names the tensors; dictionaries keep the type of their keys, tuples stay tuples."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": key}
    if isinstance(value, dict):
        return {"dict": [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):  # a named tuple would come back as another type
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r}")


def _unpack(value: Any, tensor: Any) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *rest = value.items()
    if kind == "tensor" and not rest:
        return tensor(content)
    if kind == "dict":
        return {_unpack(key, tensor): _unpack(item, tensor) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_unpack(item, tensor) for item in content]
        return items if kind == "list" else tuple(items)
    raise ValueError(f"unknown part {kind!r}")
