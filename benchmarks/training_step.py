"""What each part of pixelwise's training step brings, interleaved in one process, and a profile by kind of operation.

The first way is plain torch: the network, bfloat16 autocast, channels_last, cross-entropy of the logits. Each further way
adds one part to the one before. The ways alternate, so that a machine that slows down slows all. With one thread, the time
is that of the processor (which others on the machine disturb less), else that of the clock. Reported are medians, and the
median of the ratios within rounds.

    python benchmarks/training_step.py --backbone tf_efficientnet_lite0 --threads 2 --rounds 9
    python benchmarks/training_step.py --profile                      # the step as it is
    python benchmarks/training_step.py --only "kept memory"           # one way alone: its peak memory
"""

import argparse
import copy
import platform
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pixelwise.files import write_json
from pixelwise.losses import cross_entropy
from pixelwise.machine import keep_freed_memory
from pixelwise.models import create_model
from pixelwise.ops.activations import speed_up_activations
from pixelwise.ops.depthwise import speed_up_depthwise
from pixelwise.train.network import training_loss

CLASSES = 11
WAYS = ("plain torch", "depthwise", "activations", "coarse loss", "kept memory")  # each with all before it
KINDS = {  # by the names of torch's operations, the first that fits
    "convolution, backward": ("convolution_backward",),
    "convolution": ("convolution",),
    "batch norm": ("batch_norm",),
    "activation": ("hardtanh", "clamp", "threshold", "relu"),
    "copy, fill": ("copy_", "fill_", "clone", "cat"),
    "enlarging": ("upsample",),
    "loss": ("log_softmax", "nll_loss", "exp_", "scatter", "gather", "mm", "bmm", "index", "masked_fill"),
    "optimiser, clipping": ("sqrt", "addcdiv", "addcmul", "lerp", "norm", "_foreach", "_fused"),
}
Step = Callable[[], float]


def make_step(model: nn.Module, image: Tensor, labels: Tensor, way: int) -> Step:
    """A training step of a copy of `model`; it returns its loss."""
    model = copy.deepcopy(model)
    if way >= 1:
        speed_up_depthwise(model)
    if way >= 2:
        speed_up_activations(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = training_loss(model, image, labels) if way >= 3 else cross_entropy(model(image), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def race(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; a step that does not count goes before, so that memory is as the way leaves it."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, step in steps.items():
            keep_freed_memory(name == WAYS[4])
            step()
            started = clock()
            step()
            seconds[name].append(clock() - started)
    return dict(seconds)


def shares(step: Step, steps: int = 3) -> dict[str, float]:
    """The share of each kind of operation in the time of a step."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
    spent: dict[str, float] = defaultdict(float)
    for row in recorded.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(name in row.key for name in names)), "other")
        spent[kind] += row.self_cpu_time_total
    total = sum(spent.values())
    return {kind: time_us / total for kind, time_us in sorted(spent.items(), key=lambda item: -item[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=352)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--only", choices=WAYS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = create_model("encoder_decoder", num_classes=CLASSES, backbone=args.backbone)
    model = model.to(memory_format=torch.channels_last).train()
    image = torch.randn(args.batch, 3, args.size, args.size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (args.batch, args.size, args.size), dtype=torch.uint8)
    if args.profile:
        keep_freed_memory(True)
        for kind, share in shares(make_step(model, image, labels, len(WAYS))).items():
            print(f"{kind:<24} {share:6.1%}")
        return
    ways = WAYS if args.only is None else (args.only,)
    steps = {name: make_step(model, image, labels, WAYS.index(name)) for name in ways}
    seconds = race(steps, args.rounds)
    rows = {}
    for name, values in seconds.items():
        ratio = statistics.median(plain / own for plain, own in zip(seconds[ways[0]], values, strict=True))
        rows[name] = {"median_s": statistics.median(values), "ratio": ratio, "seconds": values}
        print(f"{name:<14} {rows[name]['median_s']:.3f} s, {ratio:.2f} x {ways[0]}")
    if args.only:
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if args.out:
        date = datetime.now(UTC).date().isoformat()
        machine = {"threads": args.threads, "platform": platform.platform(), "torch": torch.__version__}
        setting = {"backbone": args.backbone, "batch": args.batch, "size": args.size}
        result = {"date": date, **setting, "rows": rows, "machine": machine}
        write_json(args.out / f"{date}-training-step-{args.backbone}.json", result)


if __name__ == "__main__":
    main()
