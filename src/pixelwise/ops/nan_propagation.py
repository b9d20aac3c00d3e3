"""Follow NaN through a network without computing it: where each layer passes it on, at the price of one channel."""

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pixelwise.errors import UsageError

Module = TypeVar("Module", bound=nn.Module)


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
        return tree_map(lambda item: self._share(_shared_again(item, shared)), out)

    def _share(self, out: Any) -> Any:
        """Remember the memory of a map whose channels share it, for as long as there is one."""
        if isinstance(out, Tensor) and out.ndim > 1 and out.stride(1) == 0 and out.shape[1] > 1:
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


def _shared_again(out: Any, channels: int) -> Any:
    return out.expand(-1, channels, -1, -1) if isinstance(out, Tensor) and out.ndim == 4 else out


def _convolved(
    thrifty: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    """(N, C, ...) -> (N, K, ...)."""
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    if x.stride(1) == 0:
        wrong = x[:, :1].isnan()
    else:
        wrong = x.unflatten(1, (groups, -1)).sum(2).isnan()  # (N, G, ...)
        if torch.equal(wrong, wrong[:, :1].expand_as(wrong)):
            wrong = wrong[:, :1]
    ones = torch.ones(1, 1, *weight.shape[2:], dtype=torch.float64)
    geometry = (stride, padding, dilation, transposed, output_padding)
    found = aten.convolution(wrong.flatten(0, 1)[:, None].double(), ones, None, *geometry, 1) > 0.5
    if thrifty and wrong.shape[1] == 1:
        return torch.where(found, torch.nan, torch.ones((), dtype=x.dtype)).expand(-1, channels, *found.shape[2:])
    # Numbers that differ from channel to channel, as norms over channels would make NaN of equal ones.
    values = torch.linspace(0.5, 1.5, channels, dtype=x.dtype).view(groups, -1, *[1] * (x.ndim - 2))
    return torch.where(found.view(*wrong.shape[:2], 1, *found.shape[2:]), torch.nan, values).flatten(1, 2)


def structure(model: Module) -> Module:
    """A copy of a network for `NanPropagation`: in eval mode, in float32 on the CPU, its convolutions without weights.

    Weights on `meta` become ones; whole numbers on `meta`, whose values may matter, are a UsageError.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        kernel = module._parameters.get("weight") if isinstance(module, nn.modules.conv._ConvNd) else None
        if kernel is not None:
            nothing = torch.zeros(()).expand(kernel.shape)
            copies[id(kernel)] = nn.Parameter(nothing, requires_grad=False)
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in copies:
            values = _values(tensor)
            copies[id(tensor)] = (
                nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values
            )
    return copy.deepcopy(model, copies).eval()


def _values(tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        values = tensor.detach().to("cpu", copy=True)
        return values.float() if values.is_floating_point() else values
    if tensor.is_floating_point():
        return torch.ones(()).expand(tensor.shape)
    if tensor.ndim:
        raise UsageError(
            "receptive_field: the model holds whole numbers on the meta device; build it with real weights."
        )
    return torch.zeros((), dtype=tensor.dtype)
