"""Street scenes as arrays and as a data folder."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixelwise.data.classes import save_labels
from pixelwise.data.labels import CAMVID_COLORS, CAMVID_NAMES, LabelSpec
from pixelwise.data.scenes.compose import compose
from pixelwise.errors import DataError, UsageError
from pixelwise.files import atomic_path, read_json, write_json

SCENE_VERSION = 1  # raise it whenever a scene changes: folders drawn by older versions are then drawn again
SCENE_SIZES = ((192, 256), (224, 288), (240, 320), (160, 224))
SCENE_LABELS = LabelSpec(
    names=CAMVID_NAMES, colors=CAMVID_COLORS, values=tuple((index,) for index in range(len(CAMVID_NAMES)))
)
_SMALLEST, _LARGEST = 64, 4096  # pixels; below, people would be specks
_SPLITS = ("train", "val", "test")
_MARKER = "scenes.json"


def draw_scene(seed: int, size: tuple[int, int] = (240, 320)) -> tuple[np.ndarray, np.ndarray]:
    """Draw one street scene, the same on every machine for the same seed and size.

    Args:
        seed: chooses the scene, 0 or more.
        size: (height, width) in pixels, 64 to 4096 each.

    Returns:
        The image, uint8 (H, W, 3), and its mask, uint8 (H, W), with the class at every pixel's centre: 0 sky, 1 building,
        2 pole, 3 road, 4 pavement, 5 tree, 6 sign, 7 fence, 8 car, 9 pedestrian, 10 bicyclist.

    Raises:
        UsageError: the seed is negative, or the size is too small or too large.

    Example:
        >>> image, mask = draw_scene(7, (120, 160))
        >>> image.shape, mask.shape, SCENE_LABELS.names[mask[-1, 80]]
        ((120, 160, 3), (120, 160), 'road')
    """
    _check_seed(seed)
    height, width = _checked_size(size)
    return compose(seed, height, width)


def write_scenes(
    root: str | Path,
    counts: Mapping[str, int],
    *,
    seed: int = 0,
    sizes: Sequence[tuple[int, int]] = SCENE_SIZES,
) -> Path:
    """Write street scenes as a data folder: train/images, train/masks, …, and classes.yaml.

    Images are RGB PNG files, masks indexed PNG files with the class palette. A folder that already holds these very
    scenes is left as it is, and one whose drawing was interrupted is completed.

    Args:
        root: the folder; new, empty, or one that this function wrote.
        counts: how many scenes each of the splits "train", "val" and "test" gets.
        seed: chooses the scenes; every scene of every split is another one.
        sizes: the (height, width) that the scenes take in turn.

    Returns:
        `root` as a path.

    Raises:
        UsageError: a split, count, seed or size that is not possible.
        DataError: `root` holds something else, or cannot be written.

    Example:
        >>> import tempfile
        >>> root = write_scenes(Path(tempfile.mkdtemp()) / "streets", {"train": 2}, sizes=[(96, 128)])
        >>> sorted(path.name for path in root.glob("train/images/*"))
        ['train_0000.png', 'train_0001.png']
    """
    root = Path(root)
    _check_seed(seed)
    checked = [list(_checked_size(size)) for size in sizes]
    if not checked:
        raise UsageError("scenes: no size given. Pass at least one (height, width), for example (240, 320).")
    plan = {"version": SCENE_VERSION, "seed": seed, "counts": _checked_counts(counts), "sizes": checked}
    try:
        found = _found_plan(root)
        if found != plan:
            for _, _, *paths in _files(root, found) if found else ():
                for path in paths:
                    path.unlink(missing_ok=True)
            save_labels(root / "classes.yaml", SCENE_LABELS)
            write_json(root / _MARKER, plan)
        for scene_seed, size, image_path, mask_path in _files(root, plan):
            if not (image_path.exists() and mask_path.exists()):
                image, mask = map(Image.fromarray, draw_scene(scene_seed, size))
                mask.putpalette(SCENE_LABELS.palette_bytes())
                for picture, path in ((image, image_path), (mask, mask_path)):
                    with atomic_path(path) as part:
                        picture.save(part, compress_level=3)
    except OSError as error:
        raise DataError(f"{root}: the street scenes cannot be written here ({error}).") from error
    return root


def _found_plan(root: Path) -> dict[str, Any] | None:
    """What scenes.json in `root` says; None in a new or empty folder."""
    if not root.exists() or all(path.name.startswith(".") for path in root.iterdir()):
        return None
    marker = root / _MARKER
    if not marker.exists():
        raise DataError(
            f"{root}: this folder holds other files than street scenes, which are left alone. Choose a new or empty folder."
        )
    found = read_json(marker)
    try:
        sizes = [list(_checked_size(size)) for size in found["sizes"]]
        return {"seed": found["seed"], **found, "counts": _checked_counts(found["counts"]), "sizes": sizes}
    except (KeyError, TypeError, AttributeError, UsageError) as error:
        raise DataError(f"{marker}: this is no description of street scenes. Choose a new or empty folder.") from error


def _files(root: Path, plan: dict[str, Any]) -> Iterator[tuple[int, tuple[int, int], Path, Path]]:
    """Seed, size, image path and mask path of every scene."""
    for split, count in plan["counts"].items():
        for index in range(count):
            name = f"{split}_{index:04d}.png"
            text = f"{plan['seed']} {split} {index}".encode()
            scene_seed = int.from_bytes(hashlib.sha256(text).digest()[:6], "little")
            height, width = plan["sizes"][index % len(plan["sizes"])]
            yield scene_seed, (height, width), root / split / "images" / name, root / split / "masks" / name


def _check_seed(seed: int) -> None:
    """Raise unless the seed is a whole number, 0 or more."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise UsageError(f"scenes: the seed is {seed!r}; it must be a whole number, 0 or more.")


def _checked_size(size: Sequence[int]) -> tuple[int, int]:
    """The size as (height, width), if scenes can be drawn at it."""
    good = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int | np.integer) for side in size)
    if not good or not all(_SMALLEST <= side <= _LARGEST for side in size):
        raise UsageError(
            f"scenes: the size is {size!r}; it must be (height, width) with {_SMALLEST} to {_LARGEST} pixels each."
        )
    return int(size[0]), int(size[1])


def _checked_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """The counts in the order train, val, test."""
    wrong = [split for split in counts if split not in _SPLITS]
    if wrong:
        raise UsageError(f"scenes: there is no split {wrong[0]!r}. Choose among {', '.join(_SPLITS)}.")
    for split, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 9999:
            raise UsageError(f"scenes: {count!r} scenes are wanted for {split}; it must be a whole number, 0 to 9999.")
    return {split: counts[split] for split in _SPLITS if counts.get(split)}
