"""A classifier's trunk read as a chain of parts, from its captured graph: what changes the map, and what only acts on it.

No class of network is known here by name. A part has one map going in and one coming out: a layer, a block that keeps
width and size (a residual block, say), or a stretch of the graph with several ways through it.
"""

import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from pixelwise.errors import UsageError
from pixelwise.ops.convolutionalize.capture import Capture, Untraceable, holds_tensors

# keep: acts on a map and leaves its width and size (norm, activation, dropout, a gate such as squeeze-and-excitation).
# block: keeps width and size, too, but mixes pixels or channels. ways: several ways from one map to another.
Kind = Literal["keep", "conv", "pool", "block", "ways", "add", "cat"]

Levels = Iterable[tuple[int, int]]

SUMS, CATS = ("add", "add_", "iadd"), ("cat", "concat")  # names of functions and methods


@dataclass(frozen=True, eq=False)
class Part:
    """A piece of the trunk, or of its mirror image."""

    kind: Kind
    path: str  # of the module; of a function, the module that calls it
    layer: Any  # the module; None for a function and for several ways
    node: fx.Node  # its first step in the graph
    inputs: tuple[fx.Node, ...]  # the maps that go in; one, unless it adds or concatenates
    output: fx.Node  # the map that comes out
    inner: tuple["Part", ...] = ()  # of `ways`, the parts between its two maps, in order
    lead: tuple["Part", ...] = ()  # of `ways`, the parts of the same module that act on the map that goes in
    trail: tuple["Part", ...] = ()  # of `ways`, the parts of the same module that act on the map that comes out
    width: int = 0  # of a `keep` part of the mirror image, the channels of the map it acts on

    @property
    def source(self) -> fx.Node:
        """The first map that goes in."""
        return self.lead[0].inputs[0] if self.lead else self.inputs[0]

    @property
    def target(self) -> fx.Node:
        """The last map that comes out."""
        return self.trail[-1].output if self.trail else self.output

    @property
    def geometry(self) -> tuple[int, int, int]:
        """Kernel, stride and padding of a `pool` part, the larger of height and width."""
        names = ("kernel_size", "stride", "padding")
        placed: dict[str, Any] = dict(zip(names, self.node.args[1:4], strict=False)) | self.node.kwargs
        given: list[Any] = [getattr(self.layer, name, None) if self.layer else placed.get(name) for name in names]
        kernel, stride, padding = (max(item) if isinstance(item, list | tuple) else item for item in given)
        return kernel or 2, stride or kernel or 2, padding or 0

    @property
    def keeps_places(self) -> bool:
        """Whether it is a max pooling whose windows do not overlap, so that each maximum has one place to go back to."""
        plain = isinstance(self.layer, nn.MaxPool2d) and self.layer.dilation in (1, (1, 1))
        return plain and self.kind == "pool" and self.geometry[1:] == (self.geometry[0], 0)


class Chain:
    """The chain of parts from the image to the last of the maps that a decoder takes.

    `levels` are the channels and stride of these `maps`, finest first; without them, it is the map that the network returns.

    Raises:
        UsageError: a part has no mirror image; it is named with the backbone's `label`.
    """

    def __init__(
        self, network: nn.Module, size: tuple[int, int, int], label: str, levels: Levels | None = None
    ) -> None:
        from timm.models.nfnet import NormFreeBlock

        self.network, self.label = network, label
        modules = network.named_modules()
        layers = {path for path, item in modules if not list(item.children()) and type(item) is not nn.Sequential}
        try:
            with torch.device("cpu"):
                # timm keeps NFNet's block from fx for its multiplication in place, which the capture follows.
                self.capture = Capture(network, size, layers, followed=(NormFreeBlock,))
        except Untraceable as error:
            raise UsageError(
                f"mirror: backbone {label!r} does not take images of any size ({error.reason}). Choose another."
            ) from error
        self.graph, self.image = self.capture.graph, self.capture.image
        self._inputs = self._find_maps()  # of each map, those it is made of
        self.maps = self._pick(levels)
        needed = {self.maps[-1]}
        for node in reversed(self._inputs):
            needed.update(self._inputs[node] if node in needed else ())
        self._inputs = {node: inputs for node, inputs in self._inputs.items() if node in needed}
        steps = [node for node in self._inputs if node is not self.image]
        self.parts = _with_their_norms(_in_a_row(list(self._parts(steps, "")), self.image))

    def width(self, node: fx.Node) -> int:
        """Channels of a map."""
        return int(node.meta["own"].shape[1])

    def size(self, node: fx.Node) -> tuple[int, ...]:
        """Height and width of a map in cells."""
        return tuple(node.meta["own"].shape[2:])

    def after(self, node: fx.Node) -> Part:
        """The part that leads away from a map."""
        start = next((index for index, part in enumerate(self.parts) if part.source is node), None)
        if start is None:
            raise self.refuse(node, "gives a map to the decoder from the middle of a part with several ways")
        return next(part for part in self.parts[start:] if part.kind != "keep")

    def name(self, node: fx.Node) -> str:
        """What a step calls: the class of the layer, or the name of the function or method."""
        module = self.capture.module(node)
        if module is not None:
            return type(module).__name__
        return getattr(node.target, "__name__", str(node.target))

    def refuse(self, node: fx.Node, what: str = "has no mirror image") -> UsageError:
        """The error that names a step."""
        path = _path(node)
        owner = type(self.network.get_submodule(path)).__name__ if path else "its forward"
        who = f"{path} ({owner})" if node.op == "call_module" else f"{self.name(node)} in {path or 'it'} ({owner})"
        return UsageError(
            f"mirror: backbone {self.label!r} cannot be reflected: {who} {what}. Convolutions, poolings, sums, "
            "concatenations and whatever keeps width and size of a map have one. Choose such a backbone (resnet18, "
            "vgg16_bn, densenet121, efficientnet_b0, convnext_tiny, ...), or --model encoder_decoder."
        )

    def _find_maps(self) -> dict[fx.Node, tuple[fx.Node, ...]]:
        """The tensors that depend on the image; steps that return their input (a `cat` of one map) leave the graph."""
        found: dict[fx.Node, tuple[fx.Node, ...]] = {self.image: ()}
        for node in self.graph.nodes:
            given: list[fx.Node] = []
            fx.map_arg((node.args, node.kwargs), given.append)
            inputs = tuple(item for item in given if item in found)
            if not inputs or node.op == "output" or not holds_tensors(node):
                continue
            if len(inputs) == 1 and (self.name(node) in CATS or isinstance(self.capture.module(node), nn.Identity)):
                node.replace_all_uses_with(inputs[0])
            else:
                found[node] = inputs
        return found

    def _pick(self, levels: Levels | None) -> list[fx.Node]:
        """The last map of each width and stride, of those that the network returns, if it returns maps."""
        returned: list[fx.Node] = []
        fx.map_arg(next(iter(reversed(self.graph.nodes))).args, returned.append)
        if levels is None:
            return returned[-1:]
        found: dict[tuple[int, float], fx.Node] = {}
        for node in [item for item in returned if _has_axes(item)] or self._inputs:
            grid = self.capture.grid(node)
            if grid and _has_axes(node) and grid.axes == (2, 3) and grid.strides[0] == grid.strides[1]:
                found[self.width(node), grid.strides[0]] = node
        maps = [found.get(level) for level in levels]
        if None in maps:
            raise UsageError(
                f"mirror: backbone {self.label!r} cannot be reflected: its maps are not (N, C, H, W) inside. Choose a "
                "convolutional one (resnet18, vgg16_bn, ...), or --model encoder_decoder."
            )
        return [node for node in maps if node]

    def _parts(self, steps: list[fx.Node], prefix: str) -> Iterator[Part]:
        """The smallest pieces that stand as they are: layers, functions, and modules that keep their map."""
        for path, group in _children(steps, prefix):
            if path == prefix or (len(group) == 1 and group[0].op == "call_module"):
                yield from (self._single(node) for node in group)
            elif self._keeps(group) and not self._is_chain(group, path):
                inputs, outputs = self._ends(group)
                kind: Kind = "block" if any(self._mixes(node) for node in group) else "keep"
                yield Part(kind, path, self.network.get_submodule(path), group[0], tuple(inputs), outputs[0])
            else:
                yield from self._parts(group, path)

    def _single(self, node: fx.Node) -> Part:
        if not _has_axes(node):
            raise self.refuse(node)
        path, layer, inputs = _path(node), None, self._inputs[node]
        if node.op == "call_module":
            layer = self.network.get_submodule(path)
        if isinstance(layer, nn.Conv2d):
            kind: Kind = "conv"
        elif self._joins(node):
            kind = "cat" if self.name(node) in CATS else "add"
        elif len(inputs := tuple(dict.fromkeys(inputs))) != 1 or not _has_axes(inputs[0]):
            raise self.refuse(node, "joins maps in a way that has no mirror image")
        elif inputs[0].meta["own"].shape == node.meta["own"].shape and not isinstance(layer, nn.Linear):
            mixes = layer is not None and next(layer.children(), None) is not None and self._mixes(node)
            kind = "block" if mixes else "keep"
        elif self._pools(node, layer):
            kind = "pool"
        else:
            raise self.refuse(node)
        return Part(kind, path, layer, node, inputs, node)

    def _joins(self, node: fx.Node) -> bool:
        """Whether it adds or concatenates whole maps of one size."""
        given, width, name = self._inputs[node], self.width(node), self.name(node)
        if name not in SUMS + CATS or len(given) < 2 or any(self.size(item) != self.size(node) for item in given):
            return False
        widths = [self.width(item) for item in given]
        return sum(widths) == width if name in CATS else set(widths) == {width}

    def _pools(self, node: fx.Node, layer: nn.Module | None) -> bool:
        """Whether it makes the map smaller by a whole factor and leaves its channels apart."""
        before = self._inputs[node][0]
        plain = layer is None or next(layer.parameters(), None) is None
        smaller = self.size(before)[0] > self.size(node)[0] > 1
        return plain and smaller and self.width(before) == self.width(node) and "pool" in self.name(node).lower()

    def _ends(self, group: list[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """Maps that enter a group of steps, and maps that leave it."""
        inside = set(group)
        entering = dict.fromkeys(item for node in group for item in self._inputs[node] if item not in inside)
        outside = set(self._inputs) - inside
        return list(entering), [node for node in group if node is self.maps[-1] or outside.intersection(node.users)]

    def _keeps(self, group: list[fx.Node]) -> bool:
        inputs, outputs = self._ends(group)
        same = len(inputs) == len(outputs) == 1 and all(isinstance(x.meta["own"], Tensor) for x in (*inputs, *outputs))
        return same and inputs[0].meta["own"].shape == outputs[0].meta["own"].shape and _has_axes(outputs[0])

    def _is_chain(self, group: list[fx.Node], prefix: str) -> bool:
        """Whether a module does no more than call its children one after the other."""
        children = list(_children(group, prefix))
        ends = [self._ends(nodes) for _, nodes in children]
        single = all(path != prefix for path, _ in children) and all(len(i) == len(o) == 1 for i, o in ends)
        return single and all(before[1] == after[0] for before, after in pairwise(ends))

    def _mixes(self, node: fx.Node) -> bool:
        """Whether it has layers with weights that work on whole maps (and not on the averages of a gate)."""
        module, value = self.capture.module(node), node.meta["own"]
        if module is None or not isinstance(value, Tensor):
            return False
        kinds = {type_ for item in module.modules() for type_ in (nn.Conv2d, nn.Linear) if isinstance(item, type_)}
        on_map = value.ndim == 4 and max(value.shape[2:]) > 1
        return on_map if nn.Conv2d in kinds else nn.Linear in kinds and value.ndim > 2


def _in_a_row(parts: list[Part], image: fx.Node) -> list[Part]:
    """The parts one after the other; those that run side by side become one part of kind `ways`."""
    last_use = {node: index for index, part in enumerate(parts) for node in part.inputs}
    chain: list[Part] = []
    waiting: list[Part] = []
    for index, part in enumerate(parts):
        waiting.append(part)
        start = chain[-1].output if chain else image
        if any(last_use.get(node, -1) > index for node in (start, *(item.output for item in waiting[:-1]))):
            continue
        if len(waiting) == 1 and part.kind not in ("add", "cat"):
            chain.append(part)
        else:
            path = posixpath.commonpath([item.path.replace(".", "/") for item in waiting]).replace("/", ".")
            chain.append(Part("ways", path, None, waiting[0].node, (start,), part.output, tuple(waiting)))
        waiting = []
    return chain


def _with_their_norms(chain: list[Part]) -> list[Part]:
    """Norms and activations that belong to the module of a part with several ways go with it."""
    taken: list[Part] = []
    for part in chain:
        if part.kind == "keep" and taken and taken[-1].kind == "ways" and _is_in(part.path, taken[-1].path):
            taken[-1] = replace(taken[-1], trail=(*taken[-1].trail, part))
            continue
        while part.kind == "ways" and taken and taken[-1].kind == "keep" and _is_in(taken[-1].path, part.path):
            part = replace(part, lead=(taken.pop(), *part.lead))
        taken.append(part)
    return taken


def _has_axes(node: fx.Node) -> bool:
    """Whether a step gives one tensor of four axes."""
    return isinstance(node.meta["own"], Tensor) and node.meta["own"].ndim == 4


def _path(node: fx.Node) -> str:
    """Where a step stands: the path of the layer, or of the module that calls the function."""
    return str(node.target) if node.op == "call_module" else node.meta["path"]


def _children(steps: list[fx.Node], prefix: str) -> Iterator[tuple[str, list[fx.Node]]]:
    """Successive steps of one child of a module; functions that the module itself calls stand under its own path."""
    depth = prefix.count(".") + 2 if prefix else 1
    for path, group in groupby(steps, lambda node: ".".join(_path(node).split(".")[:depth])):
        yield path, list(group)


def _is_in(path: str, owner: str) -> bool:
    return bool(owner) and (path == owner or path.startswith(owner + "."))
