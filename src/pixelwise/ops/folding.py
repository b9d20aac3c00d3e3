"""A network made ready for inference: batch norm and activations inside the convolutions, weights in one precision.

In eval mode batch norm is an affine map of each channel, so it is part of the convolution before it (Jacob et al., CVPR
2018, arXiv:1712.05877, section 3.2). Which module follows which is seen in one pass over a small image, so networks need
not be traceable, and the result takes images of any size, as the network does.

On a CPU the convolutions run in oneDNN with weights that are brought into its order once, and with the activation applied
to the result while it is in the cache; autocast would convert and reorder all weights at every call.
"""

import copy
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from pixelwise.ops.cost import without_memory
from pixelwise.ops.packed import Activation, PackedConvolution

_KEPT = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
"""Norms that are left stay in float32, which they compute in; their statistics would lose digits."""

SEEN_PX = 64  # side of the image without numbers


def _activation(module: nn.Module) -> Activation | None:
    """What an activation is for oneDNN; None for modules that are none, or that it does not know."""
    if type(module) is nn.ReLU:
        return "relu", (), torch.relu
    if isinstance(module, nn.Hardtanh):  # ReLU6 too
        low, high = float(module.min_val), float(module.max_val)
        return "hardtanh", (low, high), lambda x: F.hardtanh(x, low, high)
    if type(module) is nn.Hardswish:
        return "hardswish", (), F.hardswish
    if type(module) is nn.LeakyReLU:
        slope = float(module.negative_slope)
        return "leaky_relu", (slope,), lambda x: F.leaky_relu(x, slope)
    if type(module) is nn.SiLU:
        return "swish", (), F.silu
    return None


class FoldedConv2d(nn.Module):
    """A convolution (or its transpose) with what follows it: (N, C, H, W) -> (N, C', H', W').

    Args:
        conv: the convolution.
        weight: with the scale of the batch norm.
        bias: with its shift; None for neither.
        activation: applied to the result; None for none.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: Any, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> None:
        super().__init__()
        self.is_transposed = isinstance(conv, nn.ConvTranspose2d)
        self.pads_same = not self.is_transposed and type(conv) is not nn.Conv2d  # timm's Conv2dSame
        self.kernel_size, self.stride, self.dilation, self.groups = (
            conv.kernel_size, conv.stride, conv.dilation, conv.groups,
        )  # fmt: skip
        self.padding, self.output_padding = (0, 0) if self.pads_same else conv.padding, conv.output_padding
        self.register_buffer("weight", weight.detach().contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.activation = activation
        self._packed: PackedConvolution | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}  # a copy has weights of its own, or none in memory

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_transposed and not isinstance(self.padding, str) and PackedConvolution.is_possible(x):
            if self._packed is None:
                more = (self.stride, self.dilation, self.groups, self.activation)
                self._packed = PackedConvolution.of(self.weight, self.bias, *more)
            return self._same(x, self._packed) if self.pads_same else self._packed(x, self.padding)
        if self.pads_same:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        if self.is_transposed:
            places = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
            x = F.conv_transpose2d(x, self.weight, self.bias, *places)
        else:
            x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation[2](x)

    def _same(self, x: Tensor, convolve: PackedConvolution) -> Tensor:
        """With the padding of `pad_same`, which is often wider behind, but without a padded copy of the input.

        Padded alike on both sides, by steps of the stride more in front, the convolution gives rows and columns more; these
        are cut off.
        """
        from timm.layers.padding import get_same_padding

        before, more, sizes = [], [], []
        places = zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        for length, kernel, step, dilation in places:
            both = get_same_padding(length, kernel, step, dilation)
            near, far = both // 2, both - both // 2
            more.append(-((near - far) // step))  # steps
            before.append(near + more[-1] * step)
            sizes.append(-(-length // step))
        out = convolve(x, before)
        if not any(more):
            return out
        cut = out[..., more[0] : more[0] + sizes[0], more[1] : more[1] + sizes[1]]
        return cut.contiguous(memory_format=torch.channels_last)


class Folded(nn.Module):
    """A network with its batch norms folded, computing in `dtype`: float32 (N, C, H, W) -> logits float32 (N, K, H, W)."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image.to(self.dtype)).float()


def fold(model: nn.Module, image: Tensor, dtype: torch.dtype) -> Folded:
    """The network for inference in `dtype`, bfloat16 or float32; `model` itself stays as it is.

    Batch norm is folded into the convolution before it, and the activation after that joins them, wherever nothing else
    looks at what is between, and the modules run once in a pass. What is left computes in `dtype`; norms in float32.

    Args:
        model: maps (N, C, H, W) to (N, K, H, W), in eval mode.
        image: (1, C, H, W), float32, on the network's device; followed through the network once. Images of all sizes must
            take the same way.
        dtype: of weights and maps.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> folded = fold(model, torch.rand(1, 3, 8, 8), torch.float32)
        >>> [type(item).__name__ for item in folded.model]
        ['FoldedConv2d', 'Identity', 'Identity']
        >>> image = torch.rand(1, 3, 5, 6)
        >>> bool(torch.allclose(folded(image), model(image), atol=1e-6))
        True
    """
    chains = _chains(model, image)
    # The convolutions are made anew, so their weights need not be copied; those of the model keep their gradients.
    known = [item for chain in chains for item in model.get_submodule(chain.conv).parameters()]
    twin = copy.deepcopy(model, {id(item): nn.Parameter(item.detach(), requires_grad=False) for item in known})
    twin.requires_grad_(False).eval()
    for chain in chains:
        conv: Any = twin.get_submodule(chain.conv)
        weight, bias = conv.weight.detach().float(), None if conv.bias is None else conv.bias.detach().float()
        if chain.norm:
            norm: Any = twin.get_submodule(chain.norm)
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            weight, bias = fuse_conv_bn_weights(
                weight, bias, *statistics, transpose=isinstance(conv, nn.ConvTranspose2d)
            )
            rest = norm.act if hasattr(norm, "act") and not chain.activation else nn.Identity()
            twin.set_submodule(chain.norm, rest)
        if chain.activation and not chain.activation.startswith(f"{chain.norm}."):
            twin.set_submodule(chain.activation, nn.Identity())
        twin.set_submodule(chain.conv, FoldedConv2d(conv, weight, bias, chain.function))
    _hold_in(twin, dtype)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.LocalResponseNorm):
            twin.set_submodule(name, _InFloat32(module))
    return Folded(twin, dtype).eval()


class _InFloat32(nn.Module):
    """A module that torch has in float32 only, as autocast runs it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.float()).to(x.dtype)


def _hold_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring weights into `dtype`, but for those of norms; they are not trained, so they become buffers."""
    for module in model.modules():
        if isinstance(module, _KEPT):
            continue
        for name, item in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if item.is_floating_point():
                is_temporary = name in module._non_persistent_buffers_set
                delattr(module, name)
                module.register_buffer(name, item.detach().to(dtype), persistent=not is_temporary)


@dataclass(frozen=True, kw_only=True)
class _Chain:
    """A convolution by name, and what follows it in a row: a batch norm, an activation, or neither."""

    conv: str
    norm: str = ""
    activation: str = ""
    function: Activation | None = None


@dataclass
class _Value:
    """What a tensor holds from one operation to the next: where it is from, and where it is looked at."""

    operation: str
    tensor: Tensor  # kept, so that no other takes its id
    users: list[str] = field(default_factory=list)


class _Watch(TorchFunctionMode):
    """Sees every operation on tensors, by the module that it is in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = dict(model.named_modules())
        self.hooked = {name for name, item in self.modules.items() if item._forward_hooks or item._forward_pre_hooks}
        self.inside: list[str] = []
        self.calls = Counter[str]()
        self.given: dict[str, list[_Value]] = {name: [] for name in self.modules}
        self.now: dict[int, _Value] = {}  # what a tensor holds at present, by its id
        for name, module in self.modules.items():
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(self._leave)

    def _enter(self, name: str, _module: nn.Module, _args: Any) -> None:
        self.inside.append(name)
        self.calls[name] += 1

    def _leave(self, _module: nn.Module, _args: Any, _out: Any) -> None:
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [item for item in tree_leaves(out) if isinstance(item, Tensor)]
        if given and self.inside:  # it does not only ask for a size or the like
            for item in tree_leaves((args, kwargs)):
                if isinstance(item, Tensor) and id(item) in self.now:
                    self.now[id(item)].users.append(self.inside[-1])
            for item in given:  # changed in place, it is another value under the same id
                self.now[id(item)] = value = _Value(getattr(func, "__name__", ""), item)
                self.given[self.inside[-1]].append(value)
        return out

    def result(self, name: str, operation: str = "") -> _Value | None:
        """What a module gave that was called once and did one operation, last or only; None for others."""
        values = self.given[name]
        is_single = self.calls[name] == 1 and (len(values) == 1 or (operation and values)) and name not in self.hooked
        return values[-1] if is_single and operation in ("", values[-1].operation) else None

    def follower(self, value: _Value) -> str:
        """The module that alone looks at a value; "" if there is none, or more."""
        return value.users[0] if len(value.users) == 1 else ""


def _watched(twin: nn.Module, image: Tensor) -> _Watch:
    """What a pass over an image shows; `twin` keeps the hooks."""
    watch = _Watch(twin)
    with torch.inference_mode(), watch:
        scores = twin(image.clone())
    if id(scores) in watch.now:
        watch.now[id(scores)].users.append("")  # the caller looks at it too
    return watch


def sole_followers(folded: Folded, in_channels: int) -> dict[str, str]:
    """The folded convolutions whose result another one alone looks at, both by name, and both run once in a pass."""
    image = torch.empty(1, in_channels, SEEN_PX, SEEN_PX, dtype=folded.dtype, device="meta")
    watch = _watched(without_memory(folded.model).eval(), image)  # without numbers torch's own operations are seen
    once = [name for name, item in watch.modules.items() if isinstance(item, FoldedConv2d) and watch.calls[name] == 1]
    followers = {name: watch.follower(watch.given[name][-1]) for name in once}
    return {name: follower for name, follower in followers.items() if follower in once}


def _chains(model: nn.Module, image: Tensor) -> list[_Chain]:
    """What can be folded, as a pass over an image shows it.

    Without numbers (on "meta") it would be seen too, but that imports torch's compiler, which takes longer than the pass.
    """
    shared = {id(item): item for item in (*model.parameters(), *model.buffers())}
    watch = _watched(copy.deepcopy(model, shared).eval(), image)
    chains = (_chain(name, watch) for name, module in watch.modules.items() if _is_foldable(module))
    return [chain for chain in chains if chain is not None]


def _chain(conv: str, watch: _Watch) -> _Chain | None:
    module, norm, activation = watch.modules[conv], "", ""
    value = watch.result(conv, "conv_transpose2d" if isinstance(module, nn.ConvTranspose2d) else "conv2d")
    if value is None:
        return None
    follower = watch.follower(value)
    found: Any = watch.modules[follower]
    is_grouped = isinstance(module, nn.ConvTranspose2d) and module.groups > 1  # torch cannot fold its norm
    is_last = isinstance(getattr(found, "drop", None), nn.Identity | None)  # timm's, with a dropout of its own
    if follower and isinstance(found, _BatchNorm) and found.running_mean is not None and is_last and not is_grouped:
        normed = watch.result(follower, "batch_norm")
        if normed is not None and len(watch.given[follower]) == 1:
            norm, value = follower, normed
            follower = watch.follower(value)
    function = _activation(watch.modules[follower]) if follower else None
    if function is not None and watch.result(follower) is not None:
        activation = follower
    return _Chain(conv=conv, norm=norm, activation=activation, function=function if activation else None)


def _is_foldable(module: nn.Module) -> bool:
    """Whether a module is a convolution of torch's, or timm's that pads by the size of the image, with zeros outside."""
    same = getattr(sys.modules.get("timm.layers"), "Conv2dSame", nn.Conv2d)
    return type(module) in (nn.Conv2d, nn.ConvTranspose2d, same) and module.padding_mode == "zeros"


def pad_same(x: Tensor, kernel: Any, stride: Any, dilation: Any, value: float = 0) -> Tensor:
    """As TensorFlow pads: the result is ceil(H / stride) rows high, and the smaller half of the padding comes first."""
    from timm.layers import padding  # there are such convolutions only where timm is imported already

    return padding.pad_same(x, kernel, stride, dilation, value)
