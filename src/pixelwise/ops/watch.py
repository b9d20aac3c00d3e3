"""Watch one pass through a network: which layer or function made which map of which others.

Nothing is computed: the pass runs on the device "meta", where tensors have shapes and no numbers. Unlike symbolic tracing,
it goes through any Python code, since sizes are plain numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

EMPTY = (nn.Identity, nn.Sequential)  # without children, a sequence is the identity, too


@dataclass(frozen=True, eq=False)
class Call:
    """A layer (a module without children) that was called, or a function called outside of one.

    Attributes:
        path: of the layer; for a function, of the module whose `forward` called it.
        layer: None for a function.
        function: None for a layer.
        inputs: numbers of the maps that went in.
        outputs: numbers of the maps that came out.
        args: of the function, maps replaced by `Map` in nested lists and tuples, too.
        kwargs: likewise.
    """

    path: str
    layer: nn.Module | None
    function: Callable[..., Any] | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What was called: the class of the layer or the name of the function."""
        return type(self.layer).__name__ if self.layer is not None else getattr(self.function, "__name__", "?")


@dataclass(frozen=True)
class Map:
    """Stands for a map in the arguments of a function."""

    number: int


@dataclass(frozen=True)
class Pass:
    """What one pass did.

    Attributes:
        calls: in the order in which they ran; map 0 is the image.
        shapes: of each map by its number.
        returned: the maps that the network returned, if it returned any in a list, tuple or dict or alone.
    """

    calls: list[Call]
    shapes: dict[int, tuple[int, ...]]
    returned: tuple[int, ...]


def watch(network: nn.Module, image: Tensor) -> Pass:
    """One pass of `image` through `network` in evaluation mode, without computing anything or changing the network.

    Args:
        network: any module that takes one image.
        image: (N, C, H, W); only its shape counts.

    Example:
        >>> seen = watch(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU()), torch.zeros(1, 3, 8, 6))
        >>> [(call.path, call.name, call.inputs, call.outputs) for call in seen.calls], seen.shapes[2]
        ([('0', 'Conv2d', (0,), (1,)), ('1', 'ReLU', (1,), (2,))], (1, 8, 4, 3))
    """
    watcher = _Watcher(image)
    handles = [handle for path, module in network.named_modules() for handle in watcher.attach(path, module)]
    try:
        with watcher:
            returned = run_on_meta(network, watcher.image)
    finally:
        for handle in handles:
            handle.remove()
    numbers = tuple(watcher.numbers[id(item)] for item in _tensors(returned) if id(item) in watcher.numbers)
    return Pass(watcher.calls, watcher.shapes, numbers)


def run_on_meta(network: nn.Module, image: Tensor) -> Any:
    """What `network` returns for `image` in evaluation mode, as shapes without numbers; the network stays as it is.

    Example:
        >>> tuple(run_on_meta(nn.Conv2d(3, 8, 3), torch.zeros(1, 3, 5, 9)).shape)
        (1, 8, 3, 7)
    """
    modes = {module: module.training for module in network.modules()}
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    try:
        with torch.no_grad():
            hollow = {name: tensor.detach().to("meta") for name, tensor in state.items()}
            return torch.func.functional_call(network.eval(), hollow, (image if image.is_meta else image.to("meta"),))
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Watcher(TorchFunctionMode):
    """Numbers the maps and notes who made them."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = torch.empty(image.shape, dtype=image.dtype, device="meta")
        self.calls: list[Call] = []
        self.shapes = {0: tuple(image.shape)}
        self.numbers = {id(self.image): 0}
        self._kept = [self.image]  # so that no later tensor gets the identity of an earlier one
        self._paths: list[str] = [""]
        self._layers = 0  # how many layers are running; what they call inside is their own business

    def attach(self, path: str, module: nn.Module) -> Iterator[Any]:
        is_layer = next(module.children(), None) is None

        def enter(_module: nn.Module, _args: Any) -> None:
            self._paths.append(path)
            self._layers += is_layer

        def leave(_module: nn.Module, args: Any, out: Any) -> None:
            self._paths.pop()
            self._layers -= is_layer
            if is_layer and self._layers == 0 and not isinstance(module, EMPTY):
                self._note(Call(path, module, None, self._inputs(args), ()), out)

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._layers:
            return func(*args, **kwargs)
        inputs = self._inputs((args, kwargs))
        noted = tuple(self._replace(item) for item in args), {key: self._replace(item) for key, item in kwargs.items()}
        out = func(*args, **kwargs)
        if inputs:
            self._note(Call(self._paths[-1], None, func, inputs, (), *noted), out)
        return out

    def _note(self, call: Call, out: Any) -> None:
        outputs = []
        for item in _tensors(out):
            number = len(self.shapes)
            self._kept.append(item)
            # What works in place returns its input: from here on, that tensor is the new map.
            self.numbers[id(item)], self.shapes[number] = number, tuple(item.shape)
            outputs.append(number)
        if outputs:
            self.calls.append(
                Call(call.path, call.layer, call.function, call.inputs, tuple(outputs), call.args, call.kwargs)
            )

    def _inputs(self, args: Any) -> tuple[int, ...]:
        return tuple(self.numbers[id(item)] for item in _tensors(args) if id(item) in self.numbers)

    def _replace(self, item: Any) -> Any:
        if isinstance(item, Tensor) and id(item) in self.numbers:
            return Map(self.numbers[id(item)])
        return type(item)(self._replace(entry) for entry in item) if type(item) in (list, tuple) else item


def _tensors(item: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts, in order."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, dict):
        yield from _tensors(list(item.values()))
    elif isinstance(item, list | tuple):
        for entry in item:
            yield from _tensors(entry)
