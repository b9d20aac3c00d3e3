"""Pairing the tensors of a file with those of a network; what fitted and what did not is said tensor by tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pixelwise.models.backbones import adapt_first_conv

PREFIXES = ("module.", "model.", "state_dict.", "body.", "backbone.", "encoder.", "network.")
COUNTER = "num_batches_tracked"  # batch norm counts its steps; older files lack it and prediction ignores it


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What became of the tensors of a file."""

    source: str  # where they came from, with the licence where it is known
    fitted: tuple[str, ...]  # names in the network that were filled
    adapted: tuple[str, ...]  # the first convolution, if it was converted to another number of channels
    missing: tuple[str, ...]  # names in the network that nothing filled; they keep their random values
    unused: tuple[str, ...]  # names in the file that the network has no place for (a classifier's last layer, say)
    mismatched: tuple[str, ...]  # names whose shapes differ, with both shapes
    by_order: bool  # the names differed, and tensors were paired by order because every shape agreed
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
        if name in given and not by_order:
            origin, tensor = name, given[name]
        elif plain in offered:
            origin, tensor = offered[plain]
        else:
            continue
        used.add(origin)
        if tensor.shape != own[name].shape and _differs_in_channels_only(tensor, own[name]) and not adapted:
            tensor = adapt_first_conv(tensor, own[name].shape[1])
            adapted.append(name)
        if tensor.shape == own[name].shape:
            state[name] = tensor
        else:
            mismatched.append(f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}")
    missing = [name for name in parameter_names(target) if name not in state and not _named(name, mismatched)]
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
