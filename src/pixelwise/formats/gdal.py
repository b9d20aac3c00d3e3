"""GDAL for GeoTIFF alone: no other driver, no file beside the image, no network; all bytes go through file objects."""

import contextvars
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import IO, Any

from pixelwise.errors import PixelwiseError
from pixelwise.files import extra
from pixelwise.formats.local import silence

_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no .ovr, .msk, .tfw or metadata files of satellites beside it
    "GDAL_PAM_ENABLED": "NO",  # no .aux.xml, neither read nor written
    "GDAL_CACHEMAX": 64,  # MiB of decoded blocks, for the whole process; GDAL would take 5 % of the memory
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "YES",
}
_NAME = "image.tif"  # GDAL's name of every file: some real names it would take for commands
_OWN_NAME = re.compile(rf"(?:/vsi[\w-]+/)?{re.escape(_NAME)}[:,] ?")


@contextmanager
def gdal(what: str = "GeoTIFF") -> Iterator[ModuleType]:
    """The module rasterio, with these options in this thread; its errors become an `OSError` that says GDAL's reason."""
    rasterio = extra("rasterio", "geo", what)
    errors = (rasterio.errors.RasterioError, extra("rasterio._err", "geo", what).CPLE_BaseError)
    session = extra("rasterio.session", "geo", what).DummySession()  # or boto3 would be asked for credentials
    try:
        with rasterio.Env(session=session, **_OPTIONS):
            yield rasterio
    except errors as error:
        raise OSError(_reason(error)) from error


class Dataset:
    """An open GeoTIFF that is read or written through file objects, by one thread at a time, inside `gdal()`.

    `opener` gives the file object for a mode, such as "rb" or "w+b"; `with` gives rasterio's dataset.
    """

    def __init__(self, rasterio: ModuleType, opener: Callable[[str], IO[bytes]], **options: Any) -> None:
        self._streams: list[_Stream] = []
        self._context = contextvars.copy_context()  # rasterio keeps open streams in one, which threads do not share

        def give(path: str, mode: str = "rb", **_: Any) -> _Stream:
            if not str(path).endswith(_NAME):
                raise FileNotFoundError(path)
            self._streams.append(_Stream(opener(mode)))
            return self._streams[-1]

        try:
            with silence():  # rasterio warns of files without a place
                self.dataset = self._context.run(
                    rasterio.open, _NAME, driver="GTiff", sharing=False, opener=give, **options
                )
        except BaseException:
            self._close_streams()
            self.check()
            raise

    @property
    def has_failed(self) -> bool:
        """Whether a file object has raised an error."""
        return any(stream.failure is not None for stream in self._streams)

    def check(self) -> None:
        """Raise what a file object raised, if one did."""
        for stream in self._streams:
            stream.check()

    def close(self) -> None:
        """Let go of the file."""
        try:
            self._context.run(self.dataset.close)
        finally:
            self._close_streams()

    def _close_streams(self) -> None:
        for stream in self._streams:
            stream.close()

    def __enter__(self) -> Any:
        return self.dataset

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            self.check()


class _Stream:
    """A file object for GDAL, where an error must not reach the C code: it would end the process.

    From the first error on, reading gives nothing and what is written is lost; `check` raises that error.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: BaseException | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:  # read, write, seek, tell, flush, truncate
        def attempt(*given: Any) -> Any:
            if self.failure is None:
                try:
                    return getattr(self._file, name)(*given)
                except BaseException as error:  # noqa: BLE001 (kept for `check`, called when GDAL has returned)
                    self.failure = error
            return len(given[0]) if name == "write" else b"" if name == "read" else 0

        return attempt

    def close(self) -> None:
        try:
            self._file.close()
        except BaseException as error:  # noqa: BLE001 (as above)
            self.failure = self.failure or error

    def check(self) -> None:
        if isinstance(self.failure, Exception) and not isinstance(self.failure, OSError | PixelwiseError):
            raise OSError(str(self.failure) or type(self.failure).__name__) from self.failure
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _reason(error: BaseException) -> str:
    """GDAL's own words, which rasterio keeps in the causes of its errors, without the name of the file."""
    text, link = "", error
    for _ in range(4):
        said = str(getattr(link, "errmsg", None) or link)
        text = text if "previous exception" in said else said
        if link.__cause__ is None:
            break
        link = link.__cause__
    return _OWN_NAME.sub("", text) or type(error).__name__
