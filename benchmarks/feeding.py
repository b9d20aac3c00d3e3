"""How fast augmented crops reach a network: images/s of the loader alone, and the share of the time that training waits.

Both are measured on a data folder with the defaults of `pixelwise train`. A batch counts when the network could take it:
float32, normalised, channels last. Rounds start their worker processes anew and leave out the batches that were prepared
meanwhile. CPU milliseconds are those of this process and, where workers=0, of a whole crop: on few cores they are what
counts, since the network wants the same cores.

To race another way of feeding, import `race` and give it more feeders: functions that start anew and yield
(images (N, C, s, s) as the network takes them, labels (N, s, s)) without end.

    python benchmarks/feeding.py data/camvid --out benchmarks/results
    python benchmarks/feeding.py data/camvid --workers 0 --set elastic=10 --set copy_paste=0.3
"""

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.data.photometric import network_input
from pixelwise.files import write_json
from pixelwise.losses import cross_entropy
from pixelwise.ops.training import prepare_for_training
from pixelwise.train import make_config, merge_options, parse_settings
from pixelwise.train.network import start_network
from pixelwise.train.plan import AHEAD, make_plan
from pixelwise.train.stream import make_dataset, make_stream

Feeder = Callable[[], Iterator[tuple[Tensor, Tensor]]]


def prepare(data: str, options: dict[str, Any]) -> tuple[Any, Feeder, Callable[[Tensor, Tensor], None]]:
    """The plan of a run on `data`, its feeder, and its training step."""
    config, inspection = make_config(options), inspect_data(open_data(data))
    start = start_network(config, inspection, is_resumed=False)
    plan = make_plan(config, inspection, start)
    dataset = make_dataset(config, plan, inspection, start.model)

    def feed() -> Iterator[tuple[Tensor, Tensor]]:
        for images, changes, labels, *_ in make_stream(config, plan, dataset, 0, lambda: 0.0):
            yield network_input(torch.as_tensor(images), torch.as_tensor(changes)), torch.as_tensor(labels)

    model = start.model.train().to(memory_format=torch.channels_last)
    prepare_for_training(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(images: Tensor, labels: Tensor) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=plan.precision == "bf16"):
            logits = model(images)
        cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return plan, feed, step


def measure(feed: Feeder, count: int, skip: int, step: Callable[[Tensor, Tensor], None] | None) -> dict[str, float]:
    """Images/s, CPU ms per image and share waited of `count` batches after `skip`; with no `step` nothing is trained."""
    with closing(feed()) as batches:  # type: ignore[type-var]
        for batch in itertools.islice(batches, skip):
            if step:
                step(*batch)
        images, waited, cpu, started = 0, 0.0, time.process_time(), time.perf_counter()
        for _ in range(count):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            images += len(batch[0])
            if step:
                step(*batch)
        seconds = time.perf_counter() - started
        found = {"images_per_s": images / seconds, "wait": waited / seconds}
        return found | {"cpu_ms": 1000 * (time.process_time() - cpu) / images}


def race(
    feeders: dict[str, Feeder],
    *,
    rounds: int,
    batches: int,
    skip: int,
    step: Callable[[Tensor, Tensor], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Medians of `measure` for each feeder, in turn round after round."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in feeders}
    for _ in range(rounds):
        for name, feed in feeders.items():
            found[name].append(measure(feed, batches, skip, step))
    return {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-training", action="store_true", help="the loader alone")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    options = {"options": {"backbone": args.backbone}, "steps": 10**6, "workers": args.workers}
    plan, feed, step = prepare(args.data, merge_options(options, parse_settings(args.settings)))
    how = {"rounds": args.rounds, "batches": args.batches, "skip": 1 + AHEAD * plan.workers}
    result: dict[str, Any] = {"loader": race({"pixelwise": feed}, **how)}
    if not args.no_training:
        result["training"] = race({"pixelwise": feed}, **how, step=step)
    result["how"] = {
        "data": Path(args.data).name,
        "crop_px": plan.crop_px,
        "batch_size": plan.batch_size,
        "workers": plan.workers,
        "threads": torch.get_num_threads(),
        "settings": args.settings,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=2))
    if args.out:
        write_json(args.out / f"{datetime.now(UTC).date()}-feeding-{result['how']['data']}.json", result)


if __name__ == "__main__":
    main()
