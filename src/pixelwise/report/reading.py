"""Reading a run folder for the report: every file is optional, and none is believed before it is checked."""

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from pixelwise.data.labels import Color, LabelSpec, distinct_colors
from pixelwise.errors import DataError
from pixelwise.files import read_json
from pixelwise.metrics import Scores

RUN_FILES = ("model.json", "config.yaml", "plan.json", "data.json", "environment.json", "metrics.csv")
METRICS = ("epoch", "elapsed_s", "lr", "train_loss", "images_per_s", "val_loss", "val_miou", "val_global_accuracy")

MAX_NUMBER, MAX_STEP = 1e30, 1e12

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
    scores: dict[str, Any]
    matrix: list[list[Count]]
    per_image: list[ImageScore] = []
    images: Count = 0
    examples: dict[str, str] = {}
    names: list[str] = []

    @model_validator(mode="after")
    def _is_square(self) -> "EvaluationFile":
        if not self.matrix or any(len(row) != len(self.matrix) for row in self.matrix):
            raise ValueError("the confusion matrix is not square")
        if len(Scores.from_dict(self.scores).iou) != len(self.matrix):
            raise ValueError("the scores and the confusion matrix have different numbers of classes")
        return self


class SplitFile(BaseModel):
    """What data.json says of one split: counts of images and of pixels per class."""

    images: Count
    pixels: list[Count]
    void: Count = 0
    images_with: list[Count] = []


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


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What the classes are called and how they are painted; made up where the run does not say.

    Attributes:
        names: one for each class.
        colors: one RGB colour (0..255) for each class.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]

    def fit(self, num_classes: int) -> "Classes":
        """These classes if there are as many, else made-up ones."""
        return self if len(self.names) == num_classes else made_up_classes(num_classes)


def made_up_classes(num_classes: int, names: Sequence[str] = ()) -> Classes:
    """Classes in any colours, called "class 0", "class 1" and so on unless there is a name for each."""
    if len(names) != num_classes:
        names = [f"class {index}" for index in range(num_classes)]
    return Classes(names=tuple(names), colors=distinct_colors(num_classes))


def check_run(run: Path) -> None:
    """Raise unless `run` is a folder with at least one file of a run.

    Raises:
        DataError: it is missing, a file, or a folder of something else.
    """
    if not run.is_dir():
        what = "is a file" if run.exists() else "does not exist"
        raise DataError(f"{run}: {what}. Give the run folder that `pixelwise train` wrote.")
    if not any((run / name).is_file() for name in RUN_FILES) and not evaluated_splits(run):
        raise DataError(
            f"{run}: holds none of {', '.join(RUN_FILES)} and no evaluation, so there is nothing to report. "
            "Give the run folder that `pixelwise train` wrote."
        )


def read_mapping(run: Path, name: str) -> dict[str, Any]:
    """The mapping in a JSON or YAML file of the run.

    Raises:
        DataError: the file is missing or holds something else; the message is the sentence the report shows.
    """
    path = _existing(run, name)
    content = _read_yaml(path) if path.suffix == ".yaml" else _read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{name} cannot be shown: it holds {type(content).__name__}, not a mapping.")
    return content


def read_model(run: Path, name: str, model: type[Model]) -> Model:
    """A JSON file of the run, checked against `model`.

    Raises:
        DataError: as `read_mapping`, or the content is of another form.
    """
    content = read_mapping(run, name)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "its content"
        raise DataError(f"{name} cannot be shown: {place}: {first['msg']}.") from error


def read_classes(run: Path, names: Sequence[str] = ()) -> Classes:
    """The classes that model.json describes, else those of data.json; made up from `names` if neither does."""
    for file in ("model.json", "data.json"):
        try:
            labels = LabelSpec.from_dict(read_mapping(run, file).get("labels"))
        except DataError:
            continue
        return Classes(names=labels.names, colors=labels.colors)
    return made_up_classes(len(names), names)


def evaluated_splits(run: Path) -> list[str]:
    """The splits with an evaluation in the run, the most telling first: test, then val, then the others by name."""
    found = [match[1] for path in run.iterdir() if (match := re.fullmatch(r"evaluation-(.+)\.json", path.name))]
    rank = {"test": 0, "val": 1}
    return sorted(found, key=lambda split: (rank.get(split, 2), split))


def read_metrics(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The columns of metrics.csv as (step, value), ordered by step; a resumed step counts with its last value.

    Empty cells are left out, and so are values that no plot could show (not finite, or beyond 1e30).

    Raises:
        DataError: the file is missing, unreadable, or has no row with a step.
    """
    path = _existing(run, "metrics.csv")
    columns: dict[str, dict[int, float]] = {name: {} for name in METRICS}
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(file):
                _take_row(row, columns)
    except (OSError, csv.Error) as error:
        raise DataError(f"metrics.csv cannot be shown: {error}.") from error
    if not any(columns.values()):
        raise DataError("metrics.csv holds no measurement yet.")
    return {name: sorted(values.items()) for name, values in columns.items()}


def _take_row(row: Mapping[str | None, Any], columns: dict[str, dict[int, float]]) -> None:
    step = _number(row.get("step"))
    if step is None or not 0 <= step < MAX_STEP:
        return
    for name, values in columns.items():
        value = _number(row.get(name))
        if value is not None:
            values[int(step)] = value


def _number(cell: Any) -> float | None:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if abs(value) < MAX_NUMBER else None


def _existing(run: Path, name: str) -> Path:
    path = run / name
    if not path.is_file():
        raise DataError(f"{name} is not in the run folder.")
    return path


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except DataError as error:
        raise DataError(f"{path.name} cannot be shown: it is unreadable or not JSON.") from error


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path.name} cannot be shown: it is unreadable or not YAML.") from error
