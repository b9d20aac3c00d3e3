"""The machine's own limit: matrix products and 3x3 convolutions in float32, bfloat16 and int8, and memory bandwidth.

`ours` is the rate, the only figure; there is no peer. The share that networks reach of it is raced in `share`.
"""

import statistics

import torch
import torch.nn.functional as F
from measure import Row, Setup, timed
from torch import Tensor

GEMM = 2048
CONVOLUTIONS = ((64, 192, 240), (128, 96, 120), (256, 48, 60), (256, 96, 120))  # channels, height, width
BATCH = 4  # so that bringing the weights into oneDNN's order, which happens at every call, hardly counts


def run(setup: Setup) -> list[Row]:
    rows = [_row(f"{name}, {kind}", rates) for name, kind, rates in _rates(setup)]
    size = 2**20 if setup.small else 2**27
    target, source = torch.zeros(size), torch.ones(size)
    copy = [2 * source.nbytes / value / 1e9 for value in _seconds(setup, lambda: target.copy_(source))]
    return [*rows, _row(f"memory: copy of {source.nbytes >> 20} MiB", copy, "GB/s")]


def rate(setup: Setup, dtype: torch.dtype = torch.bfloat16) -> float:
    """The highest measured FLOP/s of matrix products and convolutions."""
    return 1e9 * max(statistics.median(found) for _, kind, found in _rates(setup, (dtype,)) if kind == _name(dtype))


def _rates(
    setup: Setup, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.int8)
) -> list[tuple[str, str, list[float]]]:
    """(operation, type, GFLOP/s of each round)."""
    found = []
    side = 256 if setup.small else GEMM
    for dtype in dtypes:
        one, other = _random((side, side), dtype), _random((side, side), dtype)
        product = torch._int_mm if dtype == torch.int8 else torch.mm
        spent = _seconds(setup, lambda product=product, one=one, other=other: product(one, other))
        found.append((f"matrix product {side}²", _name(dtype), [2 * side**3 / value / 1e9 for value in spent]))
        for channels, height, width in CONVOLUTIONS[: 1 if setup.small else None]:
            step = _convolution(channels, height, width, dtype)
            flop = 2 * 9 * BATCH * channels**2 * height * width
            what = f"3x3 convolution, {channels} channels, {height} x {width}"
            found.append((what, _name(dtype), [flop / value / 1e9 for value in _seconds(setup, step)]))
    return found


def _convolution(channels: int, height: int, width: int, dtype: torch.dtype):
    """A convolution without a bias that keeps the size, ready to be called."""
    x = _random((BATCH, channels, height, width), dtype).contiguous(memory_format=torch.channels_last)
    weight = _random((channels, channels, 3, 3), dtype).contiguous(memory_format=torch.channels_last)
    if dtype != torch.int8:
        return lambda: F.conv2d(x, weight, padding=1)
    x = x.abs().to(torch.uint8)  # what oneDNN takes
    scale, zero = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
    hints = ([1, 1], [1, 1], [1, 1], 1)  # stride, padding, dilation, groups
    ready = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, *hints, list(x.shape))
    rest = (1.0, 0, torch.uint8, "none", [], "")
    return lambda: torch.ops.onednn.qconv_pointwise(x, 1.0, 0, ready, scale, zero, None, *hints, *rest)


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(-8, 8, shape, dtype=dtype) if dtype == torch.int8 else torch.randn(shape, dtype=dtype)


def _seconds(setup: Setup, step) -> list[float]:
    turn = timed(step, 0.02 if setup.small else 0.2)
    with torch.inference_mode():
        turn()
        return [turn() for _ in range(setup.rounds(5))]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row(case: str, rates: list[float], unit: str = "GFLOP/s") -> Row:
    median = statistics.median(rates)  # the ratios only tell how much the rounds differ
    return Row(
        race="limits",
        case=case,
        peer="",
        unit=unit,
        ours=median,
        theirs=median,
        ratios=tuple(value / median for value in rates),
    )
