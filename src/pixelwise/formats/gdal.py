"""GDAL on a short lead: GeoTIFF only, nothing beside the file itself, nothing from the network, nothing on the terminal."""

import contextvars
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from pixelwise.errors import PixelwiseError
from pixelwise.files import extra
from pixelwise.formats.readers import silence

DRIVER = "GTiff"  # the only one that opens files: others follow references (VRT), unpack archives or ask servers

_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no .ovr, .msk, .tfw or metadata files of satellites beside it
    "GDAL_PAM_ENABLED": "NO",  # no .aux.xml, neither read nor written
    "GDAL_CACHEMAX": 64,  # MiB of decoded blocks, for the whole process; GDAL would take 5 % of the memory
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "YES",
}
_NAME = "image.tif"  # of streams, which have none
_OWN_NAME = re.compile(rf"(?:/vsi[\w-]+/)?{re.escape(_NAME)}[:,] ?")
_quiet = threading.local()


class _OwnMessages(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_quiet, "depth", 0)


_own_messages = _OwnMessages()


@contextmanager
def gdal(what: str = "GeoTIFF") -> Iterator[ModuleType]:
    """The module rasterio, its GDAL restrained in this thread while the block lasts.

    Whatever rasterio itself raises leaves the block as an `OSError` that says GDAL's reason.

    Args:
        what: what needs it, in words for the user.

    Raises:
        UsageError: rasterio is not installed.
        OSError: GDAL could not do what was asked for.

    Example:
        >>> with gdal() as rasterio:
        ...     rasterio.open("no/such.tif")
        Traceback (most recent call last):
            ...
        OSError: no/such.tif: No such file or directory
    """
    rasterio = extra("rasterio", "geo", what)
    errors = (rasterio.errors.RasterioError, extra("rasterio._err", "geo", what).CPLE_BaseError)
    session = extra("rasterio.session", "geo", what).DummySession()  # or boto3 would be asked for credentials
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("rasterio")]:
        logging.getLogger(name).addFilter(_own_messages)
    _quiet.depth = getattr(_quiet, "depth", 0) + 1
    try:
        with rasterio.Env(session=session, **_OPTIONS):
            yield rasterio
    except errors as error:
        raise OSError(_reason(error)) from error
    finally:
        _quiet.depth -= 1


class Handle:
    """An open dataset that reads from a file object, for one thread at a time; to be used inside `gdal()`.

    Files on this disk are read so, too: GDAL's own access would take some names for commands, and libtiff would tell the
    terminal of a damaged file what it thinks of it.

    Attributes:
        dataset: rasterio's.

    Raises:
        OSError: it is no GeoTIFF, or the file object raised an error.
    """

    def __init__(self, rasterio: ModuleType, file: BinaryIO) -> None:
        self._stream = Stream(file)
        self._context = contextvars.copy_context()  # rasterio keeps open streams in one, which threads do not share
        try:
            self.dataset = self._context.run(
                _open, rasterio, opener=_give(lambda mode: self._stream), GEOREF_SOURCES="INTERNAL"
            )
        except BaseException:
            self._stream.close()
            self._stream.check()
            raise

    @property
    def is_whole(self) -> bool:
        """Whether the file object has worked so far."""
        return self._stream.failure is None

    def check(self) -> None:
        """Raise what the file object raised, if it did; GDAL must not see it."""
        self._stream.check()

    def close(self) -> None:
        """Let go of the file."""
        self._context.run(self.dataset.close)

    def __enter__(self) -> Any:
        return self.dataset

    def __exit__(self, *_: object) -> None:
        self.close()
        self.check()


@contextmanager
def new_dataset(rasterio: ModuleType, path: Path, **profile: Any) -> Iterator[Any]:
    """A new GeoTIFF to be written to, closed at the end of the block.

    The bytes go through Python: a full disk is then an `OSError` here, not words of libtiff on the terminal.

    Raises:
        OSError: it cannot be written.
    """
    streams: list[Stream] = []

    def create(mode: str) -> Stream:
        streams.append(Stream(path.open(mode)))  # type: ignore[arg-type]
        return streams[-1]

    try:
        dataset = _open(rasterio, mode="w", opener=_give(create), **profile)
        try:
            yield dataset
        finally:
            dataset.close()
    finally:
        for stream in streams:
            stream.close()
            stream.check()


class Stream:
    """A file object as GDAL can bear it: an error inside must not reach GDAL's C code, where it would end the process.

    From the first error on, reading gives nothing and what is written is lost; `check` raises that error.

    Example:
        >>> import io
        >>> stream = Stream(io.BytesIO(b"abc"))
        >>> stream.read(2), stream.tell(), stream.failure
        (b'ab', 2, None)
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: BaseException | None = None

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; fewer at the end."""
        return self._attempt(lambda: self._file.read(size), b"")

    def write(self, content: bytes) -> int:
        """All of `content`."""
        return self._attempt(lambda: self._file.write(content), len(content))

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place."""
        return self._attempt(lambda: self._file.seek(offset, whence), 0)

    def tell(self) -> int:
        """The place where it is."""
        return self._attempt(self._file.tell, 0)

    def flush(self) -> None:
        """Hand over to the operating system what was written."""
        self._attempt(self._file.flush, None)

    def truncate(self, size: int | None = None) -> int:
        """Cut off what lies behind."""
        return self._attempt(lambda: self._file.truncate(size), 0)

    def close(self) -> None:
        """Let go of the file, as often as one likes."""
        failure, self.failure = self.failure, None
        self._attempt(self._file.close, None)
        self.failure = failure or self.failure

    def check(self) -> None:
        """Raise the first error, if there was one.

        Raises:
            OSError: the file object raised an error; one of pixelwise, and an interrupt, are raised as they are.
        """
        if isinstance(self.failure, Exception) and not isinstance(self.failure, OSError | PixelwiseError):
            raise OSError(str(self.failure) or type(self.failure).__name__) from self.failure
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _attempt(self, action: Callable[[], Any], otherwise: Any) -> Any:
        if self.failure is not None:
            return otherwise
        try:
            return action()
        except BaseException as error:  # noqa: BLE001 (kept for `check`, which is called when GDAL has returned)
            self.failure = error
            return otherwise


def _open(rasterio: ModuleType, **options: Any) -> Any:
    """`rasterio.open`, without its warning that a file is not georeferenced."""
    with silence():
        return rasterio.open(_NAME, driver=DRIVER, sharing=False, **options)


def _give(opened: Callable[[str], Stream]) -> Callable[..., Stream]:
    """What rasterio calls to open a file by name; GDAL may ask for others beside it, which do not exist."""

    def give(path: str, mode: str = "rb", **_: Any) -> Stream:
        if not str(path).endswith(_NAME):
            raise FileNotFoundError(path)
        return opened(mode)

    return give


def _reason(error: BaseException) -> str:
    """GDAL's own words on the cause, which rasterio keeps in the causes of its errors, without the names it gives files."""
    words: list[str] = []
    link: BaseException | None = error
    while link is not None and len(words) < 4:
        text = str(getattr(link, "errmsg", None) or link)
        if "previous exception" not in text:
            words.append(text)
        link = link.__cause__
    return _OWN_NAME.sub("", words[-1]) if words else type(error).__name__
