"""Which names mean the same image: without usual endings and prefixes, and in spite of how systems and tools write them."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from pixelwise.data.pairs import composed, split_of
from pixelwise.formats import SOURCE_SUFFIXES
from pixelwise.formats.registry import stem_of, suffix_of

MASK_SUFFIX = re.compile(
    r"[_\-. ](masks?|labels?|gt|gtfine_labelids|gtfine_labeltrainids|label_?ids|label_?trainids|seg|segmentation|annot"
    r"|anno|annotation|ground_?truth|manual\d|l|target)$",
    re.IGNORECASE,
)
_IMAGE_SUFFIX = re.compile(r"[_\-. ](leftimg8bit|image|img|sat|rgb)$", re.IGNORECASE)
_NO_MASK = re.compile(r"_gtfine_(color|instanceids|instancetrainids)$", re.IGNORECASE)

IMAGE_DIRS = ("images", "image", "imgs", "img", "leftimg8bit", "jpegimages", "img_dir", "photos", "rgb", "inputs")
MASK_DIRS = (
    "masks", "mask", "labels", "label", "annotations", "annotation", "annot", "gtfine", "gt", "ground_truth",
    "groundtruth", "segmentationclass", "segmentationclasspng", "segmentations", "segmentation", "targets", "ann_dir",
)  # fmt: skip
"""What folders of images and of masks are called; of masks, the more usual first."""

_IMAGE_WORDS = re.compile(r"images?|imgs?|im|leftimg8bit|photo|sat|rgb|original|orig|input|frames?")
_MASK_WORDS = re.compile(
    r"masks?|label(?:s|led|ed|ids|trainids)?|gt|gtfine|seg(?:mentation|mented)?|segmask|anno(?:t|tations?|tated)?"
    r"|ground|truth|groundtruth|manual\d*|targets?|matte|\d(?:st|nd)ho|l"
)
_ROBOFLOW = re.compile(r"(?:[_.](?:jpe?g|png|tiff?|bmp|webp))?\.rf\.[0-9a-z]+", re.IGNORECASE)
_CHANNEL = re.compile(r"(.*[^/])_(\d{4})", re.DOTALL)
_NUMBERED = re.compile(r"(images?|imgs?|im|masks?|labels?|gt|seg|annot)(\d+)")  # image01, mask01


def is_mask_name(key: str) -> bool:
    """Whether the name of a file (its path without suffix) says that it is a mask."""
    words = _words(key)
    return any(_MASK_WORDS.fullmatch(word) for word in words if word != "l") or bool(MASK_SUFFIX.search(key))


def is_no_class_mask(key: str) -> bool:
    """Whether a name says that a file beside the masks holds something else: colours to look at, or instances."""
    return bool(_NO_MASK.search(key))


def match_names(
    images: Mapping[str, list[Path]], masks: Mapping[str, list[Path]]
) -> tuple[dict[str, list[Path]], list[Path], list[tuple[str, str]]]:
    """Which masks claim each image, by their keys: paths below their folders, without suffix.

    Equal names come first, then equal names without an ending such as `_mask`. Masks that are left over take an image
    that is left over if the words of their names agree, whatever their case, Unicode form, separators, zeros in front,
    prefixes and inner suffixes, and no other image has these words.

    Returns:
        The masks that claim each image; the masks without image; and the (image, mask) keys that were paired by words.
    """
    by_stem = {_IMAGE_SUFFIX.sub("", key): key for key in images}
    alone = Counter(key.rpartition("/")[0] for key in images)
    claims: dict[str, list[Path]] = {}
    left: dict[str, Path] = {}
    for key, (path, *_) in masks.items():
        stem, folder = MASK_SUFFIX.sub("", key), key.rpartition("/")[0]
        target = next((name for name in (key, stem) if name in images), None) or by_stem.get(stem) or by_stem.get(key)
        named = f"{folder}/{folder.rpartition('/')[2]}"  # a mask in a folder named as the image, around it or for masks
        target = target or next(
            (name for name in (folder, named) if name in images and (name == folder or alone[folder] == 1)), None
        )
        if target is None:
            left[key] = path
        else:
            claims.setdefault(target, []).append(path)
    by_words, orphans = [], []
    claimed = set(claims)
    forms = _unique_forms(images)
    for key, path in left.items():
        target = next((forms[form] for form in _mask_forms(key) if form in forms), None)
        if target is None or (target in claimed and not _is_further(key)):
            orphans.append(path)
        else:
            claims.setdefault(target, []).append(path)
            by_words.append((target, key))
    return claims, orphans, by_words


def channel_of(key: str) -> tuple[str, int] | None:
    """Of which image a file is a channel, and the number of it, by its path without suffix, as nnU-Net writes it.

    Example:
        >>> channel_of("case_7_0001"), channel_of("case_7")
        (('case_7', 1), None)
    """
    found = _CHANNEL.fullmatch(key)
    return (found[1], int(found[2])) if found else None


def channel_file(first: str, number: int) -> str:
    """The path or URL of another channel, by that of the first; an image that has no such name is its only file."""
    folders, slash, name = first.rpartition("/")
    stem = stem_of(name)
    found = channel_of(stem)
    return first if found is None else f"{folders}{slash}{found[0]}_{number:04d}{name[len(stem) :]}"


def closest(name: str, others: Iterable[str]) -> str:
    """The name among `others` that is most like `name`, or "" if none is."""
    return next(iter(difflib.get_close_matches(name, list(others)[:2000], 1, 0.5)), "")


def _unique_forms(keys: Iterable[str]) -> dict[tuple[str, ...], str]:
    """The key of each form that only one key has."""
    owners: dict[tuple[str, ...], set[str]] = {}
    for key in keys:
        words = _plain_words(key)
        for form in (words, tuple(word for word in words if not split_of(word))):  # DRIVE: 21_training, 21_manual1
            owners.setdefault((_parent(key), *form), set()).add(key)
        if key.endswith("_0000") and len(words) > 1:  # nnU-Net numbers the channels of an image
            owners.setdefault((_parent(key), *words[:-1]), set()).add(key)
    alone: dict[str, list[str]] = {}
    for key in keys:
        alone.setdefault(_parent(key), []).append(key)
    for parent, there in alone.items():  # case_1/seg is for the only image in case_1/, whatever its name
        if parent and len(there) == 1:
            owners.setdefault((parent,), set(there))
    return {form: next(iter(found)) for form, found in owners.items() if len(found) == 1}


def _mask_forms(key: str) -> list[tuple[str, ...]]:
    """The words of a mask's name; if a number ends it (x_mask_1), also those without the number."""
    words = _plain_words(key)
    forms = [(_parent(key), *words)]
    if _parent(key) and set(words) <= set(_plain_words(_parent(key))):  # case_1/case_1_seg, or case_1/seg
        forms.append((_parent(key),))
    return [*forms, (_parent(key), *words[:-1])] if _is_further(key) else forms


def _is_further(key: str) -> bool:
    """Whether a mask is one of several of its image: x_mask_1."""
    words = _words(key)
    return len(words) > 2 and words[-1].isdigit() and bool(_MASK_WORDS.fullmatch(words[-2]))


def _parent(key: str) -> str:
    return composed(key.rpartition("/")[0]).casefold()


def _plain_words(key: str) -> tuple[str, ...]:
    """The words that tell an image from others, numbers without zeros in front."""
    words = [word for word in _words(key) if not _IMAGE_WORDS.fullmatch(word) and not _MASK_WORDS.fullmatch(word)]
    return tuple(word.lstrip("0") or "0" if word.isdigit() else word for word in words)


def _words(key: str) -> list[str]:
    name = _ROBOFLOW.sub("", key.rpartition("/")[2])
    while suffix_of(name) in SOURCE_SUFFIXES:  # 01.jpg.png
        name = stem_of(name)
    name = composed(name).casefold()
    words: list[str] = []
    for word in filter(None, re.split(r"[_\-. ]+", name)):
        numbered = _NUMBERED.fullmatch(word)
        words += numbered.groups() if numbered else (word,)
    return words
