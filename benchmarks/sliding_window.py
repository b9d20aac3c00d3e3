"""A window for every pixel against one pass over the image: the same network, the same logits, multiply-adds and time.

The patch classifier (default network, random weights, eval mode, float32) labels an image of 256 x 256 px by `forward`, and
by `slide`, the naive way. Both do the same for each row of pixels, so `slide` is timed on the first rows of the image only
(`--rows`) and its seconds are multiplied up; `--rows 256` times all of it, some minutes. The rounds alternate, so that a
machine that slows down slows both. Reported is the median ratio, and how much of the ratio of multiply-adds that is.

    python benchmarks/sliding_window.py --out benchmarks/results
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from pixelwise.files import write_json
from pixelwise.models import create_model
from pixelwise.ops.cost import multiply_adds


class Windows(nn.Module):
    """`classify` as a network of its own, to be counted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor) -> Tensor:
        return self.model.classify(patches)


def seconds(step: Callable[[], Tensor]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def largest_difference(model: nn.Module, strip: Tensor) -> float:
    """Between the logits of the two ways, on a part of the image whose own borders are mirrored."""
    with torch.inference_mode():
        return (model(strip) - model.slide(strip)).abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, help="side of the image in pixels")
    parser.add_argument("--rows", type=int, default=4, help="rows of pixels to slide over in each round")
    parser.add_argument("--batch", type=int, default=32, help="windows at a time; slide is fastest with about 32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.manual_seed(0)
    model = create_model("patch_classifier", num_classes=2).eval()
    image = torch.randn(1, 3, args.size, args.size)
    strip = image[..., : args.rows, :]
    difference = largest_difference(model, strip)  # and a warm-up

    side = model.window
    adds = {
        "slide": args.size**2 * multiply_adds(Windows(model), (1, 3, side, side)),
        "forward": multiply_adds(model, (1, 3, args.size, args.size)),
    }
    rounds: dict[str, list[float]] = {"slide": [], "forward": []}
    with torch.inference_mode():
        model(image)
        for _ in range(args.rounds):
            rounds["forward"].append(seconds(lambda: model(image)))
            rounds["slide"].append(seconds(lambda: model.slide(strip, batch=args.batch)) * args.size / args.rows)
    ratios = {
        "multiply_adds": adds["slide"] / adds["forward"],
        "time": statistics.median(a / b for a, b in zip(rounds["slide"], rounds["forward"], strict=True)),
    }
    share = ratios["time"] / ratios["multiply_adds"]
    taken = {name: statistics.median(values) for name, values in rounds.items()}
    print(f"{args.size} x {args.size} px, window {side} px, largest difference of the logits {difference:.1e}")
    for name in ("slide", "forward"):
        print(f"{name:>8}: {adds[name] / 1e9:10,.1f} G multiply-adds, {taken[name]:9.3f} s")
    print(
        f"   ratio: {ratios['multiply_adds']:10,.0f} in multiply-adds, {ratios['time']:,.0f} in time ({share:.2f} of it)"
    )
    if args.rows < args.size:
        print(f"(slide: timed on {args.rows} of {args.size} rows, scaled)")

    date = datetime.now(UTC).date().isoformat()
    result = {
        "date": date,
        "model": "patch_classifier",
        "size_px": [args.size, args.size],
        "window_px": side,
        "slide_rows_timed": args.rows,
        "slide_batch": args.batch,
        "multiply_adds": adds,
        "seconds": taken,
        "ratio": ratios,
        "time_ratio_over_multiply_adds_ratio": share,
        "largest_difference": difference,
        "rounds_s": rounds,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "machine": {"cores": torch.get_num_threads(), "platform": platform.platform()},
    }
    write_json(args.out / f"{date}-sliding-window.json", result)


if __name__ == "__main__":
    main()
