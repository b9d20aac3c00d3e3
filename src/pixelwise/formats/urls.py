"""The file system of a URL, with limits of time; and errors of servers in words that hold no secret."""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from pixelwise.errors import DataError, PixelwiseError
from pixelwise.extras import extra
from pixelwise.formats.local import PROTOCOLS, protocol_of, shown

CONNECT_S, READ_S, REQUEST_S = 10, 60, 60
"""The longest wait for a connection, for the next bytes, and for a whole request besides its content, in seconds."""

SLOWEST_BYTES_S = 20_000  # slower content is given up, for a server that sends a byte a second would hold us for ever

UNSIZED_BYTES = (300 - REQUEST_S) * SLOWEST_BYTES_S
"""For an answer whose size nobody knows: 300 s in all."""

_TRIES = 3
_MISSING = "there is no such object."
_BROKEN_LINES = {"ClientPayloadError", "ServerDisconnectedError", "ClientOSError"}  # of aiohttp
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "GoogleAuthError", "TokenRetrievalError",
}  # fmt: skip
_TIMEOUTS = {"ConnectTimeoutError", "ReadTimeoutError", "TimeoutException"}


class NoSuchObject(DataError):
    """There is nothing of that name, which for a chunk of an array is no error."""


def is_web(location: str) -> bool:
    """Whether a URL belongs to a web server, which neither lists folders nor takes results."""
    return protocol_of(location) in ("http", "https")


def check_package(location: str) -> ModuleType:
    """The package fsspec, if it and the one for the protocol of a URL are installed; no server is asked."""
    protocol = protocol_of(location)
    module, package = PROTOCOLS.get(protocol, ("fsspec", ""))
    what, more = f"{shown(location)}: {protocol}://", (package,) * bool(package)
    fsspec = extra("fsspec", "remote", what, *more)
    extra(module, "remote", what, *more)
    return fsspec


def filesystem(location: str) -> tuple[Any, str]:
    """The file system of a URL, with limits of time, and the name that the URL has there.

    Credentials come from where the packages look for them (environment, configuration files); further settings from
    `FSSPEC_<PROTOCOL>_<SETTING>`, for example `FSSPEC_S3_ANON=true` for public buckets.
    """
    protocol, fsspec = protocol_of(location), check_package(location)
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        waiting = {"connect_timeout": CONNECT_S, "read_timeout": READ_S, "retries": {"max_attempts": 0}}
        options = {"use_listings_cache": False, "config_kwargs": waiting}
    elif protocol in ("gs", "gcs"):
        options = {"use_listings_cache": False, "requests_timeout": READ_S}
    elif is_web(location):
        timeout = extra("aiohttp", "remote", "").ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    with remote_errors(shown(location)):
        configured = fsspec.config.conf.get(protocol, {})
        system = fsspec.filesystem(protocol, **{key: options[key] for key in options if key not in configured})
        if hasattr(system, "retries"):
            system.retries = _TRIES  # of s3fs; botocore's own are switched off, for the two would multiply
        return system, str(system._strip_protocol(location))


def bounded(system: Any, size: int = 0) -> dict[str, float]:
    """The argument that ends a request of an asynchronous file system, for so many bytes, after a while."""
    return {"timeout": REQUEST_S + size / SLOWEST_BYTES_S} if getattr(system, "async_impl", False) else {}


def patiently(work: Callable[[], Any]) -> Any:
    """Do it again, a little later, where a line broke or a server is busy."""
    for attempt in range(_TRIES - 1):
        try:
            return work()
        except (OSError, ValueError, RuntimeError) as error:
            cause = _unwrapped(error)
            status = _status(cause)
            broke = isinstance(cause, ConnectionError) or bool(_names(cause) & _BROKEN_LINES)
            if status not in (429, 500, 502, 503, 504) and (status is not None or not broke):
                raise
        time.sleep(0.3 * 4**attempt)
    return work()


@contextmanager
def remote_errors(name: str) -> Iterator[None]:
    """Turn what file systems raise into a `DataError` of our own words.

    Their texts are left out, for they repeat URLs with signatures; so is the cause, which a log would print.
    """
    try:
        yield
    except (PixelwiseError, Warning):
        raise
    except Exception as error:  # noqa: BLE001  (each package has errors of its own)
        why = _explain(_unwrapped(error))
        raise (NoSuchObject if why == _MISSING else DataError)(f"{name}: {why}") from None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status an error stands for, wherever its package keeps that; causes are asked too."""
    for _ in range(5):
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for value in (getattr(error, "status", None), getattr(response, "status_code", response)):
            if isinstance(value, int) and 100 <= value < 600:
                return value
        error = getattr(error, "__cause__", None)
    return None


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _unwrapped(error: BaseException) -> BaseException:
    """What happened, where a file system says of every failure that there is no such file."""
    cause = error.__cause__
    return cause if isinstance(error, FileNotFoundError) and cause and not isinstance(cause, LookupError) else error


def _explain(error: BaseException) -> str:
    status, names = _status(error), _names(error)
    if status in (401, 403) or isinstance(error, PermissionError):
        return "you have no permission, or it does not exist. Check the credentials and the name."
    if names & _NO_CREDENTIALS:
        return "no credentials were found. Set them in the environment; FSSPEC_S3_ANON=true opens public buckets of S3."
    if status in (404, 410) or isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return _MISSING
    if isinstance(error, TimeoutError) or names & _TIMEOUTS:
        return (
            f"the server did not answer in time (it gets {CONNECT_S} s to connect, {REQUEST_S:g} s to answer, and must send "
            f"{SLOWEST_BYTES_S:,} bytes a second). Try again later, or download the file first."
        )
    if "TooManyRedirects" in names:
        return "the server sends us from one address to the next without end. Check the name."
    if status in (412, 416):
        return "the object changed while it was read. Run again when nothing writes to it."
    if status is not None:
        return f"the server answered with HTTP status {status}. Try again later, or check the name."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "it cannot be copied: the disk is full. Free some space, or set TMPDIR to a larger disk."
    if isinstance(error, OSError) or any("Connect" in name or "HTTPClientError" in name for name in names):
        return "the server cannot be reached or broke off. Check the name, the network and the endpoint."
    return f"the server's answer cannot be used ({type(error).__name__}). Check the name of the object."
