"""The words of `pixelwise predict`'s options as values: sizes, thresholds, lists."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pixelwise.errors import UsageError

if TYPE_CHECKING:
    from pixelwise.infer.options import JobOptions

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for ending, base in (("", 1024), ("iB", 1024), ("B", 1000))
}


def parse_bytes(text: str) -> int:
    """A size such as 2GiB (1,024³ bytes each), 2G (the same), 500MB (1,000² each) or a number of bytes.

    Raises:
        UsageError: it is none of these, or less than 1 MiB, as "2" is where 2 GiB are meant.

    Example:
        >>> parse_bytes("2GiB"), parse_bytes("1.5g"), parse_bytes("500 MB"), parse_bytes("4194304")
        (2147483648, 1610612736, 500000000, 4194304)
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) *([A-Za-z]*)", text.strip())
    units = {name.lower(): size for name, size in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise UsageError(f"--memory {text}: write a size such as 2GiB, 500MB or a number of bytes.")
    size = int(float(match[1]) * units[match[2].lower()])
    if size < 2**20:
        raise UsageError(f"--memory {text} is {size:,} bytes, too little for any network; write 2GiB or 500MB.")
    return size


def parse_threshold(text: str) -> tuple[str, float]:
    """CLASS=P as the name of the class and the probability; the name may hold "=".

    Raises:
        UsageError: it has another form.

    Example:
        >>> parse_threshold("tumour=0.3")
        ('tumour', 0.3)
    """
    name, sign, number = text.rpartition("=")
    try:
        share = float(number)
    except ValueError:
        share = float("nan")
    if not sign or not name.strip() or not 0 < share <= 1:
        raise UsageError(
            f"--threshold {text}: write CLASS=P with the name of a class and a probability above 0 and at most 1, such as "
            "tumour=0.3."
        )
    return name.strip(), share


def parse_list(texts: Sequence[str]) -> tuple[str, ...]:
    """Names with commas between them, from an option that may be repeated; each once.

    Example:
        >>> parse_list(["entropy,max-probability", "entropy"])
        ('entropy', 'max_probability')
    """
    names = [name.strip().replace("-", "_") for text in texts for name in text.split(",")]
    return tuple(dict.fromkeys(name for name in names if name))


def parse_intensity(text: str) -> Any:
    """ "auto", "type", or LOW,HIGH as two numbers.

    Raises:
        UsageError: it is none of these.

    Example:
        >>> parse_intensity("-100,300")
        (-100.0, 300.0)
    """
    if text in ("auto", "type"):
        return text
    try:
        low, high = (float(number) for number in text.split(","))
    except ValueError as error:
        raise UsageError(f"--intensity {text}: write auto, type, or LOW,HIGH such as -100,300.") from error
    return low, high


def job_options(
    *,
    tile: int | None,
    blend: str | None,
    overlap: float | None,
    tolerance: float,
    memory: str | None,
    tta: str | None,
    samples: int,
    seed: int,
    maps: Sequence[str],
    threshold: Sequence[str],
    min_area: int,
    format: str | None,
    geojson: bool,
    coco: bool,
    overlay: bool,
    probabilities: bool,
    reading: dict[str, Any],
) -> "JobOptions":
    """All of it as one value.

    Raises:
        UsageError: a word cannot be understood, a number is not allowed, or options exclude each other.
    """
    from pixelwise.infer.options import JobOptions, Tiling

    if overlap is not None and blend is None:
        raise UsageError("--overlap is that of blended tiles; add --blend gaussian, or leave it out.")
    if seed and samples == 1:
        raise UsageError("--seed is that of the dropout of --samples; add --samples 20, or leave it out.")
    tiling: dict[str, Any] = {} if overlap is None else {"overlap": overlap}
    return JobOptions(
        tiling=Tiling(
            tile_px=tile,
            blend=blend,  # type: ignore[arg-type]  # it is checked there
            tolerance=tolerance,
            memory_bytes=None if memory is None else parse_bytes(memory),
            tta=tta,  # type: ignore[arg-type]
            samples=samples,
            seed=seed,
            **tiling,
        ),
        maps=parse_list(maps),
        thresholds=tuple(parse_threshold(text) for text in threshold),
        min_area_px=min_area,
        format=format,
        geojson=geojson,
        coco=coco,
        overlay=overlay,
        probabilities=probabilities,
        reading=tuple((key, value) for key, value in reading.items() if value is not None),
    )


def check_engine(engine: str, address: str | None, workers: int | None) -> None:
    """Raise `UsageError` for an unknown engine, or options of the other one."""
    if engine not in ("local", "ray"):
        raise UsageError(f"--engine {engine}: there are local (this process) and ray (workers of a cluster).")
    if engine == "local" and address is not None:
        raise UsageError("--address is that of a Ray cluster; add --engine ray, or leave it out.")
    if workers is not None and workers < 1:
        raise UsageError(f"--workers must be at least 1, not {workers}.")
