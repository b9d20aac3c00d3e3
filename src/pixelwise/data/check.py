"""Everything that can be known about a data set before it is trained on: what it holds, and what is wrong with it."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pixelwise.data.labels import IGNORE_INDEX, LabelSpec, as_lists
from pixelwise.data.numbers import Numbers
from pixelwise.data.pairs import SPLITS, DataFolder, Pair, Problem
from pixelwise.data.places import Places
from pixelwise.data.problems import fatal_first, file_problems, find_problems
from pixelwise.data.samples import are_pictures, crs_name
from pixelwise.data.scan import ImageScan, PairScan, in_threads, scan_pair
from pixelwise.errors import DataError

_LARGEST = 1e29  # that is shown of a range: beyond are fill values that nobody declared

__all__ = ["Inspection", "SplitStats", "inspect_data"]


@dataclass(frozen=True, kw_only=True)
class SplitStats:
    """The pixels of one split."""

    images: int  # how many pairs
    pixels: tuple[int, ...]  # of each class
    void: int  # pixels that are no class's
    images_with: tuple[int, ...]  # for each class, how many images contain it
    # For each class, the pixels (void too) of the images that contain it, which median-frequency balancing divides by
    # (Eigen and Fergus, ICCV 2015, section 6.3.2).
    image_pixels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect_data` found.

    Attributes:
        folder: the data that were inspected.
        channels: of the images; 3 where grey and colour are mixed.
        dtypes: how many images have each number type, for example {"uint8": 701}.
        sizes: how many images have each "WIDTHxHEIGHT", the most frequent first.
        splits: statistics per split.
        numbers: per channel, of the training images, in unit scale (0..1 for whole numbers): mean, deviation (1 for a
            channel that is constant, so that it can be divided by), range and types.
        fingerprint: SHA-256 over the splits, names and decoded pixels of all images and masks.
        problems: fatal ones first.
        scans: what each pair of the folder holds, in its order.
        reading: the options with which the images were read.
    """

    folder: DataFolder
    channels: int
    dtypes: dict[str, int]
    sizes: dict[str, int]
    splits: dict[str, SplitStats]
    numbers: Numbers
    fingerprint: str
    problems: tuple[Problem, ...]
    scans: tuple[PairScan, ...] = ()
    reading: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the training images, per channel, in unit scale."""
        return self.numbers.mean

    @property
    def std(self) -> tuple[float, ...]:
        """As `mean`; 1 for a channel that is constant."""
        return self.numbers.std

    def samples(self, split: str) -> tuple[Pair, ...]:
        """The pairs of a split, those of volumes plane by plane."""
        made: list[Pair] = []
        for scan in self.scans:
            planes = scan.image.grid.planes if scan.image else 1
            if scan.pair.split == split and planes == 1:
                made.append(scan.pair)
            elif scan.pair.split == split:
                made += [replace(scan.pair, plane=plane, name=f"{scan.pair.name}:{plane}") for plane in range(planes)]
        return tuple(made)

    def places(self) -> dict[tuple[Path | None, int], Places]:
        """Where the values lie in the training masks that are read by windows, by file and plane."""
        return {
            (scan.pair.mask, plane): places
            for scan in self.scans
            if scan.pair.split == "train" and scan.mask and not are_pictures(scan.pair)
            for plane, places in enumerate(scan.mask.places)
        }

    def describe_images(self) -> dict[str, dict[str, int]]:
        """How many images there are of each format, and of each size of a pixel and coordinate system that is known."""
        images = [scan.image for scan in self.scans if scan.image]
        found = {
            "formats": Counter(image.format for image in images),
            "spacings": Counter(image.spacing for image in images if image.spacing),
            "crs": Counter(crs_name(image.grid.crs) for image in images if image.grid.crs),
            "planes": Counter(str(image.grid.planes) for image in images if image.grid.planes > 1),
        }
        return {key: dict(counts.most_common()) for key, counts in found.items()}

    def raise_if_fatal(self) -> None:
        """Stop here if there are fatal problems.

        Raises:
            DataError: listing all of them.
        """
        raise_if_fatal(self.folder, self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the single pairs, for JSON."""
        content = {
            "root": str(self.folder.root),
            "layout": self.folder.layout,
            **self.folder.choices,
            "labels": self.folder.labels.to_dict(),
            "channels": self.channels,
            "dtypes": self.dtypes,
            "sizes": self.sizes,
            "splits": {name: asdict(stats) for name, stats in self.splits.items()},
            "mean": self.mean,
            "std": self.std,
            "low": self.numbers.low,
            "high": self.numbers.high,
            "fingerprint": self.fingerprint,
            "reading": dict(self.reading),
            **self.describe_images(),
            "problems": [asdict(problem) for problem in self.problems],
        }
        return {key: as_lists(value) for key, value in content.items()}


def raise_if_fatal(folder: DataFolder, problems: Sequence[Problem]) -> None:
    """Raise a `DataError` that lists the fatal ones, if there are any."""
    fatal = [problem.message for problem in problems if problem.severity == "fatal"]
    if len(fatal) == 1:
        raise DataError(f"{folder.root}: {fatal[0]}")
    if fatal:
        listing = "".join(f"\n- {message}" for message in fatal)
        raise DataError(f"{folder.root}: {len(fatal)} problems must be fixed first:{listing}")


def check_split(
    folder: DataFolder, split: str, *, channels: int, reading: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Look at what is to be scored: the masks of a split, and the headers of its images. Returns warnings.

    Args:
        folder: as `open_data` gives it.
        split: its name.
        channels: of the network.
        reading: as of `inspect_data`.

    Raises:
        DataError: something is wrong that would make the scores wrong.
    """
    by_color = folder.labels.kind == "rgb"
    reading = {**(reading or {}), **folder.reading}
    scan = partial(scan_pair, reading=reading, channels=channels, by_color=by_color, with_pixels=False)
    others = tuple(f"{name}: " for name in SPLITS if name != split)
    of_names = [problem for problem in folder.problems if not problem.message.startswith(others)]
    problems = fatal_first([*of_names, *file_problems(folder, in_threads(scan, folder.split(split)), reading)])
    raise_if_fatal(folder, problems)
    return tuple(problem.message for problem in problems)


def inspect_data(
    folder: DataFolder,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    reading: Mapping[str, Any] | None = None,
) -> Inspection:
    """Read every image and mask once, in threads, and find out what they hold and what is wrong.

    Args:
        folder: as `open_data` gives it.
        on_progress: called with the number of pairs done and the number of all.
        reading: options of the images' formats (axis, level, series, intensity, ...), and `slices`, an odd number of
            neighbouring planes of volumes that are read as channels.

    Returns:
        The same result for the same files, whatever the number of threads. Problems do not raise here.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from pixelwise.data.layouts import open_data
        >>> root = Path(tempfile.mkdtemp())
        >>> for kind in ("images", "masks"):
        ...     (root / kind).mkdir()
        ...     for i in range(4):
        ...         Image.new("L", (8, 6), i % 2 + 10 * i * (kind == "images")).save(root / kind / f"{i}.png")
        >>> inspect_data(open_data(root)).sizes
        {'8x6': 4}
    """
    reading = {key: value for key, value in (reading or {}).items() if value is not None} | folder.reading
    scan = partial(scan_pair, reading=reading, by_color=folder.labels.kind == "rgb")
    scans = _with_one_opacity(in_threads(scan, folder.pairs, on_progress), scan, reading)
    images = [scan.image for scan in scans if scan.image is not None]
    channels = _common_channels(images)
    train = [scan.image for scan in scans if scan.image is not None and scan.pair.split == "train"]
    splits = {
        name: _split_stats([scan for scan in scans if scan.pair.split == name], folder.labels)
        for name in SPLITS
        if name in folder.splits
    }
    return Inspection(
        folder=folder,
        channels=channels,
        dtypes=dict(Counter(image.dtype for image in images).most_common()),
        sizes=dict(Counter(f"{image.grid.width}x{image.grid.height}" for image in images).most_common()),
        splits=splits,
        numbers=_numbers(train, channels),
        fingerprint=_fingerprint(scans),
        problems=find_problems(folder, scans, reading),
        scans=tuple(scans),
        reading=reading,
    )


def _with_one_opacity(
    scans: list[PairScan], scan_again: Callable[..., PairScan], reading: Mapping[str, Any]
) -> list[PairScan]:
    """A band that is marked as opacity and has one value may be both; where that of other images is a band, it is one."""
    kinds = {scan.image.opacity_kind for scan in scans if scan.image}
    if reading.get("bands") or not {"band", "constant"} <= kinds:
        return scans
    return [
        scan_again(scan.pair, channels=scan.image.channels + 1)
        if scan.image and scan.image.opacity_kind == "constant"
        else scan
        for scan in scans
    ]


def _common_channels(images: Sequence[ImageScan]) -> int:
    """Grey can be shown as RGB, so 1 and 3 are 3; of other mixtures the most frequent, and the check objects."""
    counts = Counter(image.channels for image in images)
    if set(counts) == {1, 3}:
        return 3
    return counts.most_common(1)[0][0] if counts else 0


def _split_stats(scans: Sequence[PairScan], labels: LabelSpec) -> SplitStats:
    pixels, images_with, image_pixels = np.zeros((3, 256), dtype=np.int64)
    for scan in scans:
        here = np.zeros(256, dtype=np.int64)
        for value, count in scan.counts.items():
            index = labels.class_of(value)
            if index is not None:
                here[index] += count
        here[IGNORE_INDEX] += scan.mask.grid.pixels - sum(scan.counts.values()) if scan.mask else 0
        pixels += here
        images_with += here > 0
        image_pixels += (here > 0) * (scan.mask.grid.pixels if scan.mask else 0)
    return SplitStats(
        images=len(scans),
        pixels=tuple(pixels[: labels.num_classes].tolist()),
        void=int(pixels[IGNORE_INDEX]),
        images_with=tuple(images_with[: labels.num_classes].tolist()),
        image_pixels=tuple(image_pixels[: labels.num_classes].tolist()),
    )


def _numbers(images: Sequence[ImageScan], channels: int) -> Numbers:
    """Over all pixels of all images together; grey counts for every channel of RGB."""
    usable = [image for image in images if image.channels in (channels, 1) and image.pixels and image.sums]
    pixels = sum(image.pixels for image in usable)
    found: dict[str, list[float]] = {"mean": [], "std": [], "low": [], "high": []}
    for channel in range(channels):
        total, squares, low, high = 0.0, 0.0, math.inf, -math.inf
        for image in usable:
            sums, place = image.sums, channel if image.channels > 1 else 0
            if sums is not None:
                total, squares = total + sums.total[place], squares + sums.squares[place]
                low, high = min(low, sums.low[place]), max(high, sums.high[place])
        mean = total / max(1, pixels)
        variance = max(squares / max(1, pixels) - mean**2, 0.0)
        found["mean"].append(float(mean))
        # Below this the difference of two nearly equal sums is rounding, not contrast.
        found["std"].append(float(variance**0.5) if variance > 1e-12 * max(mean**2, 1e-12) else 1.0)
        found["low"].append(float(max(low, -_LARGEST)) if pixels else 0.0)
        found["high"].append(float(min(high, _LARGEST)) if pixels else 0.0)
    of_bands = {key: tuple(values) for key, values in found.items()}
    return Numbers(**of_bands, dtypes=tuple(dict.fromkeys(image.dtype for image in usable)))


def _fingerprint(scans: Sequence[PairScan]) -> str:
    digest = hashlib.sha256()
    for scan in scans:
        image = scan.image.digest + scan.image.region if scan.image else "unreadable"
        mask = scan.mask.digest if scan.mask else "none"
        name = scan.pair.name.encode("utf-8", "surrogateescape")
        digest.update(scan.pair.split.encode() + b"\0" + name + f"\0{image}\0{mask}\n".encode())
    return digest.hexdigest()
