"""The drawn figures of the report: curves and a histogram, as SVG that takes its colours and font from the page.

Only `Figure` objects are used, never pyplot, so nothing here touches matplotlib's global figures or needs a display.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

Points = Sequence[tuple[int, float]]

MAX_POINTS = 300
SIZE_IN = (4.6, 2.7)

# Stand-ins that matplotlib can draw with; `_inline` turns them into the custom properties of the page's style sheet.
INK, GRID, FIRST, SECOND = "#010101", "#020202", "#030303", "#040404"
VARIABLES = {INK: "--muted", GRID: "--line", FIRST: "--series-1", SECOND: "--series-2"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a plot."""

    label: str
    points: Points  # (step, value), ordered by step
    smooth: bool = False  # draw the points faintly and their running mean over them


def plot_lines(lines: Sequence[Line], *, percent: bool = False) -> str:
    """At most two lines over the steps of a training, as the text of an SVG element; `percent` for fractions."""
    figure, axes = _figure()
    for line, color in zip(lines, (FIRST, SECOND), strict=False):
        steps, values = _thin(line.points)
        values = values * 100 if percent else values
        marker = "o" if len(steps) <= 40 and not line.smooth else ""
        axes.plot(steps, values, color=color, linewidth=1.0 if line.smooth else 1.6, marker=marker, markersize=2.6,
                  alpha=0.35 if line.smooth else 1.0)  # fmt: skip
        if line.smooth:
            axes.plot(steps, _running_mean(values), color=color, linewidth=1.6)
    axes.set_ylim(*_limits([value * (100 if percent else 1) for line in lines for _, value in line.points]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("step", color=INK, fontsize=9)
    return _inline(figure)


def plot_histogram(scores: Sequence[float]) -> str:
    """How many images score how much, as the text of an SVG element; `scores` are fractions in 0..1."""
    figure, axes = _figure()
    axes.hist(np.clip(np.asarray(scores) * 100, 0, 100), bins=list(range(0, 101, 5)), color=FIRST, rwidth=0.86)
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("mIoU of the image, %", color=INK, fontsize=9)
    axes.set_ylabel("images", color=INK, fontsize=9)
    return _inline(figure)


def _figure() -> tuple[Figure, Axes]:
    """An empty plot in the style of the page."""
    figure = Figure(figsize=SIZE_IN, layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9, length=0, pad=5)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    return figure, axes


def _thin(points: Points) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values, averaged in groups of neighbours so that the page stays small."""
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    if len(table) > MAX_POINTS:
        table = np.array([group.mean(axis=0) for group in np.array_split(table, MAX_POINTS)])
    return table[:, 0], table[:, 1]


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of each value and its neighbours, over a window of a fifteenth of the length, narrower at the ends."""
    window = np.ones(len(values) // 30 * 2 + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """From zero (or the lowest value) to a little above the highest value that is no outlier."""
    low, high = min(0.0, *values, 0.0), float(np.quantile(values, 0.995)) if len(values) > 200 else max(values)
    return low, low + (high - low) * 1.08 or 1.0


def _inline(figure: Figure) -> str:
    """The figure as an `<svg>` for the inside of an HTML page: same bytes each time, no ids that clash."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pixelwise"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    own = hashlib.sha256(text.encode()).hexdigest()[:8]  # equal plots share their ids, and so do parts of unequal ones
    text = re.sub(r' id="|url\(#|href="#', rf"\g<0>fig-{own}-", text)
    text = re.sub(r"(font: [^;\"]*?px|font-family:) [^;\"]+", r"\1 var(--sans)", text)
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    return text.strip()
