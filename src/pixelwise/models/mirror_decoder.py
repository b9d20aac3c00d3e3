"""The mirror image of a chain: every arrow of its graph turned round.

The rule, part by part and from the last part to the first:

- A block that keeps width and size (residual, inverted residual, ConvNeXt, ...) stands there as a fresh one of its class.
- A convolution a -> b becomes b -> a, with a stride a transposed one; a pooling becomes an unpooling by the indices it
  remembers, or a transposed convolution of each channel by itself where its windows overlap or average.
- Where a map goes several ways, the ways' results are summed; where ways are summed, one map goes all of them; where maps
  are concatenated, one is split. So a residual block that widens and shrinks becomes one that narrows and enlarges, and a
  dense block gives back, layer by layer, the maps it gained.
- A norm, an activation or a gate stays on its map. At the ends of a way it stays at its end: conv-norm-activation remains
  that, and norm-activation-conv too; its width is then that of the map it now stands on.
- What the encoder applied last (the norm and activation of its last map) is not repeated. The first convolution's image is
  the scorer: it gives K maps where the other took the image's channels, and nothing follows it.
"""

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import reduce
from itertools import groupby
from typing import Any

import torch
from torch import fx, nn

from pixelwise.models.mirror_chain import Chain, Part
from pixelwise.models.mirror_layers import at_width, has_width, reflect_conv, reflect_pool
from pixelwise.ops.convolutionalize.tracer import is_settled
from pixelwise.ops.resize import crop_like
from pixelwise.ops.unpool import MaxPoolKeepingIndices


class Unpool(nn.Module):
    """Puts values where a pooling of the encoder took its maxima."""

    def __init__(self, pool: MaxPoolKeepingIndices) -> None:
        super().__init__()
        self.pool = (pool,)  # a tuple keeps the encoder's module out of this one's children

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool[0].unpool(x)


def plan(chain: Chain) -> list[Part]:
    """The decoder's steps in the order in which they run, from the trunk's last map to the scores."""
    for part in (chain.parts[0], *chain.parts[0].inner):
        if chain.image in part.inputs and part.kind not in ("conv", "ways"):
            raise chain.refuse(part.node, "comes first, where only a convolution can be reflected into a scorer")
    steps = list(_reflect(chain, chain.parts))
    start = next(index for index, step in enumerate(steps) if step.kind not in ("keep", "pool"))
    return [step for step in steps[:start] if step.kind != "keep"] + steps[start:]


def _reflect(chain: Chain, parts: Iterable[Part]) -> Iterator[Part]:
    """The steps for a chain: blocks and parts with several ways by themselves, what is between them run by run."""
    runs = [(is_run, list(run)) for is_run, run in groupby(parts, lambda part: part.kind not in ("block", "ways"))]
    for is_run, run in reversed(runs):
        yield from _reflect_run(chain, run) if is_run else reversed(run)


def _reflect_run(chain: Chain, run: list[Part]) -> Iterator[Part]:
    movers: list[Part] = []
    keeps: list[list[Part]] = [[]]  # those before the first mover, those after it, those after the second, ...
    for part in run:
        if part.kind == "keep":
            keeps[-1].append(part)
        else:
            movers.append(part)
            keeps.append([])
    for index in range(1, len(movers) - 1):
        # A map is normed and activated before it is pooled; in the image, too, that comes right behind the convolution.
        if movers[index].kind == "pool":
            keeps[index], keeps[index + 1] = [], keeps[index] + keeps[index + 1]
    if not movers:
        yield from (replace(part, width=chain.width(part.output)) for part in run)
        return
    yield from _at_the_end(stays=keeps[-1], comes=keeps[0], width=chain.width(run[-1].target))
    for index in range(len(movers) - 1, 0, -1):
        yield movers[index]
        yield from (replace(part, width=chain.width(part.output)) for part in keeps[index])
    yield movers[0]
    if run[0].source is not chain.image:  # the scorer's map is left as it is
        yield from _at_the_end(stays=keeps[0], comes=keeps[-1], width=chain.width(run[0].source))


def _at_the_end(*, stays: Iterable[Part], comes: Iterable[Part], width: int) -> Iterator[Part]:
    """At one end of a way: gates, which hold matrices for their map's width, stay; the rest comes from the other end."""
    chosen = (*(part for part in stays if not _can_widen(part)), *(part for part in comes if _can_widen(part)))
    yield from (replace(part, width=width) for part in chosen)


def _can_widen(part: Part) -> bool:
    return part.layer is None or has_width(part.layer)


class Level:
    """Writes the steps between two joins as one graph: a module that maps (x, like) to the map of the finer level, `target`.

    The chain's layers are used up. `pools` are the encoder's poolings that keep their indices, by path.
    """

    def __init__(
        self, chain: Chain, target: fx.Node, pools: dict[str, MaxPoolKeepingIndices], num_classes: int
    ) -> None:
        self.chain, self.target, self.pools, self.num_classes = chain, target, pools, num_classes
        self.graph = fx.Graph()
        self.layers: dict[str, nn.Module] = {}
        self.x = self.graph.placeholder("x")
        self.like = self.graph.placeholder("like")

    def module(self) -> fx.GraphModule:
        """What has been written."""
        self.graph.output(self.x)
        return fx.GraphModule(self.layers, self.graph, class_name="Level")

    def write(self, part: Part, *, extra_in: int = 0) -> None:
        """Add one step; `extra_in` channels are stacked upon its input."""
        self.x = self._write(part, self.x, extra_in=extra_in)

    def _write(self, part: Part, x: fx.Node, *, extra_in: int = 0) -> fx.Node:
        chain = self.chain
        if part.kind == "keep":
            return self._keep(part, x)
        if part.kind == "block":
            return self._call(part.path, part.layer, x)
        if part.kind == "ways":
            return self._ways(part, x)
        if part.path in self.pools:
            return self._call(part.path, Unpool(self.pools[part.path]), x)
        before, after = chain.size(part.inputs[0]), chain.size(part.output)
        stride = part.geometry[1]
        exact = before == tuple(stride * length for length in after)
        if part.kind == "pool":
            layer, crop = reflect_pool(chain.width(part.output), *part.geometry, exact=exact)
        else:
            classes = self.num_classes if part.inputs[0] is chain.image else None
            layer, crop = reflect_conv(part.layer, exact=exact, extra_in=extra_in, out_channels=classes)
        x = self._call(part.path if part.layer else f"{part.path}.{chain.name(part.node)}", layer, x)
        if crop and before != chain.size(self.target):
            raise chain.refuse(part.node, "cuts its map in a way that the mirrored one cannot know")
        return self.graph.call_function(crop_like, (x, self.like)) if crop else x

    def _keep(self, part: Part, x: fx.Node) -> fx.Node:
        if part.layer is not None:
            layer = at_width(part.layer, self.chain.width(part.output), part.width)
            activation: Any
            for activation in layer.modules():
                if hasattr(activation, "inplace"):
                    activation.inplace = False  # the map it acts on may go other ways, too
            return self._call(part.path, layer, x)

        def given(item: fx.Node) -> Any:
            if item is part.inputs[0]:
                return x
            if not is_settled(item):
                raise self.chain.refuse(part.node, "takes a tensor that is no map")
            return item.meta["own"]

        args, kwargs = fx.map_arg(part.node.args, given), dict(fx.map_arg(part.node.kwargs, given))
        if "inplace" in kwargs:
            kwargs["inplace"] = False
        return self.graph.create_node(part.node.op, _out_of_place(part.node.target), args, kwargs)

    def _ways(self, part: Part, x: fx.Node) -> fx.Node:
        """In reverse order; each map is the sum of what those that used it give back."""
        chain = self.chain
        for step in _at_the_end(stays=part.trail, comes=part.lead, width=chain.width(part.target)):
            x = self._write(step, x)
        owed: dict[fx.Node, list[fx.Node]] = defaultdict(list, {part.output: [x]})
        for run in reversed(_ways_through(part)):
            total = self._sum(owed.pop(run[-1].output))
            if run[-1].kind == "add":
                for item in run[-1].inputs:
                    owed[item].append(total)
            elif run[-1].kind == "cat":
                for item, piece in zip(run[-1].inputs, self._split(total, run[-1]), strict=True):
                    owed[item].append(piece)
            else:
                for step in _reflect(chain, run):
                    total = self._write(step, total)
                owed[run[0].inputs[0]].append(total)
        x = self._sum(owed[part.inputs[0]])
        if part.source is chain.image:
            return x
        for step in _at_the_end(stays=part.lead, comes=part.trail, width=chain.width(part.source)):
            x = self._write(step, x)
        return x

    def _sum(self, nodes: list[fx.Node]) -> fx.Node:
        return reduce(lambda one, other: self.graph.call_function(operator.add, (one, other)), nodes)

    def _split(self, x: fx.Node, part: Part) -> Iterator[fx.Node]:
        widths = [self.chain.width(item) for item in part.inputs]
        pieces = self.graph.call_function(torch.split, (x, widths, 1))
        for index in range(len(widths)):
            yield self.graph.call_function(operator.getitem, (pieces, index))

    def _call(self, path: str, layer: nn.Module, x: fx.Node) -> fx.Node:
        free = (path if not index else f"{path}_{index}" for index in range(len(self.layers) + 1))
        path = next(name for name in free if name not in self.layers)
        self.layers[path] = layer
        return self.graph.call_module(path, (x,))


def _ways_through(part: Part) -> list[list[Part]]:
    """The parts inside, cut into ways without forks; sums and concatenations stand alone."""
    inner = _nested_cats(part.inner)
    uses = Counter(item for step in inner for item in step.inputs)
    ways: dict[fx.Node, list[Part]] = {}  # by the map they have led to
    for item in inner:
        goes_on = item.kind not in ("add", "cat") and uses[item.inputs[0]] == 1 and item.inputs[0] in ways
        way = ways[item.inputs[0]] if goes_on and ways[item.inputs[0]][-1].kind not in ("add", "cat") else []
        if way:
            del ways[item.inputs[0]]
        ways[item.output] = [*way, item]
    return list(ways.values())


def _out_of_place(target: Any) -> Any:
    """`mul` for `mul_` and `imul`."""
    if isinstance(target, str):
        return target.removesuffix("_") if not target.endswith("__") else target
    name = target.__name__
    if getattr(operator, name, None) is target:
        return getattr(operator, name[1:], target)
    return getattr(torch, name[:-1]) if name.endswith("_") else target


def _nested_cats(parts: Iterable[Part]) -> list[Part]:
    """A dense block concatenates all maps again for every layer; each time, what was concatenated before stays together."""
    known: dict[tuple[fx.Node, ...], fx.Node] = {}
    nested = []
    for part in parts:
        if part.kind == "cat":
            known[part.inputs] = part.output
            for length in range(len(part.inputs) - 1, 1, -1):
                if part.inputs[:length] in known:
                    part = replace(part, inputs=(known[part.inputs[:length]], *part.inputs[length:]))
                    break
        nested.append(part)
    return nested
