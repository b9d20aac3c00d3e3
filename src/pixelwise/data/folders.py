"""Layouts of data folders: which folders hold images, of which split, and which folders may hold their masks."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixelwise.data.image_files import has_images, image_files, walk
from pixelwise.data.matching import ALL_MASKS, FolderPair, match_source
from pixelwise.data.names import IMAGE_DIRS, MASK_DIRS, is_mask_name
from pixelwise.data.pairs import SPLITS, split_of
from pixelwise.data.text_labels import describe_text_labels
from pixelwise.errors import DataError
from pixelwise.formats import SOURCE_SUFFIXES

_ENDING = re.compile(r"(?P<split>.+?)[_\-. ]?(?P<kind>annot|annotations?|labels?|masks?|gt|images?|imgs?)")
_BEGINNING = re.compile(r"(?P<kind>images?|imgs?|masks?|labels?|annotations?)[_\-. ]?(?P<split>.+)")
_DEEPEST = 3  # folders below the given one in which a layout is looked for, to say where


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Folders of images by split, "" where no split is named, and those that may hold their masks, by a name for all."""

    words: str  # with {masks} for their name; "" where the names of all folders say it
    images: tuple[tuple[str, Path], ...]
    masks: Mapping[str, tuple[Path | None, ...]]  # for each folder of images

    def describe(self, name: str, ending: str = "") -> str:
        """The layout in words, with the folders of masks of this name, and the ending of the masks' names."""
        if ending:
            what = "the masks of each image joined" if ending == ALL_MASKS else f"masks *{ending}"
            return f"{self.describe(name)}, {what}"
        shown = [path.name for source in self.sources(name) for path in (source.images, source.masks) if path]
        return self.words.replace("{masks}", name) if self.words else " ".join(f"{folder}/" for folder in shown)

    def sources(self, name: str, ending: str = "") -> list[FolderPair]:
        """The folders of images with their masks in the folders of this name, of those with this ending."""
        return [
            FolderPair(
                split=split, images=images, masks=masks, ending=ending, siblings=self._siblings(images, masks, name)
            )
            for (split, images), masks in zip(self.images, self.masks[name], strict=True)
        ]

    def _siblings(self, images: Path, masks: Path | None, name: str) -> tuple[Path, ...]:
        """Other folders of images with the same folder of masks."""
        there = zip(self.images, self.masks[name], strict=True)
        return tuple(other for (_, other), its in there if its == masks is not None and other != images)


def find_layout(root: Path) -> Layout:
    """The layout of a folder.

    Raises:
        DataError: none is recognised.
    """
    layout = _segnet_layout(root) or _image_mask_layout(root) or _split_above_layout(root) or _one_folder_layout(root)
    if layout is None:
        raise DataError(_not_recognised(root))
    return layout


def _segnet_layout(root: Path) -> Layout | None:
    """train/ + trainannot/ and so on, the images directly in train/, train_images/ or imagesTr/."""
    images: dict[str, Path] = {}
    masks: dict[str, dict[str, Path]] = {}
    for name, path in _folders(root).items():
        split, kind = split_of(name), ""
        if not split and (found := _ENDING.fullmatch(name) or _BEGINNING.fullmatch(name)):
            split, kind = split_of(found["split"]), found["kind"]
        if split and (not kind or kind.startswith("im")):
            images.setdefault(split, path)
        elif split:
            masks.setdefault(kind, {})[split] = path
    if not any(set(there) & set(images) for there in masks.values()):
        return None
    return Layout(
        words="",
        images=tuple(images.items()),
        masks={name: tuple(there.get(split) for split in images) for name, there in masks.items()},
    )


def _image_mask_layout(root: Path) -> Layout | None:
    """images/ + masks/, alone or with the splits below them."""
    images = _images_in(root)
    beside = {path.name: path for path in _folders(root).values() if path != images and not split_of(path.name)}
    if images is None or not any(map(has_images, beside.values())):
        return None
    words = f"{images.name}/ + {{masks}}/"
    below = [(split_of(name), path) for name, path in _folders(images).items() if split_of(name)]
    if not below:
        return Layout(words=words, images=(("", images),), masks={name: (path,) for name, path in beside.items()})
    found = {name: tuple(_below(path, inner) for _, inner in below) for name, path in beside.items()}
    return Layout(words=f"{words} with {_split_names(below)} below", images=tuple(below), masks=found)


def _below(masks: Path, images: Path) -> Path | None:
    """The masks for one split: the folder of the same name or split, or all masks where these have no splits."""
    folders = _folders(masks)
    same = [path for name, path in folders.items() if split_of(name) == split_of(images.name)]
    exact = folders.get(images.name.lower())
    return exact or (same[0] if len(same) == 1 else None if any(map(split_of, folders)) else masks)


def _split_above_layout(root: Path) -> Layout | None:
    """train/ val/ test/, each with images/ + masks/."""
    splits = [(split_of(name), path) for name, path in _folders(root).items() if split_of(name) and _images_in(path)]
    found = [(split, images, _folders(path)) for split, path in splits if (images := _images_in(path))]
    names = {path.name.lower(): path.name for _, images, inner in found for path in inner.values() if path != images}
    if not found or not names:
        return None
    return Layout(
        words=f"{_split_names(splits)} with {found[0][1].name}/ + {{masks}}/ below",
        images=tuple((split, images) for split, images, _ in found),
        masks={name: tuple(inner.get(low) for _, _, inner in found) for low, name in names.items()},
    )


def _one_folder_layout(root: Path) -> Layout | None:
    """Images and masks in one folder or in folders for each case, told apart by their names."""
    splits = [(split_of(name), path) for name, path in _folders(root).items() if split_of(name)] or [("", root)]
    usable = [FolderPair(split=split, images=path, masks=path) for split, path in splits]
    images = [pair.image for source in usable for pair in match_source(source, root)[0] if pair.mask]
    if not images or (not splits[0][0] and _lie_deeper(images, root)):
        return None
    words = "images and masks together" + (f" in {_split_names(splits)}" if splits[0][0] else "")
    return Layout(words=words, images=tuple(splits), masks={".": tuple(path for _, path in splits)})


def _lie_deeper(images: Sequence[Path], root: Path) -> bool:
    """Whether these images have splits above them that are not in `root`, or all lie in one folder with its own layout."""
    common = Path(os.path.commonpath([path.parent for path in images]))
    while common.name.lower() in IMAGE_DIRS and common != root:
        common = common.parent
    has_splits = any(split_of(part) for path in images for part in path.relative_to(root).parts[:-1])
    return has_splits or (common != root and _looks_right(common))


def _images_in(folder: Path) -> Path | None:
    folders = _folders(folder)
    return next((folders[name] for name in IMAGE_DIRS if name in folders), None)


def beside_splits(layout: Layout, root: Path) -> tuple[str, ...]:
    """What lies beside the splits and looks like a further one, but is none by its name: folders with images, and images."""
    if not layout.images[0][0]:
        return ()
    used = {path for _, path in layout.images} | {path for paths in layout.masks.values() for path in paths if path}
    around = {path for path in used for path in path.parents}
    parents = {_around(path, root) for _, path in layout.images}
    found = []
    for parent in sorted(parents):
        there = [
            path for path in sorted(parent.iterdir()) if path not in used | around and not path.name.startswith(".")
        ]
        is_images = parent.name.lower() in IMAGE_DIRS
        found += [f"{path.name}/" for path in there if path.is_dir() and (is_images or _is_like_a_split(path))]
        found += [path.name for path in there if path.is_file() and path.name.lower().endswith(SOURCE_SUFFIXES)][:3]
    return tuple(found)


def _around(images: Path, root: Path) -> Path:
    """The folder in which the splits lie, for the images of one of them: below `root` or `root` itself."""
    return images.parent.parent if images.parent != root and split_of(images.parent.name) else images.parent


def _is_like_a_split(folder: Path) -> bool:
    """Whether a folder is called a split, or has masks: below it, beside it by its name, or among its files."""
    if split_of(folder.name):
        return True
    name = folder.name.lower()
    has_partner = any(other != name and other.startswith(name) for other in _folders(folder.parent))
    return bool(_images_in(folder)) or has_partner or any(is_mask_name(key) for key, _ in image_files(folder))


def _folders(folder: Path) -> dict[str, Path]:
    """The folders in a folder by lower-case name, splits in the order train, val, test."""
    if not folder.is_dir():
        return {}
    rank = {name: index for index, name in enumerate((*SPLITS, ""))}
    found = {
        path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")
    }
    return dict(sorted(found.items(), key=lambda item: (rank[split_of(item[0])], item[0])))


def _split_names(splits: Sequence[tuple[str, Path]]) -> str:
    """The folders of the splits, and what is taken for what where their names are others."""
    return " ".join(f"{path.name}/" + f" ({split})" * (path.name.lower() != split) for split, path in splits)


def _not_recognised(root: Path) -> str:
    there = ", ".join(sorted(f"{path.name}/" if path.is_dir() else path.name for path in root.iterdir())[:8])
    if images := _images_in(root):
        return (
            f"{root}: there is {images.name}/, but no folder of masks beside it that holds images; it holds {there}. Wanted "
            f"is masks/ (or labels/, annotations/, …) with an image of labels for each image.{_in_mask_folders(root)}"
            f"{describe_text_labels(root)}"
        )
    inner: list[Path] = []
    for here, folders, _ in walk(root):
        is_one = here != root and _looks_right(here)
        if is_one or len(here.relative_to(root).parts) >= _DEEPEST:
            inner += [here] * is_one
            folders.clear()
    hint = f" Perhaps {inner[0]} is meant." if inner else ""
    if len(inner) > 1:
        hint = f" {len(inner):,} folders, such as {inner[0]}, hold images and masks, which do not pair by their names."
    return (
        f"{root}: no layout is recognised; it holds {there or 'nothing'}. Wanted are images/ and masks/ (with train/ "
        "val/ test/ above or below them), SegNet's train/ and trainannot/ …, or a CSV file with the columns image,mask."
        f"{hint}{describe_text_labels(root)}"
    )


def _in_mask_folders(root: Path) -> str:
    """What lies in folders that are called as those of masks are, but cannot be read."""
    notes: list[str] = []
    for name, folder in _folders(root).items():
        if name in MASK_DIRS:
            image_files(folder, notes=notes)
            if not any(names for _, _, names in walk(folder)):
                notes.append(f"{folder.name}/ is empty.")
    arrays = " Save arrays with numpy.save, as .npy." if any(".npz" in note for note in notes) else ""
    return "".join(f" {note}" for note in notes[:3]) + arrays


def _looks_right(folder: Path) -> bool:
    return bool(_segnet_layout(folder) or _image_mask_layout(folder) or _split_above_layout(folder))
