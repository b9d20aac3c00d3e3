"""The data card of the report: what the network was trained on."""

from dataclasses import dataclass
from pathlib import Path

from pixelwise.data.labels import Color
from pixelwise.report import wording
from pixelwise.report.reading import Classes, DataFile, read_model

MAX_SIZES = 6
MAX_PROBLEMS = 20
FINGERPRINT = 16  # hex digits shown, of 64


@dataclass(frozen=True, kw_only=True)
class BalanceRow:
    """One class in the data: its share of the labelled pixels and the images that show it, for each split."""

    name: str
    color: Color
    shares: tuple[float, ...]
    images: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class SplitRow:
    """One split of the data."""

    name: str
    images: int
    labelled: int
    void_share: float


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """What the network was trained on."""

    facts: wording.Facts
    splits: tuple[SplitRow, ...]
    balance: tuple[BalanceRow, ...]
    problems: tuple[tuple[str, str], ...]
    more_problems: int


def data_card(run: Path, classes: Classes) -> DataCard:
    """What data.json says.

    Raises:
        DataError: it is missing or of another form.
    """
    data = read_model(run, "data.json", DataFile)
    num_classes = max((len(split.pixels) for split in data.splits.values()), default=0)
    known = classes.fit(num_classes)
    problems = [(problem.severity, problem.message) for problem in data.problems]
    splits = [
        SplitRow(
            name=name,
            images=split.images,
            labelled=sum(split.pixels),
            void_share=split.void / max(1, split.void + sum(split.pixels)),
        )
        for name, split in data.splits.items()
    ]
    return DataCard(
        facts=_data_facts(data),
        splits=tuple(splits),
        balance=tuple(_balance(data, known, index) for index in range(num_classes)),
        problems=tuple(problems[:MAX_PROBLEMS]),
        more_problems=max(0, len(problems) - MAX_PROBLEMS),
    )


def _balance(data: DataFile, classes: Classes, index: int) -> BalanceRow:
    shares, images = [], []
    for split in data.splits.values():
        pixels = split.pixels[index] if index < len(split.pixels) else 0
        shares.append(pixels / max(1, sum(split.pixels)))
        images.append(split.images_with[index] if index < len(split.images_with) else None)
    return BalanceRow(
        name=classes.names[index], color=classes.colors[index], shares=tuple(shares), images=tuple(images)
    )


def _data_facts(data: DataFile) -> wording.Facts:
    sizes = sorted(data.sizes.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{size.replace('x', ' × ')} ({number:,})" for size, number in sizes[:MAX_SIZES])
    more = f" and {len(sizes) - MAX_SIZES:,} other sizes" if len(sizes) > MAX_SIZES else ""
    facts = [
        ("Folder", data.root),
        ("Layout", data.layout),
        ("Images", f"{sum(split.images for split in data.splits.values()):,}"),
        ("Sizes, px", shown + more),
        ("Channels", str(data.channels)),
        ("Pixel type", ", ".join(data.dtypes)),
        ("Mean", _channels(data.mean)),
        ("Standard deviation", _channels(data.std)),
        ("Fingerprint", data.fingerprint[:FINGERPRINT]),
    ]
    return [(key, value) for key, value in facts if value]


def _channels(values: list[float | None]) -> str:
    return ", ".join(wording.DASH if value is None else f"{value:.3f}" for value in values)
