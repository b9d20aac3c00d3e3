"""Read the files of a run folder for the report: every file is optional, and each is validated."""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, Field, PlainValidator, ValidationError, model_validator

from pixelwise.data.labels import Color, LabelSpec, distinct_colors
from pixelwise.errors import DataError
from pixelwise.files import read_json, read_yaml
from pixelwise.metrics import Scores

RUN_FILES = ("model.json", "config.yaml", "plan.json", "data.json", "environment.json", "metrics.csv")
METRICS = ("epoch", "elapsed_s", "lr", "train_loss", "images_per_s", "val_miou", "val_global_accuracy")

MAX_NUMBER, MAX_STEP = 1e30, 1e12
MAX_ROWS, MAX_METRICS_BYTES = 100_000, 2 << 30  # of metrics.csv; of more rows some are shown

Count = Annotated[int, Field(ge=0, le=2**62)]
Share = Annotated[float, Field(ge=0, le=1)]
Model = TypeVar("Model", bound=BaseModel)


class ImageScore(BaseModel):
    """What one image of the evaluation scored; None where it has no labelled pixel."""

    name: str
    miou: Share | None = None
    global_accuracy: Share | None = None


class EvaluationFile(BaseModel):
    """The content of evaluation-<split>.json that the report shows."""

    split: str
    scores: Annotated[Scores, PlainValidator(Scores.from_dict)]
    matrix: list[list[Count]]
    per_image: list[ImageScore] = []
    images: Count = 0
    examples: dict[str, str] = {}
    names: list[str] = []
    foreground: Annotated[int, Field(ge=0, le=1)] | None = None  # of two classes the one that is looked for
    standard_error: Annotated[float, Field(ge=0)] | None = None  # of the headline

    @model_validator(mode="after")
    def _is_square(self) -> "EvaluationFile":
        if not self.matrix or any(len(row) != len(self.matrix) for row in self.matrix):
            raise ValueError("the confusion matrix is not square")
        if len(self.scores.iou) != len(self.matrix):
            raise ValueError("the scores and the confusion matrix have different numbers of classes")
        if self.foreground is not None and len(self.matrix) != 2:
            raise ValueError("only one of two classes can be the foreground")
        return self


class SplitFile(BaseModel):
    """What data.json says of one split: counts of images and of pixels per class."""

    images: Count
    pixels: list[Count]
    void: Count = 0
    images_with: list[Count] = []

    @property
    def void_share(self) -> float:
        """The share of pixels without a class."""
        return self.void / max(1, self.void + sum(self.pixels))

    def share(self, index: int) -> float:
        """The share of a class of the labelled pixels."""
        return self.pixels[index] / max(1, sum(self.pixels)) if index < len(self.pixels) else 0.0

    def shown_in(self, index: int) -> int | None:
        """The number of images with a class, if the file says it."""
        return self.images_with[index] if index < len(self.images_with) else None


class ProblemFile(BaseModel):
    """One problem found in the data."""

    severity: str
    message: str


class DataFile(BaseModel):
    """The content of data.json that the report shows."""

    root: str = ""
    layout: str = ""
    channels: Count
    dtypes: dict[str, Count] = {}
    sizes: dict[str, Count] = {}
    splits: dict[str, SplitFile]
    mean: list[float | None] = []
    std: list[float | None] = []
    fingerprint: str = ""
    problems: list[ProblemFile] = []

    @property
    def num_classes(self) -> int:
        """The classes that any split counts."""
        return max((len(split.pixels) for split in self.splits.values()), default=0)


class Classes(NamedTuple):
    """The name and the RGB colour (0..255) of each class."""

    names: tuple[str, ...]
    colors: tuple[Color, ...]

    def fit(self, num_classes: int) -> "Classes":
        """These classes if there are as many, else "class 0", "class 1" and so on in distinct colours."""
        if len(self.names) == num_classes:
            return self
        return Classes(tuple(f"class {index}" for index in range(num_classes)), distinct_colors(num_classes))


def check_run(run: Path) -> None:
    """Raise unless `run` is a folder with at least one file of a run."""
    if not run.is_dir():
        what = "is a file" if run.exists() else "does not exist"
        raise DataError(f"{run}: {what}. Give the run folder that `pixelwise train` wrote.")
    if not any((run / name).is_file() for name in RUN_FILES) and not evaluated_splits(run):
        raise DataError(
            f"{run}: holds none of {', '.join(RUN_FILES)} and no evaluation, so there is nothing to report. "
            "Give the run folder that `pixelwise train` wrote."
        )


def read_mapping(run: Path, name: str) -> dict[str, Any]:
    """The mapping in a JSON or YAML file of the run."""
    path = _existing(run, name)
    try:
        content = read_yaml(path) if path.suffix == ".yaml" else read_json(path)
    except DataError as error:
        raise DataError(f"{name} cannot be shown: it is unreadable or not {path.suffix[1:].upper()}.") from error
    if not isinstance(content, dict):
        raise DataError(f"{name} cannot be shown: it holds {type(content).__name__}, not a mapping.")
    return content


def read_model(run: Path, name: str, model: type[Model]) -> Model:
    """A JSON file of the run, checked against `model`."""
    content = read_mapping(run, name)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its content"
        raise DataError(f"{name} cannot be shown: {place}: {first['msg']}.") from error


def kept_step(run: Path) -> int | None:
    """The step of the weights that are kept, as model.json tells it."""
    try:
        scores = read_mapping(run, "model.json").get("scores")
    except DataError:
        return None
    step = scores.get("step") if isinstance(scores, dict) else None
    return step if isinstance(step, int) else None


def read_classes(run: Path, names: Sequence[str] = ()) -> Classes:
    """The classes that model.json describes, else those of data.json, else `names` in distinct colours."""
    for file in ("model.json", "data.json"):
        try:
            labels = LabelSpec.from_dict(read_mapping(run, file).get("labels"))
        except DataError:
            continue
        return Classes(labels.names, labels.colors)
    return Classes(tuple(names), distinct_colors(len(names)))


def evaluated_splits(run: Path) -> list[str]:
    """The splits with an evaluation in the run, in the order test, val, others by name."""
    found = [match[1] for path in run.iterdir() if (match := re.fullmatch(r"evaluation-(.+)\.json", path.name))]
    rank = {"test": 0, "val": 1}
    return sorted(found, key=lambda split: (rank.get(split, 2), split))


def read_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The columns of metrics.csv as (step, value), ordered by step; a resumed step counts with its last value.

    Of very many rows every `metrics_stride`th counts, the last one, and those of validations. Empty cells are left out, and
    so are values that no plot could show (not finite, or beyond 1e30).

    Raises:
        DataError: the file is missing, unreadable, or has no row with a step.
    """
    path = _existing(run, "metrics.csv")
    columns: dict[str, dict[int, float]] = {name: {} for name in METRICS}
    try:
        stride = metrics_stride(run)
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            reader = csv.reader(file)
            names = next(reader, [])
            for row in _thinned(reader, names, stride):
                step = _number(row.get("step"))
                if step is not None and 0 <= step < MAX_STEP:
                    found = {name: _number(row.get(name)) for name in METRICS}
                    for name, value in found.items():
                        if value is not None:
                            columns[name][int(step)] = value
    except (OSError, csv.Error) as error:
        raise DataError(f"metrics.csv cannot be shown: {error}.") from error
    if not any(columns.values()):
        raise DataError("metrics.csv holds no measurement yet.")
    return {name: sorted(values.items()) for name, values in columns.items()}


def metrics_stride(run: Path) -> int:
    """1, or N where metrics.csv has so many rows that only every Nth is shown."""
    path = _existing(run, "metrics.csv")
    if path.stat().st_size > MAX_METRICS_BYTES:
        raise DataError(f"metrics.csv cannot be shown: it has more than {MAX_METRICS_BYTES >> 30} GiB.")
    with path.open("rb") as file:
        rows = sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 20), b""))
    return -(-rows // MAX_ROWS) or 1


def _thinned(rows: Iterator[list[str]], names: Sequence[str], stride: int) -> Iterator[dict[str, str]]:
    validations, place = 0, names.index("val_miou") if "val_miou" in names else len(names)
    row: list[str] = []
    is_shown = True
    for number, row in enumerate(rows):
        is_shown = number % stride == 0
        if not is_shown and validations < MAX_ROWS and len(row) > place and row[place]:
            validations, is_shown = validations + 1, True
        if is_shown:
            yield dict(zip(names, row, strict=False))
    if not is_shown:
        yield dict(zip(names, row, strict=False))


def _number(cell: Any) -> float | None:
    """The number in a cell; None if there is none that a plot could show."""
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if abs(value) < MAX_NUMBER else None


def _existing(run: Path, name: str) -> Path:
    """The path of a file of the run, which must exist."""
    path = run / name
    if not path.is_file():
        raise DataError(f"{name} is not in the run folder.")
    return path
