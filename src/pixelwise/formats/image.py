"""PNG, JPEG, WebP, BMP, GIF and PNM: formats that are decoded as a whole, once, when the first window is asked for."""

import threading

import numpy as np
from numpy.typing import NDArray

from pixelwise.errors import DataError
from pixelwise.formats.base import Source, SourceInfo
from pixelwise.formats.local import Identity
from pixelwise.formats.readers import image_info, read_image

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"GIF87a", b"GIF89a", *(b"P%d" % kind for kind in range(1, 7)))


def is_image(head: bytes, name: str) -> bool:
    """Whether a file that begins with `head` is one of these formats, whatever its name.

    Example:
        >>> is_image(b"GIF89a...", "a.txt"), is_image(b"II*\\0", "a.png")
        (True, False)
    """
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def open_image(location: str) -> "ImageSource":
    """Open an image; only its header is read.

    Raises:
        DataError: the file is missing, damaged, no image, or larger than is decoded at once.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> path = str(Path(tempfile.mkdtemp()) / "a.png")
        >>> Image.new("L", (4, 3), 7).save(path)
        >>> with open_image(path) as source:
        ...     source.read(1, 1, 2, 3).shape
        (2, 3, 1)
    """
    return ImageSource(location)


class ImageSource(Source):
    """An image that is kept decoded while it is open; made by `open_image`.

    Attributes:
        cache_bytes: what the decoded image takes in memory.
    """

    def __init__(self, location: str) -> None:
        self._identity = Identity.local(location)
        found = image_info(location)
        self.info = SourceInfo(
            location=location,
            format=found.format.lower(),
            height=found.height,
            width=found.width,
            channels=found.channels,
            dtype=found.dtype,
            block_px=(found.height, found.width),
        )
        self.cache_bytes = found.height * found.width * found.channels * np.dtype(found.dtype).itemsize
        self._lock = threading.Lock()
        self._pixels: NDArray | None = None

    def read(self, top: int, left: int, height: int, width: int, plane: int = 0) -> NDArray:
        with self._lock:
            if self._pixels is None:
                self._pixels = self._decoded()
            return self._pixels[top : top + height, left : left + width]

    def fingerprint(self) -> str:
        return self._identity.fingerprint()

    def check_unchanged(self) -> None:
        self._identity.check()

    def close(self) -> None:
        with self._lock:
            self._pixels = None

    def _decoded(self) -> NDArray:
        info = self.info
        pixels = read_image(info.location)
        found, told = (*pixels.shape, pixels.dtype.name), (info.height, info.width, info.channels, info.dtype)
        if found != told:
            raise DataError(
                f"{info.location}: its header says {told}, but its pixels are {found}. The file is damaged."
            )
        pixels.flags.writeable = False
        return pixels
