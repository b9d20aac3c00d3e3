"""Load a trained network once, then label images of any size.

Nothing is resized: a prediction is exactly what one forward pass over the whole image, at its own size, says. Large images
are computed piece by piece (`infer.tiling`), with the same scores where the network allows it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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

from pixelwise.data.labels import LabelSpec
from pixelwise.data.samples import to_tensor
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats import Source
from pixelwise.formats.readers import read_image
from pixelwise.formats.writers import label_image, write_png
from pixelwise.infer.bundle import ModelCard, load_bundle
from pixelwise.infer.devices import is_out_of_memory, resolve_device, resolve_precision
from pixelwise.infer.overlay import blend, displayable
from pixelwise.infer.tiling.options import Tiling
from pixelwise.ops.batch_statistics import batch_statistics as statistics_of_the_batch
from pixelwise.ops.cost import PassMemory
from pixelwise.ops.receptive_field import ReceptiveField

ONE_PASS_PX = 1 << 20
"""Images of no more pixels are always labelled in one pass."""


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
        model: The network; the predictor takes it over (eval mode, moved to `device`, channels_last).
        card: What is known about it.
        device: "auto" (a GPU if there is one), or a torch device such as "cpu" or "cuda:1".
        precision: "bf16" (autocast), "float32", or "auto": bf16 where the device computes in it.
        folder: The run folder it came from, if any.
        batch_statistics: Whether batch norm uses the mean and variance of the batch at hand in place of the averages of
            the training; a prediction then depends on the whole batch.

    Raises:
        UsageError: the device or the precision does not exist here, or a network without batch norm is asked for its
            statistics.

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
    ) -> None:
        if batch_statistics and not any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise UsageError(
                f"batch statistics: {card.model} has no batch norm, so they change nothing. Leave them out."
            )
        self.batch_statistics = batch_statistics
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.card = card
        self.folder = folder
        self.model = model.to(self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.memory_of_a_pass: PassMemory | None = None  # measured when a large image needs it
        self.receptive_fields: dict[int, ReceptiveField] = {}
        self.cut_radii: dict[tuple[int, float], tuple[int, int, int, int]] = {}  # by network and tolerance
        self.scorers: dict[tuple[Any, ...], Any] = {}  # by size and wishes, so that the search for them is done once
        shape = (1, -1, 1, 1)
        self._mean = torch.tensor(card.mean, device=self.device).reshape(shape)
        self._std = torch.tensor(card.std, device=self.device).reshape(shape)

    @property
    def labels(self) -> LabelSpec:
        """Names and colours of the classes."""
        return self.card.labels

    def predict(
        self,
        image: str | Path | NDArray[np.generic] | Tensor,
        *,
        probabilities: bool = True,
        tile_px: int | None = None,
        tiling: Tiling | None = None,
    ) -> Prediction:
        """Label every pixel of one image, at its own size.

        An image of more than a million pixels is computed piece by piece if one pass would take more than 1 GiB on a CPU, or
        half of a GPU's free memory; the scores are those of one pass (to rounding) where the receptive field of the network
        has an end. The image and the labels themselves lie in memory; for larger ones use `pixelwise predict` or
        `infer.batch`, which read and write by windows.

        Args:
            image: A file, an array (H, W) or (H, W, C), or a tensor (C, H, W). Integers are divided by the maximum of
                their type, floats are taken as they are (0..1). One channel is repeated where the network wants three.
            probabilities: False keeps only the labels, which takes K times less memory.
            tile_px: Side of the pieces, whatever the memory.
            tiling: More wishes: memory, blending, averages over transformed images. `tile_px` comes before its own.

        Raises:
            DataError: the file cannot be read, or the image does not suit the network.
            UsageError: the network does not allow what was asked for.
            PixelwiseError: the image does not fit into memory, or the result is not finite.
        """
        name = str(image) if isinstance(image, str | Path) else "the image"
        source = self.read(image)
        if tile_px is None and tiling is None and source.shape[1] * source.shape[2] <= ONE_PASS_PX:
            return self.label(source, name=name, probabilities=probabilities)
        from pixelwise.infer.tiling.memory_image import label_in_parts  # which is built on this class

        wishes = tiling or Tiling()
        if tile_px is not None:
            wishes = replace(wishes, tile_px=tile_px)
        return label_in_parts(self, source, name, wishes, probabilities=probabilities)

    def label(self, source: Tensor, *, name: str = "the image", probabilities: bool = True) -> Prediction:
        """As `predict`, for an image (C, H, W) that `read` gave; errors call it `name`."""
        return self.label_batch([source], [name], probabilities=probabilities)[0]

    def label_batch(
        self, sources: Sequence[Tensor], names: Sequence[str], *, probabilities: bool = True
    ) -> list[Prediction]:
        """As `label`, for images of one size and type in a single pass."""
        with _out_of_memory_named(names, sources[0]):
            logits = self.logits(torch.stack(list(sources)))  # (N, K, H, W)
            best, labels = logits.max(dim=1)  # (N, H, W)
            for name, values in zip(names, best, strict=True):
                if not bool(torch.isfinite(values).all()):
                    raise PixelwiseError(
                        f"{name}: the network's scores overflow ({self.precision}). Check the values of the image, or use "
                        "precision float32."
                    )
            return [
                Prediction(
                    labels=labels[index].to("cpu", torch.uint8).numpy(),
                    spec=self.labels,
                    source=source,
                    logits=logits[index].cpu() if probabilities else None,
                    weights_sha256=self.card.weights_sha256,
                )
                for index, source in enumerate(sources)
            ]

    def read(self, image: str | Path | NDArray[np.generic] | Tensor) -> Tensor:
        """The image as the network's tensor (C, H, W), uint8 or float32 in unit scale, on the CPU.

        Raises:
            DataError: it cannot be read, is empty, or has channels that the network cannot use.
        """
        name, array = "the image", image
        if isinstance(image, str | Path):
            name, array = str(image), read_image(image)
        elif isinstance(image, Tensor):
            if image.ndim != 3:
                raise DataError(f"the image tensor must have shape (C, H, W), got {tuple(image.shape)}.")
            array = image.detach().cpu().permute(1, 2, 0).numpy()
        if not isinstance(array, np.ndarray):
            raise DataError(f"the image must be a path, an array or a tensor, got {type(image).__name__}.")
        array = array[:, :, None] if array.ndim == 2 else array
        if array.ndim != 3 or 0 in array.shape:
            raise DataError(f"{name}: must have shape (H, W) or (H, W, C) with no side empty, got {array.shape}.")
        if array.dtype.kind not in "buif":
            raise DataError(f"{name}: must hold whole numbers or floats, got {array.dtype}.")
        try:
            with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, which `label` refuses
                return to_tensor(array, self.card.in_channels)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error

    def check_channels(self, found: int, name: str) -> None:
        """Raise `DataError` if images of so many channels do not suit the network; one channel is repeated for three."""
        wanted = self.card.in_channels
        if found != wanted and (found, wanted) != (1, 3):
            raise DataError(
                f"{name}: it has {found} channel{'s' * (found != 1)}, but {wanted} are wanted. Only one can be repeated."
            )

    @torch.inference_mode()
    def window(self, pixels: NDArray[Any]) -> Tensor:
        """The network's input of a window (H, W, C) of an image: float32 (C, H, W), normalised, on the device.

        Raises:
            DataError: it has channels that the network cannot use.
        """
        with np.errstate(over="ignore"):  # numbers beyond float32 become infinite, which the scores show
            tensor = to_tensor(pixels, self.card.in_channels)
        return self.normalised(tensor[None])[0]

    def window_reader(self, source: Source, plane: int = 0) -> Callable[[int, int, int, int], Tensor]:
        """(top, left, height, width) -> the network's input in that window of the source, as `window` gives it."""
        self.check_channels(source.info.channels, source.info.location)

        def read(top: int, left: int, height: int, width: int) -> Tensor:
            return self.window(source.read(top, left, height, width, plane))

        return read

    @torch.inference_mode()
    def network(self, x: Tensor) -> Tensor:
        """Class scores of normalised input: float32 (N, C, H, W) on the device -> float32 (N, K, H, W)."""
        norms = statistics_of_the_batch(self.model) if self.batch_statistics else nullcontext()
        with norms, torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(x.contiguous(memory_format=torch.channels_last)).float()  # (N, K, H, W)

    @torch.inference_mode()
    def logits(self, image: Tensor) -> Tensor:
        """Class scores of a batch: (N, C, H, W), uint8 or float in unit scale -> (N, K, H, W) float32 on the device.

        Raises:
            DataError: the shape or the type does not suit the network.
        """
        channels = self.card.in_channels
        if image.ndim != 4 or image.shape[1] != channels or 0 in image.shape:
            raise DataError(f"the network takes (N, {channels}, H, W), got {tuple(image.shape)}.")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise DataError(f"a batch must be uint8 or float in unit scale (0..1), got {image.dtype}.")
        return self.network(self.normalised(image))

    def normalised(self, image: Tensor) -> Tensor:
        """(N, C, H, W), uint8 or float in unit scale -> float32 as the network wants it, on the device."""
        unit = image.to(self.device).float()
        unit = unit / 255 if image.dtype == torch.uint8 else unit
        return (unit - self._mean) / self._std


def load(
    run: str | Path, *, device: str = "auto", precision: str = "auto", batch_statistics: bool = False
) -> Predictor:
    """The trained network of a run folder, ready to predict.

    Args:
        run: A folder with `model.safetensors` and `model.json`; nothing else is needed.
        device: "auto" (a GPU if there is one), or a torch device such as "cpu" or "cuda:1".
        precision: "auto", "bf16" or "float32".
        batch_statistics: As for `Predictor`.

    Raises:
        DataError: the folder holds no usable network.
        UsageError: the device or the precision does not exist here, or there is no batch norm.

    Example:
        >>> load("no/such/run")
        Traceback (most recent call last):
            ...
        pixelwise.errors.DataError: no/such/run: is not a folder. Give the run folder that `pixelwise train` wrote.
    """
    target = resolve_device(device)
    resolve_precision(precision, target)  # a misspelt option should not wait for the weights
    model, card = load_bundle(run, target)
    return Predictor(
        model, card, device=target, precision=precision, folder=Path(run), batch_statistics=batch_statistics
    )


@contextmanager
def _out_of_memory_named(names: Sequence[str], image: Tensor) -> Iterator[None]:
    """Turn running out of memory into an error that names the image and its size."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        channels, height, width = image.shape
        more, instead = (f" and {len(names) - 1} more", "a smaller batch") if len(names) > 1 else ("", "")
        raise PixelwiseError(
            f"{names[0]}{more}: {width} x {height} px with {channels} channels does not fit into memory. Use a machine or "
            f"device with more memory, or {instead or 'cut the image into parts'}."
        ) from error
