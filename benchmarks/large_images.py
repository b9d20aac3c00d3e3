"""Large images, from pixels in memory to labels: pixelwise's exact stripes, MONAI's sliding window, MMSegmentation's slide.

All contestants label the same uint8 image with the same U-Net (`--widths`, random weights, eval mode, float32 computation
unless `--precision bf16`, channels_last weights, which is faster for all of them) and end with a uint8 map of labels:

* `pixelwise`: what `choose_scorer` gives, with its own choice of stripes; planning is part of the time;
* `monai-gaussian`, `monai-constant`: `monai.inferers.sliding_window_inference` with overlap 0.25. Windows of 512 and 1024
  px, and 1 and 4 at a time, are tried at the smallest size first, and each mode then keeps what was fastest for it;
* `mmseg`: MMSegmentation's slide mode, stated again in `slide`: crops of 512 px every 341 px, logits summed and divided by
  the number of crops on each pixel. It adds in place, where the original pads every crop to the whole image and adds
  that, which costs far more time on large images; so the original is slower than what is raced here;
* `one-pass`: the network on the whole image, at the sizes of `--one-pass`; the labels of the others are compared with it.

Every run has a process of its own. Its time is that from pixels to labels, after a warm-up; its memory is the peak of its
resident memory less what it held before: input, maps, sums, labels. The seconds of all cores together are told too, for
other work on the machine changes them less. Rounds alternate between the contestants, so that a
machine that slows down slows all. Ratios are medians over the rounds. `exponent` tells how time grows with the pixels
between neighbouring sizes: 1 is linear.

    pip install monai
    python benchmarks/large_images.py --out benchmarks/results
    python benchmarks/large_images.py --quick
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pixelwise.data.labels import LabelSpec
from pixelwise.files import write_json
from pixelwise.infer.bundle import ModelCard
from pixelwise.infer.options import Decision, Tiling
from pixelwise.infer.predictor import Predictor
from pixelwise.infer.tiling import Region, choose_scorer
from pixelwise.models import create_model

MONAI_OVERLAP = 0.25
SLIDE_CROP_PX, SLIDE_STRIDE_PX = 512, 341
Label = Callable[[NDArray[np.uint8]], tuple[NDArray[np.uint8], str]]
"""The image (H, W, 3) -> its labels (H, W), and how they were made."""


def make_predictor(args: argparse.Namespace) -> Predictor:
    torch.manual_seed(0)
    colors = tuple((20 * index, 0, 0) for index in range(args.classes))
    spec = LabelSpec(
        names=tuple(f"class{index}" for index in range(args.classes)),
        colors=colors,
        values=tuple((index,) for index in range(args.classes)),
    )
    config = {"num_classes": args.classes, "in_channels": 3, "widths": tuple(args.widths)}
    card = ModelCard(model="unet", config=config, labels=spec, mean=(0.5,) * 3, std=(0.25,) * 3)
    accelerate = args.accelerate if args.contestant == "pixelwise" else "none"  # the peers get the plain network
    model = create_model("unet", **config)
    return Predictor(model, card, device=args.device, precision=args.precision, accelerate=accelerate)


def make_image(size: int) -> NDArray[np.uint8]:
    """Soft shapes with fine grain, (size, size, 3)."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (max(2, size // 48), max(2, size // 48), 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    grain = rng.integers(-20, 21, (512, 512, 3), dtype=np.int16)
    result = np.empty_like(image)
    for top in range(0, size, 512):
        for left in range(0, size, 512):
            part = image[top : top + 512, left : left + 512].astype(np.int16)
            part += grain[: part.shape[0], : part.shape[1]]
            result[top : top + 512, left : left + 512] = part.clip(0, 255)
    return result


def stripes(predictor: Predictor) -> Label:
    def label(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], str]:
        height, width, _ = image.shape
        labels = np.empty((height, width), dtype=np.uint8)
        decide = Decision(num_classes=predictor.labels.num_classes)
        scorer = choose_scorer(predictor, height, width, Tiling())

        def read(top: int, left: int, rows: int, columns: int) -> Tensor:
            return predictor.window(image[top : top + rows, left : left + columns])

        with torch.inference_mode():
            for scores in scorer.score(read, Region(0, 0, height, width)):
                found = scores.region
                labels[found.top : found.bottom, found.left : found.right] = decide(scores)["labels"]
        return labels, scorer.way

    return label


def whole(predictor: Predictor) -> Label:
    def label(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], str]:
        logits = predictor.scores(predictor.window(image)[None])
        return logits.argmax(dim=1)[0].to(torch.uint8).cpu().numpy(), "whole image"

    return label


def monai(predictor: Predictor, mode: str, roi_px: int, batch: int) -> Label:
    from monai.inferers import sliding_window_inference

    def label(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], str]:
        with torch.inference_mode(), autocast(predictor):
            logits = sliding_window_inference(
                predictor.window(image)[None], roi_px, batch, predictor.model, overlap=MONAI_OVERLAP, mode=mode
            )
            return logits.argmax(dim=1)[0].to(torch.uint8).cpu().numpy(), f"windows of {roi_px} px, {batch} at a time"

    return label


def slide(predictor: Predictor) -> Label:
    """The slide mode: crops at equal distances, the last ones moved back so that they end with the image."""

    def starts(length: int) -> list[int]:
        count = max(math.ceil((length - SLIDE_CROP_PX) / SLIDE_STRIDE_PX), 0) + 1
        return [max(0, min(index * SLIDE_STRIDE_PX, length - SLIDE_CROP_PX)) for index in range(count)]

    def label(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], str]:
        with torch.inference_mode(), autocast(predictor):
            x = predictor.window(image)[None]  # (1, 3, H, W)
            _, _, height, width = x.shape
            sums = x.new_zeros((1, predictor.labels.num_classes, height, width))
            count = x.new_zeros((1, 1, height, width))
            for top in starts(height):
                for left in starts(width):
                    at = (..., slice(top, top + SLIDE_CROP_PX), slice(left, left + SLIDE_CROP_PX))
                    sums[at] += predictor.model(x[at])
                    count[at] += 1
            logits = sums / count
            return logits.argmax(dim=1)[0].to(torch.uint8).cpu().numpy(), f"crops of {SLIDE_CROP_PX} px"

    return label


def autocast(predictor: Predictor) -> AbstractContextManager[Any]:
    return torch.autocast(predictor.device.type, torch.bfloat16) if predictor.precision == "bf16" else nullcontext()


def contestant(name: str, predictor: Predictor) -> Label:
    kind, *how = name.split(":")
    if kind == "pixelwise":
        return stripes(predictor)
    if kind == "mmseg":
        return slide(predictor)
    if kind == "one-pass":
        return whole(predictor)
    return monai(predictor, kind.removeprefix("monai-"), int(how[0]), int(how[1]))


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def run_one(args: argparse.Namespace) -> None:
    """One run in this process; the result goes to `args.result` as JSON, the labels beside it."""
    predictor = make_predictor(args)
    label = contestant(args.contestant, predictor)
    image = make_image(args.size)
    on_gpu = predictor.device.type == "cuda"
    predictor.scores(predictor.window(image[:256, :256])[None])  # first use of kernels and threads
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = torch.cuda.memory_allocated() if on_gpu else status("VmRSS")
    started, worked = time.perf_counter(), time.process_time()
    labels, way = label(image)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    peak = torch.cuda.max_memory_allocated() if on_gpu else status("VmHWM")
    if args.labels:
        np.save(args.labels, labels)
    write_json(args.result, {"seconds": seconds, "cpu_seconds": cpu_seconds, "bytes": peak - before, "way": way})


def start(args: argparse.Namespace, name: str, size: int, labels: Path | None = None) -> dict[str, Any]:
    """One run in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--contestant", name, "--size", str(size), "--result", str(result)]
        for key in ("device", "precision", "classes", "accelerate"):
            command += [f"--{key}", str(getattr(args, key))]
        command += ["--widths", *map(str, args.widths)]
        subprocess.run(command + (["--labels", str(labels)] if labels else []), check=True)
        return json.loads(result.read_text())


def best_windows(args: argparse.Namespace, mode: str, size: int) -> tuple[str, dict[str, float]]:
    """The window and batch with which MONAI is fastest, and the seconds of all that were tried."""
    names = [f"monai-{mode}:{roi}:{batch}" for roi in args.roi for batch in args.batch]
    seconds = {name: min(start(args, name, size)["seconds"] for _ in range(args.tries)) for name in names}
    return min(seconds, key=lambda name: seconds[name]), seconds


def race(args: argparse.Namespace, names: dict[str, str], size: int, folder: Path) -> dict[str, Any]:
    """All contestants on images of one size, in turn."""
    names = names | ({"one-pass": "one-pass"} if size in args.one_pass else {})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name, full in names.items():
            path = folder / f"{name}.npy" if size in args.one_pass and number == 0 else None
            runs[name].append(start(args, full, size, path))
            print(f"  {size} round {number + 1}: {name:15} {runs[name][-1]['seconds']:8.1f} s", flush=True)
    peer = [run["seconds"] for run in runs["pixelwise"]]
    rows = {}
    for name, found in runs.items():
        rows[name] = {
            "way": found[0]["way"],
            "seconds": statistics.median(run["seconds"] for run in found),
            "cpu_seconds": statistics.median(run["cpu_seconds"] for run in found),
            "bytes": statistics.median(run["bytes"] for run in found),
            "pixelwise_time_over": statistics.median(a / b["seconds"] for a, b in zip(peer, found, strict=True)),
            "pixelwise_memory_over": statistics.median(
                a["bytes"] / b["bytes"] for a, b in zip(runs["pixelwise"], found, strict=True)
            ),
            "rounds": found,
        }
    if size in args.one_pass:
        truth = np.load(folder / "one-pass.npy")
        for name in names:
            rows[name]["labels_that_differ_from_one_pass"] = float((np.load(folder / f"{name}.npy") != truth).mean())
    return rows


def add_exponents(table: dict[int, dict[str, Any]]) -> None:
    """How time grows from the size before, as the power of the number of pixels."""
    for before, after in pairwise(sorted(table)):
        for name in table[before].keys() & table[after].keys():
            growth = table[after][name]["seconds"] / table[before][name]["seconds"]
            table[after][name]["exponent"] = math.log(growth) / math.log((after / before) ** 2)


def show(table: dict[int, dict[str, Any]]) -> None:
    print(
        f"{'size':>6} {'contestant':15} {'seconds':>9} {'of cores':>9} {'GiB':>7} {'time':>6} {'memory':>7} "
        f"{'exponent':>8} differs  way"
    )
    for size, rows in table.items():
        for name, row in rows.items():
            differs = row.get("labels_that_differ_from_one_pass")
            print(
                f"{size:>6} {name:15} {row['seconds']:9.1f} {row['cpu_seconds']:9.1f} {row['bytes'] / 2**30:7.2f} "
                f"{row['pixelwise_time_over']:6.2f} {row['pixelwise_memory_over']:7.2f} "
                f"{row.get('exponent', math.nan):8.2f} "
                f"{'' if differs is None else f'{differs:.3%}':7}  {row['way']}"
            )
    print("(time, memory: pixelwise's over the contestant's)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[2048, 4096, 8192], help="sides of the images in pixels"
    )
    parser.add_argument(
        "--one-pass", type=int, nargs="*", default=[2048], help="sizes that are also labelled in one pass"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--classes", type=int, default=11)
    parser.add_argument("--roi", type=int, nargs="+", default=[512, 1024], help="windows that MONAI may choose from")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="numbers of windows at a time, likewise")
    parser.add_argument("--tries", type=int, default=2, help="runs of each before the fastest is taken")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--accelerate", default="auto", help="as that of `pixelwise predict`; of pixelwise's own turns")
    parser.add_argument("--quick", action="store_true", help="512 and 1024 px, one round; nothing is written")
    parser.add_argument("--out", type=Path, default=None, help="folder of the result file; without it there is none")
    for internal in ("--contestant", "--result", "--labels"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.one_pass, args.rounds, args.roi, args.tries = [512, 1024], [512, 1024], 1, [256], 1
    return args


def main() -> None:
    args = parse()
    if args.contestant:
        run_one(args)
        return
    smallest = min(args.sizes)
    names, tried = {"pixelwise": "pixelwise"}, {}
    for mode in ("gaussian", "constant"):
        names[f"monai-{mode}"], tried[mode] = best_windows(args, mode, smallest)
        print(f"MONAI {mode} at {smallest} px: " + ", ".join(f"{name} {s:.1f} s" for name, s in tried[mode].items()))
    names["mmseg"] = "mmseg"
    with tempfile.TemporaryDirectory() as folder:
        table = {size: race(args, names, size, Path(folder)) for size in sorted(args.sizes)}
    add_exponents(table)
    show(table)
    if args.out is None:
        return
    import monai as peer

    date = datetime.now(UTC).date().isoformat()
    result = {
        "date": date,
        "network": {"model": "unet", "widths": args.widths, "num_classes": args.classes, "in_channels": 3},
        "precision": args.precision,
        "device": args.device,
        "monai_tried_s": tried,
        "sizes": table,
        "versions": {"torch": torch.__version__, "monai": peer.__version__, "python": platform.python_version()},
        "machine": {"cores": torch.get_num_threads(), "platform": platform.platform()},
    }
    write_json(args.out / f"{date}-large-images-{args.device.split(':')[0]}.json", result)


if __name__ == "__main__":
    main()
