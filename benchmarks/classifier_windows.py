"""A classifier made fully convolutional against the same classifier on every window of a photo: scores and time.

At the classifier's own image size both agree to float32. Inside a larger photo they differ, because padding ends a window
that is passed alone, and does not end one within a photo. This measures by how much, with real weights on real photos: how
often both name the same class, of all windows and of those where the classifier alone gives a class more than SURE; the mean
difference of the scores over their mean size; and the largest difference of a class's probability (median over the windows).
The windows are timed in batches of 15, the pass in one.

    python benchmarks/classifier_windows.py torchvision/mobilenet_v2 FILE photos/*.webp --out benchmarks/results
"""

import argparse
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelwise.data.samples import to_tensor
from pixelwise.files import write_json
from pixelwise.formats.opening import read_image
from pixelwise.infer.heatmap import WindowClassifier, open_classifier

BATCH = 15
SURE = 0.8


def windows(opened: WindowClassifier, image: Tensor) -> Tensor:
    """Every window of the photo that a cell stands for, row by row."""
    own, stride = opened.input_px, opened.stride
    rows, columns = ((length - own) // stride + 1 for length in image.shape[2:])
    cut = [(y * stride, x * stride) for y in range(rows) for x in range(columns)]
    return torch.cat([image[:, :, y : y + own, x : x + own] for y, x in cut])


def compare(opened: WindowClassifier, path: Path) -> dict[str, Any]:
    photo = to_tensor(read_image(path), 3)[None] / 255
    photo = (photo - opened._mean) / opened._std
    started = time.perf_counter()
    cells = opened.scorer(photo)
    once = time.perf_counter() - started
    cells = cells[0].flatten(1).T  # (windows, K)
    cut = windows(opened, photo)
    started = time.perf_counter()
    # The scorer at the classifier's own size is the classifier: the tests show it.
    alone = torch.cat([opened.scorer(cut[at : at + BATCH])[:, :, 0, 0] for at in range(0, len(cut), BATCH)])
    apart = time.perf_counter() - started
    return {
        "same": (alone.argmax(1) == cells.argmax(1)).float().tolist(),
        "sure": (alone.softmax(1).amax(1) > SURE).tolist(),
        "scores": ((alone - cells).abs().mean(1) / alone.abs().mean(1)).tolist(),
        "probability": (alone.softmax(1) - cells.softmax(1)).abs().amax(1).tolist(),
        "ratio": apart / once,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifier")
    parser.add_argument("weights", type=Path)
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    opened = open_classifier(args.classifier, weights=args.weights, device="cpu")
    with torch.inference_mode():
        found = [compare(opened, path) for path in args.photos]
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "classifier": args.classifier,
        "photos": len(args.photos),
        "windows": sum(len(item["same"]) for item in found),
        "same_class": statistics.mean(value for item in found for value in item["same"]),
        "sure_windows": sum(sum(item["sure"]) for item in found),
        "same_class_where_sure": statistics.mean(
            same for item in found for same, sure in zip(item["same"], item["sure"], strict=True) if sure
        ),
        "score_difference": statistics.mean(value for item in found for value in item["scores"]),
        "probability_difference": statistics.median(value for item in found for value in item["probability"]),
        "time_ratio": statistics.median(item["ratio"] for item in found),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    name = args.classifier.replace("/", "-")
    write_json(args.out / f"{result['date']}-windows-{name}.json", result)
    for key, value in result.items():
        print(f"{key:24} {value}")


if __name__ == "__main__":
    main()
