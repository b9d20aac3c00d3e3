"""What pixelwise raises when a user's input cannot be used.

Every message says what is wrong, what was given, what is allowed and what to do, in one paragraph, because the command
line prints it as it is (without a traceback). Anything that is not one of these classes is a bug in pixelwise.
"""


class PixelwiseError(ValueError):
    """The base of every error a user can cause; its message is one readable paragraph."""


class UsageError(PixelwiseError):
    """A wrong option, name or combination of options."""


class DataError(PixelwiseError):
    """A file or a data folder that cannot be used as it is."""


def brief(value: object, length: int = 80) -> str:
    """`value` for an error message: one line, bounded, however large it is.

    Example:
        >>> brief([8] * 1_000_000, 12)
        '[8, 8, 8, 8…'
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**18:
        return "a huge number"  # which may have thousands of digits
    if isinstance(value, list | tuple | str) and not isinstance(value, Exception):
        value = value[: length + 1]
    text = " ".join((str(value) if isinstance(value, Exception) else repr(value)).split())
    return text if len(text) <= length else text[: length - 1] + "…"
