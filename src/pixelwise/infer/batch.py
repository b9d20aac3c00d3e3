"""The images of one call and the outputs they become: files, folders, globs and URLs, checked before anything starts."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Literal
from urllib.parse import unquote

from pixelwise.data.image_files import is_series, is_zarr
from pixelwise.data.names import channel_file, channel_of
from pixelwise.errors import PixelwiseError, UsageError
from pixelwise.extras import extra
from pixelwise.formats.base import LABELS
from pixelwise.formats.local import local_path, protocol_of, shown
from pixelwise.formats.registry import FORMATS, SOURCE_SUFFIXES, WRITERS, likely_suffix, stem_of
from pixelwise.formats.remote import list_images
from pixelwise.infer.options import JobOptions
from pixelwise.infer.outputs import Location, OutFolder

_ENDINGS = {  # of outputs that have one format
    "overlay": ("_overlay", ".png"),
    "probabilities": ("_probabilities", ".npy"),
    "geojson": ("", ".geojson"),
    "coco": ("_coco", ".json"),
}
_DICOM = FORMATS["dicom"].suffixes
_BESIDE = re.compile(  # suffixes of what lies beside images and is none
    r"\.(txt|csv|tsv|json|geojson|jsonl|xml|ya?ml|toml|ini|cfg|md|rst|html?|pdf|log|py|sh|zip|gz|tar|db|md5|sha\d*|msk|ovr|prj|"
    r"tab|cpg|shp|shx|dbf|tfw|jgw|pgw|bpw|gfw|tiff?w|jpe?gw|pngw|wld|safetensors|part)"
)
_MOST_SUFFIXES = 8


class OutputError(PixelwiseError):
    """An output cannot be written, so those of the next images could not be either."""


@dataclass(frozen=True)
class Task:
    """One image to label and the files it becomes."""

    path: Location
    outputs: dict[str, Location]  # "labels" and others; the content of the image may change their suffixes


@dataclass(frozen=True)
class Outcome:
    """What became of one input: "done", "skipped" (it was finished before) or "failed" (`message` says why)."""

    path: Location
    status: Literal["done", "skipped", "failed"]
    message: str = ""


@dataclass(frozen=True)
class Batch:
    """All the work of one call: the tasks, the inputs that do not exist, where the outputs go and what they are.

    `passed_over` counts and names the files of folders whose suffix is none of an image that is read; "" if there are none.
    """

    tasks: tuple[Task, ...]
    missing: tuple[Outcome, ...]
    folder: OutFolder
    options: JobOptions
    passed_over: str = ""

    def with_channels(self, files: int) -> "Batch":
        """The same work where so many files are the channels of one image: case_0000.png and others become case.png.

        Raises:
            UsageError: an image becomes what another one becomes too.
        """
        if files == 1:
            return self
        names = {str(task.path) for task in self.tasks}
        tasks = []
        for task in self.tasks:
            channel = channel_of(stem_of(PurePath(str(task.path)).name))
            if channel and 0 < channel[1] < files and channel_file(str(task.path), 0) in names:
                continue
            tasks.append(_without_number(task) if channel and channel[1] == 0 else task)
        outputs = Counter(str(output) for task in tasks for output in task.outputs.values())
        if twice := [output for output, count in outputs.items() if count > 1]:
            raise UsageError(f"two images would both become {twice[0]}. Label them in two calls with different --out.")
        return replace(self, tasks=tuple(tasks))


def _without_number(task: Task) -> Task:
    """The outputs of the first channel's file, named after the image."""
    outputs: dict[str, Location] = {}
    stem = stem_of(PurePath(task.path).name if isinstance(task.path, Path) else _name_in(shown(task.path)))
    for kind, output in task.outputs.items():
        folder, slash, name = str(output).rpartition("/")
        name = PurePath(name).name
        name = stem[:-5] + name.removeprefix(stem) if name.startswith(stem) else name
        outputs[kind] = output.with_name(name) if isinstance(output, Path) else f"{folder}{slash}{name}"
    return Task(task.path, outputs)


def plan_batch(inputs: Sequence[str | Path], out: str | Path, *, options: JobOptions | None = None) -> Batch:
    """Find the images and the names of their outputs; nothing is read or written yet.

    A file or URL is taken whatever its suffix. A folder is read recursively for image suffixes (hidden files, links to
    folders and `out` itself are left out), a glob such as `scans/**/*.tif` is expanded; both keep their sub-folders in
    `out`. A Zarr folder, and a folder of DICOM files only, is one image.

    Args:
        inputs: files, folders, globs, URLs.
        out: the folder of the results, or its URL.
        options: what is written, and how it is computed; by default labels alone.

    Raises:
        UsageError: there is no input at all, two inputs would become the same file, an output is also an input, or a
            package for what is wanted is not installed.
    """
    options = options or JobOptions()
    if options.format is not None and options.format not in WRITERS:
        raise UsageError(f"there is no format {options.format!r} for labels; there are {', '.join(WRITERS)}.")
    # What is missing should be known before the work, not when its result is to be written.
    if options.format and (package := WRITERS[options.format].package):
        extra(*package, f"writing {options.format}")
    for name in ("rasterio", "shapely") if options.geojson else ():
        extra(name, "geo", "GeoJSON")
    folder = OutFolder(out)
    local = folder.out if isinstance(folder.out, Path) else None
    if local is not None and local.exists() and not local.is_dir():
        raise UsageError(f"--out {local}: is a file. Name a folder for the results.")
    finder = Finder(local)
    for given in inputs:
        finder.add(str(given))
    if not finder.found:
        reasons = " ".join(message for _, message in finder.missing[:5])
        raise UsageError(f"no images to label. {reasons}".strip())
    missing = tuple(Outcome(path, "failed", message) for path, message in finder.missing)
    return Batch(_tasks(finder, folder, options), missing, folder, options, finder.passed_over)


def _tasks(finder: "Finder", folder: OutFolder, options: JobOptions) -> tuple[Task, ...]:
    """What becomes of the images, as far as their names tell; their content decides on the suffixes at the end."""
    kinds = [LABELS, *options.maps, *(kind for kind in _ENDINGS if getattr(options, kind))]
    owners: dict[PurePath, tuple[Location, Location]] = {}
    tasks, clashes = [], []
    for (_, name), (path, likely) in finder.found.items():
        task = Task(path, {})
        for kind in kinds:
            wanted = WRITERS[options.format].suffixes[0] if options.format else likely
            ending, suffix = _ENDINGS.get(kind) or ("" if kind == LABELS else f"_{kind}", wanted)
            if kind in options.maps and suffix == ".png":
                suffix = ".tif"
            bare = name.with_name(name.name + ending)
            task.outputs[kind] = output = folder.at(f"{bare}{suffix}")
            first, its = owners.setdefault(bare, (path, output))
            if first != path:  # whatever the suffixes, for these may still change
                result = output if its == output else f"{folder.at(bare)}, whatever its suffix"
                clashes.append(f"{first} and {path} would both become {result}")
        tasks.append(task)
    if clashes:
        more = f", and {len(clashes) - 5:,} more" if len(clashes) > 5 else ""
        listed = "; ".join(clashes[:5])
        raise UsageError(f"{listed}{more}. Rename one, or label them in two calls with different --out folders.")
    inputs = {real(task.path) for task in tasks}
    for task in tasks:
        for output in task.outputs.values():
            if real(output) in inputs:
                raise UsageError(
                    f"the result of {task.path} would replace the input {output}. Choose another --out folder."
                )
    return tuple(tasks)


class Finder:
    """Collects the images that arguments mean, and the arguments that mean none; leaves out the folder `out`."""

    def __init__(self, out: Path | None) -> None:
        self.out = real(out) if out is not None else None
        # By real place, and name of the output without a suffix: the image, and the likely suffix of its labels.
        self.found: dict[tuple[Location, PurePath], tuple[Location, str]] = {}
        self.missing: list[tuple[Location, str]] = []  # argument or name, what is wrong with it
        self._passed_over = Counter[str]()  # suffixes of files of folders

    @property
    def passed_over(self) -> str:
        """One line on the files of folders that are not labelled for their suffix; "" if there are none."""
        if not self._passed_over:
            return ""
        listed = [f"{count:,} {suffix}" for suffix, count in self._passed_over.most_common(_MOST_SUFFIXES)]
        more = len(self._passed_over) - _MOST_SUFFIXES
        listed += [f"{more} suffixes more"] if more > 0 else []
        return (
            f"passed over in folders: {', '.join(listed)}; images are looked for by {' '.join(sorted(SOURCE_SUFFIXES))}. "
            "Give a file by its name to have it tried, or convert it."
        )

    def add(self, given: str) -> None:
        """Take what one argument means."""
        path = local_path(given)
        try:
            self._add_url(given) if path is None else self._add(Path(path))
        except OSError as error:
            self._unreadable(given, error)

    def _add_url(self, url: str) -> None:
        # A folder says so by its slash; a server need not know folders.
        bare = shown(url)
        if not bare.endswith("/") and not set(PurePosixPath(bare).name) & set("*?["):
            return self._found(url, PurePosixPath(_name_in(bare)), url)
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
            # The folder itself may be an image.
            inner = PurePosixPath(item.removeprefix(base).lstrip("/") or PurePosixPath(item).name)
            self._found(item, inner, item)
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
        for parent, folders, names in os.walk(folder, onerror=lambda error: self._unreadable(error.filename, error)):
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
                if name.startswith("."):
                    continue
                if name.lower().endswith(SOURCE_SUFFIXES):
                    self._add_file(here / name, base)
                elif (suffix := PurePath(name.lower()).suffix) and not _BESIDE.fullmatch(suffix):
                    self._passed_over[suffix] += 1

    def _add_file(self, path: Path, base: Path) -> None:
        # A folder given by itself is named after itself, also if it was written as `.` or `..`.
        shown_path = path if path.is_relative_to(base) else Path(os.path.abspath(path))  # noqa: PTH100
        self._found(real(path), PurePath(shown_path.relative_to(base)), path)

    def _found(self, place: Location, name: PurePath, image: Location) -> None:
        bare = name.with_name(stem_of(name.name))
        self.found.setdefault((place, bare), (image, likely_suffix(PurePath(str(image)).name)))

    def _unreadable(self, name: Location, error: OSError) -> None:
        self._miss(name, f"cannot be read ({error.strerror}).")

    def _miss(self, name: Location, message: str) -> None:
        self.missing.append((name, f"{name}: {message}"))


def _with_series(urls: Sequence[str]) -> list[str]:
    """Several DICOM files that have a folder to themselves are one image, as `is_series` says of local ones."""
    folders = defaultdict(list)
    for url in urls:
        folders[url.rpartition("/")[0]].append(url.lower().endswith(_DICOM))
    series = {folder for folder, are_dicom in folders.items() if len(are_dicom) > 1 and all(are_dicom)}
    return list(dict.fromkeys(folder if (folder := url.rpartition("/")[0]) in series else url for url in urls))


def real(place: Location) -> Location:
    """A path without links; unlike `Path.resolve` this survives a loop of links. A URL as it is."""
    return Path(os.path.realpath(place)) if isinstance(place, Path) else place


def _name_in(url: str) -> str:
    """The name of what a URL leads to. Servers of the web write it with %20 for spaces, object stores as it is."""
    name = PurePosixPath(url).name
    if protocol_of(url) not in ("http", "https"):
        return name
    return re.sub(r"[/\\\x00]", "_", unquote(name))
