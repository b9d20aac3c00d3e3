"""Weights from elsewhere: from the library that owns them, from a file, or from another network of one's own.

What fitted and what did not is said tensor by tensor.
"""

import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError  # what torch's restricted reader raises; nothing is unpickled here
from typing import Any

import timm
import torch
import torchvision.models as tv
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.models.backbones import classifier_state, create_classifier, resolve_backbone
from pixelwise.models.class_names import by_class_name

# What the readers of weight files raise for a damaged one (torch's restricted reader has no error of its own for all).
DAMAGED = (
    OSError, RuntimeError, ValueError, LookupError, EOFError, TypeError, AttributeError, AssertionError, OverflowError,
    struct.error, SafetensorError, UnpicklingError,
)  # fmt: skip
PREFIXES = re.compile(r"((module|model|state_dict|body|backbone|encoder|network)\.)+")  # of wrappers
COUNTER = "num_batches_tracked"  # batch norm counts its steps; older files lack it and prediction ignores it


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What became of the tensors of a file."""

    source: str  # where they came from, with the licence where it is known
    fitted: tuple[str, ...]  # names in the network that were filled
    missing: tuple[str, ...]  # names in the network that nothing filled; they keep their random values
    adapted: tuple[str, ...] = ()  # the first convolution, if it was converted to another number of channels
    unused: tuple[str, ...] = ()  # names in the file that the network has no place for (a classifier's last layer, say)
    mismatched: tuple[str, ...] = ()  # names whose shapes differ, with both shapes
    by_order: bool = False  # the names differed, and tensors were paired by order because every shape agreed
    note: str = ""  # what else to know
    classifier: str | None = None  # of timm or torchvision, whose weights they are; it has its own normalisation

    def summary(self) -> str:
        """One line to print."""
        parts = [f"{len(self.fitted)} tensors fit"]
        if self.by_order:
            parts[0] += " (other names; paired by order, all shapes agree)"
        parts += [f"{name} adapted to the image's channels" for name in self.adapted]
        parts += [f"{len(self.missing)} missing: {_some(self.missing)}"] if self.missing else []
        parts += [f"{len(self.mismatched)} of another shape: {_some(self.mismatched)}"] if self.mismatched else []
        parts += [f"{len(self.unused)} not used: {_some(self.unused)}"] if self.unused else []
        parts += [self.note] if self.note else []
        return f"{self.source}: " + "; ".join(parts)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def parameter_names(module: nn.Module) -> list[str]:
    """All names of a state but the counters."""
    return [name for name in module.state_dict() if not name.endswith(COUNTER)]


def belongs(target: nn.Module, state: Mapping[str, Tensor], mismatched: Sequence[str]) -> bool:
    """A sibling (ResNet-50 for ResNet-18) shares most names and many shapes: a mixture of both would be neither."""
    names = parameter_names(target)
    filled = sum(name in state for name in names)
    return filled >= 0.5 * len(names) and len(mismatched) <= 0.1 * len(names)


def load_pretrained(model: nn.Module, source: str | Path) -> Loaded:
    """Fill a network, its encoder, or the part of it that comes from a classifier, with trained weights.

    `source` "auto" asks the library that owns the classifier (its cache first, else its download); else it is a file:
    `.safetensors`, or a torch file that holds a plain state dict of the classifier or of the network itself.

    Raises:
        UsageError: no such file, nothing in it fits, or the library has no weights or no network; nothing was changed.
    """
    backbone: str | None = getattr(model.config, "backbone", None)
    classifiers = _classifiers(model)
    if source == "auto" and backbone is None and classifiers:
        return load_classifier(model, classifiers[0])
    if source == "auto" and backbone is None:
        raise UsageError(
            "--pretrained alone asks the library that owns a backbone, and this network has none of its own: pass "
            "--pretrained FILE, or choose --model encoder_decoder --backbone NAME."
        )
    given, label = library_weights(str(backbone)) if source == "auto" else (read_state(source), Path(source).name)
    target = model.get_submodule("encoder") if backbone else model
    loaded, state = match_state(target, given, reference=classifier_state(backbone) if backbone else None, source=label)
    if not belongs(target, state, loaded.mismatched):
        for name in classifiers:
            if (filled := _filled_classifier(name, given)) is not None:
                return _load_from_classifier(model, filled, name, label)
        owners = " nor to ".join([backbone or "this network", *classifiers])
        raise UsageError(f"{label} does not belong to {owners}: {loaded.summary()}.")
    target.load_state_dict(state, strict=False)
    return replace(loaded, classifier=backbone)


def load_network(
    model: nn.Module, trained: nn.Module, source: str, classes: tuple[Sequence[str], Sequence[str]] | None = None
) -> Loaded:
    """Fill a network with the tensors of a trained one that have its names and shapes: of its own kind, or of a sibling.

    `classes` names those of `model` and of `trained`: what belongs to a class is taken over by its name, and stays random
    for a new one; without it the classes are the same. A first convolution for other channels stays random. `source` is
    what messages call the trained one.

    Raises:
        UsageError: less than half of `model` would be filled, or shapes differ; nothing was changed.
    """
    own, (theirs, note) = model.state_dict(), (trained.state_dict(), "")
    if classes is not None:
        theirs, note = by_class_name(model, trained, *classes)
    loaded, state = match_state(model, theirs, reference=None, source=source)
    loaded = replace(loaded, note=note)
    counts = [(getattr(trained.config, key), getattr(model.config, key)) for key in ("num_classes", "in_channels")]
    names = [row.split(" ")[0] for row in loaded.mismatched]
    foreign = [name for name in names if not _differ_by(theirs.get(name), own[name], counts)]
    if not belongs(model, state, foreign):
        raise UsageError(f"{source} does not belong to this network: {loaded.summary()}.")
    model.load_state_dict(state, strict=False)
    return loaded


def load_classifier(model: nn.Module, name: str) -> Loaded:
    """Fill a network with the library's weights of a classifier, from its cache or by download.

    The network has `classifiers`, through which `name` is looked for first, or its backbone is this classifier.

    Raises:
        UsageError: the network does not start from this classifier, or there are no weights; nothing was changed.
    """
    backbone, classifiers = getattr(model.config, "backbone", None), _classifiers(model)
    if backbone is not None:
        if resolve_backbone(name) != resolve_backbone(backbone):
            raise UsageError(
                f"--init {name}: the encoder is {backbone}. Choose --backbone {name}, or --init {backbone}."
            )
        return load_pretrained(model, "auto")
    if not classifiers:
        raise UsageError(
            f"--init {name}: this network starts from no classifier. Give a run folder, or leave --init out."
        )
    name = next((entry for entry in classifiers if name in (entry, entry.rpartition("/")[2])), name)
    given, label = library_weights(name)
    filled = _filled_classifier(name, given)
    if filled is None:
        raise UsageError(
            f"--init {name}: the weights of {label} do not fit the library's own network. Update the library."
        )
    return _load_from_classifier(model, filled, name, label)


def is_classifier(name: str) -> bool:
    """Whether timm or torchvision has a classifier of this name."""
    try:
        resolve_backbone(name)
    except UsageError:
        return False
    return True


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    return tuple(getattr(model, "classifiers", ())) if hasattr(model, "weights_from_classifier") else ()


def _filled_classifier(name: str, given: Mapping[str, Tensor]) -> nn.Module | None:
    """The classifier with these tensors, or None if they are another's; its last layer may have other classes."""
    with torch.device("meta"):
        hollow = create_classifier(name)
    own = hollow.state_dict()
    last = next((key.rpartition(".")[0] for key in reversed(own) if own[key].ndim > 1), "")
    loaded, state = match_state(hollow, given, reference=own, source=name)
    lacking = [*loaded.missing, *(row.split(" ")[0] for row in loaded.mismatched)]
    if any(key.rpartition(".")[0] != last for key in lacking):
        return None
    with torch.random.fork_rng(devices=[]):
        model = create_classifier(name)
    model.load_state_dict(state, strict=False)
    return model


def _load_from_classifier(model: nn.Module, classifier: nn.Module, name: str, label: str) -> Loaded:
    starter: Any = model  # known to have the method, which nn.Module does not declare
    state: dict[str, Tensor] = starter.weights_from_classifier(classifier)
    model.load_state_dict(state, strict=False)
    missing = tuple(key for key in parameter_names(model) if key not in state)
    return Loaded(source=label, fitted=tuple(state), missing=missing, classifier=name)


def _differ_by(theirs: Tensor | None, own: Tensor, counts: list[tuple[int, int]]) -> bool:
    """Whether a tensor's shapes differ in nothing but the numbers of classes or channels."""
    if theirs is None or theirs.ndim != own.ndim:
        return False
    return all(one == other or (one, other) in counts for one, other in zip(theirs.shape, own.shape, strict=True))


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
            is_plain = path.suffix == ".safetensors"
            content: Any = load_file(path) if is_plain else torch.load(path, map_location="cpu", weights_only=True)
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
            f"the weights of {name} are in no cache and {library} could not fetch them ({_reason(error)}). Connect to a "
            "network once, pass --pretrained FILE, or leave --pretrained and --init out to start from random weights."
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
    """Pair the tensors of a file, called `source`, with those of a network; gives the state dict of what fits, too.

    `reference` holds the whole classifier's tensors in their own order: a file with other names is paired by it.
    """
    own = target.state_dict()
    offered = {_plain(name): (name, tensor) for name, tensor in given.items()}
    renamed = None
    if reference is not None and sum(_plain(name) in offered for name in own) < 0.5 * len(own):
        renamed = _rename_by_order(given, reference)
    offered = renamed or offered
    state: dict[str, Tensor] = {}
    adapted: list[str] = []
    mismatched: dict[str, str] = {}
    used: set[str] = set()
    for name, wanted in own.items():
        if name in given and not renamed:
            origin, tensor = name, given[name]
        elif _plain(name) in offered:
            origin, tensor = offered[_plain(name)]
        else:
            continue
        used.add(origin)
        if tensor.shape != wanted.shape and _is_rgb_of(tensor, wanted) and not adapted:
            tensor = adapt_input_conv(wanted.shape[1], tensor)
            adapted.append(name)
        if tensor.shape == wanted.shape:
            state[name] = tensor
        else:
            mismatched[name] = f"{name} {tuple(tensor.shape)} for {tuple(wanted.shape)}"
    loaded = Loaded(
        source=source,
        fitted=tuple(name for name in state if name not in adapted),
        missing=tuple(name for name in parameter_names(target) if name not in state and name not in mismatched),
        adapted=tuple(adapted),
        unused=tuple(name for name in given if name not in used and not name.endswith(COUNTER)),
        mismatched=tuple(mismatched.values()),
        by_order=bool(renamed),
    )
    return loaded, state


def _plain(name: str) -> str:
    """One spelling for a tensor's name: no wrapper's prefix, and timm's flattened `stages_0` as `stages.0`."""
    wrapped = PREFIXES.match(name)
    return name[wrapped.end() if wrapped else 0 :].replace("_", ".")


def _rename_by_order(
    given: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, tuple[str, Tensor]] | None:
    """The file's tensors under the classifier's plain names, if both have the same shapes in the same order."""
    theirs, ours = ([pair for pair in state.items() if not pair[0].endswith(COUNTER)] for state in (given, reference))
    if [tensor.shape for _, tensor in theirs] != [tensor.shape for _, tensor in ours]:
        return None
    return {_plain(name): pair for (name, _), pair in zip(ours, theirs, strict=True)}


def _is_rgb_of(tensor: Tensor, own: Tensor) -> bool:
    """Whether it is an RGB convolution offered for another number of input channels."""
    return tensor.ndim == own.ndim == 4 and tensor.shape[1] == 3 and tensor[:, 0].shape == own[:, 0].shape
