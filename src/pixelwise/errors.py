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
