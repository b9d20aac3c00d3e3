"""Labelled images are predicted and compared with their masks window by window; images of one size may share a pass."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixelwise.data.labels import IGNORE_INDEX, LabelSpec
from pixelwise.data.layouts import DataFolder, Pair
from pixelwise.data.samples import OpenPair, OpenPairs
from pixelwise.errors import DataError
from pixelwise.formats.base import LABELS, Source
from pixelwise.formats.image import label_image, write_png
from pixelwise.infer.network import Region
from pixelwise.infer.overlay import displayable, thinned
from pixelwise.infer.pipeline import Pipeline, compute_together
from pixelwise.infer.predictor import Predictor
from pixelwise.infer.prefetch import ONE_PASS_PX, OnePlane, in_memory, prefetch
from pixelwise.infer.regions import Arrays
from pixelwise.infer.store import Store
from pixelwise.metrics.confusion import ConfusionMatrix, Scores

EXAMPLE_PX = 1024  # the long side of an example picture, at most
THINNED_PX = 16 * ONE_PASS_PX  # larger images are thinned out as they are read for an example


class ImageScore(TypedDict):
    """The scores of one image: mIoU over the classes that occur in it, NaN where nothing is labelled."""

    name: str
    miou: float
    global_accuracy: float
    pixels: int


@dataclass(frozen=True)
class _Labelled:
    """A single image, or plane of a volume, with its mask and the classes of the mask's values."""

    pair: Pair
    image: Source
    mask: Source
    spec: LabelSpec

    @classmethod
    def of(cls, opened: OpenPair, pair: Pair) -> "_Labelled":
        """The plane that a pair means; a small one is read."""
        image, mask = opened.image, opened.mask
        if mask is None:
            raise DataError(f"{pair.image}: has no mask.")
        if pair.plane is not None:
            image, mask = OnePlane(image, pair.plane), OnePlane(mask, pair.plane)
        return cls(pair, in_memory(image), in_memory(mask), opened.labels)

    @property
    def is_small(self) -> bool:
        """Whether it may share a pass."""
        return self.image.info.planes == 1 and self.image.info.height * self.image.info.width <= ONE_PASS_PX

    def is_like(self, other: "_Labelled") -> bool:
        """Whether both may share a pass."""
        mine, its = self.image.info, other.image.info
        return (mine.height, mine.width, mine.channels, mine.dtype, mine.planes) == (
            its.height, its.width, its.channels, its.dtype, its.planes
        )  # fmt: skip

    def truth(self, plane: int, region: Region, step: int = 1) -> NDArray[np.uint8]:
        """Class ids in a region, or of every `step`-th row and column of it, and void."""
        raw = self.mask.read(region.top, region.left, region.height, region.width, plane)[::step, ::step]
        try:
            return np.asarray(self.spec.encode(raw[:, :, 0] if raw.shape[2] == 1 else raw), dtype=np.uint8)
        except DataError as error:
            raise DataError(f"{self.pair.mask}: the mask {error}") from error


class _Counting(Store):
    """Keeps nothing of the labels but how often they are right, class by class."""

    def __init__(self, labelled: _Labelled, classes: int) -> None:
        info = labelled.image.info
        super().__init__(info.height, info.width, info.planes, {LABELS: np.dtype(np.uint8)})
        self.labelled, self.confusion = labelled, ConfusionMatrix(classes)

    def add(self, plane: int, region: Region, arrays: Arrays) -> None:
        """Count the labels of a window."""
        truth, labels = self.labelled.truth(plane, region), arrays[LABELS]
        if labels.max() >= self.confusion.num_classes:  # pixels without data
            truth = np.where(labels == IGNORE_INDEX, np.uint8(IGNORE_INDEX), truth)
        self.confusion.update(labels, truth)
        self._note(plane, region)


class _Thinned(Store):
    """Keeps the labels of every `step`-th row and column."""

    def __init__(self, labelled: _Labelled, step: int) -> None:
        info = labelled.image.info
        super().__init__(info.height, info.width, info.planes, {LABELS: np.dtype(np.uint8)})
        self.step, self.labels = step, np.zeros((-(-info.height // step), -(-info.width // step)), dtype=np.uint8)

    def add(self, plane: int, region: Region, arrays: Arrays) -> None:
        """Keep some pixels of a window."""
        top, left = -(-region.top // self.step), -(-region.left // self.step)
        found = arrays[LABELS][top * self.step - region.top :: self.step, left * self.step - region.left :: self.step]
        self.labels[top : top + found.shape[0], left : left + found.shape[1]] = found
        self._note(plane, region)


def score_pairs(
    predictor: Predictor,
    folder: DataFolder,
    pairs: Sequence[Pair],
    batch: int,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[ConfusionMatrix, list[ImageScore], list[range]]:
    """The matrix of all pixels together, the scores of each image, and which images shared a pass."""
    confusion = ConfusionMatrix(predictor.labels.num_classes)
    per_image: list[ImageScore] = []
    groups: list[range] = []
    for group in _groups(predictor, folder, pairs, batch):
        groups.append(range(len(per_image), len(per_image) + len(group)))
        stores = [_Counting(labelled, predictor.labels.num_classes) for labelled in group]
        _label(predictor, group, stores)
        for labelled, store in zip(group, stores, strict=True):
            confusion += store.confusion
            per_image.append(_image_score(labelled.pair.name, store.confusion.scores()))
            if on_progress is not None:
                on_progress(len(per_image), len(pairs))
    return confusion, per_image, groups


def _groups(predictor: Predictor, folder: DataFolder, pairs: Sequence[Pair], batch: int) -> Iterator[list[_Labelled]]:
    """The images that share a pass: neighbours of one size; their files are open until the next group."""
    card = predictor.card
    files = OpenPairs(lambda pair: OpenPair(pair, folder.labels, card.in_channels, card.reading))
    group: list[_Labelled] = []
    with closing(files), closing(prefetch(lambda pair: _Labelled.of(files.get(pair), pair), pairs)) as coming:
        for _, future in coming:
            labelled = future.result()
            if group and not (group[0].is_like(labelled) and labelled.is_small):
                yield group
                group = []
            group.append(labelled)
            if len(group) == batch:
                yield group
                group = []
        if group:
            yield group


def _label(predictor: Predictor, group: Sequence[_Labelled], stores: Sequence[Store], plane: int | None = None) -> None:
    """Label the images of a group; statistics of the batch are those of the group."""
    pipelines = [Pipeline(network=predictor, source=labelled.image) for labelled in group]
    if len(group) > 1 or (predictor.batch_statistics and group[0].image.info.planes == 1):
        compute_together(pipelines, stores)
    else:
        pipelines[0].compute(stores[0], plane=plane)


def _image_score(name: str, scores: Scores) -> ImageScore:
    return {
        "name": name,
        "miou": scores.miou if scores.pixels else math.nan,
        "global_accuracy": scores.global_accuracy,
        "pixels": scores.pixels,
    }


def write_examples(
    pictures: Path,
    predictor: Predictor,
    folder: DataFolder,
    pairs: Sequence[Pair],
    chosen: dict[str, int],
    groups: Sequence[range],
) -> None:
    """Write the chosen images below `pictures`, each as image, truth and prediction."""
    for old in (old for kind in ("best", "median", "worst") for old in pictures.glob(f"{kind}-*")):
        shutil.rmtree(old, ignore_errors=True)
    for indices in groups:  # together again, since statistics of the batch depend on all of it
        keys = {index - indices.start: key for key, index in chosen.items() if index in indices}
        if not keys:
            continue
        for group in _groups(predictor, folder, [pairs[index] for index in indices], len(indices)):
            info = group[0].image.info
            step = 1 if info.height * info.width <= THINNED_PX else -(-max(info.height, info.width) // EXAMPLE_PX)
            stores = [_Thinned(labelled, step) for labelled in group]
            shown = info.planes // 2
            _label(predictor, group, stores, plane=shown)
            for place, key in keys.items():
                _write_example(pictures / key, group[place], stores[place], shown)


def _write_example(folder: Path, labelled: _Labelled, store: _Thinned, plane: int) -> None:
    info, spec, step = labelled.image.info, labelled.spec, store.step
    image = Image.fromarray(displayable(thinned(labelled.image, step, plane)))
    bands = [Region(top, 0, min(step, info.height - top), info.width) for top in range(0, info.height, step)]
    truth = labelled.truth(plane, Region(0, 0, info.height, info.width)) if step == 1 else np.concatenate(
        [labelled.truth(plane, band, step) for band in bands]
    )  # fmt: skip
    write_png(folder / "image.png", _shrunk(image, Image.Resampling.BOX))
    write_png(folder / "truth.png", _shrunk(label_image(truth, spec), Image.Resampling.NEAREST))
    write_png(folder / "prediction.png", _shrunk(label_image(store.labels, spec), Image.Resampling.NEAREST))


def _shrunk(picture: Image.Image, how: Image.Resampling) -> Image.Image:
    scale = EXAMPLE_PX / max(picture.size)
    if scale >= 1:
        return picture
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), how)
