"""Score a trained network on a split: one exact confusion matrix over every labelled pixel, at full resolution."""

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pixelwise.data.check import check_split
from pixelwise.data.classes import CLASSES_NAME
from pixelwise.data.layouts import DataFolder, Pair, Problem, open_data
from pixelwise.data.proposals import classes_beside
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.files import remove_leftovers, write_json
from pixelwise.infer.predictor import Predictor, load
from pixelwise.infer.remarks import warn
from pixelwise.infer.scoring import ImageScore, score_pairs, write_examples
from pixelwise.infer.tiling import Note
from pixelwise.metrics.confusion import ConfusionMatrix, Scores
from pixelwise.metrics.headline import Headline, foreground_of, headline, standard_error

EXAMPLES = 2  # of each of best, median and worst
BATCH = 10  # images in a pass with statistics of the batch, as the authors of FC-DenseNet tested


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a network scored on a split.

    Attributes:
        split: The split's name.
        names: The K class names.
        scores: All scores, from the matrix of all pixels together.
        matrix: Pixels (K, K): rows are the truth, columns the prediction.
        per_image: One entry for each image, in the order of the data folder.
        examples: The example folders written ("best-1", "worst-2", …), each with the name of its image.
        images: How many images.
        seconds: How long it took, reading included.
        precision: What the network computed in, "bf16" or "float32".
        acceleration: What computed it: the network as it is ("none"), what it was folded into ("fold"), or 8 bits ("int8").
        statistics: What batch norm used: "running" averages of the training, or those of the "batch" at hand.
        batch: The most images in one pass; with statistics of the batch the scores depend on it.
        foreground: Of two classes, the one that is no background; None if there are more, or both are looked for.
        standard_error: Of the headline (the foreground's IoU, else mIoU), over the images; NaN if it cannot be told.
    """

    split: str
    names: tuple[str, ...]
    scores: Scores
    matrix: list[list[int]]
    per_image: list[ImageScore]
    images: int
    seconds: float
    precision: str
    acceleration: str = "none"
    examples: dict[str, str] = field(default_factory=dict)
    statistics: str = "running"
    batch: int = 1
    foreground: int | None = None
    standard_error: float = math.nan

    @property
    def headline(self) -> Headline:
        """The score of what is looked for, with its standard error."""
        return headline(self.scores, self.names, self.foreground, self.standard_error)

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as values that JSON can hold (undefined scores are None)."""
        per_image = [
            {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in entry.items()}
            for entry in self.per_image
        ]
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        error = None if math.isnan(self.standard_error) else self.standard_error
        more = {"names": list(self.names), "scores": self.scores.to_dict(), "standard_error": error}
        return plain | more | {"per_image": per_image}


def evaluate(
    run: str | Path | Predictor,
    data: str | Path | DataFolder,
    *,
    split: str = "test",
    out: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    batch: int | None = None,
    check: bool = True,
    note: Note | None = warn,
) -> Evaluation:
    """Score a trained network on a split of a data folder.

    Nothing is resized; void pixels are dropped from truth and prediction. Images may be of any format and size: what does
    not fit into memory is predicted, read and counted window by window.
    Writes `evaluation-<split>.json`, and the best, median and worst images by mIoU below `evaluation-<split>/`.

    Args:
        run: A run folder, or a predictor.
        data: A data folder, or its path; without a classes.yaml of its own its masks are read as the training's were.
        split: Which split to score.
        out: Where to write; by default the run folder (nothing is written for a predictor that came from none,
            or from one that may not be written into).
        on_progress: Called after each image with the number done and the number in all.
        batch: The most images in one pass; only neighbours of equal size share one. By default 1, or 10 for a predictor
            with batch statistics.
        check: Whether to look at the masks of the split first; data that were inspected need not.
        note: Takes what should be known of the images and masks, a line for each kind (numbers far from those of the
            training, a band that is left out, masks that look inverted); by default a `UserWarning`, None for nothing.

    Raises:
        UsageError: the batch is less than 1.
        DataError: the data's classes are not the network's, the split is empty, a file cannot be read, or masks hold what
            is no class, differ from their images in size, or do not look like masks.
        PixelwiseError: an image does not fit into memory, or a result cannot be written.

    Example:
        >>> import tempfile
        >>> from pixelwise.data.labels import LabelSpec
        >>> from pixelwise.infer.bundle import ModelCard
        >>> from pixelwise.models import create_model
        >>> spec = LabelSpec(names=("sky", "road"), colors=((0, 0, 255), (90, 90, 90)), values=((0,), (1,)))
        >>> config = {"tiny": True, "num_classes": 2, "in_channels": 3}
        >>> card = ModelCard(model="unet", config=config, labels=spec, mean=(0.5,) * 3, std=(0.2,) * 3)
        >>> predictor = Predictor(create_model("unet", **config), card, device="cpu")
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for kind, mode in (("images", "RGB"), ("masks", "L")):
        ...     (root / "test" / kind).mkdir(parents=True)
        ...     for value in (0, 1):
        ...         Image.new(mode, (8, 6), value).save(root / "test" / kind / f"{value}.png")
        >>> evaluation = evaluate(predictor, root)
        >>> evaluation.scores.pixels, evaluation.images
        (96, 2)
    """
    started = time.perf_counter()
    predictor = run if isinstance(run, Predictor) else load(run)
    folder = data if isinstance(data, DataFolder) else open_for(predictor, data)
    _check_classes(predictor.labels.names, folder)
    pairs = _pairs(folder, split)
    if batch is None:
        batch = BATCH if predictor.batch_statistics else 1
    if batch < 1:
        raise UsageError(f"batch must be at least 1, not {batch}.")
    if check:
        for text in check_split(folder, split, channels=predictor.in_channels, reading=predictor.card.reading):
            if note is not None:
                note(text)
    parts, per_image, groups = score_pairs(predictor, folder, pairs, batch, on_progress, note)
    confusion = sum(parts.values(), ConfusionMatrix(predictor.labels.num_classes))
    foreground = foreground_of(predictor.labels.names, predictor.labels.values)
    target = place_of_results(predictor) if out is None else Path(out)
    if target is not None:
        remove_leftovers(target, *target.glob(f"evaluation-{split}/*"))
    chosen = choose_examples(per_image) if target is not None else {}
    evaluation = Evaluation(
        split=split,
        names=predictor.labels.names,
        scores=confusion.scores(),
        foreground=foreground,
        standard_error=standard_error(
            tuple(parts.values()), lambda scores: scores.miou if foreground is None else scores.iou[foreground]
        ),
        matrix=confusion.matrix.tolist(),
        per_image=per_image,
        images=len(pairs),
        seconds=time.perf_counter() - started,
        precision=predictor.precision,
        acceleration=predictor.acceleration.kind,
        examples={key: per_image[index]["name"] for key, index in chosen.items()},
        statistics="batch" if predictor.batch_statistics else "running",
        batch=batch,
    )
    if target is not None:
        pictures = target / f"evaluation-{split}"
        write_examples(pictures, predictor, folder, pairs, chosen, groups)
        write_evaluation(evaluation, target / f"evaluation-{split}.json")
    return evaluation


def place_of_results(predictor: Predictor) -> Path | None:
    """The run folder that a network is from; None if there is none, or nothing may be written there (a colleague's)."""
    folder = predictor.folder
    return folder if folder is not None and os.access(folder, os.W_OK) else None


def write_evaluation(evaluation: Evaluation, path: str | Path) -> None:
    """Write all results as JSON.

    Raises:
        PixelwiseError: the file cannot be written.
    """
    try:
        write_json(path, evaluation.to_dict())
    except OSError as error:
        raise PixelwiseError(f"{path}: cannot be written ({error.strerror or error}). Choose another place.") from error


def open_for(
    predictor: Predictor,
    root: str | Path,
    *,
    classes: str | Path | None = None,
    ignore: Sequence[int] = (),
    group_by: str | None = None,
    masks: str | None = None,
    region: str | None = None,
) -> DataFolder:
    """Open a data folder to score `predictor` on it.

    The meaning of mask values is the data's own if it says so (`classes`, or a classes.yaml in `root`), and else the
    one that the network was trained with. A split that has to be made is made as for the training: unless `group_by`
    is given, with the card's `data["group_by"]`, or training images would be scored as unseen ones. `masks` names the
    folder of masks where several hold labels, and `region` that of what counts; without them those that the network was
    trained with, if `root` has them.

    Raises:
        DataError: the folder cannot be used.
        UsageError: an option does not fit.
    """
    root = Path(root)
    known = None if classes is not None or os.path.lexists(classes_beside(root)) else predictor.labels
    asked = {"group_by": group_by, "masks": masks, "region": region}
    named = {key: name for key, name in asked.items() if name is not None}
    trained = {key: name for key in asked if isinstance(name := predictor.card.data.get(key), str) and key not in named}
    named |= {"group_by": trained.pop("group_by")} if "group_by" in trained else {}
    given: dict[str, Any] = {"classes": classes, "ignore": tuple(ignore), "labels": known} | named
    for left_out in ((), ("region",), ("masks",)):  # other data need not have folders of these names
        if set(left_out) <= set(trained):
            with suppress(UsageError):
                there: dict[str, Any] = {key: name for key, name in trained.items() if key not in left_out}
                folder = open_data(root, **given, **there)
                return _with_warning(folder, trained["region"]) if left_out == ("region",) else folder
    try:
        folder = open_data(root, **given)
    except UsageError as error:
        if group_by is not None or "group_by" not in given:
            raise
        advice = "The network was trained with it. Pass --group-by for these data; '(.*)' keeps each image by itself."
        raise UsageError(f"{error} {advice}") from error
    return _with_warning(folder, trained["region"]) if "region" in trained else folder


def _with_warning(folder: DataFolder, region: str) -> DataFolder:
    message = f"the network was trained with --region {region}, which is not here: all pixels count."
    return replace(folder, problems=(*folder.problems, Problem("warning", message)))


def _check_classes(wanted: tuple[str, ...], folder: DataFolder) -> None:
    """The data's classes are those of the network: the same names in the same order."""
    given = folder.labels.names
    if given == wanted:
        return
    if len(given) != len(wanted):
        what = f"{len(given)} classes, but the network knows {len(wanted)}"
    else:
        index, (one, other) = next(
            item for item in enumerate(zip(given, wanted, strict=True)) if item[1][0] != item[1][1]
        )
        what = f"class {index} is {one!r}, but the network's is {other!r}"
    raise DataError(
        f"{folder.root}: {what}. The data has: {_listed(given)}. The network has: {_listed(wanted)}. Write a "
        f"{CLASSES_NAME} with the network's names in its order and this data's mask values, and pass it with --classes."
    )


def choose_examples(per_image: Sequence[ImageScore], count: int = EXAMPLES) -> dict[str, int]:
    """The indices of the best, worst and median images by mIoU, none twice; images without labels are left out."""
    scored = [index for index, entry in enumerate(per_image) if not math.isnan(entry["miou"])]
    ranked = sorted(scored, key=lambda index: (-per_image[index]["miou"], per_image[index]["name"]))
    rest = ranked[count:]
    middle = rest[:-count]
    start = max(0, (len(middle) - count + 1) // 2)
    groups = {"best": ranked[:count], "worst": rest[::-1][:count], "median": middle[start : start + count]}
    return {f"{kind}-{rank}": index for kind, group in groups.items() for rank, index in enumerate(group, 1)}


def _pairs(folder: DataFolder, split: str) -> tuple[Pair, ...]:
    known = ", ".join(f"{name} ({len(folder.split(name)):,})" for name in folder.splits)
    if split not in folder.splits or not folder.split(split):
        raise DataError(f"{folder.root}: split {split!r} holds no images; the splits are {known or 'none'}.")
    pairs = folder.split(split)
    if unlabelled := [pair.name for pair in pairs if pair.mask is None]:
        raise DataError(
            f"{folder.root}: {len(unlabelled):,} of {len(pairs):,} images of split {split!r} have no mask "
            f"({_listed(unlabelled)}), so they cannot be scored. Add the masks, or take the images out."
        )
    return pairs


def _listed(names: Sequence[str], most: int = 20) -> str:
    more = f", … ({len(names) - most:,} more)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
