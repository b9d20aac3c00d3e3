"""What of the images of a data folder is not read: further images of a file, and files beside it that others follow."""

from collections.abc import Iterator

from pixelwise.data.matching import relative
from pixelwise.data.pairs import DataFolder, Problem, first_of
from pixelwise.data.scan import PairScan


def left_out(split: str, scans: list[PairScan], folder: DataFolder) -> Iterator[Problem]:
    """One warning for each kind of what is left out, with the images of a split that it is true of."""
    found: dict[str, list[str]] = {}
    for scan in scans:
        for text in scan.image.remarks if scan.image else ():
            found.setdefault(text, []).append(relative(scan.pair.image, folder.root))
    for text, names in found.items():
        yield Problem("warning", f"{split}: {first_of(names, 3)}: {text}.", tuple(names))
