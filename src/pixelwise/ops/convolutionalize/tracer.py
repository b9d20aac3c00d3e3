"""Following the code of a network with torch.fx, with the shape of every value at several image sizes at hand.

With the shapes known, code that asks for a size that no image changes (the number of channels, of axes) can be followed
where fx alone gives up. Whatever else cannot be followed is told to the caller, who may take that module as one step.

Steps are of several kinds, told by the class of a layer or the name of a function or method: those that look at single
values, at single cells, or that only rearrange.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import _maybe_revert_all_patches
from torch.fx.proxy import Attribute, TraceError
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

CONTENT = "it branches on the content of the image"
# What forward methods and torch's operators raise when shapes or types do not suit them.
REFUSALS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError,
    ArithmeticError,
)  # fmt: skip

# Activations that look at single values; these look at more, or hold parameters.
_OTHERS = {"MultiheadAttention", "Softmax", "Softmin", "Softmax2d", "LogSoftmax", "GLU", "PReLU", "RReLU"}
_ELEMENTWISE_MODULES = (
    nn.Identity,
    _DropoutNd,
    *(getattr(activation, name) for name in activation.__all__ if name not in _OTHERS),
)
_ELEMENTWISE = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardtanh", "hardswish",
    "hardsigmoid", "sigmoid", "tanh", "softplus", "softsign", "dropout", "dropout2d", "alpha_dropout",
    "feature_dropout", "abs", "exp", "sqrt", "square", "pow", "clamp", "neg", "reciprocal", "rsqrt", "clone",
    "contiguous", "detach", "float", "to", "type_as", "mul_", "add_", "div_", "sub_", "relu_", "sigmoid_", "clamp_",
}  # fmt: skip
# Of several maps, or of a map and a table by channels: each cell of the result depends on the same cell of the inputs.
_BY_CELL_MODULES = (_BatchNorm, nn.PReLU, nn.LayerNorm, nn.Linear)
_BY_CELL = {
    "add", "sub", "mul", "div", "true_divide", "truediv", "iadd", "imul", "isub", "itruediv", "maximum", "minimum",
    "cat", "concat", "addcmul", "lerp", "where", "batch_norm", "layer_norm", "prelu", "linear", "expand_as",
}  # fmt: skip
_MOVING = {"flip", "roll"}  # these put values elsewhere in the map
_REARRANGING_MODULES = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle)
_REARRANGING = {
    "flatten", "unflatten", "reshape", "view", "view_as", "permute", "transpose", "swapaxes", "movedim", "moveaxis",
    "squeeze", "unsqueeze", "chunk", "split", "unbind", "narrow", "stack", "contiguous", "getitem", *_MOVING,
}  # fmt: skip


def is_elementwise(node: fx.Node, module: nn.Module | None) -> bool:
    """Each value of the result depends on one value of the input, and all in the same way."""
    return _is(node, module, _ELEMENTWISE_MODULES, _ELEMENTWISE)


def is_by_cell(node: fx.Node, module: nn.Module | None) -> bool:
    """Each cell of the resulting map depends on the same cell of the maps that go in, if all have the same size."""
    if _is(node, module, (), _MOVING):
        return False
    by_cell = _is(node, module, _BY_CELL_MODULES, _BY_CELL)
    return by_cell or is_elementwise(node, module) or is_rearranging(node, module)


def is_rearranging(node: fx.Node, module: nn.Module | None) -> bool:
    """Each value of the result is a value of the input."""
    return _is(node, module, _REARRANGING_MODULES, _REARRANGING)


def _is(node: fx.Node, module: nn.Module | None, modules: tuple[type, ...], names: set[str]) -> bool:
    """Whether a step calls a module of one of these classes, or a function of torch or a method of one of these names."""
    if node.op == "call_module":
        return isinstance(module, modules)
    if node.op == "call_method":
        return node.target in names
    home = str(getattr(node.target, "__module__", "")).partition(".")[0]
    return home in ("torch", "_operator") and getattr(node.target, "__name__", "") in names


def is_linear(module: nn.Module | None) -> bool:
    """A linear layer with its own weights and torch's own forward."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and "weight" in module._parameters  # type: ignore[union-attr]  # not under a parametrisation


def is_adaptive_average(node: fx.Node, module: nn.Module | None) -> bool:
    """Average pooling to a number of cells that is given."""
    return isinstance(module, nn.AdaptiveAvgPool2d) or node.target is F.adaptive_avg_pool2d


def _is_adaptive_pool(node: fx.Node, module: nn.Module | None) -> bool:
    """Pooling to a number of cells that is given, and is more than one."""
    is_maximum = isinstance(module, nn.AdaptiveMaxPool2d) or node.target is F.adaptive_max_pool2d
    if not is_maximum and not is_adaptive_average(node, module):
        return False
    size = module.output_size if module is not None else (*node.args[1:], *node.kwargs.values())
    return size not in (1, (1, 1), (1,), ((1, 1),), ([1, 1],))


@dataclass(frozen=True)
class Refused:
    """In place of a value: why there is none at this image size, and at which module."""

    reason: str
    path: str


class _Settled:
    """What a proxy may be used as while the code is followed: as a number or a truth that no image size changes."""

    node: fx.Node
    tracer: Any

    def __len__(self) -> int:
        return len(self.tracer.settled(self.node))

    def __index__(self) -> int:
        return int(self.tracer.settled(self.node))


class _Proxy(_Settled, fx.Proxy):
    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)


class _Attribute(_Settled, Attribute):
    pass


class Tracer(fx.Tracer):
    """fx's tracer that knows values at several sizes ("own", "large", "odd"); the modules at `leaves` are single steps."""

    proxy_buffer_attributes = True

    def __init__(self, leaves: Collection[str], images: dict[str, Tensor], followed: Collection[type] = ()) -> None:
        from timm.layers import get_notrace_functions, get_notrace_modules

        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaf_types = tuple(kind for kind in get_notrace_modules() if kind not in followed)
        self._leaves, self._images = leaves, images
        self._pending: list[fx.Node] = []
        self._image: fx.Node | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, self._leaf_types) or module_qualified_name in self._leaves
        return known or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: Any) -> bool:
        return bool(self.settled(obj.node))

    def settled(self, node: fx.Node) -> Any:
        """A value that is the same at all sizes."""
        self.evaluate()
        for size in ("own", "large"):
            if isinstance(node.meta[size], Refused):
                raise TraceError(node.meta[size].reason)
        if isinstance(node.meta["own"], Tensor):
            raise TraceError(CONTENT)
        if not is_settled(node):
            raise TraceError("it branches on the size of the image or of the batch")
        return node.meta["own"]

    def iter(self, obj: Any) -> Iterator[Any]:
        own, large = self.values(obj.node)
        if not isinstance(own, tuple | list) or not isinstance(large, tuple | list) or len(own) != len(large):
            raise TraceError("it iterates over the content of the image")
        return iter([obj[index] for index in range(len(own))])

    def create_node(self, kind: str, target: Any, *more: Any, **others: Any) -> fx.Node:
        node = super().create_node(kind, target, *more, **others)
        stack = [path for path, _ in self.module_stack.values()]
        node.meta["path"] = next((path for path in reversed(stack) if kind != "call_module" or path != target), "")
        self._image = self._image or node  # the first placeholder
        if kind != "output":
            self._pending.append(node)
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **others: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **others)
        node = proxy.node
        if kind == "call_method" and target.endswith("_") and not target.endswith("__"):
            args[0].node = node  # what works in place: from here on, its input is what it gives
        module = self.root.get_submodule(target) if kind == "call_module" else None
        if _is_adaptive_pool(node, module) and self._keeps_the_map(node):
            return _Proxy(node.args[0], self)  # type: ignore[arg-type]
        return proxy

    def _keeps_the_map(self, node: fx.Node) -> bool:
        """Adaptive pooling to the size that the map has at the classifier's own image size, and that is a map."""
        before, after = self.values(node.args[0])[0], self.values(node)[0]  # type: ignore[arg-type]
        if not isinstance(before, Tensor) or not isinstance(after, Tensor):
            return False
        return before.shape == after.shape and max(after.shape[-2:]) > 1

    def values(self, node: fx.Node) -> tuple[Any, Any]:
        """The value of a step at the own size and at the larger one."""
        self.evaluate()
        return node.meta["own"], node.meta["large"]

    def evaluate(self) -> None:
        """Find the values of the steps so far."""
        with _maybe_revert_all_patches(), torch.no_grad():  # so that the steps run, and are not followed themselves
            for node in self._pending:
                for size in self._images:
                    node.meta[size] = self._evaluate(node, size)
        self._pending = []

    def _evaluate(self, node: fx.Node, size: str) -> Any:
        if node is self._image:
            return self._images[size]
        if node.op == "placeholder":
            return node.args[0] if node.args else None
        inputs = [item.meta[size] for item in node.all_input_nodes]
        refused = next((value for value in inputs if isinstance(value, Refused)), None)
        if refused is not None:
            return refused
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, (*_ELEMENTWISE_MODULES, _BatchNorm)) and len(inputs) == 1:
            return inputs[0]  # of the same shape; asking torch takes far longer
        try:
            value = run_node(node, self.root, lambda item: item.meta[size])
            return value.to("meta") if isinstance(value, Tensor) else value  # tensors that the code makes have content
        except REFUSALS as error:
            path = node.target if node.op == "call_module" else node.meta["path"]
            return Refused(first_line(error), str(path))


def run_node(node: fx.Node, root: nn.Module, value: Callable[[fx.Node], Any]) -> Any:
    """What a node gives, where its inputs have the values that `value` tells."""
    if node.op == "get_attr":
        found: Any = root
        for name in str(node.target).split("."):
            found = getattr(found, name)
        return found
    args = fx.map_arg(node.args, value)
    kwargs = fx.map_arg(node.kwargs, value)
    with torch.device("meta"):  # for tensors that the code makes
        if node.op == "call_module":
            return root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def is_settled(node: fx.Node) -> bool:
    """Whether a step gives a number, a truth or the like that is the same at all sizes."""
    own, large, odd = (node.meta[size] for size in ("own", "large", "odd"))
    others = [large] if isinstance(odd, Refused) else [large, odd]  # a network need not take the odd size
    if isinstance(own, Tensor | Refused):
        return False
    return all(type(value) is type(own) and value == own for value in others)


def refused_here(node: fx.Node, size: str) -> str:
    """Why this step, and none before it, has no value."""
    value = node.meta.get(size)
    fresh = not any(isinstance(item.meta[size], Refused) for item in node.all_input_nodes)
    return value.reason if isinstance(value, Refused) and fresh else ""


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
