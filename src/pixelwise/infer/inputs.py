"""The images that arguments mean: files, folders, globs and URLs, and folders that are one image (Zarr, DICOM series)."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import unquote

from pixelwise.data.matching import is_series, is_zarr, stem_of
from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.formats.registry import SOURCE_SUFFIXES
from pixelwise.formats.remote import is_url, list_images, local_path, protocol_of, shown

Location = Path | str
"""A path, or a URL as text."""

_DICOM = (".dcm", ".dicom")


class Finder:
    """Collects the images that arguments mean, each known by its real place and its name below the output folder.

    Args:
        out: the output folder, which is left out; None if it is a URL.

    Attributes:
        found: (real place, name of the output without a suffix) -> the image, in the order of the arguments.
        missing: (argument or name, what is wrong with it).

    Example:
        >>> finder = Finder(None)
        >>> finder.add("no/such.tif")
        >>> [message for _, message in finder.missing]
        ['no/such.tif: there is no such file or folder.']
    """

    def __init__(self, out: Path | None) -> None:
        self.out = real(out) if out is not None else None
        self.found: dict[tuple[Location, PurePath], Location] = {}
        self.missing: list[tuple[Location, str]] = []

    def add(self, given: str) -> None:
        """Take what one argument means.

        Raises:
            UsageError: it is the output folder, or a URL of an unknown kind.
        """
        path = local_path(given) if is_url(given) else given
        try:
            self._add_url(given) if path is None else self._add(Path(path))
        except OSError as error:
            self._miss(given, f"cannot be read ({error.strerror}).")

    def _add_url(self, url: str) -> None:
        # A folder says so by its slash; a server need not know folders.
        bare = shown(url)
        if not bare.endswith("/") and not set(PurePosixPath(bare).name) & set("*?["):
            return self._found(url, PurePosixPath(stem_of(_name_in(bare))), url)
        base = bare.partition("*")[0].rpartition("/")[0]
        try:
            listed = list_images(url.rstrip("/"), SOURCE_SUFFIXES)
        except UsageError:
            raise
        except PixelwiseError as error:
            self.missing.append((url, str(error)))
            return None
        if not listed:
            self._miss(bare, "holds no images.")
        for item in listed if set(bare) & set("*?[") else _with_series(listed):
            inner = PurePosixPath(item.removeprefix(base).lstrip("/"))
            name = inner.name or PurePosixPath(item).name  # the folder itself may be an image
            self._found(item, inner.with_name(stem_of(name)) if inner.name else PurePosixPath(stem_of(name)), item)
        return None

    def _add(self, path: Path) -> None:
        before = len(self.found)
        if path.is_dir():
            self._add_folder(path, path)
            if len(self.found) == before:
                self._miss(path, f"holds no images ({', '.join(sorted(SOURCE_SUFFIXES))}).")
        elif os.path.lexists(path):
            self._add_file(path, path.parent)
        elif set(str(path)) & set("*?["):
            self._add_glob(path)
        else:
            self._miss(path, "there is no such file or folder.")

    def _add_glob(self, pattern: Path) -> None:
        parts = pattern.parts
        first = next(index for index, part in enumerate(parts) if set(part) & set("*?["))
        base = Path(*parts[:first])
        try:
            matches = sorted(base.glob(str(PurePath(*parts[first:]))))
        except (ValueError, NotImplementedError) as error:
            return self._miss(pattern, f"is not a glob that can be used ({error}).")
        if not matches:
            self._miss(pattern, "no file matches.")
        for match in matches:
            if match.is_dir():
                self._add_folder(match, base)
            elif not match.name.startswith("."):
                self._add_file(match, base)

    def _add_folder(self, folder: Path, base: Path) -> None:
        if real(folder) == self.out:
            raise UsageError(f"--out {self.out}: is also an input. Choose another folder for the results.")
        for parent, folders, names in os.walk(folder, onerror=self._unreadable):
            here = Path(parent)
            above = base if here != base else Path(os.path.abspath(here)).parent  # noqa: PTH100
            if is_zarr(here):
                folders.clear()
                self._add_file(here, above)
                continue
            inner = [name for name in sorted(folders) if not name.startswith(".")]
            folders[:] = [name for name in inner if real(here / name) != self.out]
            if is_series(here, names):
                self._add_file(here, above)
                continue
            for name in sorted(names):
                if not name.startswith(".") and name.lower().endswith(SOURCE_SUFFIXES):
                    self._add_file(here / name, base)

    def _add_file(self, path: Path, base: Path) -> None:
        # A folder given by itself is named after itself, also if it was written as `.` or `..`.
        shown_path = path if path.is_relative_to(base) else Path(os.path.abspath(path))  # noqa: PTH100
        inner = PurePath(shown_path.relative_to(base))
        self._found(real(path), inner.with_name(stem_of(inner.name)), path)

    def _found(self, place: Location, name: PurePath, image: Location) -> None:
        self.found.setdefault((place, name), image)

    def _unreadable(self, error: OSError) -> None:
        self._miss(error.filename, f"cannot be read ({error.strerror}).")

    def _miss(self, name: Location, message: str) -> None:
        self.missing.append((name, f"{name}: {message}"))


def _with_series(urls: Sequence[str]) -> list[str]:
    """Several DICOM files that have a folder to themselves are one image, as `is_series` says of local ones.

    Example:
        >>> _with_series(["s3://b/a/1.dcm", "s3://b/a/2.dcm", "s3://b/c/1.dcm", "s3://b/d.png"])
        ['s3://b/a', 's3://b/c/1.dcm', 's3://b/d.png']
    """
    folders = defaultdict(list)
    for url in urls:
        folders[url.rpartition("/")[0]].append(url)
    series = {
        folder
        for folder, inner in folders.items()
        if len(inner) > 1 and all(url.lower().endswith(_DICOM) for url in inner)
    }
    return list(dict.fromkeys(url.rpartition("/")[0] if url.rpartition("/")[0] in series else url for url in urls))


def find_images(inputs: Sequence[str | Path], out: Path | None) -> Finder:
    """All the images that arguments mean.

    Raises:
        UsageError: there is no image at all, or an input is the output folder.
    """
    finder = Finder(out)
    for given in inputs:
        finder.add(str(given))
    if not finder.found:
        reasons = " ".join(message for _, message in finder.missing[:5])
        raise UsageError(f"no images to label. {reasons}".strip())
    return finder


def real(path: Path) -> Path:
    """`path` without links; unlike `Path.resolve` this survives a loop of links."""
    return Path(os.path.realpath(path))


def _name_in(url: str) -> str:
    """The name of what a URL leads to. Servers of the web write it with %20 for spaces, object stores as it is.

    Example:
        >>> _name_in("https://host/slides/a%20b.tif"), _name_in("s3://bucket/a%20b.tif"), _name_in("https://host/a%2Fb.tif")
        ('a b.tif', 'a%20b.tif', 'a_b.tif')
    """
    name = PurePosixPath(url).name
    if protocol_of(url) not in ("http", "https"):
        return name
    return re.sub(r"[/\\\x00]", "_", unquote(name))
