"""The images in a folder: which files and folders are one, what is walked through, how they are called to a user."""

import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from pixelwise.data.names import MASK_SUFFIX
from pixelwise.files import ZARR_DOCUMENTS
from pixelwise.formats import FORMATS, SOURCE_SUFFIXES
from pixelwise.formats.local import HEAD_BYTES, is_dicom_head, printable
from pixelwise.formats.registry import stem_of, suffix_of

_BARE = re.compile(r"(?!dicomdir$)[^.]*|.*\.(?:\d+|ima)")  # names that scanners give to DICOM files
_UNREADABLE = (
    ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jxl", ".ico", ".svg", ".psd", ".xcf", ".raw", ".nef", ".cr2",
    ".dng", ".exr", ".mat", ".npz", ".h5", ".hdf5", ".mha", ".mhd", ".nrrd", ".mp4", ".avi", ".zip",
)  # fmt: skip
_MAX_LOOKS = 20  # files of such names in a folder that are opened


def walk(folder: Path, notes: list[str] | None = None) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` that follows links to folders, but into no folder that it is in already; hidden ones are left out."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = Path(parent)
        kept = []
        for name in sorted(folders):
            if name.startswith((".", "__MACOSX")):
                continue
            if (here / name).is_symlink() and _leads_back(here, (here / name).resolve()):
                if notes is not None:
                    notes.append(f"the link {printable(here / name)} leads to a folder that it lies in; not followed.")
                continue
            kept.append(name)
        folders[:] = kept
        yield here, folders, names


def _leads_back(here: Path, target: Path) -> bool:
    """Whether a link to `target` leads to where the walk came from, perhaps through other links."""
    return any(path.resolve().is_relative_to(target) for path in (here, *here.parents))


def image_files(
    folder: Path, other_keys: Container[str] = (), notes: list[str] | None = None
) -> list[tuple[str, Path]]:
    """The images below a folder as (path below it without suffix, file), sorted; hidden ones are left out.

    A Zarr is one image, and so is a folder of DICOM files that is one series, unless its files have partners of their own:
    `other_keys` are the paths, without suffix, of what is to be paired with these. What is passed over is told in `notes`.
    """
    found, passed = [], Counter[str]()
    for here, folders, names in walk(folder, notes):
        inner = here.relative_to(folder)
        files = [(inner / stem_of(name)).as_posix() for name in names]
        if here != folder and is_zarr(here):
            folders.clear()
            found.append((inner.with_name(stem_of(inner.name)).as_posix(), here))
            continue
        if is_series(here, names) and not any(
            key in other_keys or MASK_SUFFIX.sub("", key) in other_keys for key in files
        ):
            found.append((inner.as_posix(), here))
            continue
        for key, name in zip(files, names, strict=True):
            if name.startswith("."):
                continue
            if name.lower().endswith(SOURCE_SUFFIXES):
                found.append((key, here / name))
            elif suffix_of(name) in _UNREADABLE or ((here / name).is_symlink() and not (here / name).exists()):
                passed[suffix_of(name) or name] += 1
    if passed and notes is not None:
        shown = ", ".join(f"{count:,} x {suffix}" for suffix, count in passed.most_common(5))
        notes.append(f"{folder.name}/ holds files that cannot be read as images, and are not used: {shown}.")
    return sorted(found)


def has_images(folder: Path) -> bool:
    """Whether there is an image anywhere below a folder; the first one is enough."""
    return any(
        is_zarr(here) or any(name.lower().endswith(SOURCE_SUFFIXES) for name in names) or is_series(here, names)
        for here, _, names in walk(folder)
    )


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
