"""Labelled images are predicted and compared with their masks window by window; images of one size may share a pass."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixelwise.data.labels import IGNORE_INDEX, LabelSpec
from pixelwise.data.layouts import DataFolder, Pair
from pixelwise.data.masks import mask_values
from pixelwise.data.samples import OpenPair, OpenPairs
from pixelwise.errors import DataError
from pixelwise.formats.base import LABELS, Source, View
from pixelwise.formats.image import label_image, write_png
from pixelwise.infer.overlay import displayable, thinned
from pixelwise.infer.pipeline import ONE_PASS_PX, Pipeline, compute_together, in_memory, is_small
from pixelwise.infer.predictor import Predictor
from pixelwise.infer.prefetch import prefetch
from pixelwise.infer.remarks import Remarks
from pixelwise.infer.store import Arrays, Store
from pixelwise.infer.tiling import Note, Region
from pixelwise.metrics.confusion import ConfusionMatrix

EXAMPLE_PX = 1024  # the long side of an example picture, at most
MOST_COUNTS = 4_000_000  # numbers in the matrices of single images, which are one from there on
THINNED_PX = 16 * ONE_PASS_PX  # larger images are thinned out as they are read for an example


class ImageScore(TypedDict):
    """The scores of one image: mIoU over the classes that occur in it, NaN where nothing is labelled."""

    name: str
    miou: float
    global_accuracy: float
    pixels: int


class _OnePlane(View):
    """A single plane of an open volume, which is not closed with this."""

    def __init__(self, source: Source, plane: int) -> None:
        super().__init__(source, planes=1)
        self._plane = plane

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[Any]:
        return self.source.read(top, left, height, width, self._plane)

    def valid(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray[np.bool_] | None:
        return self.source.valid(top, left, height, width, self._plane)

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()}-{self._plane}"

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _Labelled:
    """A single image, or plane of a volume, with its mask and the classes of the mask's values."""

    pair: Pair
    image: Source
    mask: Source
    spec: LabelSpec
    region: Source | None = None  # a mask that is not 0 where pixels count

    @classmethod
    def of(cls, opened: OpenPair, pair: Pair) -> "_Labelled":
        """The plane that a pair means; a small one is read."""
        image, mask, region = opened.image, opened.mask, opened.region
        if mask is None:
            raise DataError(f"{pair.image}: has no mask.")
        if pair.plane is not None:
            image, mask = _OnePlane(image, pair.plane), _OnePlane(mask, pair.plane)
            region = region and _OnePlane(region, pair.plane)
        return cls(pair, in_memory(image), in_memory(mask), opened.labels, region and in_memory(region))

    def is_like(self, other: "_Labelled") -> bool:
        """Whether both may share a pass."""
        mine, its = self.image.info, other.image.info
        keys = ("height", "width", "channels", "dtype", "planes")
        return is_small(mine) and all(getattr(mine, key) == getattr(its, key) for key in keys)

    def truth(self, plane: int, window: Region, step: int = 1) -> NDArray[np.uint8]:
        """Class ids in a window, or of every `step`-th row and column of it, and void."""
        raw = mask_values(self.mask.read(*window, plane)[::step, ::step])
        try:
            labels = self.spec.encode(raw)
        except DataError as error:
            raise DataError(f"{self.pair.mask}: the mask {error}") from error
        if self.region is None:
            return labels
        inside = self.region.read(*window, plane)[::step, ::step].any(axis=2)
        return np.where(inside, labels, np.uint8(IGNORE_INDEX))


class _Counting(Store):
    """Keeps nothing of the labels but how often they are right, class by class."""

    def __init__(self, labelled: _Labelled, classes: int) -> None:
        super().__init__(labelled.image.info, {LABELS: np.dtype(np.uint8)})
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
        super().__init__(labelled.image.info, {LABELS: np.dtype(np.uint8)})
        self.step, self.labels = step, np.zeros((-(-self.height // step), -(-self.width // step)), dtype=np.uint8)

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
    note: Note | None = None,
) -> tuple[dict[str, ConfusionMatrix], list[ImageScore], list[range]]:
    """The matrix of each group of images (slices of a volume are one), each image's scores, and which shared a pass."""
    parts: dict[str, ConfusionMatrix] = {}
    keeps_apart = len(pairs) * predictor.labels.num_classes**2 <= MOST_COUNTS
    per_image: list[ImageScore] = []
    groups: list[range] = []
    told = None if note is None else Remarks(note)
    for group in _groups(predictor, folder, pairs, batch):
        groups.append(range(len(per_image), len(per_image) + len(group)))
        stores = [_Counting(labelled, predictor.labels.num_classes) for labelled in group]
        _label(predictor, group, stores)
        for labelled, store in zip(group, stores, strict=True):
            pair = labelled.pair
            if told is not None:
                told.look(labelled.image, predictor.card)
            key = (pair.group or pair.name) if keeps_apart else ""
            parts[key] = parts[key] + store.confusion if key in parts else store.confusion
            found = store.confusion.scores()
            per_image.append(
                ImageScore(
                    name=labelled.pair.name,
                    miou=found.miou if found.pixels else math.nan,
                    global_accuracy=found.global_accuracy,
                    pixels=found.pixels,
                )
            )
            if on_progress is not None:
                on_progress(len(per_image), len(pairs))
    return parts, per_image, groups


def _groups(predictor: Predictor, folder: DataFolder, pairs: Sequence[Pair], batch: int) -> Iterator[list[_Labelled]]:
    """The images that share a pass: neighbours of one size; their files are open until the next group."""
    reading = predictor.card.reading | folder.reading
    files = OpenPairs(lambda pair: OpenPair(pair, folder.labels, predictor.in_channels, reading))
    group: list[_Labelled] = []
    with closing(files), closing(prefetch(lambda pair: _Labelled.of(files.get(pair), pair), pairs)) as coming:
        for _, future in coming:
            labelled = future.result()
            if group and not group[0].is_like(labelled):
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
    band = info.height if step == 1 else step
    bands = [Region(top, 0, min(band, info.height - top), info.width) for top in range(0, info.height, band)]
    truth = np.concatenate([labelled.truth(plane, region, step) for region in bands])
    image = Image.fromarray(displayable(thinned(labelled.image, step, plane)))
    write_png(folder / "image.png", _shrunk(image, Image.Resampling.BOX))
    for name, labels in (("truth", truth), ("prediction", store.labels)):
        write_png(folder / f"{name}.png", _shrunk(label_image(labels, spec), Image.Resampling.NEAREST))


def _shrunk(picture: Image.Image, how: Image.Resampling) -> Image.Image:
    scale = min(1.0, EXAMPLE_PX / max(picture.size))
    return picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), how)
