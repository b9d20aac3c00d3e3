"""Which URLs are followed, by which package, for how long; and errors of servers in words that hold no secret.

Only plain URLs of the table below are opened, each by the file system of its own protocol. Nothing else is: a chain
(`zip::`, `simplecache::`) or a manifest (`reference::`) could make one name mean any file of this machine.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.files import extra

PROTOCOLS = {  # the module of the file system, and the package that pip installs beside the extra, if any
    "s3": ("s3fs", ""), "s3a": ("s3fs", ""), "gs": ("gcsfs", "gcsfs"), "gcs": ("gcsfs", "gcsfs"),
    "az": ("adlfs", "adlfs"), "abfs": ("adlfs", "adlfs"), "abfss": ("adlfs", "adlfs"),
    "hf": ("huggingface_hub", ""), "http": ("aiohttp", ""), "https": ("aiohttp", ""), "memory": ("fsspec", ""),
}  # fmt: skip
"""Every protocol that is followed, besides `file`, which is a local path."""

CONNECT_S = 10
READ_S = 60
REQUEST_S = 300
"""No request takes longer, whatever trickles in."""

_MISSING = "there is no such object."
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = ("file", "local")
_CHAINED = re.compile(r"^(?:[A-Za-z][A-Za-z0-9+.-]*)::|::")
_FOREIGN_ERRORS = {  # what file systems raise that is none of Python's own errors, by the module that defines it
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "huggingface_hub.errors": ("HfHubHTTPError",),
    "httpx": ("HTTPError",),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
}


class NoSuchObject(DataError):
    """There is nothing of that name, which for a chunk of an array is no error."""


def is_url(location: object) -> bool:
    """Whether a name is a URL, not a path.

    Example:
        >>> is_url("s3://scans/a.tif"), is_url("scans/a.tif"), is_url("C:/scans/a.tif")
        (True, False, False)
    """
    text = str(location)
    return bool(_SCHEME.match(text)) or ("::" in text and "://" in text)


def shown(location: object) -> str:
    """A URL without its user, password and query, which may be secrets; a path as it is.

    Example:
        >>> shown("https://me:secret@host:8080/a.tif?signature=abc")
        'https://host:8080/a.tif'
    """
    text = str(location)
    match = _SCHEME.match(text)
    if not is_url(text) or match is None:
        return text.split("?")[0] if is_url(text) else text
    head, rest = text[: match.end()], text[match.end() :].split("?")[0]
    host, slash, path = rest.partition("/")
    if match[1].lower() in ("http", "https"):
        path = path.split("#")[0]
    return head + host.rpartition("@")[2] + slash + path


def protocol_of(location: str) -> str:
    """The protocol of a URL, "file" among them.

    Raises:
        UsageError: it is chained, or none that is followed.

    Example:
        >>> protocol_of("s3://scans/a.tif")
        's3'
        >>> protocol_of("simplecache::s3://scans/a.tif")
        Traceback (most recent call last):
            ...
        pixelwise.errors.UsageError: simplecache::s3://scans/a.tif: chained URLs are not followed. Name the file itself.
    """
    bare = re.sub(r"^([A-Za-z+.-]+://(?:[^/]*@)?)\[[0-9A-Fa-f:.]+\]", r"\1host", location)  # of IPv6, as [::1]
    if _CHAINED.search(bare.split("?")[0]):
        raise UsageError(f"{shown(location)}: chained URLs are not followed. Name the file itself.")
    match = _SCHEME.match(location)
    name = match[1].lower() if match else ""
    if name in _LOCAL:
        return "file"
    if name not in PROTOCOLS:
        known = ", ".join(f"{key}://" for key in ("file", *PROTOCOLS))
        raise UsageError(f"{shown(location)}: URLs of this kind are not followed. Possible are {known}.")
    return name


def local_path(location: str) -> str | None:
    """The path that a `file://` URL means; None for every other URL.

    Raises:
        UsageError: it names another machine, or is none that is followed.

    Example:
        >>> local_path("file:///scans/a%20b.tif")
        '/scans/a b.tif'
    """
    if protocol_of(location) != "file":
        return None
    rest = location.partition("://")[2]
    if rest.startswith("localhost/"):
        rest = rest[len("localhost") :]
    if not rest.startswith("/"):
        raise UsageError(f"{shown(location)}: write file:/// and a full path, or the path alone.")
    return unquote(rest)


def filesystem(location: str) -> tuple[Any, str]:
    """The file system of a URL, with bounded waiting, and the name that the URL has there.

    Credentials come from where the packages look for them (environment, configuration files); further settings from
    `FSSPEC_<PROTOCOL>_<SETTING>`, for example `FSSPEC_S3_ANON=true` for public buckets.

    Raises:
        UsageError: the URL is none that is followed, or its package is not installed.

    Example:
        >>> filesystem("memory://scans/a.tif")[1]
        '/scans/a.tif'
    """
    protocol = protocol_of(location)
    fsspec = check_package(location)
    with remote_errors(shown(location)):
        system = fsspec.filesystem(protocol, **_options(protocol, fsspec.config.conf.get(protocol, {})))
        if hasattr(system, "retries"):
            system.retries = 3  # of s3fs; botocore's own are switched off, for the two would multiply
        return system, str(system._strip_protocol(location))


def check_package(location: str) -> ModuleType:
    """The package fsspec, if it and the one for the protocol of a URL are installed; no server is asked.

    Raises:
        UsageError: one is not installed, or the URL is none that is followed.

    Example:
        >>> check_package("memory://scans/a.tif").__name__
        'fsspec'
    """
    protocol = protocol_of(location)
    module, package = PROTOCOLS.get(protocol, ("fsspec", ""))
    for name in ("fsspec", module):
        try:
            extra(name, "remote", f"{protocol}://")
        except UsageError:
            command = f'pip install "pixelwise[remote]"{" " + package if package else ""}'
            raise UsageError(
                f"{shown(location)}: {protocol}:// needs the package {name}. Install it: {command}"
            ) from None
    return extra("fsspec", "remote", f"{protocol}://")


def _options(protocol: str, configured: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        waiting = {"connect_timeout": CONNECT_S, "read_timeout": READ_S, "retries": {"max_attempts": 0}}
        options = {"use_listings_cache": False, "config_kwargs": waiting}
    elif protocol in ("http", "https"):
        timeout = extra("aiohttp", "remote", "https://").ClientTimeout(
            total=None, sock_connect=CONNECT_S, sock_read=READ_S
        )
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    elif protocol in ("gs", "gcs"):
        options = {"use_listings_cache": False, "requests_timeout": READ_S}
    return {key: value for key, value in options.items() if key not in configured}


def host(location: str) -> str:
    """The server or bucket of a URL, for messages."""
    return urlsplit(shown(location)).netloc


@contextmanager
def remote_errors(name: str) -> Iterator[None]:
    """Turn what file systems raise into a `DataError` of our own words.

    Their texts are left out, for they repeat URLs with signatures; so is the cause, which a log would print.

    Args:
        name: the URL as it may be shown.

    Example:
        >>> with remote_errors("s3://scans/a.tif"):
        ...     raise FileNotFoundError("https://host/a.tif?signature=abc")
        Traceback (most recent call last):
            ...
        pixelwise.formats.protocols.NoSuchObject: s3://scans/a.tif: there is no such object.
    """
    try:
        yield
    except PixelwiseError:
        raise
    except _errors() as error:
        why = _explain(error)
        raise (NoSuchObject if why == _MISSING else DataError)(f"{name}: {why}") from None


def is_passing(error: BaseException) -> bool:
    """Whether a second try may well succeed: a line that broke, a server that is busy; no refusal."""
    error = _unwrapped(error)
    status = _status(error)
    if status is not None:
        return status in (429, 500, 502, 503, 504)
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError) or bool(
        names & {"ClientPayloadError", "ServerDisconnectedError", "ClientOSError"}
    )


def _errors() -> tuple[type[BaseException], ...]:
    """What file systems raise; asked for after the fact, when the module that defines an error is surely imported."""
    found: list[type[BaseException]] = [OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError]
    for module, names in _FOREIGN_ERRORS.items():
        if module in sys.modules:
            found += [getattr(sys.modules[module], name) for name in names if hasattr(sys.modules[module], name)]
    return tuple(found)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status an error stands for, wherever its package keeps that; causes are asked too."""
    for _ in range(5):
        if error is None:
            return None
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for value in (getattr(error, "status", None), getattr(response, "status_code", response)):
            if isinstance(value, int) and 100 <= value < 600:
                return value
        error = error.__cause__
    return None


def _unwrapped(error: BaseException) -> BaseException:
    """What happened, where a file system says of every failure that there is no such file."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None or isinstance(cause, LookupError):
        return error
    return cause


def _explain(error: BaseException) -> str:
    error = _unwrapped(error)
    status = _status(error)
    names = {kind.__name__ for kind in type(error).__mro__}
    if status in (401, 403) or isinstance(error, PermissionError):
        return "you have no permission, or it does not exist. Check the credentials and the name."
    if names & {
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "GoogleAuthError",
        "TokenRetrievalError",
    }:
        return "no credentials were found. Set them in the environment; FSSPEC_S3_ANON=true opens public buckets of S3."
    if status in (404, 410) or isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return _MISSING
    if isinstance(error, TimeoutError) or names & {"ConnectTimeoutError", "ReadTimeoutError", "TimeoutException"}:
        return f"the server did not answer in time ({CONNECT_S} s to connect, {READ_S} s to send). Try again later."
    if status in (412, 416):
        return "the object changed while it was read. Run again when nothing writes to it."
    if status is not None:
        return f"the server answered with HTTP status {status}. Try again later, or check the name."
    if isinstance(error, OSError) or any("Connect" in name or "HTTPClientError" in name for name in names):
        return "the server cannot be reached or broke off. Check the name, the network and the endpoint."
    return f"the server's answer cannot be used ({type(error).__name__}). Check the name of the object."
