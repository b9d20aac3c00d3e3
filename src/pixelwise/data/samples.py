"""From a pair of files to the tensors that transforms and networks take."""

from dataclasses import dataclass

from torch import Tensor, from_numpy

from pixelwise.data.labels import LabelSpec
from pixelwise.data.layouts import Pair
from pixelwise.data.raster import printable
from pixelwise.data.readers import read_image, read_mask, to_tensor
from pixelwise.errors import DataError


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


def load_sample(pair: Pair, labels: LabelSpec, channels: int | None = None) -> Sample:
    """Read the files of a pair.

    Args:
        pair: which files.
        labels: what the values of the mask mean.
        channels: the number of channels the network takes; grey images are repeated for 3. None keeps the file's.

    Raises:
        DataError: a file cannot be used, the sizes differ, or the mask holds values that are no class.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> Image.new("L", (4, 3)).save(root / "a.png")
        >>> Image.new("L", (4, 3), 1).save(root / "b.png")
        >>> pair = Pair(image=root / "a.png", mask=root / "b.png", split="train", group="a", name="a")
        >>> labels = LabelSpec(names=("no", "yes"), colors=((0, 0, 0), (9, 9, 9)), values=((0,), (1,)))
        >>> sample = load_sample(pair, labels, channels=3)
        >>> tuple(sample.image.shape), tuple(sample.mask.shape)
        ((3, 3, 4), (3, 4))
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
