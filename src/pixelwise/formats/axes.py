"""Which axis of an array is what: rows, columns, channels, planes; as the user or the file says, or as its lengths tell."""

from collections.abc import Sequence

from pixelwise.errors import DataError, UsageError

_ROLES = {
    "y": ("y", "lat", "latitude", "north", "northing", "row", "rows", "height", "h"),
    "x": ("x", "lon", "longitude", "east", "easting", "col", "cols", "column", "columns", "width", "w"),
    "c": ("c", "channel", "channels", "band", "bands", "wavelength", "s"),
}
_MAX_COLORS = 4  # an axis nobody names is the channels if it is no longer than this: grey, grey + opacity, RGB, RGBA


def axes_of(
    shape: Sequence[int], names: Sequence[str | None] | None, wanted: str | None = None, channels: int | None = None
) -> tuple[str, ...]:
    """The names of the axes of an array, among them "y" and "x", and "c" if it has channels; all others are planes.

    What the user wants ("zyx") counts before the names of the file; where both are missing, the lengths and the number of
    channels that the network takes decide.
    """
    size = " x ".join(map(str, shape))
    if wanted is not None:
        if len(wanted) != len(shape) or len(set(wanted)) != len(wanted) or not {"y", "x"} <= set(wanted):
            raise UsageError(
                f"axes {wanted!r} do not fit an array of {size}. Write one letter for each axis, y and x among them, "
                'for example "zyx", "cyx" or "tczyx".'
            )
        return tuple(wanted)
    if names and all(names):
        roles = tuple(role_of(str(name)) for name in names)
        if len(roles) == len(shape) and {"y", "x"} <= set(roles) and len(set(roles)) == len(roles):
            return roles
    guess = _guess(tuple(shape), channels)
    if guess is None:
        raise DataError(
            f"nothing says which of its axes ({size}) are rows and columns. Say so by axes, for example --axes tczyx."
        )
    return tuple(guess)


def axes_of_mask(shape: Sequence[int], axes: str | None) -> str | None:
    """The axes of a mask beside an image whose axes are given: the same, without channels; None if it has others."""
    for wanted in (axes or "", (axes or "").replace("c", "")):
        is_flat = "c" not in wanted or (len(wanted) == len(shape) and shape[wanted.index("c")] == 1)
        if len(wanted) == len(shape) and is_flat:
            return wanted
    return None


def role_of(name: str) -> str:
    """The letter of an axis of this name, where it is rows, columns or channels; else the name itself."""
    plain = name.strip().lower()
    return next((role for role, names in _ROLES.items() if plain in names), plain)


def _guess(shape: tuple[int, ...], channels: int | None) -> str | None:
    """Axes without names: as many channels as the network takes, or few, first or last; else a stack."""
    if len(shape) == 2:
        return "yx"
    if len(shape) == 5:  # the order of NGFF, where the network takes as many channels and no other axis fits
        return "tczyx" if shape[1] == channels and shape.count(shape[1]) == 1 else None
    if len(shape) not in (3, 4):
        return None
    planes, last, first = ("", shape[-1], shape[0]) if len(shape) == 3 else ("z", shape[3], shape[1])
    tests = [lambda length: length == channels] if channels else []
    for is_channels in (*tests, lambda length: length <= _MAX_COLORS):
        if is_channels(last) != is_channels(first):
            return f"{planes}yxc" if is_channels(last) else f"{planes}cyx"
    if len(shape) == 3:
        return "yxc" if last <= _MAX_COLORS and shape[1] > _MAX_COLORS else "zyx"
    return None


def axes_of_numpy(shape: tuple[int, ...], channels: int | None) -> str:
    """The axes of an array that NumPy saved: (H, W), (H, W, C) or (planes, H, W, C), unless that cannot be meant.

    (C, H, W) is read as such where the network takes so many channels and not as many as the last axis has. (planes, H, W)
    are those of a grey image where neither end fits, the first axis is the shortest, and it is longer than colours are.
    """
    if len(shape) == 2:
        return "yx"
    planes, sides = ("z", shape[1:]) if len(shape) == 4 else ("", shape)
    first, last = sides[0], sides[-1]
    fits_first, fits_last = (length == channels or (length == 1 and channels == 3) for length in (first, last))
    if fits_first and not fits_last:
        return f"{planes}cyx"
    is_grey_stack = not planes and channels in (1, 3) and _MAX_COLORS < first < min(sides[1:])
    return "zyx" if is_grey_stack and not fits_last else f"{planes}yxc"
