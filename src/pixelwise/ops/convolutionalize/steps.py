"""Kinds of steps in a network's graph: those that look at single values, at single cells, or that only rearrange."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

# Activations that look at single values; these look at more, or hold parameters.
_OTHERS = {"MultiheadAttention", "Softmax", "Softmin", "Softmax2d", "LogSoftmax", "GLU", "PReLU", "RReLU"}
ELEMENTWISE_MODULES = (
    nn.Identity,
    _DropoutNd,
    *(getattr(activation, name) for name in activation.__all__ if name not in _OTHERS),
)
_ELEMENTWISE = [
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardtanh", "hardswish",
    "hardsigmoid", "sigmoid", "tanh", "softplus", "softsign", "dropout", "dropout2d", "alpha_dropout",
    "feature_dropout", "abs", "exp", "sqrt", "square", "pow", "clamp", "neg", "reciprocal", "rsqrt", "clone",
    "contiguous", "detach", "float", "to", "type_as", "mul_", "add_", "div_", "sub_", "relu_", "sigmoid_", "clamp_",
]  # fmt: skip
ELEMENTWISE_METHODS = frozenset(_ELEMENTWISE)
ELEMENTWISE_FUNCTIONS = frozenset(
    getattr(home, name) for home in (torch, F) for name in _ELEMENTWISE if callable(getattr(home, name, None))
)
# Of several maps, or of a map and a table by channels: each cell of the result depends on the same cell of the inputs.
_BY_CELL = [
    "add", "sub", "mul", "div", "true_divide", "truediv", "iadd", "imul", "isub", "itruediv", "neg", "maximum",
    "minimum", "cat", "concat", "addcmul", "lerp", "where", "batch_norm", "layer_norm", "prelu", "linear",
]  # fmt: skip
BY_CELL_FUNCTIONS = frozenset(
    getattr(home, name) for home in (torch, F, operator) for name in _BY_CELL if callable(getattr(home, name, None))
)
BY_CELL_METHODS = frozenset({"add", "sub", "mul", "div", "type_as", "expand_as"})
BY_CELL_MODULES = (_BatchNorm, nn.PReLU, nn.LayerNorm, nn.Linear)
_REARRANGING = [
    "flatten", "unflatten", "reshape", "view", "view_as", "permute", "transpose", "swapaxes", "movedim", "moveaxis",
    "squeeze", "unsqueeze", "chunk", "split", "unbind", "narrow", "stack", "contiguous",
]  # fmt: skip
MOVING = frozenset({"flip", "roll"})  # these put values elsewhere in the map
REARRANGING_METHODS = frozenset(_REARRANGING) | MOVING
REARRANGING_FUNCTIONS = frozenset(
    [operator.getitem, *(getattr(torch, x) for x in REARRANGING_METHODS if callable(getattr(torch, x, None)))]
)
REARRANGING_MODULES = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle)


def is_elementwise(node: fx.Node, module: nn.Module | None) -> bool:
    """Each value of the result depends on one value of the input, and all in the same way."""
    return _is(node, module, ELEMENTWISE_MODULES, ELEMENTWISE_FUNCTIONS, ELEMENTWISE_METHODS)


def is_by_cell(node: fx.Node, module: nn.Module | None) -> bool:
    """Each cell of the resulting map depends on the same cell of the maps that go in, if all have the same size."""
    by_cell = _is(node, module, BY_CELL_MODULES, BY_CELL_FUNCTIONS, BY_CELL_METHODS)
    moves = getattr(node.target, "__name__", node.target) in MOVING
    return by_cell or is_elementwise(node, module) or (is_rearranging(node, module) and not moves)


def is_rearranging(node: fx.Node, module: nn.Module | None) -> bool:
    """Each value of the result is a value of the input."""
    return _is(node, module, REARRANGING_MODULES, REARRANGING_FUNCTIONS, REARRANGING_METHODS)


def is_linear(module: nn.Module | None) -> bool:
    """A linear layer with its own weights and torch's own forward."""
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return plain and "weight" in module._parameters  # type: ignore[union-attr]  # not under a parametrisation


def is_plain_conv(module: nn.Module | None) -> bool:
    """A convolution with torch's own forward, padded by numbers of zeros."""
    if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
        return False
    own = type(module)._conv_forward is nn.Conv2d._conv_forward
    return own and module.padding_mode == "zeros" and module.padding != "same"


def is_plain_pool(module: nn.Module | None) -> bool:
    """A maximum or average pooling with torch's own forward that rounds down."""
    pools = (nn.MaxPool2d, nn.AvgPool2d)
    own = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in pools)
    return own and not module.ceil_mode and not getattr(module, "return_indices", False)  # type: ignore[union-attr]


def is_adaptive_average(node: fx.Node, module: nn.Module | None) -> bool:
    """Average pooling to a number of cells that is given."""
    return isinstance(module, nn.AdaptiveAvgPool2d) or node.target is F.adaptive_avg_pool2d


def is_adaptive_pool(node: fx.Node, module: nn.Module | None) -> bool:
    """Pooling to a number of cells that is given, and is more than one."""
    is_maximum = isinstance(module, nn.AdaptiveMaxPool2d) or node.target is F.adaptive_max_pool2d
    if not is_maximum and not is_adaptive_average(node, module):
        return False
    size = module.output_size if module is not None else (*node.args[1:], *node.kwargs.values())
    return size not in (1, (1, 1), (1,), ((1, 1),), ([1, 1],))


def _is(node: fx.Node, module: nn.Module | None, modules: Any, functions: Any, methods: Any) -> bool:
    if node.op == "call_module":
        return isinstance(module, modules)
    if node.op == "call_function":
        return node.target in functions
    return node.op == "call_method" and node.target in methods
