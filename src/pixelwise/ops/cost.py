"""What one forward pass costs, in multiplications and in memory, counted from the operations it really runs."""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Run = Callable[[Tensor], Tensor]
"""A network ready to use: images (N, C, H, W) -> logits (N, K, H, W)."""

MEASURED_PX = 256  # side of the image that is passed where shapes alone do not tell
FIT_PX = (512, 1024, 2048)  # sides of the images that a `PassMemory` is fitted to


def without_memory(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers have shapes only."""
    parameters = {
        id(item): nn.Parameter(torch.empty_like(item, device="meta"), requires_grad=False)
        for item in module.parameters()
    }
    buffers = {id(item): torch.empty_like(item, device="meta") for item in module.buffers()}
    memo: dict[int, Any] = {**parameters, **buffers}
    return copy.deepcopy(module, memo)


class AtMost(TorchFunctionMode):
    """Raises `OverflowError` when more than so many tensors are made, as by a network of a million layers.

    Example:
        >>> with AtMost(3):
        ...     nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
        Traceback (most recent call last):
            ...
        OverflowError: more than 3 tensors
    """

    _FACTORIES = (torch.empty, torch.zeros, torch.ones)

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most, self._made = most, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._made += func in self._FACTORIES
        if self._made > self._most:
            raise OverflowError(f"more than {self._most:,} tensors")
        return func(*args, **(kwargs or {}))


class WithoutDraws(TorchFunctionMode):
    """New weights are zero where they would be drawn, for networks whose weights come from elsewhere or that have none.

    Drawing takes seconds for a hundred million weights, and on `meta` it imports torch's compiler, which takes one. What is
    computed without chance (constants, ranges, kernels) is made as ever.

    Example:
        >>> with WithoutDraws():
        ...     layer = nn.Conv2d(3, 5, 3)
        >>> layer.weight.abs().sum().item()
        0.0
    """

    _DRAWS = (nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, Tensor.uniform_, Tensor.normal_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._DRAWS:
            return func(*args, **kwargs)
        with torch.no_grad():
            return (args[0] if args else kwargs["tensor"]).zero_()


def multiply_adds(model: nn.Module, shape: tuple[int, int, int, int]) -> int:
    """Multiplications (each with its addition) of the convolutions and matrix products for an image of shape (N, C, H, W).

    Norms, activations, pooling and fixed interpolation are not counted, as in the literature's figures. A model on `meta`
    computes nothing and needs no memory.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    was_training = model.training
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            model.eval()(torch.zeros(shape, device=device))
    finally:
        model.train(was_training)
    return counter.get_total_flops() // 2


def peak_bytes(run: Run, shape: tuple[int, int, int, int], device: str | torch.device = "cpu") -> int:
    """The most that the tensors of one pass over an image of shape (N, C, H, W) take at any time, without the weights.

    Nothing is computed and none of it is allocated: the operations run on tensors that have a shape and a type only.

    Raises:
        DataDependentOutputException, DynamicOutputShapeException: a step of the network asks for the values of a tensor.
    """
    live = _LiveBytes()
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True), live:
        run(torch.empty(shape, device=device).contiguous(memory_format=torch.channels_last))
    return live.peak


def measured_bytes(run: Run, shape: tuple[int, int, int, int], device: str | torch.device = "cpu") -> int:
    """As `peak_bytes`, from a pass that is run, for networks whose steps ask for the values of tensors."""
    live = _LiveBytes()
    with torch.inference_mode(), live:
        run(torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last))
    return live.peak


@dataclass(frozen=True)
class PassMemory:
    """The memory of a pass over an image of any size: `per_px * H * W + per_side * (H + W) + fixed` bytes."""

    per_px: float
    per_side: float = 0.0
    fixed: float = 0.0

    @classmethod
    def of(cls, run: Run, channels: int, device: str | torch.device = "cpu") -> "PassMemory":
        """Fitted to three sizes: networks that pad take more for the pixels of a small image than of a large one.

        Where the network asks for the values of tensors, it is fitted to a small image that is really passed.
        """
        try:
            peaks = [peak_bytes(run, (1, channels, px, px), device) for px in FIT_PX]
        except (DataDependentOutputException, DynamicOutputShapeException):
            return cls(measured_bytes(run, (1, channels, MEASURED_PX, MEASURED_PX), device) / MEASURED_PX**2)
        terms = [[px**2, 2 * px, 1] for px in FIT_PX]
        per_px, per_side, fixed = np.linalg.solve(terms, peaks).tolist()
        if min(per_side, fixed) < 0:  # another layer is the largest in small images
            return cls(max(peak / px**2 for peak, px in zip(peaks, FIT_PX, strict=True)))
        return cls(per_px, per_side, fixed)

    def __call__(self, count: int, height: int, width: int) -> int:
        """Bytes of a pass over `count` images of `height` x `width` px."""
        return int(count * (self.per_px * height * width + self.per_side * (height + width)) + self.fixed)


class _LiveBytes(TorchDispatchMode):
    """Counts the memory behind the tensors that operations return, for as long as a tensor needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "prim":  # asks where a tensor is
            return func(*args, **(kwargs or {}))
        with self:  # operations made of others are looked into
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":  # which takes none
                self._see(leaf.untyped_storage())
        scratch = 0
        if func is torch.ops.aten.convolution.default and args[1].device.type == "cpu":
            scratch = args[1].nbytes  # the CPU's convolutions bring the weights into another order, for each call
        self.peak = max(self.peak, self.now + scratch)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) in self.known:
            return
        self.known.add(key)
        self.now += (size := storage.nbytes())
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size
