"""Which mask belongs to which image: names are matched by stem, with the usual endings left out."""

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pixelwise.data.image_files import image_files, relative
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
from pixelwise.data.pairs import Pair, Problem, composed, counted, first_of, split_of
from pixelwise.formats.registry import stem_of

ALL_MASKS = "all"
"""In place of an ending: all masks of an image together."""

_LABEL_STUDIO = re.compile(r"task-\d+-annotation-\d+-by-.*-tag-(.+)-\d+$")


@dataclass(frozen=True, kw_only=True)
class FolderPair:
    """A folder of images with its folder of masks; `split` is "" where the layout names none."""

    split: str
    images: Path
    masks: Path | None
    ending: str = ""  # of the names of the masks, where several masks for each image lie together
    siblings: tuple[Path, ...] = ()  # folders of images of other splits, which have their masks in the same folder

    @property
    def joins(self) -> bool:
        """Whether all masks of an image are joined."""
        return self.ending == ALL_MASKS


def match_source(
    source: FolderPair, root: Path, listed: Container[Path] | None = None, counts: Container[int] | None = None
) -> tuple[list[Pair], list[Problem]]:
    """Pair the images and masks of one source, still without groups, and say what stays alone, of the `listed` images.

    `counts` are the numbers of files that an image without mask may have its channels in; None allows any.
    """
    notes: list[str] = []
    images, masks, doubled, splits = _files(source, notes)
    images, channels = _with_channels(images, masks, counts)
    claims, orphans, by_words = match_names(images, masks)
    where = source.split or source.images.name
    problems = [Problem("warning", f"{where}: {note}") for note in notes]
    problems += _incomplete(where, channels, images, root)
    problems += _twice(where, doubled, root, "Keep one of them.")
    if source.joins:
        by_words = [(image, mask) for image, mask in by_words if len(claims[image]) == 1]
    else:
        problems += _twice(where, list(claims.items()), root, _advice(claims))
    if by_words:
        problems.append(_other_names(where, by_words, (images, masks), root))
    if source.siblings:
        orphans, shared = _of_siblings(source, masks, claims, orphans, root)
        problems += shared
    left = [relative(path, root) for path in orphans]
    if orphans:
        count = counted(len(orphans), "mask", "has no image", "have no image")
        problems.append(Problem("warning", f"{where}: {count}: {first_of(left, 5)}. They are not used.", tuple(left)))
    pairs = [
        _pair(key, paths[0], claims.get(key, []), source, splits, channel_files=1 + max(channels.get(key, [0])))
        for key, paths in sorted(images.items())
        if listed is None or paths[0] in listed
    ]
    lonely = [pair.image for pair in pairs if pair.mask is None]
    if lonely:
        problems.append(_lonely(where, lonely, len(pairs), root, source.split, left))
    return pairs, problems


def _pair(
    key: str, image: Path, masks: list[Path], source: FolderPair, splits: Mapping[Path, str], *, channel_files: int
) -> Pair:
    split = source.split or (splits.get(masks[0], "") if masks else "")
    more = tuple(masks[1:]) if source.joins else ()
    mask = masks[0] if masks else None
    return Pair(image=image, mask=mask, split=split, name=key, channel_files=channel_files, more_masks=more)


def _of_siblings(
    source: FolderPair, masks: "_Files", claims: "_Files", orphans: list[Path], root: Path
) -> tuple[list[Path], list[Problem]]:
    """The masks that images of no split claim, and a problem for those that images of several splits do."""
    theirs = set[Path]()
    for folder in source.siblings:
        for paths in match_names(_by_key(image_files(folder)), masks)[0].values():
            theirs.update(paths)
    shared = [relative(path, root) for paths in claims.values() for path in paths if path in theirs]
    problems = []
    if shared:
        count = counted(len(shared), "mask", "belongs", "belong")
        message = (
            f"{source.split}: {count} to images of several splits by name: {first_of(shared, 3)}. Put the masks in a folder "
            "for each split, or list all pairs in a CSV file with the columns image,mask,split."
        )
        problems.append(Problem("fatal", message, tuple(shared)))
    return [path for path in orphans if path not in theirs], problems


_Files = dict[str, list[Path]]


def _files(
    source: FolderPair, notes: list[str]
) -> tuple[_Files, _Files, list[tuple[str, list[Path]]], Mapping[Path, str]]:
    """The images and the masks of a source by their keys, the keys that several files have, and splits that masks lie in."""
    if source.masks == source.images:
        images, masks = _in_one_folder(image_files(source.images, notes=notes))
        return images, masks, [*images.items(), *masks.items()], {}
    wanted = {key for key, _ in image_files(source.images)}
    found = _by_key(image_files(source.masks, wanted, notes) if source.masks else [])
    ending = "" if source.joins else source.ending.casefold()
    found = {key: paths for key, paths in found.items() if key.casefold().endswith(ending)}
    found, splits = (
        _without_splits(found) if not any(split_of(key.partition("/")[0]) for key in wanted) else (found, {})
    )
    masks = {key: paths for key, paths in found.items() if ending or not is_no_class_mask(key)}
    images = _by_key(image_files(source.images, masks, notes))
    doubled = [*images.items(), *found.items()]
    if list(images) == ["."]:  # the folder itself is a series: it has one mask, whatever its name
        images = {source.images.name: images["."]}
        masks = {source.images.name: next(iter(masks.values()))} if len(masks) == 1 else masks
    return images, masks, doubled, splits


def _without_splits(masks: _Files) -> tuple[_Files, dict[Path, str]]:
    """Masks in folders for each split, of images that lie together: their keys without these folders, and their splits."""
    tops = {key: split_of(key.partition("/")[0]) for key in masks if "/" in key}
    if len(tops) < len(masks) or not all(tops.values()):
        return masks, {}
    below = _by_key([(key.partition("/")[2], path) for key, paths in masks.items() for path in paths])
    return below, {path: tops[key] for key, paths in masks.items() for path in paths}


def _with_channels(images: _Files, masks: _Files, counts: Container[int] | None) -> tuple[_Files, dict[str, list[int]]]:
    """The images with those as one whose channels lie in files of their own, and the numbers of the files that are there.

    Files are channels if there is a mask for all of them and none for each; without masks, if all images have the same, as
    many as those with masks: else they are the frames of a film.
    """
    named = {MASK_SUFFIX.sub("", key) for key in masks} | set(masks)
    found: dict[str, dict[int, str]] = {}
    for key in images:
        if (channel := channel_of(key)) and key not in named and (channel[0] in named or not masks):
            found.setdefault(channel[0], {})[channel[1]] = key
    alike = {tuple(sorted(there)) for there in found.values()}
    if not masks and (len(alike) != 1 or alike == {(0,)} or sum(map(len, found.values())) < len(images)):
        return images, {}
    if not masks and counts is not None and 1 + max(next(iter(alike))) not in counts:
        return images, {}
    if len(images.keys() & found.keys()):  # case_7 lies beside case_7_0000: nobody knows
        return images, {}
    parts = {key for there in found.values() for key in there.values()}
    folded = {key: paths for key, paths in images.items() if key not in parts}
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


def _by_key(files: list[tuple[str, Path]]) -> dict[str, list[Path]]:
    grouped: dict[str, list[Path]] = {}
    for key, path in files:
        grouped.setdefault(key, []).append(path)
    return grouped


def _advice(claims: _Files) -> str:
    """What to do where images have several masks: with the same endings for each of them, one ending can be chosen."""
    endings = {tuple(sorted(stem_of(path.name).rpartition("_")[2] for path in paths)) for paths in claims.values()}
    several = next(iter(endings), ())
    are_kinds = all("_" in stem_of(path.name) for paths in claims.values() for path in paths)
    if len(endings) == 1 and len(set(several)) > 1 and are_kinds and not any(map(str.isdigit, several)):
        return f"Say which with {' or '.join(f'--masks {ending}' for ending in several)}."
    return (
        f"If they mark different objects, and a number means the same class in all of them, --masks {ALL_MASKS} joins them; "
        "masks that contradict each other are refused. Or keep one mask for each image, or list the pairs in a CSV file."
    )


def _other_names(where: str, pairs: list[tuple[str, str]], files: tuple["_Files", "_Files"], root: Path) -> Problem:
    """What is said of masks whose names are not those of their images, with what differs in the first."""
    keys = pairs[0]
    image, mask = (relative(there[key][0], root) for there, key in zip(files, keys, strict=True))
    subject = (
        "1 mask has another name than its image"
        if len(pairs) == 1
        else (f"{len(pairs):,} masks have other names than their images")
    )
    one, other = (key.rpartition("/")[2] for key in keys)
    how = ""
    if composed(one) == composed(other):
        how = ", in another Unicode form"
    elif composed(one).casefold() == composed(other).casefold():
        how = ", which differs in upper and lower case"
    return Problem("warning", f"{where}: {subject}: {mask} was paired with {image}{how}.")


def _twice(where: str, found: list[tuple[str, list[Path]]], root: Path, advice: str) -> Iterator[Problem]:
    """One problem for names that several files have."""
    doubled = [(key, paths) for key, paths in found if len(paths) > 1]
    for key, paths in doubled[:1]:
        names = [relative(path, root) for path in paths]
        more = f" {len(doubled) - 1:,} more names stand for several files too." if len(doubled) > 1 else ""
        word = "both" if len(names) == 2 else "all"
        message = f"{where}: {first_of(names, 3, ' and ')} {word} stand for {key!r}.{more} {advice}"
        yield Problem("fatal", message, tuple(relative(path, root) for _, paths in doubled for path in paths))


def _lonely(where: str, lonely: list[Path], total: int, root: Path, split: str, orphans: list[str]) -> Problem:
    files = tuple(relative(path, root) for path in lonely)
    if split == "test" and len(lonely) == total:
        return Problem("warning", f"test: none of the {total:,} images has a mask, so it cannot be evaluated.", files)
    count = counted(len(lonely), "image", "has no mask", "have no mask")
    advice = "Add a mask of the same name for each, or remove them."
    if tags := [found[1] for name in orphans if (found := _LABEL_STUDIO.search(stem_of(name)))]:
        advice = (
            f"The masks are named as Label Studio does, by a task's number and a tag ({first_of(sorted(set(tags)), 4)}), "
            "which do not say the image; the JSON export of the project does (id, data.image). Draw the masks of each task "
            "into one image of labels, with a number for each tag, named as its image. If there is one tag, list the pairs "
            "in a CSV file with the columns image,mask: several lines for one image are joined."
        )
    elif orphans:
        by_name = {name.rpartition("/")[2]: name for name in orphans}
        first = files[0].rpartition("/")[2]
        like = closest(first, by_name) or next(iter(by_name))
        advice = (
            f"The closest of the masks without image is {by_name[like]}. Rename them to match, or list all pairs in a CSV "
            "file with the columns image,mask,split."
        )
    return Problem("fatal", f"{where}: {count}: {first_of(files, 5)}. {advice}", files)
