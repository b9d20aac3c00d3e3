"""Which mask belongs to which image: names are matched by stem, with the usual endings left out."""

import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pixelwise.data.names import (
    IMAGE_DIRS,
    MASK_DIRS,
    MASK_SUFFIX,
    channel_file,
    channel_of,
    closest,
    is_mask_name,
    is_no_class_mask,
    match_names,
)
from pixelwise.data.pairs import Pair, Problem, counted, first_of
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


@dataclass(frozen=True, kw_only=True)
class FolderPair:
    """A folder of images with its folder of masks; `split` is "" where the layout names none."""

    split: str
    images: Path
    masks: Path | None
    ending: str = ""  # of the names of the masks, where several masks for each image lie together


def match_source(
    source: FolderPair, root: Path, listed: Container[Path] | None = None
) -> tuple[list[Pair], list[Problem]]:
    """Pair the images and masks of one source, still without groups, and say what stays alone, of the `listed` images."""
    notes: list[str] = []
    images, masks, doubled = _files(source, notes)
    images, channels = _with_channels(images, masks)
    claims, orphans, by_words = match_names(images, masks)
    where = source.split or source.images.name
    problems = [Problem("warning", f"{where}: {note}") for note in notes]
    problems += _incomplete(where, channels, images, root)
    problems += _twice(where, doubled, root, "Keep one of them.")
    problems += _twice(where, list(claims.items()), root, _advice(claims))
    if by_words:
        image, mask = (relative(files[key][0], root) for files, key in zip((images, masks), by_words[0], strict=True))
        count = counted(len(by_words), "mask", "has", "have")
        message = f"{where}: {count} another spelling than the image that it was paired with: {mask} is for {image}."
        problems.append(Problem("warning", message))
    left = [relative(path, root) for path in orphans]
    if orphans:
        count = counted(len(orphans), "mask", "has no image", "have no image")
        problems.append(Problem("warning", f"{where}: {count}: {first_of(left, 5)}. They are not used.", tuple(left)))
    pairs = [
        Pair(
            image=paths[0],
            mask=claims.get(key, [None])[0],
            split=source.split,
            name=key,
            channel_files=1 + max(channels.get(key, [0])),
        )
        for key, paths in sorted(images.items())
        if listed is None or paths[0] in listed
    ]
    lonely = [pair.image for pair in pairs if pair.mask is None]
    if lonely:
        problems.append(_lonely(where, lonely, len(pairs), root, source.split, left))
    return pairs, problems


_Files = dict[str, list[Path]]


def _files(source: FolderPair, notes: list[str]) -> tuple[_Files, _Files, list[tuple[str, list[Path]]]]:
    """The images and the masks of a source by their keys, and the keys that several files have."""
    if source.masks == source.images:
        images, masks = _in_one_folder(image_files(source.images, notes=notes))
        return images, masks, [*images.items(), *masks.items()]
    wanted = {key for key, _ in image_files(source.images)}
    found = _by_key(image_files(source.masks, wanted, notes) if source.masks else [])
    found = {key: paths for key, paths in found.items() if key.casefold().endswith(source.ending.casefold())}
    masks = {key: paths for key, paths in found.items() if source.ending or not is_no_class_mask(key)}
    images = _by_key(image_files(source.images, masks, notes))
    doubled = [*images.items(), *found.items()]
    if list(images) == ["."]:  # the folder itself is a series: it has one mask, whatever its name
        images = {source.images.name: images["."]}
        masks = {source.images.name: next(iter(masks.values()))} if len(masks) == 1 else masks
    return images, masks, doubled


def _with_channels(images: _Files, masks: _Files) -> tuple[_Files, dict[str, list[int]]]:
    """The images with those as one whose channels lie in files of their own, and the numbers of the files that are there.

    Files are channels if there is a mask for all of them and none for each; without masks, if all images have the same.
    """
    named = {MASK_SUFFIX.sub("", key) for key in masks} | set(masks)
    found: dict[str, dict[int, str]] = {}
    for key in images:
        if (channel := channel_of(key)) and key not in named and (channel[0] in named or not masks):
            found.setdefault(channel[0], {})[channel[1]] = key
    alike = {tuple(sorted(there)) for there in found.values()}
    if not masks and (len(alike) != 1 or alike == {(0,)} or sum(map(len, found.values())) < len(images)):
        return images, {}
    if len(images.keys() & found.keys()):  # case_7 lies beside case_7_0000: nobody knows
        return images, {}
    folded = {
        key: paths
        for key, paths in images.items()
        if key not in {k for there in found.values() for k in there.values()}
    }
    for name, there in found.items():
        folded[name] = images[there[min(there)]]
    return folded, {name: sorted(there) for name, there in found.items()}


def _incomplete(where: str, channels: dict[str, list[int]], images: _Files, root: Path) -> Iterator[Problem]:
    """Images that lack a channel which others have."""
    wanted = {number for there in channels.values() for number in there}
    wanted = set(range(1 + max(wanted, default=-1)))
    lacking = [
        relative(Path(channel_file(str(images[name][0]), number)), root)
        for name, there in sorted(channels.items())
        for number in sorted(wanted - set(there))
    ]
    if lacking:
        count = counted(len(lacking), "file", "is", "are")
        message = f"{where}: the images have {len(wanted)} channels in files of their own, but {count} missing: "
        message += (
            f"{first_of(lacking, 5)}. Add {'it' if len(lacking) == 1 else 'them'}, or remove all files of these images."
        )
        yield Problem("fatal", message, tuple(lacking))


def _in_one_folder(files: list[tuple[str, Path]]) -> tuple[_Files, _Files]:
    """Images and masks that lie together, told apart by words in their names or in those of the folders around them."""
    found: tuple[_Files, _Files] = {}, {}
    for key, path in files:
        *folders, name = key.split("/")
        roles = [folder.casefold() for folder in folders]
        is_mask = any(role in MASK_DIRS for role in roles)
        is_mask = is_mask or (not any(role in IMAGE_DIRS for role in roles) and is_mask_name(name))
        kept = [folder for folder in folders if folder.casefold() not in (*IMAGE_DIRS, *MASK_DIRS)]
        found[is_mask].setdefault("/".join([*kept, name]), []).append(path)
    images, masks = found
    if not masks and all(_photo_first(paths) for paths in images.values()):  # 01.jpg with 01.png
        return {key: paths[:1] for key, paths in images.items()}, {key: paths[1:] for key, paths in images.items()}
    return images, {key: paths for key, paths in masks.items() if not is_no_class_mask(key)}


def _photo_first(paths: list[Path]) -> bool:
    """Whether these are a JPEG, which cannot be a mask, and one other file; the JPEG is put first."""
    paths.sort(key=lambda path: path.suffix.lower() not in (".jpg", ".jpeg"))
    return len(paths) == 2 and [path.suffix.lower() in (".jpg", ".jpeg") for path in paths] == [True, False]


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


def _by_key(files: list[tuple[str, Path]]) -> dict[str, list[Path]]:
    grouped: dict[str, list[Path]] = {}
    for key, path in files:
        grouped.setdefault(key, []).append(path)
    return grouped


def _advice(claims: _Files) -> str:
    """What to do where images have several masks: with the same endings for each of them, one ending can be chosen."""
    endings = {tuple(sorted(stem_of(path.name).rpartition("_")[2] for path in paths)) for paths in claims.values()}
    several = next(iter(endings), ())
    if len(endings) == 1 and len(set(several)) > 1:
        return "Say which with " + " or ".join(f"--masks {ending}" for ending in several) + "."
    return "Keep one mask for each image, or list the pairs in a CSV file."


def _twice(where: str, found: list[tuple[str, list[Path]]], root: Path, advice: str) -> Iterator[Problem]:
    """One problem for names that several files have."""
    doubled = [(key, paths) for key, paths in found if len(paths) > 1]
    for key, paths in doubled[:1]:
        names = [relative(path, root) for path in paths]
        more = f" {len(doubled) - 1:,} more names stand for several files too." if len(doubled) > 1 else ""
        message = f"{where}: {' and '.join(names)} both stand for {key!r}.{more} {advice}"
        yield Problem("fatal", message, tuple(relative(path, root) for _, paths in doubled for path in paths))


def _lonely(where: str, lonely: list[Path], total: int, root: Path, split: str, orphans: list[str]) -> Problem:
    files = tuple(relative(path, root) for path in lonely)
    if split == "test" and len(lonely) == total:
        return Problem("warning", f"test: none of the {total:,} images has a mask, so it cannot be evaluated.", files)
    count = counted(len(lonely), "image", "has no mask", "have no mask")
    advice = "Add a mask of the same name for each, or remove them."
    if orphans:
        by_name = {name.rpartition("/")[2]: name for name in orphans}
        first = files[0].rpartition("/")[2]
        like = closest(first, by_name) or next(iter(by_name))
        advice = (
            f"The closest of the masks without image is {by_name[like]}. Rename them to match, or list all pairs in a CSV "
            "file with the columns image,mask,split."
        )
    return Problem("fatal", f"{where}: {count}: {first_of(files, 5)}. {advice}", files)
