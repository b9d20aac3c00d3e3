"""A network on its device: in which numbers it computes, what it takes as input, and its scores for regions of an image."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pixelwise.data.samples import to_tensor
from pixelwise.errors import DataError, UsageError
from pixelwise.infer.bundle import ModelCard
from pixelwise.ops.batch_statistics import batch_statistics as statistics_of_the_batch
from pixelwise.ops.cost import PassMemory, Run
from pixelwise.ops.receptive_field import ReceptiveField

PRECISIONS = ("auto", "bf16", "float32")

# How torch reports that memory ran out where it does not raise torch.OutOfMemoryError.
_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "alloc_failed")

Read = Callable[[int, int, int, int], Tensor]
"""(top, left, height, width) -> the network's input there, float32 (C, height, width), normalised, on its device."""


class Network:
    """A trained network on its device.

    Args:
        model: The network, which is taken over (eval mode, moved to `device`, channels_last).
        card: What is known about it.
        device: "auto" (a GPU if there is one), or a torch device such as "cpu" or "cuda:1".
        precision: "bf16" (autocast), "float32", or "auto": bf16 where the device computes in it.
        batch_statistics: Whether batch norm uses the mean and variance of the batch at hand in place of the averages of
            the training; a prediction then depends on the whole batch.

    Raises:
        UsageError: the device or the precision does not exist here, or a network without batch norm is asked for its
            statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        batch_statistics: bool = False,
    ) -> None:
        if batch_statistics and not any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise UsageError(
                f"batch statistics: {card.model} has no batch norm, so they change nothing. Leave them out."
            )
        self.batch_statistics = batch_statistics
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.card, self.labels, self.in_channels = card, card.labels, len(card.mean)
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.memory_of_a_pass: PassMemory | None = None  # measured when a large image needs it
        self.receptive_fields: dict[int, ReceptiveField] = {}
        self.cut_radii: dict[tuple[int, float], tuple[int, int, int, int]] = {}  # by network and tolerance
        self.scorers: dict[tuple[Any, ...], Scorer] = {}  # by size and options, so that the search is done once
        shape = (1, -1, 1, 1)
        self._mean = torch.tensor(card.mean, device=self.device).reshape(shape)
        self._std = torch.tensor(card.std, device=self.device).reshape(shape)

    def check_channels(self, found: int, name: str) -> None:
        """Raise `DataError` if images of so many channels do not suit the network; one channel is repeated for three."""
        wanted = self.in_channels
        if found != wanted and (found, wanted) != (1, 3):
            raise DataError(
                f"{name}: it has {found} channel{'s' * (found != 1)}, but {wanted} are wanted. Only one can be repeated."
            )

    def window(self, pixels: NDArray[Any]) -> Tensor:
        """The network's input of a window (H, W, C) of an image: float32 (C, H, W), normalised, on the device."""
        with torch.inference_mode(), np.errstate(over="ignore"):  # numbers beyond float32 become infinite
            return self.normalised(to_tensor(pixels, self.in_channels)[None])[0]

    @torch.inference_mode()
    def scores(self, x: Tensor) -> Tensor:
        """Class scores of normalised input: float32 (N, C, H, W) on the device -> float32 (N, K, H, W)."""
        norms = statistics_of_the_batch(self.model) if self.batch_statistics else nullcontext()
        with norms, torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(x.contiguous(memory_format=torch.channels_last)).float()  # (N, K, H, W)

    @torch.inference_mode()
    def logits(self, image: Tensor) -> Tensor:
        """Class scores of a batch: (N, C, H, W), uint8 or float in unit scale -> (N, K, H, W) float32 on the device."""
        channels = self.in_channels
        if image.ndim != 4 or image.shape[1] != channels or 0 in image.shape:
            raise DataError(f"the network takes (N, {channels}, H, W), got {tuple(image.shape)}.")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise DataError(f"a batch must be uint8 or float in unit scale (0..1), got {image.dtype}.")
        return self.scores(self.normalised(image))

    def normalised(self, image: Tensor) -> Tensor:
        """(N, C, H, W), uint8 or float in unit scale -> float32 as the network wants it, on the device."""
        unit = image.to(self.device).float()
        unit = unit / 255 if image.dtype == torch.uint8 else unit
        return (unit - self._mean) / self._std

    def pass_memory(self) -> PassMemory:
        """What a pass takes, measured once."""
        if self.memory_of_a_pass is None:
            self.memory_of_a_pass = PassMemory.of(self.scores, self.in_channels, self.device)
        return self.memory_of_a_pass


@dataclass(frozen=True)
class Region:
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """The row below the last."""
        return self.top + self.height

    @property
    def right(self) -> int:
        """The column right of the last."""
        return self.left + self.width


@dataclass(frozen=True)
class Scores:
    """The scores of a region: float32 (K, height, width) on the device; softmax over K gives the probabilities.

    `spread` is the mean entropy of the passes (height, width), in nats, where several were averaged; else None.
    """

    region: Region
    values: Tensor
    spread: Tensor | None = None


class Scorer(ABC):
    """A strategy: a network made ready for images of one size (H, W).

    Attributes:
        way: in words, for the user, such as "whole image" or "stripes of 64 rows".
        cost: multiply-adds for the whole image, over those of one pass.
        memory_bytes: the most it takes at any time, beside the weights.
        is_whole: whether each pass is one over the whole image, however small the region.
        disk_bytes: what it takes on the disk of the folder `scratch`.
        beside_bytes: what else may grow in this process meanwhile, which is not taken from `memory_bytes`.
    """

    way: str
    cost: float
    memory_bytes: int
    is_whole: bool = False
    disk_bytes: int = 0
    scratch: Any = None
    beside_bytes: int = 0

    @abstractmethod
    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """The scores of a region of the image (or all of it), each pixel once, in windows of the strategy's choice.

        `region` changes what is computed, never the result: every window equals that of any other region.
        """


class WholeImage(Scorer):
    """The scores of the whole image from one pass; of a region, cut from those.

    Args:
        run: images (N, C, h, w) -> logits (N, K, h, w).
        memory: what a pass takes; None if it was not measured, as of small images.
        height: H of the image.
        width: W.
    """

    way = "whole image"
    cost = 1.0
    is_whole = True

    def __init__(self, run: Run, memory: PassMemory | None = None, *, height: int, width: int) -> None:
        self.run, self.height, self.width = run, height, width
        self.memory_bytes = memory(1, height, width) if memory else 0

    def score(self, read: Read, region: Region) -> Iterator[Scores]:
        """As `Scorer.score`: one window, the region itself."""
        image = read(0, 0, self.height, self.width).float()[None].contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            logits = self.run(image)[0].float()  # (K, H, W)
        yield Scores(region, logits[:, region.top : region.bottom, region.left : region.right])


def resolve_device(name: str | torch.device) -> torch.device:
    """The device meant by `name`; "auto" is the first GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {str(name)!r} cannot be used here ({reason}). Use auto, cpu or cuda.") from error
    if device.type == "meta":
        raise UsageError("device 'meta' computes nothing. Use auto, cpu or cuda.")
    return device


def resolve_precision(name: str, device: torch.device) -> Literal["bf16", "float32"]:
    """The precision meant by `name` on `device`; "auto" is bf16 where the hardware multiplies in it."""
    if name not in PRECISIONS:
        raise UsageError(f"precision {name!r} is unknown; use one of {', '.join(PRECISIONS)}.")
    if name == "float32":
        return "float32"
    return "bf16" if name == "bf16" or computes_in_bf16(device) else "float32"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware of `device` multiplies in bfloat16 (CUDA since Ampere; CPUs with AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    # torch has no public question for this; where a version lacks these, float32 is always right.
    questions = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(question() for question in questions if question is not None)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The largest memory so far: of the GPU's allocator, else of this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)
