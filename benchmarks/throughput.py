"""Training and inference throughput of pixelwise's encoder-decoder against smp's U-Net on the same backbone, interleaved.

Both get what each does best here: bfloat16 autocast and channels_last, the same crops, the same batch, one process, the
same number of threads. The rounds alternate, so that a machine that slows down slows both. Reported is the median ratio.

    pip install segmentation-models-pytorch
    python benchmarks/throughput.py --out benchmarks/results
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from pixelwise.files import write_json
from pixelwise.losses import cross_entropy
from pixelwise.models import create_model
from pixelwise.ops.depthwise import speed_up_depthwise

CLASSES = 11


def trainer(model: nn.Module, image: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(image)
        cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def labeller(model: nn.Module, image: Tensor) -> Callable[[], None]:
    def step() -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            model(image).argmax(1)

    return step


def race(ours: Callable[[], None], peers: Callable[[], None], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, ours and the peer's in turn, after one warm-up each."""
    ours()
    peers()
    seconds: dict[str, list[float]] = {"pixelwise": [], "smp": []}
    for _ in range(rounds):
        for name, step in (("pixelwise", ours), ("smp", peers)):
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = {}
    for what, batch, size in (("training step", 8, (352, 352)), ("inference", 4, (384, 480))):
        ours = create_model("encoder_decoder", num_classes=CLASSES, backbone=args.backbone)
        peer = smp.Unet(f"tu-{args.backbone}", encoder_weights=None, classes=CLASSES)
        is_training = what == "training step"
        speed_up_depthwise(ours)
        image = torch.randn(batch, 3, *size).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(CLASSES, (batch, *size))
        steps = []
        for model in (ours, peer):
            model.to(memory_format=torch.channels_last).train(is_training)
            steps.append(trainer(model, image, labels) if is_training else labeller(model, image))
        seconds = race(steps[0], steps[1], args.rounds)
        per_second = {name: batch / statistics.median(values) for name, values in seconds.items()}
        ratio = statistics.median(b / a for a, b in zip(seconds["pixelwise"], seconds["smp"], strict=True))
        rows[what] = {"batch": batch, "size": size, "images_per_s": per_second, "ratio": ratio, "seconds": seconds}
        print(
            f"{what}: pixelwise {per_second['pixelwise']:.2f}, smp {per_second['smp']:.2f} images/s, ratio {ratio:.2f}"
        )
    versions = {"torch": torch.__version__, "smp": smp.__version__, "python": platform.python_version()}
    machine = {"cores": torch.get_num_threads(), "platform": platform.platform()}
    date = datetime.now(UTC).date().isoformat()
    result = {"date": date, "backbone": args.backbone, "rows": rows, "versions": versions, "machine": machine}
    write_json(args.out / f"{date}-throughput-{args.backbone}.json", result)


if __name__ == "__main__":
    main()
