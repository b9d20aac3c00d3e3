"""Load a trained network once, then label images of any size.

Nothing is resized: a prediction is exactly what one forward pass over the whole image, at its own size, says. Large images
are computed window by window (`infer.tiling`), with the same scores where the network allows it.
"""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pixelwise.data import samples
from pixelwise.data.labels import LabelSpec
from pixelwise.data.samples import to_tensor
from pixelwise.errors import DataError, UsageError
from pixelwise.formats.base import LABELS, Source
from pixelwise.formats.image import label_image, write_png
from pixelwise.infer.acceleration import Acceleration, accelerated, check_acceleration, is_usual
from pixelwise.infer.bundle import ModelCard, load_bundle
from pixelwise.infer.devices import resolve_device, resolve_precision
from pixelwise.infer.int8_file import check_int8, read_ranges
from pixelwise.infer.options import JobOptions, Tiling
from pixelwise.infer.overlay import blend, displayable
from pixelwise.infer.pipeline import LOGITS, ArraySource, Pipeline, check_channels
from pixelwise.infer.remarks import remarks
from pixelwise.infer.tiling import Scorer
from pixelwise.ops.batch_statistics import batch_statistics as statistics_of_the_batch
from pixelwise.ops.cost import PassMemory
from pixelwise.ops.receptive_field import ReceptiveField, receptive_field


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """A class for every pixel of one image.

    Attributes:
        labels: Class ids 0..K-1, uint8 (H, W).
        spec: Names and colours of the K classes.
        source: The image as it was read, (C, H, W).
        logits: Class scores, float32 (K, H, W) on the CPU; None if they were not asked for.
        weights_sha256: Which network said so.

    Example:
        >>> spec = LabelSpec(names=("sky", "road"), colors=((0, 0, 255), (90, 90, 90)), values=((0,), (1,)))
        >>> image, logits = torch.zeros(3, 1, 2, dtype=torch.uint8), torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]])
        >>> labels = logits.argmax(0).to(torch.uint8).numpy()
        >>> prediction = Prediction(labels=labels, spec=spec, source=image, logits=logits)
        >>> prediction.labels.tolist(), prediction.probabilities[0].round(2).tolist()
        ([[0, 1]], [[0.8799999952316284, 0.11999999731779099]])
        >>> prediction.overlay(alpha=1.0).getpixel((0, 0))
        (0, 0, 255)
    """

    labels: NDArray[np.uint8]
    spec: LabelSpec
    source: Tensor
    logits: Tensor | None = None
    weights_sha256: str = ""

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """How sure the network is of each class, float32 (K, H, W), summing to one over the classes.

        Raises:
            UsageError: the image was predicted with `probabilities=False`.
        """
        if self.logits is None:
            raise UsageError("this prediction holds no probabilities; call predict(image, probabilities=True).")
        return self.logits.softmax(dim=0).numpy()

    @property
    def image(self) -> NDArray[np.uint8]:
        """The image as an 8-bit RGB picture, (H, W, 3)."""
        return displayable(self.source)

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The class colours over the image; `alpha` 0 shows the image alone, 1 the colours alone."""
        return blend(self.image, self.labels, self.spec, alpha)

    def save(self, path: str | Path) -> None:
        """Write the labels as an indexed PNG with the class palette, atomically."""
        write_png(path, label_image(self.labels, self.spec), {"model": self.weights_sha256})


class Predictor:
    """A trained network, ready to label images. Make one with `load`.

    Args:
        model: The network; the predictor takes it over (eval mode, moved to `device`, channels_last). Changes of its weights
            after the first prediction need not count, and images of all sizes must take the same way through it.
        card: What is known about it.
        device: "auto" (a GPU if there is one), or a torch device such as "cpu" or "cuda:1".
        precision: "bf16" (autocast), "float32", or "auto": bf16 where the device computes in it.
        folder: The run folder it came from, if any.
        batch_statistics: Whether batch norm uses the mean and variance of the batch at hand in place of the averages of
            the training; a prediction then depends on the whole batch.
        accelerate: "fold" computes with batch norm inside the convolutions and all weights in the precision, which is
            checked against the network as it is; "none" does not; "auto" folds in bf16 on a CPU. Scores differ by
            rounding. "int8" multiplies in 8 bits as the int8.json of the folder says (`pixelwise quantize`).

    Raises:
        UsageError: the device, the precision or the acceleration does not exist here, or a network without batch norm is
            asked for its statistics.

    Example:
        >>> from pixelwise.models import create_model
        >>> spec = LabelSpec(names=("sky", "road"), colors=((0, 0, 255), (90, 90, 90)), values=((0,), (1,)))
        >>> config = {"tiny": True, "num_classes": 2, "in_channels": 3}
        >>> card = ModelCard(model="unet", config=config, labels=spec, mean=(0.5,) * 3, std=(0.2,) * 3)
        >>> predictor = Predictor(create_model("unet", **config), card, device="cpu")
        >>> prediction = predictor.predict(np.zeros((37, 50, 3), dtype=np.uint8))
        >>> prediction.labels.shape, prediction.probabilities.shape
        ((37, 50), (2, 37, 50))
    """

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        folder: Path | None = None,
        batch_statistics: bool = False,
        accelerate: str = "auto",
    ) -> None:
        if batch_statistics and not any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise UsageError(
                f"batch statistics: {card.model} has no batch norm, so they change nothing. Leave them out."
            )
        if batch_statistics and accelerate in ("fold", "int8"):
            raise UsageError("batch statistics: what is folded has the averages of the training. Use accelerate none.")
        self.batch_statistics = batch_statistics
        self.accelerate = "none" if batch_statistics else check_acceleration(accelerate)
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.card, self.labels, self.in_channels, self.folder = card, card.labels, len(card.mean), folder
        if self.accelerate == "int8":
            check_int8(self.device, self.precision)
            self._ranges = read_ranges(folder, card.weights_sha256)
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.cut_radii: dict[float, tuple[int, int, int, int]] = {}  # by tolerance
        self.scorers: dict[tuple[Any, ...], Scorer] = {}  # by size and options, so that the search is done once
        shape = (1, -1, 1, 1)
        self._mean = torch.tensor(card.mean, device=self.device).reshape(shape)
        self._std = torch.tensor(card.std, device=self.device).reshape(shape)

    def open(self, location: str | Path, reading: Mapping[str, Any] | None = None) -> Source:
        """Open an image as those of the training were read, as far as its format can be so; `reading` comes first."""
        trained, given = self.card.reading, reading or {}
        try:
            return samples.open_image(location, {**trained, **given}, self.in_channels)
        except UsageError:
            if not trained:
                raise
            of_all: dict[str, Any] = {
                key: trained[key] for key in ("bands", "channel_files") if key in trained
            }  # which all have
            return samples.open_image(location, {**of_all, **given}, self.in_channels)

    def window(self, pixels: NDArray[Any], valid: NDArray[np.bool_] | None = None) -> Tensor:
        """The network's input of a window (H, W, C) of an image: float32 (C, H, W), normalised, on the device.

        It is 0, the mean of the training data, where the window is not `valid` (H, W).
        """
        with torch.inference_mode(), np.errstate(over="ignore"):  # numbers beyond float32 become infinite
            window = self.normalised(to_tensor(pixels, self.in_channels)[None])[0]
            return window if valid is None else window.masked_fill(torch.from_numpy(~valid).to(self.device), 0)

    @torch.inference_mode()
    def scores(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """Class scores of normalised input: float32 (N, C, H, W) on the device -> float32 (N, K, H, W).

        They are those of the network, or of a `model` made of what computes it.
        """
        norms = statistics_of_the_batch(self.model) if self.batch_statistics else nullcontext()
        run, context = self.acceleration.model if model is None else model, self.autocast
        if run is not self.model and model is None and not is_usual(x):  # whose overflow must be seen
            run, context = self.model, self._autocast
        with norms, context():
            return run(x.contiguous(memory_format=torch.channels_last)).float()  # (N, K, H, W)

    @cached_property
    def acceleration(self) -> Acceleration:
        """What computes the scores: the network, or what it was folded into."""
        return accelerated(
            self.model, self.accelerate, in_channels=self.in_channels, device=self.device, precision=self.precision,
            autocast=self._autocast, ranges=self._ranges if self.accelerate == "int8" else None,
        )  # fmt: skip

    @property
    def computing(self) -> str:
        """How the scores are computed, in words."""
        return f"{self.card.model}: {self.precision} on {self.device}, {self.acceleration.reason}"

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which that computes."""
        return self._autocast() if self.acceleration.kind == "none" else nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

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

    @cached_property
    def pass_memory(self) -> PassMemory:
        """What a pass takes, measured when a large image needs it."""
        return PassMemory.of(self.scores, self.in_channels, self.device)

    @cached_property
    def receptive_field(self) -> ReceptiveField:
        """How far the network looks."""
        return receptive_field(self.model, in_channels=self.in_channels)

    def predict(
        self,
        image: str | Path | NDArray[np.generic] | Tensor,
        *,
        probabilities: bool = True,
        tile_px: int | None = None,
        tiling: Tiling | None = None,
        plane: int = 0,
    ) -> Prediction:
        """Label every pixel of one image, at its own size.

        An image of more than a million pixels is computed window by window if one pass would take more than 1 GiB on a
        CPU, or half of a GPU's free memory; the scores are those of one pass (to rounding) where the receptive field of
        the network has an end. The image and the labels themselves lie in memory; for larger ones use `pixelwise
        predict` or `infer.run_batch`, which read and write by windows.

        Warns (`UserWarning`, one line) of an image whose numbers are far from those that the network was trained on, and of
        what of a file is not read.

        Args:
            image: A file of any format, an array (H, W) or (H, W, C), or a tensor (C, H, W). Integers are divided by the
                maximum of their type, floats are taken as they are (0..1). One channel is repeated where the network
                wants three.
            probabilities: False keeps only the labels, which takes K times less memory.
            tile_px: Side of the tiles, whatever the memory.
            tiling: More options: memory, blending, averages over transformed images. `tile_px` comes before its own.
            plane: Of a file that holds several (a slice of a volume).

        Raises:
            DataError: the file cannot be read, or the image does not suit the network.
            UsageError: the network does not allow what was asked for.
            PixelwiseError: the image does not fit into memory, or the result is not finite.
        """
        tiling = tiling or Tiling()
        options = JobOptions(tiling=tiling if tile_px is None else replace(tiling, tile_px=tile_px))
        source = self._source(image, plane)
        pipeline = Pipeline(network=self, source=source, options=options, with_logits=probabilities)
        store = pipeline.store()
        pipeline.label(store)
        for _, text in remarks(source, self.card):
            warnings.warn(text, stacklevel=2)
        height, width = source.info.height, source.info.width
        with np.errstate(over="ignore"):
            pixels = to_tensor(source.read(0, 0, height, width), self.in_channels)
        return Prediction(
            labels=store.rows(LABELS, 0, 0, height),
            spec=self.labels,
            source=pixels,
            logits=torch.from_numpy(store.rows(LOGITS, 0, 0, height)) if probabilities else None,
            weights_sha256=self.card.weights_sha256,
        )

    def _source(self, image: Any, plane: int) -> Source:
        """The image in memory."""
        if isinstance(image, str | Path):
            with self.open(image) as source:
                info = source.info
                check_channels(info, self.in_channels)
                if not 0 <= plane < info.planes:
                    raise UsageError(f"{image}: there is no plane {plane}; it has {info.planes}, counted from 0.")
                window = (0, 0, info.height, info.width, plane)
                pixels, valid = source.read(*window), source.valid(*window)
                return ArraySource(pixels, name=info.location, valid=valid, metadata=source.metadata)
        if isinstance(image, Tensor):
            if image.ndim != 3:
                raise DataError(f"the image tensor must have shape (C, H, W), got {tuple(image.shape)}.")
            image = image.detach().cpu().permute(1, 2, 0).numpy()
        if not isinstance(image, np.ndarray):
            raise DataError(f"the image must be a path, an array or a tensor, got {type(image).__name__}.")
        array = image[:, :, None] if image.ndim == 2 else image
        if array.ndim != 3 or 0 in array.shape:
            raise DataError(f"the image: must have shape (H, W) or (H, W, C) with no side empty, got {array.shape}.")
        if array.dtype.kind not in "buif":
            raise DataError(f"the image: must hold whole numbers or floats, got {array.dtype}.")
        return ArraySource(array)


def load(
    run: str | Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_statistics: bool = False,
    accelerate: str = "auto",
) -> Predictor:
    """The trained network of a run folder, ready to predict.

    Args:
        run: A folder with `model.safetensors` and `model.json`; nothing else is needed.
        device: "auto" (a GPU if there is one), or a torch device such as "cpu" or "cuda:1".
        precision: "auto", "bf16" or "float32".
        batch_statistics: As for `Predictor`.
        accelerate: As for `Predictor`.

    Raises:
        DataError: the folder holds no usable network.
        UsageError: the device, the precision or the acceleration does not exist here, or there is no batch norm.

    Example:
        >>> load("no/such/run")
        Traceback (most recent call last):
            ...
        pixelwise.errors.DataError: no/such/run: is not a folder. Give the run folder that `pixelwise train` wrote.
    """
    target = resolve_device(device)
    resolve_precision(precision, target)  # a misspelt option should not wait for the weights
    check_acceleration(accelerate)
    model, card = load_bundle(run, target)
    how: dict[str, Any] = {"precision": precision, "batch_statistics": batch_statistics, "accelerate": accelerate}
    return Predictor(model, card, device=target, folder=Path(run), **how)
