"""The graph of a network with the shape of every value at several image sizes: what grows with the image is a map.

A network is followed with torch.fx on the device "meta", where nothing is computed but shapes, at its own image size and
at a much larger one. A value with two axes that grow with the image is a map; by how much they grow tells its stride
exactly. Values that do not grow are scores or context. A third size, an odd one, tells what no size changes.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pixelwise.errors import UsageError
from pixelwise.ops.convolutionalize.tracer import CONTENT, REFUSALS, Tracer, first_line, refused_here
from pixelwise.ops.cost import without_memory

# The larger image is higher by GROWTH_PX and wider by twice as much: divisible by every usual stride (a power of two, 3, 5,
# 7), so growth over growth of a map is its stride, whatever the padding; and it tells height from width.
GROWTH_PX = 2**7 * 3 * 5 * 7
ODD_PX = (37, 75)  # more than the own size, for code that asks what a size leaves when it is divided
OWN_BATCH, LARGE_BATCH = 2, 3  # they differ, so that code cannot settle on a batch size


@dataclass(frozen=True)
class Grid:
    """Where a map (N, ..., H, ...) has its rows and columns, how many at the own size, and how many pixels apart."""

    axes: tuple[int, int]
    size: tuple[int, int]
    strides: tuple[float, float]


class Untraceable(UsageError):
    """The code of a network cannot be followed; `reason` is why, without the module."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class Capture:
    """A classifier of images (C, H, W), or its trunk, as a `graph` of steps; the modules at `leaves` stay one step each.

    The `meta` of each step holds its value at the three sizes, without content. `twin` is the classifier without memory
    behind its parameters. Code that cannot be followed, or takes no images of that size, is `Untraceable`.
    """

    def __init__(
        self,
        classifier: nn.Module,
        input_size: tuple[int, int, int],
        leaves: Collection[str] = (),
        followed: Collection[type] = (),  # classes to follow though timm keeps them from fx
    ) -> None:
        self.classifier, self.input_size, self.leaves, self.followed = classifier, input_size, set(leaves), followed
        self.twin = without_memory(classifier).eval()
        channels, height, width = input_size
        sizes = {
            "own": (OWN_BATCH, channels, height, width),
            "large": (LARGE_BATCH, channels, height + GROWTH_PX, width + 2 * GROWTH_PX),
            "odd": (LARGE_BATCH, channels, height + ODD_PX[0], width + ODD_PX[1]),
        }
        dtype = next((item.dtype for item in classifier.parameters() if item.is_floating_point()), torch.float32)
        images = {name: torch.empty(size, dtype=dtype, device="meta") for name, size in sizes.items()}
        optional = _optional_arguments(classifier)
        while not self._follow(images, optional):
            pass
        self.image = next(node for node in self.graph.nodes if node.op == "placeholder")

    def _follow(self, images: dict[str, Tensor], optional: dict[str, Any]) -> bool:
        """Follow the code once; a module whose code cannot be followed becomes one step, and all begins anew."""
        tracer = Tracer(self.leaves, images, self.followed)
        try:
            self.graph = tracer.trace(self.twin, concrete_args=optional)
            tracer.evaluate()
            broken = next((node for node in self.graph.nodes if refused_here(node, "own")), None)
            if broken is None:
                return True
            reason, around = broken.meta["own"].reason, [broken.meta["own"].path, broken.meta["path"]]
        except REFUSALS as error:
            reason, around = first_line(error), [path for path, _ in reversed(tracer.module_stack.values())] or [""]
        broken_in = self.twin.get_submodule(around[0])
        # Torch's layers refuse what does not suit them; there is nothing to be gained by looking at them otherwise.
        is_torch_s = type(broken_in).__module__.startswith("torch.nn") and not isinstance(broken_in, nn.Sequential)
        if not is_torch_s and reason != CONTENT:
            path = next((path for path in around if path and path not in self.leaves), None)
            if path is not None:
                self.leaves.add(path)
                return False
        size = "(N, {}, {}, {})".format(*self.input_size)
        hint = " If the classifier is made for another size, pass input_size=PIXELS or (channels, height, width)."
        raise Untraceable(
            f"{self.where(around[0])} cannot be made fully convolutional: its code cannot be followed on images {size}, "
            f"because {reason.rstrip('.')}.{'' if reason == CONTENT else hint}",
            reason,
        )

    def where(self, path: str) -> str:
        """A module in words: its path and class."""
        kind = type(self.classifier.get_submodule(path)).__name__
        return f"{path} ({kind})" if path else f"the classifier itself ({kind})"

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a step calls, without content, if it calls one."""
        return self.twin.get_submodule(str(node.target)) if node.op == "call_module" else None

    def has_state(self, node: fx.Node) -> bool:
        """Whether a step has parameters or buffers of the classifier in it."""
        module = self.module(node)
        own = module is not None and any(True for _ in (*module.parameters(), *module.buffers()))
        return own or any(item.op == "get_attr" for item in node.all_input_nodes)

    def grid(self, node: fx.Node) -> Grid | None:
        """The grid of the map that a step gives, if it gives one."""
        return grid_of(node.meta["own"], node.meta["large"])

    def refusal(self, node: fx.Node, why: str) -> UsageError:
        """The error for a step that cannot be converted."""
        path = str(node.target) if node.op == "call_module" else node.meta.get("path", "")
        return UsageError(f"{self.where(path)} cannot be made fully convolutional: {why}.")

    def size_refusal(self, node: fx.Node, why: str) -> UsageError:
        """The error for a step that cannot be converted; if it or a later one works at one image size only, that is why."""
        if node.op == "call_module" and not refused_here(node, "large"):
            return self.refusal(node, why)
        nodes = list(self.graph.nodes)
        broken = [item for item in nodes if item.op != "output" and refused_here(item, "large")]
        later = [item for item in broken if nodes.index(item) >= nodes.index(node) and item.target is not torch._assert]
        told = next(iter([*later, *broken]), None)
        if told is None:
            return self.refusal(node, why)
        refused = told.meta["large"]
        says = "it refuses" if told.target is torch._assert else f"it says: {refused.reason.rstrip('.')}"
        tables = [str(item.target) for item in told.all_input_nodes if item.op == "get_attr"]
        table = f" Its {' and '.join(tables)} is made for one number of positions." if tables else ""
        return UsageError(
            f"{self.where(refused.path)} cannot be made fully convolutional: it works at the classifier's own image size "
            f"only. On a larger image {says}.{table}"
        )

    def require_scores(self) -> None:
        """Raise a UsageError unless the network is a classifier, which gives scores (N, K)."""
        last = next(iter(reversed(self.graph.nodes))).args[0]
        scores = last.meta["own"] if isinstance(last, fx.Node) else last
        if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[0] != OWN_BATCH:
            given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            images = (OWN_BATCH, *self.input_size)
            raise UsageError(
                f"{self.where('')} is no classifier: for images {images} it gives {given}, where scores (N, K) are wanted."
            )


class NewNetwork:
    """The network that a classifier is turned into, with its `graph`, which is being built.

    `root` is a copy of the classifier's modules that shares their parameters.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture, self.graph = capture, fx.Graph()
        self.root = share(capture.classifier)
        self._uses = Counter(str(node.target) for node in capture.graph.nodes if node.op == "call_module")

    def own_module(self, node: fx.Node) -> Any:
        """The module of a step, to be changed and given to `place`; other steps that use it keep theirs."""
        module = self.root.get_submodule(str(node.target))
        return share(module) if self._uses[str(node.target)] > 1 else module

    def value(self, node: fx.Node) -> fx.Node:
        """A parameter, a buffer, or a tensor that the code made while it was followed."""
        name = str(node.target)
        if "." not in name and not hasattr(self.root, name):
            made = getattr(self.capture.twin, name)
            if made.is_meta and not any(item.is_meta for item in self.capture.classifier.parameters()):
                raise self.capture.refusal(node, "its code computes with its parameters before it sees the image")
            self.root.register_buffer(name, made, persistent=False)
        return self.graph.node_copy(node)

    def place(self, node: fx.Node, module: nn.Module) -> str:
        """Put `module` where the step's was, or under a name of its own if other steps use that; returns its path."""
        if node.op == "call_module" and self._uses[str(node.target)] == 1:
            self.root.set_submodule(str(node.target), module)
            return str(node.target)
        path = node.name
        while hasattr(self.root, path):
            path += "_"
        self.root.add_module(path, module)
        return path


def _optional_arguments(classifier: nn.Module) -> dict[str, Any]:
    """The defaults of what `forward` takes besides the image; a UsageError if it wants more than one image, or none."""
    parameters = list(inspect.signature(classifier.forward).parameters.values())
    named = [item for item in parameters if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)]
    wanted = [item.name for item in named if item.default is item.empty]
    if len(wanted) > 1 or not named:
        raise UsageError(
            f"the classifier itself ({type(classifier).__name__}) cannot be made fully convolutional: its forward takes "
            f"{len(wanted)} inputs ({', '.join(wanted) or 'none by name'}), where one image is wanted."
        )
    return {item.name: item.default for item in named[1:]}


def share(module: nn.Module) -> nn.Module:
    """A copy of a module that has its own structure and settings, but the same parameters and buffers in memory."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(item): item for item in tensors})


def holds_tensors(node: fx.Node) -> bool:
    """Whether a step gives a tensor, or several."""
    value = node.meta.get("own")
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(isinstance(x, Tensor) for x in value))


def grid_of(value: Any, large: Any) -> Grid | None:
    """The grid of a map, or None for anything else; a tuple of maps counts as its first."""
    if isinstance(value, tuple | list) and isinstance(large, tuple | list) and value and large:
        return grid_of(value[0], large[0])
    if not isinstance(value, Tensor) or not isinstance(large, Tensor) or value.ndim != large.ndim or value.ndim < 3:
        return None
    growth = {axis: large.shape[axis] - value.shape[axis] for axis in range(1, value.ndim)}
    rows = [axis for axis, more in growth.items() if more and 2 * more in growth.values()]
    if len(rows) != 1 or sum(more > 0 for more in growth.values()) != 2:
        return None
    row = rows[0]
    column = next(axis for axis, more in growth.items() if more == 2 * growth[row])
    size = (value.shape[row], value.shape[column])
    strides = (GROWTH_PX / growth[row], 2 * GROWTH_PX / growth[column])
    return Grid((row, column), size, strides)
