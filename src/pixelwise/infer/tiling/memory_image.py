"""Prediction of an image that lies in memory, in the pieces that the rest of the memory allows."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pixelwise.errors import PixelwiseError
from pixelwise.infer.decide import Decision
from pixelwise.infer.devices import is_out_of_memory
from pixelwise.infer.predictor import Prediction, Predictor
from pixelwise.infer.tiling.base import Region, Scorer
from pixelwise.infer.tiling.options import Tiling
from pixelwise.infer.tiling.plan import choose_scorer

_LEAST_BYTES = 1 << 20  # no piece fits into less


def label_in_parts(
    predictor: Predictor,
    image: Tensor,
    name: str,
    tiling: Tiling,
    *,
    probabilities: bool,
    note: Callable[[str], None] = lambda message: None,
) -> Prediction:
    """The labels of an image (C, H, W) that `Predictor.read` gave, piece by piece; where memory runs out, in half of it.

    Args:
        predictor: the network.
        image: uint8 or float32 in unit scale.
        name: of the image, for errors.
        tiling: how.
        probabilities: whether the scores are kept, float32 (K, H, W).
        note: told what the user should know.

    Raises:
        PixelwiseError: it does not fit into memory in any piece, or the scores overflow.
        UsageError: the network does not allow what was asked for.

    Example:
        >>> from pixelwise.data.labels import LabelSpec
        >>> from pixelwise.infer.bundle import ModelCard
        >>> from pixelwise.models import create_model
        >>> spec = LabelSpec(names=("sky", "road"), colors=((0, 0, 255), (90, 90, 90)), values=((0,), (1,)))
        >>> config = {"tiny": True, "num_classes": 2, "in_channels": 3}
        >>> card = ModelCard(model="unet", config=config, labels=spec, mean=(0.5,) * 3, std=(0.2,) * 3)
        >>> predictor = Predictor(create_model("unet", **config), card, device="cpu")
        >>> image = torch.zeros(3, 70, 90, dtype=torch.uint8)
        >>> label_in_parts(predictor, image, "a", Tiling(tile_px=32), probabilities=False).labels.shape
        (70, 90)
    """
    height, width = image.shape[1:]
    decide = Decision(num_classes=predictor.labels.num_classes, precision=predictor.precision)
    while True:
        scorer = choose_scorer(predictor, height, width, tiling, note)
        try:
            return _label(predictor, image, name, scorer, decide, probabilities)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        budget = (tiling.memory_bytes or scorer.memory_bytes) // 2
        if budget < _LEAST_BYTES:
            raise PixelwiseError(
                f"{name}: {width} x {height} px does not fit into memory, not even in small pieces. Use a machine or device "
                "with more memory."
            )
        note(f"{name}: out of memory; going on with half of it.")
        tiling = replace(tiling, memory_bytes=budget, tile_px=tiling.tile_px and max(1, tiling.tile_px // 2))


@torch.inference_mode()
def _label(
    predictor: Predictor, image: Tensor, name: str, scorer: Scorer, decide: Decision, probabilities: bool
) -> Prediction:
    _, height, width = image.shape
    labels = torch.empty(height, width, dtype=torch.uint8).numpy()
    logits = torch.empty(predictor.labels.num_classes, height, width) if probabilities else None

    def read(top: int, left: int, height: int, width: int) -> Tensor:
        return predictor.normalised(image[None, :, top : top + height, left : left + width])[0]

    try:
        for part in scorer.score(read, Region(0, 0, height, width)):
            rows = slice(part.region.top, part.region.bottom)
            columns = slice(part.region.left, part.region.right)
            labels[rows, columns] = decide(part)["labels"]
            if logits is not None:
                logits[:, rows, columns] = part.values
    except PixelwiseError as error:
        raise PixelwiseError(f"{name}: {error}") from error
    return Prediction(
        labels=labels, spec=predictor.labels, source=image, logits=logits, weights_sha256=predictor.card.weights_sha256
    )
