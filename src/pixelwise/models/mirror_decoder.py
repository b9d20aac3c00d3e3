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
- Where a convolution looks at one pixel of each stride x stride (the shortcuts of a ResNet), its image is repeated over
  all of them. Reflected convolutions start with He's weights, counted over the taps that feed one output, the scorer with
  smaller ones, the transposed convolutions of poolings as interpolation.
"""

import copy
import math
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
from pixelwise.ops.convolutionalize.tracer import is_settled
from pixelwise.ops.pooling import MaxPoolKeepingIndices
from pixelwise.ops.resize import bilinear_kernel, crop_like

Pair = tuple[int, int]
SCORE_GAIN = 0.01  # in place of He's 2: at the start, no class is much likelier than another


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
        yield from run
        return
    yield from _at_the_end(stays=keeps[-1], comes=keeps[0], width=chain.width(run[-1].target))
    for index in range(len(movers) - 1, 0, -1):
        yield movers[index]
        yield from keeps[index]
    yield movers[0]
    if run[0].source is not chain.image:  # the scorer's map is left as it is
        yield from _at_the_end(stays=keeps[0], comes=keeps[-1], width=chain.width(run[0].source))


def _at_the_end(*, stays: Iterable[Part], comes: Iterable[Part], width: int) -> Iterator[Part]:
    """At one end of a way: gates, which hold matrices for their map's width, stay; the rest comes from the other end."""
    gates = (part for part in stays if not has_width(part.layer))
    yield from (replace(part, width=width) for part in (*gates, *(part for part in comes if has_width(part.layer))))


class Level:
    """Writes the steps between two joins as one graph: a module that maps (x, like) to the map of the finer level, `target`.

    `pools` are the encoder's poolings that keep their indices, by path.
    """

    def __init__(
        self, chain: Chain, target: fx.Node, pools: dict[str, MaxPoolKeepingIndices], num_classes: int
    ) -> None:
        self.chain, self.target, self.pools, self.num_classes = chain, target, pools, num_classes
        self.graph = fx.Graph()
        self.layers: dict[str, nn.Module] = {}
        self.x, self.like = self.graph.placeholder("x"), self.graph.placeholder("like")

    def module(self, result: fx.Node) -> fx.GraphModule:
        """What has been written."""
        self.graph.output(result)
        return fx.GraphModule(self.layers, self.graph, class_name="Level")

    def write(self, part: Part, x: fx.Node, *, extra_in: int = 0) -> fx.Node:
        """Add one step behind `x`, upon which `extra_in` channels are stacked."""
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
            own = self.chain.width(part.output)
            layer = at_width(part.layer, own, part.width or own)
            module: Any
            for module in layer.modules():
                if hasattr(module, "inplace"):
                    module.inplace = False  # the map it acts on may go other ways, too
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
            x = self.write(step, x)
        owed: dict[fx.Node, list[fx.Node]] = defaultdict(list, {part.output: [x]})
        for run in reversed(_ways_through(part)):
            total = self._sum(owed.pop(run[-1].output))
            if run[-1].kind == "add":
                for item in run[-1].inputs:
                    owed[item].append(total)
            elif run[-1].kind == "cat":
                widths = [chain.width(item) for item in run[-1].inputs]
                split = self.graph.call_function(torch.split, (total, widths, 1))
                for index, item in enumerate(run[-1].inputs):
                    owed[item].append(self.graph.call_function(operator.getitem, (split, index)))
            else:
                for step in _reflect(chain, run):
                    total = self.write(step, total)
                owed[run[0].inputs[0]].append(total)
        x = self._sum(owed[part.inputs[0]])
        if part.source is not chain.image:
            for step in _at_the_end(stays=part.lead, comes=part.trail, width=chain.width(part.source)):
                x = self.write(step, x)
        return x

    def _sum(self, nodes: list[fx.Node]) -> fx.Node:
        return reduce(lambda one, other: self.graph.call_function(operator.add, (one, other)), nodes)

    def _call(self, path: str, layer: nn.Module, x: fx.Node) -> fx.Node:
        names = (path, *(f"{path}_{index}" for index in range(1, len(self.layers) + 1)))
        path = next(name for name in names if name not in self.layers)
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


def reflect_conv(
    conv: nn.Conv2d, *, exact: bool, extra_in: int = 0, out_channels: int | None = None
) -> tuple[nn.Module, bool]:
    """A convolution from the map that `conv` gives to one like that which it takes, and whether its result must be cropped.

    `exact` says that the input of `conv` is always stride times as large as its output; else the result may be too large at
    the bottom and right. `extra_in` channels are stacked upon the map. With `out_channels` it is a scorer, with a bias.
    """
    from timm.layers import Conv2dSame

    channels, out = conv.out_channels + extra_in, out_channels or conv.in_channels
    groups, bias = (1, True) if out_channels else (conv.groups, conv.bias is not None)
    options: dict[str, Any] = {"dilation": conv.dilation, "groups": groups, "bias": bias}
    same = isinstance(conv, Conv2dSame) or conv.padding == "same"
    stride, kernel, padding = _pair(conv.stride), _pair(conv.kernel_size), _pair(0 if same else conv.padding)
    spans = [step * (size - 1) + 1 for step, size in zip(_pair(conv.dilation), kernel, strict=True)]
    layer: nn.Conv2d | nn.ConvTranspose2d
    if max(spans) == 1 or max(stride) == 1:
        # What a convolution without padding cuts off comes back: padding p turns into span - 1 - p.
        above, left = (span // 2 if same else span - 1 - pad for span, pad in zip(spans, padding, strict=True))
        layer = nn.Conv2d(channels, out, kernel, padding=(above, left), **options)
        more, crop = (0, 0), max(stride) > 1 and not exact
    else:
        if same:
            padding = _pair([(span - step) // 2 for span, step in zip(spans, stride, strict=True)])
        more, crop = _output_padding(spans, stride, padding, exact)
        layer = nn.ConvTranspose2d(channels, out, kernel, stride, padding, more, **options)
    # Gaussian weights of standard deviation sqrt(gain / fan in).
    taps = math.prod(layer.kernel_size) * layer.in_channels / layer.groups
    if isinstance(layer, nn.ConvTranspose2d):
        taps /= math.prod(stride)
    nn.init.normal_(layer.weight, std=((SCORE_GAIN if out_channels else 2.0) / taps) ** 0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    if max(spans) == 1 < max(stride):
        return nn.Sequential(layer, nn.Upsample(scale_factor=stride, mode="nearest")), crop
    return layer, crop


def reflect_pool(channels: int, kernel: int, stride: int, padding: int, *, exact: bool) -> tuple[nn.Module, bool]:
    """A transposed convolution of each channel by itself, that starts as interpolation; crop as of `reflect_conv`."""
    kernel = max(kernel, stride)
    more, crop = _output_padding([kernel] * 2, (stride, stride), (padding, padding), exact)
    layer = nn.ConvTranspose2d(channels, channels, kernel, stride, padding, more, groups=channels, bias=False)
    row = bilinear_kernel(kernel)[kernel // 2]
    for phase in range(stride):  # the taps that meet in one pixel: a constant map stays what it is
        row[phase::stride] /= row[phase::stride].sum()
    with torch.no_grad():
        layer.weight.copy_((row[:, None] * row).expand_as(layer.weight))
    return layer, crop


def at_width(layer: nn.Module, channels: int, width: int) -> nn.Module:
    """A copy of a norm or an activation with its starting values, for `width` channels in place of `channels`."""
    layer = copy.deepcopy(layer)
    for module in layer.modules() if channels != width else ():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.shape == (channels,):  # all alike at the start
                fresh = tensor.detach()[:1].repeat(width)
                setattr(module, name, nn.Parameter(fresh) if isinstance(tensor, nn.Parameter) else fresh)
        for attribute in ("num_features", "num_channels"):
            if getattr(module, attribute, None) == channels:
                setattr(module, attribute, width)
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (width,)
        if isinstance(module, nn.GroupNorm):
            module.num_groups = math.gcd(module.num_groups, width)
    return layer


def has_width(layer: nn.Module | None) -> bool:
    """Whether a function or layer can get another width: it holds single numbers for its channels, no matrices."""
    return layer is None or all(tensor.ndim <= 1 for tensor in layer.parameters())


def _output_padding(spans: list[int], stride: Pair, padding: Pair, exact: bool) -> tuple[Pair, bool]:
    """What a transposed convolution must add at the end to give stride times its input, or more and be cropped."""
    more = [step + 2 * pad - span for span, step, pad in zip(spans, stride, padding, strict=True)]
    if exact and all(0 <= item < step for item, step in zip(more, stride, strict=True)):
        return _pair(more), False
    return _pair([step - 1 for step in stride]), True


def _pair(value: Any) -> Pair:
    """Height and width; a convolution called "valid" has no padding."""
    if isinstance(value, str):
        return 0, 0
    return (value, value) if isinstance(value, int) else (value[0], value[1])
