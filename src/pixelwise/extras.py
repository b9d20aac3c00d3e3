"""Optional packages: imported when they are first needed, and how to install what is missing."""

import importlib
import re
from importlib import metadata
from types import ModuleType

from pixelwise.errors import UsageError


def requirements(extra: str) -> tuple[str, ...]:
    """What an extra of pixelwise installs, as pip takes it.

    Example:
        >>> requirements("slide")
        ('tiffslide>=2.4',)
    """
    try:
        known = metadata.requires("pixelwise") or ()
    except metadata.PackageNotFoundError:  # it runs from its source
        known = ()
    lines = [re.fullmatch(r"([^;]+?)\s*;\s*extra == ['\"](.+)['\"]", line) for line in known]
    return tuple(match[1] for match in lines if match and match[2] == extra)


def extra(module: str, name: str, what: str, *more: str) -> ModuleType:
    """An optional package, imported when it is first needed.

    Args:
        module: the package to import, such as "rasterio".
        name: the extra of pixelwise that installs it, such as "geo".
        what: what needs it, in words for the user.
        more: packages that pip must install beside the extra.

    Raises:
        UsageError: it is not installed.

    Example:
        >>> extra("no_such_package", "zarr", "Zarr")
        Traceback (most recent call last):
            ...
        pixelwise.errors.UsageError: Zarr needs the package no_such_package. Install it: pip install "zarr>=3.0.8"
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        wanted = [*(requirements(name) or (package,)), *more]
        command = " ".join(["pip install", *(f'"{each}"' for each in wanted)])
        raise UsageError(f"{what} needs the package {package}. Install it: {command}") from error
