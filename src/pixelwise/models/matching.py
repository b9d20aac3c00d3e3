"""Pairing the tensors of a file with those of a network; what fitted and what did not is said tensor by tensor."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pixelwise.models.backbones import adapt_first_conv

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
            tensor = adapt_first_conv(tensor, wanted.shape[1])
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
