"""The pictures of docs/large-images.md: how stripes stream, and what tiles without a halo do to the labels.

The first is drawn; the second is what a trained network says of a drawn scene that it has not seen.

    pixelwise demo --out runs/demo
    python benchmarks/large_images_pictures.py runs/demo --out docs/images
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from ladder_pictures import frameless, save
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

import pixelwise
from pixelwise.data.scenes import SCENE_LABELS, draw_scene

SIZE = (320, 480)  # (height, width)
TILE_PX = 64
NOW, KEPT, DONE, HALO = "#e08214", "#fdd9a8", "#7fbf7b", "#c2a5cf"


def layers(axis: Axes) -> None:
    """Rows of the maps of a small U-shaped network while a stripe passes: done, kept for later, computed now."""
    names = ("image", "stride 1", "stride 2", "stride 4", "stride 2", "labels")
    heights = ((4, 52), (18, 50), (10, 46), (6, 42), (6, 38), (0, 34))  # rows kept, and the last row + 1 so far
    for x, (name, (kept, stop)) in enumerate(zip(names, heights, strict=True)):
        start = stop - 8
        axis.add_patch(Rectangle((x, 0), 0.7, 64, facecolor="white", edgecolor="0.6"))
        axis.add_patch(Rectangle((x, 0), 0.7, start - kept, facecolor="#eeeeee", edgecolor="none"))
        axis.add_patch(Rectangle((x, start - kept), 0.7, kept, facecolor=KEPT, edgecolor="none"))
        axis.add_patch(Rectangle((x, start), 0.7, 8, facecolor=NOW, edgecolor="none"))
        if name == "labels":
            axis.add_patch(Rectangle((x, 0), 0.7, start, facecolor=DONE, edgecolor="none"))
        axis.text(x + 0.35, -2, name, ha="center", va="bottom", fontsize=7)
    axis.set_xlim(-0.1, 5.8)
    axis.set_ylim(66, -9)
    axis.set_axis_off()
    axis.set_title("stripes: each row of each map is computed once", fontsize=9)
    legend = ((NOW, "computed now"), (KEPT, "kept: later rows need it"), ("#eeeeee", "given up"), (DONE, "written"))
    handles = [Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="0.6") for color, _ in legend]
    axis.legend(
        handles, [text for _, text in legend], fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2
    )


def halos(axis: Axes) -> None:
    """One tile with its halo among the cores of the others."""
    axis.add_patch(Rectangle((0, 0), 96, 64, facecolor="white", edgecolor="0.6"))
    axis.add_patch(Rectangle((20, 4), 56, 56, facecolor=HALO, edgecolor="none"))
    axis.add_patch(Rectangle((32, 16), 32, 32, facecolor=NOW, edgecolor="none"))
    for x in (32, 64):
        axis.plot((x, x), (0, 64), color="0.6", linewidth=0.7)
    for y in (16, 48):
        axis.plot((0, 96), (y, y), color="0.6", linewidth=0.7)
    axis.set_xlim(-2, 98)
    axis.set_ylim(66, -9)
    axis.set_axis_off()
    axis.set_title("halo tiles: what two tiles share is computed twice", fontsize=9)
    legend = ((NOW, "core: its labels are kept"), (HALO, "halo: the receptive field"))
    handles = [Rectangle((0, 0), 1, 1, facecolor=color) for color, _ in legend]
    axis.legend(
        handles, [text for _, text in legend], fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=1
    )


def streaming(out: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=(3, 2), layout="constrained")
    layers(axes[0])
    halos(axes[1])
    save(figure, out / "streaming.png")


def bare_tiles(predictor: pixelwise.Predictor, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The labels of tiles that are predicted each by itself, as if they were images."""
    labels = np.empty(image.shape[:2], np.uint8)
    for top in range(0, image.shape[0], TILE_PX):
        for left in range(0, image.shape[1], TILE_PX):
            where = np.s_[top : top + TILE_PX, left : left + TILE_PX]
            labels[where] = predictor.predict(image[where], probabilities=False).labels
    return labels


def seams(run: Path, out: Path, seed: int) -> None:
    """Labels from one pass, from tiles without a halo, and from `tile_px`, with the share of pixels that differ."""
    predictor = pixelwise.load(run, device="cpu", precision="float32")
    image, _ = draw_scene(seed, size=SIZE)
    whole = predictor.predict(image, probabilities=False).labels
    pictures = [("the scene", image), ("one pass", SCENE_LABELS.colorize(whole))]
    exact = predictor.predict(image, tile_px=TILE_PX, probabilities=False).labels
    for name, labels in ((f"bare tiles of {TILE_PX} px", bare_tiles(predictor, image)), (f"tile_px={TILE_PX}", exact)):
        differing = int((labels != whole).sum())
        share = (
            f"{differing:,} px differ from one pass ({differing / whole.size:.1%})" if differing else "no pixel differs"
        )
        pictures.append((f"{name}: {share}", SCENE_LABELS.colorize(labels)))
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4))
    for axis, (title, picture) in zip(axes.flat, pictures, strict=True):
        frameless(axis, picture, title)
    save(figure, out / "seams.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--seed", type=int, default=90_001)
    args = parser.parse_args()
    streaming(args.out)
    seams(args.run, args.out, args.seed)


if __name__ == "__main__":
    main()
