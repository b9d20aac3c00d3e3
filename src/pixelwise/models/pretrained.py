"""Weights from elsewhere: from the library that owns them, or from a file; what fitted is said tensor by tensor."""

import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError  # what torch's restricted reader raises; nothing is unpickled here
from typing import Any

import timm
import torch
import torchvision.models as tv
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.models.backbones import adapt_first_conv, classifier_state, resolve_backbone

PREFIXES = ("module.", "model.", "state_dict.", "body.", "backbone.", "encoder.", "network.")
# What the readers of weight files raise for a damaged one (torch's restricted reader has no error of its own for all).
DAMAGED = (
    OSError, RuntimeError, ValueError, LookupError, EOFError, TypeError, AttributeError, AssertionError, OverflowError,
    struct.error, SafetensorError, UnpicklingError,
)  # fmt: skip
COUNTER = "num_batches_tracked"  # batch norm counts its steps; older files lack it and prediction ignores it


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What became of the tensors of a file.

    Attributes:
        source: where they came from, with the licence where it is known.
        fitted: names in the network that were filled.
        adapted: the first convolution, if it was converted to another number of channels.
        missing: names in the network that nothing filled; they keep their random values.
        unused: names in the file that the network has no place for (a classifier's last layer, say).
        mismatched: names whose shapes differ, with both shapes.
        by_order: the names differed, and tensors were paired by order because every shape agreed.
    """

    source: str
    fitted: tuple[str, ...]
    adapted: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    mismatched: tuple[str, ...]
    by_order: bool

    def summary(self) -> str:
        """One line to print."""
        parts = [f"{len(self.fitted)} tensors fit"]
        if self.by_order:
            parts[0] += " (other names; paired by order, all shapes agree)"
        parts += [f"{name} adapted to the image's channels" for name in self.adapted]
        parts += [f"{len(self.missing)} missing: {_some(self.missing)}"] if self.missing else []
        parts += [f"{len(self.mismatched)} of another shape: {_some(self.mismatched)}"] if self.mismatched else []
        parts += [f"{len(self.unused)} not used: {_some(self.unused)}"] if self.unused else []
        return f"{self.source}: " + "; ".join(parts)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def load_pretrained(model: nn.Module, source: str | Path) -> Loaded:
    """Fill a network, or its encoder, with trained weights.

    Args:
        model: from `create_model`; one with an `encoder` takes a classifier's weights there.
        source: "auto" asks the library that owns the backbone (its cache first, else its download); else a file:
            `.safetensors`, or a torch file that holds a plain state dict.

    Raises:
        UsageError: no such file, nothing in it fits, or the library has no weights or no network; nothing was changed.
    """
    backbone: str | None = getattr(model.config, "backbone", None)
    target: nn.Module = model.get_submodule("encoder") if backbone else model
    if source == "auto":
        if backbone is None:
            raise UsageError(
                "--pretrained alone asks the library that owns a backbone, and this network has none of its own: pass "
                "--pretrained FILE, or choose --model encoder_decoder --backbone NAME."
            )
        given, label = library_weights(backbone)
    else:
        given, label = read_state(source), Path(source).name
    loaded, state = match_state(target, given, reference=classifier_state(backbone) if backbone else None, source=label)
    names = _parameters(target)
    filled = sum(name in state for name in names)
    # A sibling (ResNet-50 for ResNet-18) shares most names and many shapes: a mixture of both would be neither.
    if filled < 0.5 * len(names) or len(loaded.mismatched) > 0.1 * len(names):
        raise UsageError(f"{label} does not belong to {backbone or 'this network'}: {loaded.summary()}.")
    target.load_state_dict(state, strict=False)
    return loaded


def _parameters(module: nn.Module) -> list[str]:
    return [name for name in module.state_dict() if not name.endswith(COUNTER)]


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or torch file; a torch file is read without running any code it may hold.

    Raises:
        UsageError: missing, damaged, or not a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"--pretrained {path}: there is no such file.")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch wonders at the format before it refuses the file
            if path.suffix == ".safetensors":
                content: Any = load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise UsageError(
            f"--pretrained {path}: cannot be read as weights ({_reason(error)}). It must hold plain tensors."
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(item, Tensor) for item in content.values()):
        raise UsageError(
            f"--pretrained {path}: holds no state dict (names to tensors), but a {type(content).__name__}."
        )
    return {str(name): item for name, item in content.items() if isinstance(item, Tensor)}


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def library_weights(backbone: str) -> tuple[dict[str, Tensor], str]:
    """The owner's weights for `backbone` and a line that names them and their licence; from its cache where they are there.

    Raises:
        UsageError: the library has none, or they are in no cache and cannot be downloaded.
    """
    library, name = resolve_backbone(backbone)
    try:
        return _timm_weights(name) if library == "timm" else _torchvision_weights(name)
    except DAMAGED as error:
        raise UsageError(
            f"--pretrained: the weights of {name} are in no cache and {library} could not fetch them ({_reason(error)}). "
            "Connect to a network once, pass --pretrained FILE, or leave --pretrained out to start from random weights."
        ) from error


def _timm_weights(name: str) -> tuple[dict[str, Tensor], str]:
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise LookupError(f"timm has no pretrained weights for {name}")
    model = timm.create_model(name, pretrained=True)
    return model.state_dict(), f"timm {name}.{config.tag or 'default'} (licence {config.license or 'not stated'})"


def _torchvision_weights(name: str) -> tuple[dict[str, Tensor], str]:
    choices = list(tv.get_model_weights(name))
    if not choices:
        raise LookupError(f"torchvision has no pretrained weights for {name}")
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    default = tv.get_model_weights(name).DEFAULT
    cached = [entry for entry in (default, *choices) if (cache / Path(entry.url).name).is_file()]
    entry = cached[0] if cached else default
    state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    return dict(state), f"torchvision {entry} (licence BSD-3-Clause)"


def match_state(
    target: nn.Module, given: Mapping[str, Tensor], *, reference: Mapping[str, Tensor] | None, source: str
) -> tuple[Loaded, dict[str, Tensor]]:
    """Pair the tensors of a file with those of a network; changes nothing.

    Args:
        target: the network or trunk to fill.
        given: the file's tensors.
        reference: the whole classifier's tensors in their own order; lets a file with other names be paired by order.
        source: what to call the file.

    Returns:
        What fits and what does not, and the state dict of what does.
    """
    own = target.state_dict()
    offered = {_plain(name): (name, tensor) for name, tensor in given.items()}
    wanted = {name: _plain(name) for name in own}
    by_order = False
    if reference is not None and sum(plain in offered for plain in wanted.values()) < 0.5 * len(own):
        renamed = _rename_by_order(given, reference)
        if renamed:
            offered, by_order = {_plain(name): pair for name, pair in renamed.items()}, True
    state: dict[str, Tensor] = {}
    adapted: list[str] = []
    mismatched: list[str] = []
    used: set[str] = set()
    for name, plain in wanted.items():
        if plain not in offered:
            continue
        origin, tensor = offered[plain]
        used.add(origin)
        if tensor.shape != own[name].shape and _differs_in_channels_only(tensor, own[name]) and not adapted:
            tensor = adapt_first_conv(tensor, own[name].shape[1])
            adapted.append(name)
        if tensor.shape == own[name].shape:
            state[name] = tensor
        else:
            mismatched.append(f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}")
    missing = [name for name in _parameters(target) if name not in state and not _named(name, mismatched)]
    loaded = Loaded(
        source=source,
        fitted=tuple(name for name in state if name not in adapted),
        adapted=tuple(adapted),
        missing=tuple(missing),
        unused=tuple(name for name in given if name not in used and not name.endswith(COUNTER)),
        mismatched=tuple(mismatched),
        by_order=by_order,
    )
    return loaded, state


def _named(name: str, rows: list[str]) -> bool:
    return any(row.startswith(name + " ") for row in rows)


def _plain(name: str) -> str:
    """One spelling for a tensor's name: no wrapper's prefix, and timm's flattened `stages_0` as `stages.0`."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name.replace("_", ".")


def _rename_by_order(
    given: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, tuple[str, Tensor]] | None:
    """The file's tensors under the classifier's names, if both have the same shapes in the same order."""
    theirs = [(name, tensor) for name, tensor in given.items() if not name.endswith(COUNTER)]
    ours = [(name, tensor) for name, tensor in reference.items() if not name.endswith(COUNTER)]
    if [tensor.shape for _, tensor in theirs] != [tensor.shape for _, tensor in ours]:
        return None
    return {name: pair for (name, _), pair in zip(ours, theirs, strict=True)}


def _differs_in_channels_only(tensor: Tensor, own: Tensor) -> bool:
    """An RGB convolution offered for another number of input channels."""
    return (
        tensor.ndim == own.ndim == 4
        and tensor.shape[1] == 3
        and tensor.shape[0] == own.shape[0]
        and tensor.shape[2:] == own.shape[2:]
    )
