"""`int8.json` in a run folder: the ranges with which the run's network computes in 8 bits, and what that costs.

It may come from a stranger, so nothing in it is believed before it is checked. The weights are quantised anew each time,
from the run's own.
"""

import math
from pathlib import Path
from typing import Any

import torch

from pixelwise.errors import DataError, UsageError, brief
from pixelwise.files import read_json
from pixelwise.ops.quantization import has_int8

INT8_NAME = "int8.json"
FORMAT = 1
_MOST = 100_000  # convolutions
_FAR = 1e30  # beyond all maps
_KEYS = {
    "format", "weights_sha256", "ranges", "split", "folded", "int8", "cost", "speed", "calibration_images", "versions",
}  # fmt: skip

Ranges = dict[str, tuple[float, float]]


def check_int8(device: torch.device, precision: str) -> None:
    """Raise `UsageError` unless 8 bits can be faster here: on a CPU with instructions for them, beside bfloat16."""
    text = ""
    if device.type != "cpu":
        text = f"it is for CPUs, and the network is on {device}"
    elif not has_int8():
        text = "this CPU has neither AVX512-VNNI nor AMX, so 8 bits would be slower"
    elif precision != "bf16":
        text = f"its other layers compute in bf16, not {precision}"
    if text:
        raise UsageError(f"accelerate int8: {text}. Use accelerate auto.")


def read_ranges(folder: Path | None, weights_sha256: str) -> Ranges:
    """The range of the input of each convolution in 8 bits, by its name, for the weights of a run.

    Raises:
        UsageError: the run has none, or they belong to other weights.
        DataError: the file is damaged.
    """
    command = f"Make it: pixelwise quantize {folder or 'RUN'} DATA"
    if folder is None or not (folder / INT8_NAME).exists():
        raise UsageError(f"accelerate int8: there is no {INT8_NAME} in {folder or 'a run folder'}. {command}")
    path = folder / INT8_NAME
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT or isinstance(values["format"], bool):
        raise DataError(f"{path}: is not of format {FORMAT}, which this version of pixelwise reads. {command}")
    if values.keys() != _KEYS:
        raise DataError(f"{path}: has keys {brief(sorted(values))}, not {', '.join(sorted(_KEYS))}. {command}")
    if values["weights_sha256"] != weights_sha256:
        raise UsageError(f"{path}: belongs to other weights; the network was trained further. {command}")
    ranges = values["ranges"]
    if not isinstance(ranges, dict) or len(ranges) > _MOST:
        raise DataError(f"{path}: 'ranges' must be a mapping, not {brief(ranges)}. {command}")
    for name, span in ranges.items():
        if not (isinstance(span, list) and len(span) == 2 and all(map(_is_number, span)) and span[0] <= 0 <= span[1]):
            raise DataError(
                f"{path}: the range of {brief(name)} must be two numbers [low, high] around 0, not {brief(span)}. {command}"
            )
    return {name: (float(low), float(high)) for name, (low, high) in ranges.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < _FAR
