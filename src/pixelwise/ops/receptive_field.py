"""The receptive field of any network, found by changing pixels and looking at what changes, not by a list of layers.

A line of pixels of a long, thin canvas becomes NaN and the lines of logits that become NaN are noted, for each place that
the line can have on the network's coarsest grid, once along the height and once along the width. NaN takes every path: it
survives activations, maxima and weights of zero. Nothing is multiplied for it, and most layers are run on one channel.
"""

import copy
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pixelwise.errors import UsageError

FIRST_PX, THIN_PX = 256, 8  # the sides to begin with
UNKNOWN_STRIDE, LARGEST_STRIDE = 32, 256

aten = torch.ops.aten
# What treats all channels alike, so that where those of its maps are one and the same, one needs to be computed.
_BY_CHANNEL_NAMES = (
    "relu", "relu_", "leaky_relu", "leaky_relu_", "sigmoid", "hardtanh", "hardtanh_", "clamp_min", "clamp_min_",
    "gelu", "silu", "silu_", "hardswish", "hardswish_", "elu", "native_batch_norm", "add.Tensor",
    "add_.Tensor", "mul.Tensor", "mul_.Tensor", "max_pool2d_with_indices", "max_unpool2d", "avg_pool2d", "clone",
    "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d.vec",
    "upsample_bilinear2d.vec", "upsample_bicubic2d.vec", "reflection_pad2d", "replication_pad2d",
)  # fmt: skip
_BY_CHANNEL = {
    getattr(getattr(aten, operator), overload or "default")
    for operator, _, overload in (name.partition(".") for name in _BY_CHANNEL_NAMES)
}


@dataclass(frozen=True, kw_only=True)
class ReceptiveField:
    """Which pixels the logits of a pixel depend on.

    Attributes:
        bounded: False where they depend on all of the image (global pooling, attention), or on more than was tried.
        stride: the smallest shift in pixels, along height and width, that shifts the logits along; None if not bounded.
        radius_px: how far above, below, left and right of a pixel the farthest of them is, for the pixels that see
            farthest; None if not bounded.
        size_px: rows and columns from the first to the last that a pixel depends on, for the pixels that see most;
            likewise None. Where pixels see differently far in different directions, less than their radii together.
    """

    bounded: bool
    stride: int | None = None
    radius_px: tuple[int, int, int, int] | None = None
    size_px: tuple[int, int] | None = None

    def tile_cost(self, tile_px: int) -> float:
        """What exact tiles of `tile_px` px compute, each with its halo, over one pass; infinite if the field has no end."""
        if self.stride is None or self.radius_px is None:
            return math.inf
        above, below, left, right = (-(-px // self.stride) * self.stride for px in self.radius_px)
        return (1 + (above + below) / tile_px) * (1 + (left + right) / tile_px)


class _Extent(NamedTuple):
    stride: int
    before: int
    after: int
    size: int


def receptive_field(
    model: nn.Module, *, in_channels: int | None = None, stride: int | None = None, limit_px: int = 4096
) -> ReceptiveField:
    """The receptive field of a network in eval mode, and whether it has an end.

    Pixels count that a logit can depend on as the network is wired, whatever its weights, so random weights will do, and a
    network on `meta` as well (nothing is multiplied). Up to a pass for each pixel of its stride and each side, on the CPU.

    Args:
        model: maps images (N, C, H, W) to logits (N, K, H, W).
        in_channels: C; from the model's `config` unless given, else 3.
        stride: the coarsest stride in pixels; the model's `stride` unless given. Only where the search begins: the result
            holds what was found.
        limit_px: length of the longest canvas. A field that reaches from its middle to its ends counts as unbounded.

    Raises:
        UsageError: the logits have another size than the image, or no stride up to 256 px fits.

    Example:
        >>> stack = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 5, padding=2))
        >>> receptive_field(stack).size_px
        (7, 7)
        >>> class Squeeze(nn.Module):
        ...     def forward(self, image):
        ...         return image * image.mean((2, 3), keepdim=True).sigmoid()
        >>> receptive_field(Squeeze()).bounded
        False
    """
    if in_channels is None:
        in_channels = getattr(getattr(model, "config", None), "in_channels", 3)
    if stride is None:
        stride = getattr(model, "stride", None)
    first_stride = stride if isinstance(stride, int) and stride > 0 else UNKNOWN_STRIDE
    probed = structure(model)
    try:
        found = _field(probed, in_channels, first_stride, limit_px, thrifty=True)
    except RuntimeError:  # the network writes to single channels
        found = ReceptiveField(bounded=False)
    return found if found.bounded else _field(probed, in_channels, first_stride, limit_px, thrifty=False)


def _field(model: nn.Module, in_channels: int, stride: int, limit_px: int, thrifty: bool) -> ReceptiveField:
    extents = []
    for axis in (-2, -1):
        extent = _extent(partial(_Canvas, model, in_channels, thrifty, axis), stride, limit_px)
        if extent is None:
            return ReceptiveField(bounded=False)
        extents.append(extent)
    rows, columns = extents
    return ReceptiveField(
        bounded=True,
        stride=max(rows.stride, columns.stride),
        radius_px=(rows.before, rows.after, columns.before, columns.after),
        size_px=(rows.size, columns.size),
    )


def _extent(make: Callable[[int, int], "_Canvas"], stride: int, limit_px: int) -> _Extent | None:
    """The extent along one axis, or None where it has no end within the limit."""
    while stride <= LARGEST_STRIDE:
        canvas = _large_canvas(make, stride, limit_px)
        if canvas is None:
            return None
        lines = canvas.reached_by_all(stride)
        for period in range(1, stride + 1):
            pairs = zip(lines, lines[period:], strict=False)
            if stride % period == 0 and all(torch.equal(line + period, later) for line, later in pairs):
                return _summary(lines[:period], period)
        stride *= 2
    raise UsageError(
        f"receptive_field: no shift of up to {LARGEST_STRIDE} px shifts the logits along, so there is no field that holds "
        "for all pixels."
    )


class _Canvas:
    """A canvas, `length` along one axis and thin along the other, whose lines become NaN one at a time."""

    def __init__(self, model: nn.Module, in_channels: int, thrifty: bool, axis: int, length: int, stride: int) -> None:
        self.model, self.axis, self.length, self.thrifty = model, axis, length, thrifty
        thin = -(-THIN_PX // stride) * stride
        self.shape = (1, in_channels, *((length, thin) if axis == -2 else (thin, length)))
        self.middle = length // 2 // stride * stride
        self.known: dict[int, Tensor] = {}

    @torch.no_grad()
    def reached(self, shift: int) -> Tensor:
        """(L',), ascending: the lines of logits, counted from the middle, that depend on the line at `shift` from there."""
        if shift in self.known:
            return self.known[shift]
        image = torch.zeros(self.shape)
        image.select(self.axis, self.middle + shift).fill_(torch.nan)
        with NanPropagation(thrifty=self.thrifty):
            logits = self.model(image)
        if logits.shape[-2:] != image.shape[-2:]:
            raise UsageError(
                f"receptive_field: the model makes {tuple(logits.shape[-2:])} of an image of {tuple(image.shape[-2:])} px; "
                "it must give logits for every pixel. Upsample them to the image first."
            )
        other = -1 if self.axis == -2 else -2
        self.known[shift] = logits.isnan().any(dim=other).any(dim=(0, 1)).nonzero().flatten() - self.middle
        return self.known[shift]

    def reached_by_all(self, last: int) -> list[Tensor]:
        """`reached` for the shifts 0 ... `last`.

        Layers keep the order of what they take, so where two lines reach the very same places, those between them do too
        and need no passes of their own.
        """
        found = {shift: self.reached(shift) for shift in (0, last)}
        spans = [(0, last)]
        while spans:
            low, high = spans.pop()
            if torch.equal(found[low], found[high]):
                found |= dict.fromkeys(range(low + 1, high), found[low])
            elif high - low > 1:
                between = (low + high) // 2
                found[between] = self.reached(between)
                spans += [(low, between), (between, high)]
        return [found[shift] for shift in range(last + 1)]

    def is_clear(self, lines: Tensor, margin: int) -> bool:
        """Whether `lines` keep away from the ends of the canvas."""
        return bool((lines >= margin - self.middle).all() and (lines < self.length - margin - self.middle).all())


def _large_canvas(make: Callable[[int, int], _Canvas], stride: int, limit_px: int) -> _Canvas | None:
    """The first canvas of length 256, 512, ... on which the lines around the middle reach others, but not its ends."""
    length = max(FIRST_PX, 8 * stride)
    canvas, reached = None, torch.empty(0)
    while length <= limit_px:
        canvas = make(length, stride)
        reached = canvas.reached(0)
        if canvas.is_clear(reached, stride):
            reached = torch.cat([reached, canvas.reached(stride - 1)])
            if len(reached) and canvas.is_clear(reached, stride):
                return _shorter(make, canvas, int(reached.abs().max()), stride)
        length *= 2
    return None if len(reached) else canvas


def _shorter(make: Callable[[int, int], _Canvas], canvas: _Canvas, farthest: int, stride: int) -> _Canvas:
    """A canvas just long enough for lines as far from the middle as `farthest`, if that saves much."""
    length = 2 * (-(-farthest // stride) + 3) * stride
    if length < FIRST_PX or length > 0.75 * canvas.length:
        return canvas
    short = make(length, stride)
    clear = all(short.is_clear(short.reached(shift), stride) for shift in (0, stride - 1))
    return short if clear else canvas


def _summary(lines: list[Tensor], period: int) -> _Extent:
    """Turn what each line of pixels reaches into what each line of logits, by its phase, depends on."""
    if not any(map(len, lines)):
        return _Extent(period, 0, 0, 0)  # nothing depends on the image
    to = torch.cat(lines)
    back = torch.cat([shift - line for shift, line in enumerate(lines)])  # how far below it the line of logits sees
    first = torch.full((period,), torch.iinfo(back.dtype).max).scatter_reduce(0, to % period, back, "amin")
    last = torch.full((period,), torch.iinfo(back.dtype).min).scatter_reduce(0, to % period, back, "amax")
    depends = last >= first
    size = int((last - first + 1)[depends].max())
    return _Extent(period, max(0, -int(back.min())), max(0, int(back.max())), size)


class NanPropagation(TorchDispatchMode):
    """Runs a network so that NaN reaches everything that could depend on where it was put, whatever the weights are.

    A convolution does not multiply: its sums are NaN where one of the numbers that it adds is, else arbitrary. Channels of
    a group share that, so one stands for all. Unpooling puts a value at one place of its window, which others would have
    got it; here NaN goes to all of them. Everything else runs as it is. With `thrifty`, equal channels share their memory:
    networks that write to some of them end in a RuntimeError, and a norm over them without a smallest variance is NaN.
    """

    def __init__(self, *, thrifty: bool = True) -> None:
        super().__init__()
        self.thrifty = thrifty
        self.channels: dict[int, int] = {}  # of the maps whose channels share their memory, by that memory

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten.convolution.default:
            return self._share(_convolved(self.thrifty, *args))
        shared = _shared_channels(args) if func in _BY_CHANNEL else 0
        if func._schema.is_mutable:
            self._refuse_some(args, kwargs, shared)
        if not shared:
            return _run(func, args, kwargs)
        out = _run(func, [_first_channel(arg, shared) for arg in args], kwargs)
        if func._schema.is_mutable:
            return args[0]

        def share(item: Any) -> Any:
            is_map = isinstance(item, Tensor) and item.ndim == 4
            return self._share(item.expand(-1, shared, -1, -1)) if is_map else item

        return tree_map(share, out)

    def _share(self, out: Tensor) -> Tensor:
        """Remember the memory of a map whose channels share it, for as long as there is one."""
        if out.ndim > 1 and out.stride(1) == 0 and out.shape[1] > 1:
            storage = out.untyped_storage()
            if storage._cdata not in self.channels:
                weakref.finalize(storage, self.channels.pop, storage._cdata, None)
            self.channels[storage._cdata] = out.shape[1]
        return out

    def _refuse_some(self, args: Sequence[Any], kwargs: Mapping[str, Any], shared: int) -> None:
        """Writing to one channel would write to all that share its memory."""
        for leaf in tree_leaves((args, kwargs)):
            channels = self.channels.get(leaf.untyped_storage()._cdata) if isinstance(leaf, Tensor) else None
            if channels is not None and channels != shared:
                raise RuntimeError("a network that writes to some channels of a map, which share their memory")


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    out = func(*args, **kwargs)
    if func is not aten.max_unpool2d.default:
        return out
    windows = F.interpolate(args[0].isnan().to(out.dtype), size=out.shape[-2:], mode="nearest")
    return out.masked_fill(windows > 0, torch.nan)


def _shared_channels(args: Sequence[Any]) -> int:
    """How many channels the maps (N, C, H, W) among the arguments have, if in all of them they are one; else 0."""
    counts = {arg.shape[1] if arg.stride(1) == 0 else 0 for arg in args if isinstance(arg, Tensor) and arg.ndim == 4}
    return counts.pop() if len(counts) == 1 else 0


def _first_channel(arg: Any, channels: int) -> Any:
    """The first of a map, in the same memory, or of the numbers of a norm."""
    if not isinstance(arg, Tensor) or arg.ndim == 0:
        return arg
    if arg.ndim == 4:
        return arg[:, :1]
    return arg[:1] if arg.shape == (channels,) else arg


def _convolved(thrifty: bool, x: Tensor, weight: Tensor, _bias: Tensor | None, *geometry: Any) -> Tensor:
    """(N, C, ...) -> (N, K, ...); `geometry` is stride, padding, dilation, whether transposed, output padding, groups."""
    *_, transposed, _, groups = geometry
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    if x.stride(1) == 0:
        wrong = x[:, :1].isnan()
    else:
        wrong = x.unflatten(1, (groups, -1)).sum(2).isnan()  # (N, G, ...)
        if torch.equal(wrong, wrong[:, :1].expand_as(wrong)):
            wrong = wrong[:, :1]
    ones = torch.ones(1, 1, *weight.shape[2:], dtype=torch.float64)
    found = aten.convolution(wrong.flatten(0, 1)[:, None].double(), ones, None, *geometry[:-1], 1) > 0.5
    if thrifty and wrong.shape[1] == 1:
        return torch.where(found, torch.nan, torch.ones((), dtype=x.dtype)).expand(-1, channels, *found.shape[2:])
    # Numbers that differ from channel to channel, as norms over channels would make NaN of equal ones.
    values = torch.linspace(0.5, 1.5, channels, dtype=x.dtype).view(groups, -1, *[1] * (x.ndim - 2))
    return torch.where(found.view(*wrong.shape[:2], 1, *found.shape[2:]), torch.nan, values).flatten(1, 2)


def structure(model: nn.Module) -> nn.Module:
    """A copy of a network for `NanPropagation`: in eval mode, in float32 on the CPU, its convolutions without weights.

    Weights on `meta` become ones; whole numbers on `meta`, whose values may matter, are a UsageError.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        kernel = module._parameters.get("weight") if isinstance(module, nn.modules.conv._ConvNd) else None
        if kernel is not None:
            copies[id(kernel)] = nn.Parameter(torch.zeros(()).expand(kernel.shape), requires_grad=False)
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in copies:
            is_weight, values = isinstance(tensor, nn.Parameter), _values(tensor)
            copies[id(tensor)] = nn.Parameter(values, requires_grad=False) if is_weight else values
    return copy.deepcopy(model, copies).eval()


def _values(tensor: Tensor) -> Tensor:
    is_real = tensor.is_floating_point()
    if not tensor.is_meta:
        return tensor.detach().to("cpu", torch.float32 if is_real else tensor.dtype, copy=True)
    if is_real:
        return torch.ones(()).expand(tensor.shape)
    if tensor.ndim:
        raise UsageError(
            "receptive_field: the model holds whole numbers on the meta device; build it with real weights."
        )
    return torch.zeros((), dtype=tensor.dtype)
