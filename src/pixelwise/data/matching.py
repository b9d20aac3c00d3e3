"""Which mask belongs to which image: names are matched by stem, with the usual endings left out, or listed in a CSV file."""

import csv
import os
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pixelwise.data.pairs import SPLIT_ALIASES, Pair, Problem, counted, first_of
from pixelwise.errors import DataError
from pixelwise.files import ZARR_DOCUMENTS
from pixelwise.formats import FORMATS, SOURCE_SUFFIXES
from pixelwise.formats.local import HEAD_BYTES, is_dicom_head, printable
from pixelwise.formats.registry import stem_of

_MASK_SUFFIX = re.compile(
    r"[_\-. ](masks?|labels?|gt|gtfine_labelids|gtfine_labeltrainids|label_?ids|label_?trainids|seg|segmentation|annot"
    r"|anno|annotation|ground_?truth|manual\d|l|target)$",
    re.IGNORECASE,
)
_IMAGE_SUFFIX = re.compile(r"[_\-. ](leftimg8bit|image|img|sat|rgb)$", re.IGNORECASE)
_BARE = re.compile(r"(?!dicomdir$)[^.]*|.*\.(?:\d+|ima)")  # names that scanners give to DICOM files
_MAX_LOOKS = 20  # files of such names in a folder that are opened
_NO_MASK = re.compile(r"_gtfine_(color|instanceids|instancetrainids)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of images with its folder of masks; `split` is "" where the layout names none."""

    split: str
    images: Path
    masks: Path | None


def match_source(source: Source, root: Path) -> tuple[list[Pair], list[Problem]]:
    """Pair the images and masks of one source, still without groups, and say what stays alone."""
    wanted = {key for key, _ in image_files(source.images)}
    found = _by_key(image_files(source.masks, wanted) if source.masks else [])
    masks = {key: paths for key, paths in found.items() if not _NO_MASK.search(key)}
    images = _by_key(image_files(source.images, masks))
    doubled = [*images.items(), *found.items()]
    if list(images) == ["."]:  # the folder itself is a series: it has one mask, whatever its name
        images = {source.images.name: images["."]}
        masks = {source.images.name: next(iter(masks.values()))} if len(masks) == 1 else masks
    claims, orphans = _choose(images, masks)
    where = source.split or source.images.name
    problems = [_twice(where, key, paths, root) for key, paths in (*doubled, *claims.items()) if len(paths) > 1]
    if orphans:
        count = counted(len(orphans), "mask", "has no image", "have no image")
        files = tuple(relative(path, root) for path in orphans)
        problems.append(Problem("warning", f"{where}: {count}: {first_of(files, 5)}. They are not used.", files))
    pairs = [
        Pair(image=paths[0], mask=claims.get(key, [None])[0], split=source.split, name=key)
        for key, paths in sorted(images.items())
    ]
    lonely = [pair.image for pair in pairs if pair.mask is None]
    if lonely:
        problems.append(_lonely(where, lonely, len(pairs), root, source.split))
    return pairs, problems


def image_files(folder: Path, other_keys: Container[str] = ()) -> list[tuple[str, Path]]:
    """The images below a folder as (path below it without suffix, file), sorted; hidden ones are left out.

    A Zarr is one image, and so is a folder of DICOM files that is one series, unless its files have partners of their own:
    `other_keys` are the paths, without suffix, of what is to be paired with these.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        here = Path(parent)
        inner = here.relative_to(folder)
        files = [(inner / stem_of(name)).as_posix() for name in names]
        if here != folder and is_zarr(here):
            folders.clear()
            found.append((inner.with_name(stem_of(inner.name)).as_posix(), here))
            continue
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))]
        if is_series(here, names) and not any(
            key in other_keys or _MASK_SUFFIX.sub("", key) in other_keys for key in files
        ):
            found.append((inner.as_posix(), here))
            continue
        for key, name in zip(files, names, strict=True):
            if name.lower().endswith(SOURCE_SUFFIXES) and not name.startswith("."):
                found.append((key, here / name))
    return sorted(found)


def is_zarr(folder: Path) -> bool:
    """Whether a folder is an array, by what is in it or, so that a damaged one is missed, by its name."""
    return folder.name.lower().endswith(".zarr") or any((folder / name).is_file() for name in ZARR_DOCUMENTS)


def is_series(folder: Path, names: Iterable[str]) -> bool:
    """Whether the files right in a folder are one DICOM series.

    They are if there are no other images, and either several files are named .dcm, or some without a suffix, or with a
    number as suffix, are DICOM by their content.
    """
    names = [name for name in names if not name.startswith(".")]
    images = [name for name in names if name.lower().endswith(SOURCE_SUFFIXES)]
    if any(not name.lower().endswith(FORMATS["dicom"].suffixes) for name in images):
        return False
    bare = [name for name in names if _BARE.fullmatch(name.lower())]
    return len(images) > 1 or any(_is_dicom(folder / name) for name in sorted(bare)[:_MAX_LOOKS])


def _is_dicom(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return is_dicom_head(file.read(HEAD_BYTES))
    except OSError:
        return False


def relative(path: Path, root: Path) -> str:
    """`path` as a user sees it below `root`."""
    return printable((path.relative_to(root) if path.is_relative_to(root) else path).as_posix())


def _by_key(files: list[tuple[str, Path]]) -> dict[str, list[Path]]:
    grouped: dict[str, list[Path]] = {}
    for key, path in files:
        grouped.setdefault(key, []).append(path)
    return grouped


def _choose(
    images: Mapping[str, list[Path]], masks: Mapping[str, list[Path]]
) -> tuple[dict[str, list[Path]], list[Path]]:
    """The masks that claim each image, by its key, and masks without image. Equal names come first."""
    by_stem = {_IMAGE_SUFFIX.sub("", key): key for key in images}
    claims: dict[str, list[Path]] = {}
    orphans = []
    for key, (path, *_) in masks.items():
        stem, folder = _MASK_SUFFIX.sub("", key), key.rpartition("/")[0]
        target = next((name for name in (key, stem) if name in images), None) or by_stem.get(stem) or by_stem.get(key)
        target = target or (folder if folder in images else None)  # a mask in a folder named as the image
        if target is None:
            orphans.append(path)
        else:
            claims.setdefault(target, []).append(path)
    return claims, orphans


def _twice(where: str, key: str, paths: list[Path], root: Path) -> Problem:
    names = tuple(relative(path, root) for path in paths)
    return Problem("fatal", f"{where}: {' and '.join(names)} both stand for {key!r}. Keep one of them.", names)


def _lonely(where: str, lonely: list[Path], total: int, root: Path, split: str) -> Problem:
    files = tuple(relative(path, root) for path in lonely)
    if split == "test" and len(lonely) == total:
        return Problem("warning", f"test: none of the {total:,} images has a mask, so it cannot be evaluated.", files)
    count = counted(len(lonely), "image", "has no mask", "have no mask")
    advice = "Add a mask of the same name for each, or remove them."
    return Problem("fatal", f"{where}: {count}: {first_of(files, 5)}. {advice}", files)


_NEEDED = {"image", "mask"}


def find_csv(root: Path) -> list[Path]:
    """The CSV files that list pairs: `root` itself, or those directly in it with an image and a mask column."""
    if root.is_file():
        return [root]
    found = [path for path in sorted(root.glob("*.csv")) if path.is_file() and _columns(path) >= _NEEDED]
    if len(found) > 1 and not all(path.stem.lower() in SPLIT_ALIASES for path in found):
        names = ", ".join(path.name for path in found)
        raise DataError(f"{root}: several CSV files list pairs ({names}). Give the one to use instead of the folder.")
    return found


def read_csv(path: Path) -> tuple[list[Pair], list[Problem]]:
    """Read one list of pairs. A file named train.csv, val.csv or test.csv needs no column for the split."""
    own = SPLIT_ALIASES.get(path.stem.lower(), "")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            pairs = [_pair(path, line, row, own) for line, row in _rows(path, csv.reader(file, strict=True))]
    except (OSError, csv.Error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as CSV ({error}).") from error
    if not pairs:
        raise DataError(f"{path}: lists no pairs; below the line `image,mask` one line for each pair is wanted.")
    if len({bool(pair.split) for pair in pairs}) > 1:
        raise DataError(f"{path}: some lines give a split and some do not. Give one for all of them or for none.")
    return pairs, _problems(path, pairs)


def _rows(path: Path, reader: Iterator[list[str]]) -> Iterator[tuple[int, dict[str, str]]]:
    header = [name.strip().lower() for name in next(reader, [])]
    if not set(header) >= _NEEDED:
        shown = ", ".join(header)[:200] or "nothing"
        raise DataError(
            f"{path}: the first line must name the columns image and mask (and perhaps split); it has {shown}."
        )
    for line, cells in enumerate(reader, start=2):
        if any(cell.strip() for cell in cells):
            if len(cells) != len(header):
                raise DataError(
                    f"{path}, line {line}: {len(cells)} cells, but the first line names {len(header)} columns."
                )
            yield line, {name: cell.strip() for name, cell in zip(header, cells, strict=True)}


def _pair(path: Path, line: int, row: dict[str, str], own_split: str) -> Pair:
    if not row["image"]:
        raise DataError(f"{path}, line {line}: no image is named.")
    given = row.get("split", "")
    split = SPLIT_ALIASES.get(given.lower(), "") if given else own_split
    if given and not split:
        raise DataError(f"{path}, line {line}: split {given!r} is not one of train, val, test.")
    named, mask = Path(row["image"]), path.parent / row["mask"] if row["mask"] else None
    return Pair(image=path.parent / named, mask=mask, split=split, name=named.with_name(stem_of(named.name)).as_posix())


def _problems(path: Path, pairs: list[Pair]) -> list[Problem]:
    problems, seen = [], set()
    for pair in pairs:
        name = relative(pair.image, path.parent)
        if (pair.split, pair.name) in seen:
            message = f"{path.name}: {name} stands in two lines (suffixes do not count). Keep one of them."
            problems.append(Problem("fatal", message, (name,)))
        seen.add((pair.split, pair.name))
    lonely = [relative(pair.image, path.parent) for pair in pairs if pair.mask is None]
    if lonely:
        count = counted(len(lonely), "image", "has no mask", "have no mask")
        message = f"{path.name}: {count}, the first is {lonely[0]}. Name a mask for each, or take the lines out."
        problems.append(Problem("fatal", message, tuple(lonely)))
    return problems


def _columns(path: Path) -> set[str]:
    """The names in the first line; none for a file that is no CSV."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return {name.strip().lower() for name in next(csv.reader(file), [])}
    except (OSError, csv.Error, ValueError):
        return set()
