"""A run's network in 8 bits: calibrated on training images and scored beside the folded network, before it may be used."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelwise.data.layouts import DataFolder
from pixelwise.data.samples import OpenPair
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.files import write_json
from pixelwise.infer.acceleration import Acceleration, quantized_by
from pixelwise.infer.bundle import ModelCard, load_bundle
from pixelwise.infer.evaluate import Evaluation, evaluate
from pixelwise.infer.int8_file import FORMAT, INT8_NAME, Ranges, check_int8
from pixelwise.infer.predictor import Predictor
from pixelwise.ops.quantization import calibrated

MOST_COST = 1.0
"""Points of mIoU, or of the headline, that 8 bits may cost."""

WINDOW_PX = 1024  # of larger images the middle is looked at
ROUNDS = 9  # of the race


@dataclass(frozen=True, kw_only=True)
class Int8:
    """What 8 bits did to a network.

    Attributes:
        card: Of the network.
        ranges: Of the inputs of its quantised convolutions, by their names.
        calibration_images: How many images they are from.
        folded: The scores of the folded network, in bfloat16.
        int8: The scores in 8 bits.
        speed: The time of a pass of the folded network over that of a pass in 8 bits, on one image of the split.
    """

    card: ModelCard
    ranges: Ranges
    calibration_images: int
    folded: Evaluation
    int8: Evaluation
    speed: float

    @property
    def cost(self) -> dict[str, float]:
        """Points lost, of 100: of mIoU and of the headline."""
        miou = self.folded.scores.miou - self.int8.scores.miou
        return {"miou": 100 * miou, "headline": 100 * (self.folded.headline.value - self.int8.headline.value)}

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write `int8.json` into the run folder.

        Raises:
            PixelwiseError: 8 bits cost more than a point, and it is not forced; or the file cannot be written.
        """
        path = Path(folder) / INT8_NAME
        if not force and not all(points <= MOST_COST for points in self.cost.values()):  # NaN is not
            points = max(self.cost.values())
            text = f"8 bits cost {points:.2f} points, more than {MOST_COST:.2f}, so nothing was written."
            raise PixelwiseError(f"{text} More --calibration-images may help; --force takes it as it is.")
        scores = {"folded": self.folded.scores.to_dict(), "int8": self.int8.scores.to_dict()}
        more = {"cost": self.cost, "speed": self.speed, "calibration_images": self.calibration_images}
        versions = {"pixelwise": metadata.version("pixelwise"), "torch": torch.__version__}
        known = {"format": FORMAT, "weights_sha256": self.card.weights_sha256, "split": self.int8.split}
        try:
            write_json(path, {**known, **scores, **more, "versions": versions, "ranges": self.ranges})
        except OSError as error:
            raise PixelwiseError(f"{path}: cannot be written ({error.strerror or error}).") from error
        return path


def quantize_run(
    run: str | Path,
    open_folder: Callable[[Predictor], DataFolder],
    *,
    split: str = "val",
    calibration_images: int = 32,
    on_progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> Int8:
    """Calibrate the network of a run in 8 bits, and score it.

    Args:
        run: A run folder.
        open_folder: Opens the data for the network, such as `infer.evaluate.open_for`.
        split: The split that both are scored on; the images of "train" calibrate.
        calibration_images: How many, evenly spread over the split "train".
        on_progress: Called with what is done, how many images it is done for, and how many there are.

    Raises:
        UsageError: this machine gains nothing by 8 bits, or no convolution of the network is large enough to.
        DataError: the data cannot be used.
    """
    cpu = torch.device("cpu")
    check_int8(cpu, "bf16")
    if calibration_images < 1:
        raise UsageError(f"calibration images must be at least 1, not {calibration_images}.")
    model, card = load_bundle(run, cpu)
    # Without a folder, so that neither writes its evaluation there.
    plain, made = (Predictor(model, card, device="cpu", precision="bf16", accelerate="fold") for _ in range(2))
    data = open_folder(plain)
    folded: Any = plain.acceleration.model
    images = _images(plain, data, calibration_images, lambda *of: on_progress("calibrating", *of))
    ranges = calibrated(folded, images, plain.in_channels)
    made.acceleration = quantized_by(folded, ranges, plain.in_channels)
    folded_scores, int8_scores = (
        evaluate(predictor, data, split=split, on_progress=lambda *of, task=task: on_progress(task, *of))
        for predictor, task in ((plain, "scoring bf16"), (made, "scoring int8"))
    )
    image = next(_images(plain, data, 1, lambda done, total: None, split))
    return Int8(
        card=card, ranges=ranges, calibration_images=min(calibration_images, len(data.split("train"))),
        folded=folded_scores, int8=int8_scores, speed=_race(plain.acceleration, made.acceleration, image),
    )  # fmt: skip


def _images(
    predictor: Predictor, data: DataFolder, most: int, progress: Callable[[int, int], None], split: str = "train"
) -> Iterator[Tensor]:
    """Images of a split, evenly spread, as the network is given them: (1, C, H, W); of large ones the middle."""
    pairs = data.split(split) if split in data.splits else ()
    if not pairs:
        raise DataError(f"{data.root}: split {split!r} holds no images, which calibrate the network.")
    count = min(most, len(pairs))
    for place in range(count):
        with OpenPair(
            pairs[place * len(pairs) // count],
            data.labels,
            predictor.in_channels,
            predictor.card.reading | data.reading,
        ) as opened:
            info, plane = opened.image.info, opened.pair.plane
            height, width = min(info.height, WINDOW_PX), min(info.width, WINDOW_PX)
            top, left = (info.height - height) // 2, (info.width - width) // 2
            pixels = opened.read_image(top, left, height, width, info.planes // 2 if plane is None else plane)
        progress(place + 1, count)
        yield predictor.normalised(pixels[None])


@torch.inference_mode()
def _race(one: Acceleration, other: Acceleration, image: Tensor) -> float:
    """The time of a pass of one over that of the other, by turns; medians."""
    image = image.contiguous(memory_format=torch.channels_last)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for model, found in zip((one.model, other.model), times, strict=True):
            started = time.perf_counter()
            model(image)
            found.append(time.perf_counter() - started)
    return statistics.median(times[0][1:]) / statistics.median(times[1][1:])
