"""The pictures of docs/ladder.md, drawn from the runs that `ladder.py --runs RUNS` left.

python benchmarks/ladder_pictures.py RUNS --out docs/images
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image

import pixelwise
from pixelwise.data.scenes import SCENE_LABELS, draw_scene
from pixelwise.data.separation import separation_weights
from pixelwise.ops.pooling import max_pool_keeping_indices, max_unpool

LECTURE = ((1, 5, 4, 2), (3, 9, 8, 0), (10, 2, 7, 15), (6, 1, 3, 2))  # block maxima 9, 8, 10, 15


def frameless(axis: Axes, picture: NDArray[np.generic], title: str) -> None:
    axis.imshow(picture, interpolation="nearest")
    axis.set_title(title, fontsize=8)
    axis.set_axis_off()


def rungs(runs: Path, names: list[str], out: Path, seed: int) -> None:
    """One unseen scene, its true classes, and what each network says of it."""
    image, truth = draw_scene(seed, size=(128, 192))
    pictures = [("the scene", image), ("true classes", SCENE_LABELS.colorize(truth))]
    for name in names:
        labels = pixelwise.load(runs / name, device="cpu").predict(image, probabilities=False).labels
        pictures.append((name, SCENE_LABELS.colorize(labels)))
    columns = 4
    figure, axes = plt.subplots(
        -(-len(pictures) // columns), columns, figsize=(10, 1.85 * -(-len(pictures) // columns))
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, picture) in zip(axes.flat, pictures, strict=False):
        frameless(axis, picture, title)
    save(figure, out / "ladder.png")


def unpooling(out: Path) -> None:
    """The lecture's 4 x 4 example: pooled, and put back."""
    image = torch.tensor(LECTURE, dtype=torch.float32)[None, None]
    maxima, indices = max_pool_keeping_indices(image, 2)
    restored = max_unpool(maxima, indices, image.shape[-2:])
    figure, axes = plt.subplots(1, 3, figsize=(7, 2.4), width_ratios=(4, 2, 4))
    titles = ("before pooling", "2 x 2 maxima", "put back where they stood")
    for axis, title, grid in zip(axes, titles, (image, maxima, restored), strict=True):
        values = grid[0, 0].numpy()
        axis.imshow(values, cmap="YlGn", vmin=0, vmax=20)
        for (row, column), value in np.ndenumerate(values):
            axis.text(column, row, f"{value:.0f}", ha="center", va="center")
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    save(figure, out / "unpooling.png")


def separation(out: Path) -> None:
    """Close discs and the weights of the gaps between them."""
    rows, columns = np.mgrid[:120, :180]
    discs = ((40, 45, 30), (45, 108, 28), (88, 78, 22), (80, 150, 24))
    mask = np.zeros(rows.shape, np.uint8)
    for row, column, radius in discs:
        mask |= ((rows - row) ** 2 + (columns - column) ** 2 < radius**2).astype(np.uint8)
    weights = np.asarray(separation_weights(mask, w0=10.0, sigma_px=5.0))
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    axes[0].imshow(mask, cmap="gray")
    axes[0].set_title("mask", fontsize=9)
    shown = axes[1].imshow(weights, cmap="inferno")
    axes[1].set_title("weight w, w0 = 10, sigma = 5 px", fontsize=9)
    figure.colorbar(shown, ax=axes)
    for axis in axes:
        axis.set_axis_off()
    save(figure, out / "separation.png")


def save(figure: plt.Figure, path: Path) -> None:
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    with Image.open(path) as picture:  # a palette halves the file
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--seed", type=int, default=90_001)
    parser.add_argument("--only", nargs="*", default=None)
    args = parser.parse_args()
    from ladder import NARROW

    names = args.only or [name for name in NARROW if (args.runs / name / "model.safetensors").is_file()]
    rungs(args.runs, names, args.out, args.seed)
    unpooling(args.out)
    separation(args.out)


if __name__ == "__main__":
    main()
