"""Any image classifier as a fully convolutional network: class scores for every window of a larger image.

Source: Long, Shelhamer, Darrell. Fully Convolutional Networks for Semantic Segmentation. CVPR 2015 (arXiv:1411.4038),
        section 3.1: a fully connected layer is a convolution whose kernel covers its whole input. Strides are removed by
        dilation as in section 3.2. Pooling over the whole map becomes pooling over windows of the map's own size.

The classifier's code is captured as a graph (`capture`). Its trunk, which gives maps for images of any size, stays as it is,
or loses its last strides (`trunk`). Its head is redone for windows (`head`). No class of network is known here by name.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from pixelwise.errors import UsageError
from pixelwise.ops.convolutionalize.capture import Capture, NewNetwork, holds_tensors
from pixelwise.ops.convolutionalize.head import Head, Windows, starts_head, window_of
from pixelwise.ops.convolutionalize.tracer import REFUSALS, Refused, first_line, is_settled
from pixelwise.ops.convolutionalize.trunk import Trunk
from pixelwise.ops.cost import without_memory

HeadKind = Literal["window", "cells"]
DEFAULT_PX = 224


def convolutionalize(
    classifier: nn.Module,
    *,
    input_size: int | tuple[int, int, int] | None = None,
    head: HeadKind = "window",
    dense: bool | int = False,
) -> nn.Module:
    """Turn an image classifier into a network that scores every window of a larger image, with the same weights.

    On an image of the classifier's own size the scores are the classifier's. On a larger one, cell (y, x) holds the
    scores of the window that begins at pixel (y * stride, x * stride): exactly, if the classifier pads nowhere. Padding
    lets a classifier see where its window ends; a window inside a larger image ends nowhere, so scores differ there.
    Context that a classifier takes from the whole image (squeeze and excitation) it takes from the whole larger image.

    Args:
        classifier: maps images (N, C, H, W) of its own size to scores (N, K). It is left as it is; the result shares
            its parameters in memory.
        input_size: its own image size in pixels, or (channels, height, width); by default what timm notes for it, else
            224 and the channels of its first convolution.
        head: "window" scores windows of the own size. "cells" leaves the pooling over the map out, so that each cell
            gets scores of its own: class activation maps, whose mean over a window the classifier's scores are, where
            its head is linear.
        dense: the pixels between neighbouring cells, by removing the last strides (an image step of 32 can become 16,
            8, ... 1); True for 1, False for the classifier's own.

    Returns:
        A module that maps images (N, C, H, W), at least of the own size, to scores (N, K, h, w). Where a module stays
        what it was, its path and the names of its parameters are the classifier's; a linear layer becomes a convolution
        at its path. Its `meta` holds `input_size`, `stride` (pixels between cells) and `head`. It starts in the
        classifier's mode, training or evaluation.

    Raises:
        UsageError: it cannot be converted; the message names the module and the reason.

    Example:
        >>> import torch
        >>> pool = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        >>> classifier = nn.Sequential(pool, nn.Flatten(), nn.Linear(8 * 4 * 4, 5)).eval()
        >>> scorer = convolutionalize(classifier, input_size=10)
        >>> scorer.get_submodule("2").weight.shape
        torch.Size([5, 8, 4, 4])
        >>> image = torch.rand(1, 3, 16, 20)
        >>> scores = scorer(image)  # a cell every 2 px
        >>> tuple(scores.shape)
        (1, 5, 4, 6)
        >>> torch.allclose(scores[:, :, 1, 2], classifier(image[:, :, 2:12, 4:14]), atol=1e-6)
        True
        >>> tuple(convolutionalize(classifier, input_size=10, dense=True)(image).shape)
        (1, 5, 7, 11)
    """
    if head not in get_args(HeadKind):
        raise UsageError(f'head must be "window" or "cells", not {head!r}.')
    if isinstance(dense, float) or dense < 0 or (dense == 0 and dense is not False):
        raise UsageError(f"dense must be True, False or a number of pixels of at least 1, not {dense!r}.")
    size = _own_size(classifier, input_size)
    with torch.device("cpu"):  # where the numbers are that tell how values move; "meta" may be the default
        capture = Capture(classifier, size)
        capture.require_scores()
        conversion = _Conversion(capture, head == "cells", None if dense is False else int(dense))
        scorer = conversion.run()
        while conversion.trunk.stuck:
            scorer, conversion = _with_larger_steps(conversion)
        if dense is not False:
            _check_removal(conversion, scorer)
    scorer.meta |= {"input_size": size, "stride": conversion.stride, "head": head}
    return scorer


def _with_larger_steps(conversion: "_Conversion") -> tuple[fx.GraphModule, "_Conversion"]:
    """Convert again, with the modules around the steps that could not be changed as one step each."""
    capture, opaque = conversion.capture, conversion.trunk.opaque
    why = "the strides before it cannot be removed; use dense=False or a larger number"
    refusal = capture.refusal(conversion.trunk.stuck[0], why)
    if "" in opaque:
        raise refusal
    try:
        larger = Capture(capture.classifier, capture.input_size, capture.leaves | opaque)
        conversion = _Conversion(larger, conversion.per_cell, conversion.wanted)
        return conversion.run(), conversion
    except UsageError as error:
        raise refusal from error


class _Hollow(fx.Interpreter):
    """Runs a graph for the shapes; tensors that the code makes lose their content too."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        return value.to("meta") if isinstance(value, torch.Tensor) else value


def _check_removal(conversion: "_Conversion", scorer: nn.Module) -> None:
    """Modules that are one step each may not take the map sizes that the removal of strides leads to."""
    channels, height, width = conversion.capture.input_size
    try:
        with torch.no_grad():
            hollow = _Hollow(without_memory(scorer).eval())
            for steps in (0, 1):
                size = (1, channels, height + steps * conversion.own_stride, width + 2 * steps * conversion.own_stride)
                hollow.run(conversion.capture.image.meta["own"].new_empty(size))
    except REFUSALS as error:
        raise UsageError(
            f"{conversion.capture.where('')}: its strides cannot be removed, because a part of it does not take the maps "
            f"that then come: {first_line(error)}. Use dense=False or a larger number."
        ) from error


def _own_size(classifier: nn.Module, given: Any) -> tuple[int, int, int]:
    if isinstance(given, tuple | list):
        size = tuple(given)
    else:
        notes: Any = getattr(classifier, "default_cfg", None)
        notes = notes if isinstance(notes, dict) else {}
        first = [module for path, module in classifier.named_modules() if path == notes.get("first_conv")]
        convs = [module for module in (*first, *classifier.modules()) if isinstance(module, nn.Conv2d)]
        noted = notes.get("input_size", (convs[0].in_channels if convs else 3, DEFAULT_PX, DEFAULT_PX))
        channels = convs[0].in_channels if first and convs else noted[0]
        size = (channels, *noted[1:]) if given is None else (channels, given, given)
    if len(size) != 3 or not all(isinstance(item, int) and item > 0 for item in size):
        raise UsageError(f"input_size must be a number of pixels, or (channels, height, width), not {given!r}.")
    return size


class _Conversion:
    """One walk over the graph of a classifier."""

    def __init__(self, capture: Capture, per_cell: bool, stride: int | None) -> None:
        self.capture, self.new, self.per_cell = capture, NewNetwork(capture), per_cell
        self.wanted = stride
        self.trunk, self.head = Trunk(self.new, stride, self._value), Head(self.new, per_cell, self._value)
        self.done: dict[fx.Node, fx.Node] = {}  # the new step of each step outside the head
        self.windows: dict[fx.Node, Windows] = {}  # what each value of the head is
        self.strides: set[int] = set()  # of the last maps
        self.of_image = _downstream(capture.graph, capture.image)
        self.in_head = self._find_head()

    def run(self) -> fx.GraphModule:
        image = self.new.graph.placeholder("image")
        least = self.capture.image.meta["own"].shape[1:]
        least = (least[0], 1, 1) if self.per_cell else tuple(least)
        self.done[self.capture.image] = self.new.graph.call_function(require_size, (image, least))
        self.trunk.spacing[self.capture.image] = 1
        for node in self.capture.graph.nodes:
            if node.op == "output":
                self._finish(node)
            elif node in self.in_head:
                given = {
                    item: self._window(node, item) for item in node.all_input_nodes if self._is_tensor_of_image(item)
                }
                self.windows[node] = self.head.convert(node, given)
            elif node.op == "get_attr":
                self.done[node] = self.new.value(node)
            elif node not in self.done and node.op != "placeholder" and self.done.keys() >= set(node.all_input_nodes):
                # Checks of other arguments go, and sizes of what is in the head, where its steps need them as numbers only.
                maps = [item for item in node.all_input_nodes if self._is_tensor_of_image(item)]
                self.done[node] = self.trunk.convert(node, maps)
        for node in self.new.graph.nodes:
            node.meta.clear()
        return fx.GraphModule(self.new.root, self.new.graph, class_name="FullyConvolutional")

    def _is_tensor_of_image(self, node: fx.Node) -> bool:
        return node in self.of_image and holds_tensors(node)

    def _find_head(self) -> set[fx.Node]:
        """The tensors that depend on the image but are neither maps nor go into maps again."""
        nodes = [node for node in self.capture.graph.nodes if self._is_tensor_of_image(node)]
        maps = {node for node in nodes if self.capture.grid(node)}
        for node in nodes:
            sources = [item for item in node.all_input_nodes if item in maps]
            if node in maps and len(sources) == 1:
                before = self.capture.grid(sources[0])
                if before and starts_head(self.capture, node, sources[0], before):
                    maps -= _downstream(self.capture.graph, node)
        feeding = set(maps)
        for node in reversed(nodes):
            if any(user in feeding for user in node.users):
                feeding.add(node)
        return {node for node in nodes if node not in feeding and node.op != "output"}

    def _window(self, node: fx.Node, source: fx.Node) -> Windows:
        """What a step of the head takes from `source`, another one or a last map."""
        if source in self.windows:
            return self.windows[source]
        grid, value = self.capture.grid(source), source.meta["own"]
        if grid is None or value.ndim != 4:
            raise self.capture.size_refusal(node, "what goes into it is no map (N, C, H, W)")
        self.own_stride = round(grid.strides[0])
        self.strides.add(self.own_stride // self.trunk.spacing[source])
        if len(self.strides) > 1:
            raise self.capture.refusal(
                node, f"scores of maps with different strides ({sorted(self.strides)} px) are joined"
            )
        return window_of(self.done[source], value, grid, self.trunk.spacing[source], self.new.graph)

    def _value(self, node: fx.Node) -> Any:
        if node in self.done:
            return self.done[node]
        if not is_settled(node):
            raise self.capture.size_refusal(node, "it needs the size of the image or of the batch")
        return node.meta["own"]

    def _finish(self, node: fx.Node) -> None:
        last = node.args[0]
        refused = [item for item in self.done if isinstance(item.meta["large"], Refused)]
        if not isinstance(last, fx.Node) or last not in self.windows or refused:
            start = refused[0] if refused else self.capture.image
            raise self.capture.size_refusal(start, "its scores do not come from a map")
        self.stride = next(iter(self.strides))
        if self.wanted is not None and self.stride != self.wanted and not self.trunk.stuck:
            found = [grid for item in self.done if (grid := self.capture.grid(item))]
            steps = sorted({round(grid.strides[0]) for grid in found if grid.strides[0] >= 1})
            raise UsageError(
                f"dense must be one of {', '.join(map(str, steps))} for {type(self.capture.classifier).__name__}: its maps "
                f"have these strides in pixels. It is {self.wanted}."
            )
        scores = self.head.scores(last, self.windows[last])
        if not self.per_cell:
            image, window = self.done[self.capture.image], tuple(self.capture.image.meta["own"].shape[2:])
            scores = self.new.graph.call_function(whole_windows, (scores, image, window, self.stride))
        self.new.graph.output(scores)


def _downstream(graph: fx.Graph, start: fx.Node) -> set[fx.Node]:
    found = {start}
    for node in graph.nodes:
        if any(item in found for item in node.all_input_nodes):
            found.add(node)
    return found


def require_size(image: Tensor, least: Sequence[int]) -> Tensor:
    """The image (N, C, H, W), if it has the channels of `least` = (C, H, W) and is not smaller; else a UsageError."""
    channels, height, width = least
    if image.ndim != 4 or image.shape[1] != channels:
        raise UsageError(f"the image must have shape (N, {channels}, H, W), not {tuple(image.shape)}.")
    if image.shape[2] < height or image.shape[3] < width:
        raise UsageError(
            f"the image of {image.shape[2]} x {image.shape[3]} px (height x width) is smaller than the classifier's window "
            f"of {height} x {width} px. Pad or enlarge it."
        )
    return image


def whole_windows(scores: Tensor, image: Tensor, window: Sequence[int], stride: int) -> Tensor:
    """The scores (N, K, h, w) of windows within the image: padding and rounding let a network have a few cells more."""
    rows, columns = ((length - own) // stride + 1 for length, own in zip(image.shape[2:], window, strict=True))
    return scores[:, :, :rows, :columns]
