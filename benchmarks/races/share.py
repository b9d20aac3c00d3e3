"""How much of the machine's measured bfloat16 rate every registered network reaches: inference, and a training step.

Multiplications and additions of a pass over one image of 360 x 480 px (`describe_model`, two for each multiply-add), and
three times as many for a training step (forward, and backward for the input and for the weights), over the seconds and the
rate. Where the share is low, a profile tells the two operations that take most of the time.
"""

import networks
import torch
from measure import Row, Setup, interleave, timed
from races import limits
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pixelwise.models import describe_model, list_models
from pixelwise.ops.training import prepare_for_training
from pixelwise.train.network import training_loss

GOALS = {("unet", "inference"): 0.85, ("unet", "training step"): 0.6}
LOW = 0.4  # below it the reason is told
TRAINING = 3  # passes that a step is worth


def run(setup: Setup) -> list[Row]:
    rate = limits.rate(setup)
    size = (96, 128) if setup.small else (360, 480)
    rows = []
    for name in ("unet", "enet") if setup.small or setup.few else list_models():
        flop = 2 * describe_model(name, num_classes=networks.CLASSES, size=size)["multiply_adds"]
        x = torch.randn(1, 3, *size)
        model = networks.create(name)
        for kind, step, cost in (
            ("inference", inference(name, model, x), flop),
            ("training step", training(model, x), TRAINING * flop),
        ):
            if kind == "training step":
                model.train()
            with torch.inference_mode(kind == "inference"):
                seconds = interleave({name: timed(step, 0)}, setup.rounds(2))[name]
                shares = tuple(cost / value / rate for value in seconds)
                row = _row(name, kind, shares, rate)
                note = f"{name}: {largest_operations(step)}" if row.ratio < LOW else ""
            rows.append(_row(name, kind, shares, rate, note))
    return rows


def _row(name: str, kind: str, shares: tuple[float, ...], rate: float, note: str = "") -> Row:
    middle = sorted(shares)[len(shares) // 2]
    return Row(
        race="share of the limit",
        case=f"{name}, {kind}",
        peer="measured bfloat16 rate",
        unit="GFLOP/s",
        ours=middle * rate / 1e9,
        theirs=rate / 1e9,
        ratios=shares,
        goal=GOALS.get((name, kind)),
        note=note,
    )


def inference(name: str, model: nn.Module, x: Tensor):
    """Labels of the image, as `predict` computes them."""
    predictor = networks.ready(model, networks.card(name))
    return lambda: networks.labels(predictor, x)


def training(model: nn.Module, x: Tensor):
    """A step in bfloat16 on one image, as a run does it."""
    model.to(memory_format=torch.channels_last)
    prepare_for_training(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    image = x.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(len(x), *x.shape[-2:], dtype=torch.uint8)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = training_loss(model, image, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def largest_operations(step) -> str:
    """The two operations that take most of the time, in words."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    return ", ".join(f"{row.key} {row.self_cpu_time_total / total:.0%}" for row in rows[:2])
