"""Load a trained network once, then label images of any size.

Nothing is resized: a prediction is exactly what one forward pass over the whole image, at its own size, says. Large images
are computed window by window (`infer.tiling`), with the same scores where the network allows it.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pixelwise.data.labels import LabelSpec
from pixelwise.data.samples import to_tensor
from pixelwise.errors import DataError, UsageError
from pixelwise.formats.base import LABELS, Source
from pixelwise.formats.image import label_image, write_png
from pixelwise.infer.bundle import ModelCard, load_bundle
from pixelwise.infer.network import Network, resolve_device, resolve_precision
from pixelwise.infer.options import JobOptions, Tiling
from pixelwise.infer.overlay import blend, displayable
from pixelwise.infer.pipeline import LOGITS, Pipeline
from pixelwise.infer.prefetch import ArraySource, open_image


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


class Predictor(Network):
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
        super().__init__(model, card, device=device, precision=precision, batch_statistics=batch_statistics)
        self.folder = folder

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
        if tile_px is not None:
            tiling = replace(tiling, tile_px=tile_px)
        source = self._source(image, plane)
        options = JobOptions(tiling=tiling)
        pipeline = Pipeline(network=self, source=source, options=options, with_logits=probabilities)
        store = pipeline.store()
        pipeline.label(store)
        height, width = source.info.height, source.info.width
        with np.errstate(over="ignore"):
            pixels = to_tensor(source.read(0, 0, height, width), self.card.in_channels)
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
            with open_image(image, self.card) as source:
                info = source.info
                self.check_channels(info.channels, info.location)
                if not 0 <= plane < info.planes:
                    raise UsageError(f"{image}: there is no plane {plane}; it has {info.planes}, counted from 0.")
                pixels = source.read(0, 0, info.height, info.width, plane)
                return ArraySource(pixels, name=info.location, valid=source.valid(0, 0, info.height, info.width, plane))
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
