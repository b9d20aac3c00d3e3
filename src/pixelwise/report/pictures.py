"""The pictures of the report: image, truth, prediction and errors of single images, as data URIs."""

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixelwise.data.labels import IGNORE_INDEX
from pixelwise.errors import DataError
from pixelwise.formats.opening import read_image, read_mask
from pixelwise.report.run_folder import Classes, EvaluationFile, ImageScore

SIDES_PX = (720, 480, 320, 200)  # the long side of each picture; the first at which the page stays small
MAX_BYTES = 3_500_000
ERROR_RGB = (207, 54, 36)
VOID_RGB = ((214, 214, 214), (184, 184, 184))
KINDS = ("best", "median", "worst")


class Panel(NamedTuple):
    """One picture: what it is, its content as a data URI, and whether it is so small that the page enlarges it."""

    caption: str
    uri: str
    is_small: bool


@dataclass(frozen=True, kw_only=True)
class Example:
    """One image of the evaluation: its rank, its name and score where they are known, and its pictures or a note."""

    kind: str
    name: str
    score: ImageScore | None
    panels: tuple[Panel, ...] = ()
    note: str = ""


def read_examples(run: Path, evaluation: EvaluationFile, classes: Classes) -> list[Example]:
    """The best, median and worst images that the evaluation kept, in this order."""
    folder = run / f"evaluation-{evaluation.split}"
    found = [match for path in folder.glob("*-*") if (match := re.fullmatch(r"(best|median|worst)-(\d+)", path.name))]
    if not found:
        raise DataError(f"The folder {folder.name} with the pictures is not in the run folder.")
    found.sort(key=lambda match: (KINDS.index(match[1]), int(match[2])))
    scores = {score.name: score for score in evaluation.per_image}
    examples: list[Example] = []
    for side in SIDES_PX:
        examples = [
            _example(folder / match[0], match[1], evaluation.examples, scores, classes, side) for match in found
        ]
        if sum(len(panel.uri) for example in examples for panel in example.panels) <= MAX_BYTES:
            break
    return examples


def _example(
    folder: Path, kind: str, names: Mapping[str, str], scores: Mapping[str, ImageScore], classes: Classes, side: int
) -> Example:
    """One example with pictures of at most `side` pixels."""
    name = names.get(folder.name, "")
    try:
        panels, note = _panels(folder, classes, side), ""
    except DataError:
        panels, note = (), f"The pictures in {folder.name} are missing or unreadable."
    if not note and not panels:
        note = f"The pictures in {folder.name} have different sizes and cannot be compared."
    return Example(kind=kind, name=name, score=scores.get(name), panels=panels, note=note)


def _panels(folder: Path, classes: Classes, side: int) -> tuple[Panel, ...]:
    """Image, truth, prediction and errors; none if their sizes differ."""
    image = read_image(folder / "image.png")
    if image.dtype != np.uint8:
        raise DataError(f"a picture of type {image.dtype}; the evaluation writes no others than 8-bit ones.")
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    truth, prediction = (read_mask(folder / file).clip(0, 255) for file in ("truth.png", "prediction.png"))
    if not image.shape[:2] == truth.shape == prediction.shape:
        return ()
    height, width = truth.shape
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    truth, prediction = (
        np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
        for labels in (truth, prediction)
    )
    pictures = {
        "image": _data_uri(Image.fromarray(image), "JPEG"),
        "truth": _data_uri(_paint(truth, classes), "PNG"),
        "prediction": _data_uri(_paint(prediction, classes), "PNG"),
        "errors": _data_uri(Image.fromarray(error_map(image, truth, prediction)), "JPEG"),
    }
    return tuple(Panel(caption, uri, max(size) < 300) for caption, uri in pictures.items())


def error_map(
    image: NDArray[np.uint8], truth: NDArray[np.integer], prediction: NDArray[np.integer]
) -> NDArray[np.uint8]:
    """The image (H, W, 3) in pale grey, wrong pixels red, void (255 in the truth) striped."""
    grey = image.mean(axis=2) * 0.44 + 143
    drawn = np.repeat(grey[..., None], 3, axis=2)
    drawn[truth != prediction] = ERROR_RGB
    stripes = np.add.outer(np.arange(truth.shape[0]), np.arange(truth.shape[1])) // 4 % 2
    void = truth == IGNORE_INDEX
    drawn[void] = np.array(VOID_RGB)[stripes[void]]
    return drawn.astype(np.uint8)


def _paint(labels: NDArray[np.uint8], classes: Classes) -> Image.Image:
    """Class ids in their colours; void and unknown ids black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes.colors)] = classes.colors
    picture = Image.fromarray(labels)
    picture.putpalette(palette.tobytes())
    return picture


def _data_uri(picture: Image.Image, kind: str) -> str:
    """The picture as a data URI: "JPEG", or "PNG" without loss."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **{"quality": 84, "subsampling": 0} if kind == "JPEG" else {"optimize": True})
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
