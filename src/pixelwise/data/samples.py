"""From a pair of files to the tensors that transforms and networks take."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, from_numpy

from pixelwise.data.labels import LabelSpec
from pixelwise.data.layouts import Pair
from pixelwise.errors import DataError
from pixelwise.formats.raster import printable
from pixelwise.formats.readers import read_image, read_mask


@dataclass(frozen=True)
class Sample:
    """One image and its labels.

    Attributes:
        image: (C, H, W), uint8, or float32 in unit scale.
        mask: uint8 (H, W), class ids and 255 for void; None where the pair has no mask.
        name: the pair's name.
    """

    image: Tensor
    mask: Tensor | None
    name: str


def to_tensor(array: np.ndarray, channels: int | None = None) -> torch.Tensor:
    """Turn an image (H, W, C) into what transforms and networks take.

    Args:
        array: as `read_image` gives it.
        channels: the number of channels wanted; grey is repeated for 3. None keeps what is there.

    Returns:
        (C, H, W): uint8 stays uint8; other integers become float32 divided by their type's maximum; floats become
        float32 as they are.

    Raises:
        DataError: the image has another number of channels.
    """
    found = array.shape[2]
    if channels is not None and found != channels:
        if (found, channels) != (1, 3):
            raise DataError(
                f"it has {found} channel{'s' * (found != 1)}, but {channels} are wanted. Only one can be repeated."
            )
        array = np.repeat(array, 3, axis=2)
    planes = np.ascontiguousarray(array.transpose(2, 0, 1))
    if planes.dtype.kind in "ui" and planes.dtype != np.uint8:
        planes = (planes / np.float64(np.iinfo(planes.dtype).max)).astype(np.float32)
    elif planes.dtype != np.uint8:
        planes = planes.astype(np.float32)
    return torch.from_numpy(planes if planes.flags.writeable else planes.copy())


def load_sample(pair: Pair, labels: LabelSpec, channels: int | None = None) -> Sample:
    """Read the files of a pair.

    Args:
        pair: which files.
        labels: what the values of the mask mean.
        channels: the number of channels the network takes; grey images are repeated for 3. None keeps the file's.

    Raises:
        DataError: a file cannot be used, the sizes differ, or the mask holds values that are no class.
    """
    array = read_image(pair.image)
    try:
        image = to_tensor(array, channels)
    except DataError as error:
        raise DataError(f"{printable(pair.image)}: {error}") from error
    if pair.mask is None:
        return Sample(image, None, pair.name)
    raw = read_mask(pair.mask)
    if raw.shape[:2] != array.shape[:2]:
        raise DataError(
            f"{printable(pair.mask)}: the mask is {raw.shape[1]} x {raw.shape[0]} px, but its image "
            f"{printable(pair.image)} is {array.shape[1]} x {array.shape[0]} px. Both must have the same size."
        )
    try:
        return Sample(image, from_numpy(labels.encode(raw)), pair.name)
    except DataError as error:
        raise DataError(f"{printable(pair.mask)}: the mask {error}") from error
