"""What inference gains by folding, by 8 bits and by torch.compile: passes of one network with equal weights, interleaved.

The statistics of batch norm are drawn, so that no map vanishes as in an untrained network. Ratios are the time of the
network under autocast over that of each way; compiling is timed too.

    python benchmarks/folding.py                                    # folded and 8 bits
    python benchmarks/folding.py --compile --only encoder_decoder:resnet18
"""

import argparse
import copy
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from measure import interleave, machine, timed, versions
from networks import with_statistics
from torch import Tensor, nn

from pixelwise.files import write_json
from pixelwise.models import create_model
from pixelwise.ops.folding import fold
from pixelwise.ops.quantization import calibrated, has_int8, quantizable, quantize

NETWORKS = {
    "encoder_decoder:tf_efficientnet_lite0": {"backbone": "tf_efficientnet_lite0"},
    "encoder_decoder:resnet18": {"backbone": "resnet18"},
    "encoder_decoder:mobilenetv2_100": {"backbone": "mobilenetv2_100"},
    "unet": {},
    "unet:16..128": {"widths": (16, 32, 64, 128), "batch_norm": True},
    "segnet": {},
    "linknet": {},
    "fcdensenet56": {},
}
SIZE = (360, 480)


def network(name: str) -> nn.Module:
    """With random weights, and statistics as of a training."""
    torch.manual_seed(0)
    model = create_model(name.partition(":")[0], num_classes=11, **NETWORKS[name]).eval().requires_grad_(False)
    return with_statistics(model).to(memory_format=torch.channels_last)


def ways(model: nn.Module, image: Tensor, is_compiled: bool) -> dict[str, object]:
    """Each way to compute the scores in bfloat16, ready to be called, and what it took to make it."""
    started = time.perf_counter()
    folded = fold(model, torch.randn(1, 3, 96, 96), torch.bfloat16)
    folded(image)
    made = {"autocast": model, "fold": folded}
    seconds = {"fold": time.perf_counter() - started}
    if has_int8() and quantizable(folded, 3):
        made["int8"] = quantize(folded, calibrated(folded, [image], 3), 3)
    if is_compiled:
        import torch._inductor.config as inductor

        inductor.freezing = True  # weights as constants, which is faster
        half, started = torch.compile(copy.deepcopy(model).bfloat16(), dynamic=False), time.perf_counter()
        made["compile"] = lambda image: half(image.bfloat16()).float()
        with torch.no_grad():
            made["compile"](image)
        seconds["compile"] = time.perf_counter() - started
    return {"made": made, "seconds": seconds}


def race(name: str, rounds: int, is_compiled: bool) -> dict[str, object]:
    model = network(name)
    image = torch.randn(1, 3, *SIZE).contiguous(memory_format=torch.channels_last)
    found = ways(model, image, is_compiled)

    def step(way: str) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            found["made"][way](image)

    seconds = interleave({way: timed(lambda way=way: step(way)) for way in found["made"]}, rounds)
    ratios = {
        way: statistics.median(b / a for a, b in zip(values, seconds["autocast"], strict=True))
        for way, values in seconds.items()
    }
    rates = {way: 1 / statistics.median(values) for way, values in seconds.items()}
    print(
        name, *(f"{way} {rates[way]:.1f} images/s ({ratios[way]:.2f})" for way in rates), found["seconds"], flush=True
    )
    return {"network": name, "images_per_s": rates, "ratios": ratios, "made_in_s": found["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = [race(name, args.rounds, args.compile) for name in args.only]
    date = datetime.now(UTC).date().isoformat()
    write_json(
        args.out / f"{date}-folding.json",
        {"date": date, "size": SIZE, "rows": rows, "machine": machine(), "versions": versions()},
    )


if __name__ == "__main__":
    main()
