"""Networks that meet in the races: ours, ready to predict, and smp's U-Net on the same backbone with the same weights."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixelwise import RunConfig, open_data
from pixelwise.data.check import inspect_data
from pixelwise.data.labels import LabelSpec
from pixelwise.data.scenes import write_scenes
from pixelwise.infer.bundle import ModelCard
from pixelwise.infer.devices import computes_in_bf16
from pixelwise.infer.options import largest
from pixelwise.infer.predictor import Predictor
from pixelwise.models import create_model
from pixelwise.train.module import SegmentationModule, loss_weights
from pixelwise.train.network import start_network
from pixelwise.train.plan import make_plan
from pixelwise.train.stream import make_dataset, make_stream

BACKBONES = ("tf_efficientnet_lite0", "resnet18")
CLASSES = 11
MEAN, STD = (0.5,) * 3, (0.5,) * 3


def spec(classes: int = CLASSES) -> LabelSpec:
    """Classes without a meaning."""
    return LabelSpec(
        names=tuple(f"class{index}" for index in range(classes)),
        colors=tuple((10 * index, 0, 0) for index in range(classes)),
        values=tuple((index,) for index in range(classes)),
    )


def card(name: str, **fields: Any) -> ModelCard:
    config = {"num_classes": CLASSES, "in_channels": 3, **fields}
    return ModelCard(model=name, config=config, labels=spec(), mean=MEAN, std=STD)


def create(name: str, **fields: Any) -> nn.Module:
    """One of ours with random weights, always the same."""
    torch.manual_seed(0)
    return with_statistics(create_model(name, num_classes=CLASSES, **fields).eval())


def with_statistics(model: nn.Module) -> nn.Module:
    """With drawn statistics of batch norm: with those of the start, values vanish, on which processors are slow."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def ready(model: nn.Module, about: ModelCard, **how: str) -> Predictor:
    """A predictor of a copy of a network, for predictors take a network over."""
    return Predictor(copy.deepcopy(model), about, device="cpu", **how)


@torch.inference_mode()
def labels(predictor: Predictor, x: Tensor) -> Tensor:
    """Normalised images (N, C, H, W) -> labels (N, H, W), uint8, as `predict` makes them."""
    return torch.stack([largest(scores)[1] for scores in predictor.scores(x)]).to(torch.uint8)


def peer(backbone: str, ours: nn.Module) -> nn.Module:
    """smp's U-Net with the weights of our encoder in its own."""
    import segmentation_models_pytorch as smp

    torch.manual_seed(0)
    model = with_statistics(smp.Unet(f"tu-{backbone}", encoder_weights=None, classes=CLASSES).eval())
    model.encoder.model.load_state_dict(ours.encoder.body.state_dict())
    return model


def difference_of_features(ours: nn.Module, theirs: nn.Module) -> str:
    """How far the deepest features of the two encoders differ, in words; the same backbone with the same weights."""
    with torch.inference_mode():
        x = torch.randn(1, 3, 64, 96)
        mine, its = ours.encoder(x)[-1], theirs.encoder(x)[-1]
        return f"deepest features differ by at most {(mine - its).abs().max().item():.0e}"


def padded(x: Tensor) -> Tensor:
    """Enlarged to multiples of 32 px, which smp demands; ours does it inside."""
    height, width = x.shape[-2:]
    return nn.functional.pad(x, (0, -width % 32, 0, -height % 32), mode="replicate")


def training_module(scratch: Path, backbone: str, *, crop_px: int, batch_size: int) -> tuple[Any, tuple[Tensor, ...]]:
    """The Lightning module of a real training on drawn scenes with our defaults, and the first batch of its stream."""
    folder = open_data(write_scenes(scratch / "scenes", {"train": 8}, sizes=((360, 480),)))
    options = {"options": {"backbone": backbone}, "crop_px": crop_px, "batch_size": batch_size, "workers": 0}
    config = RunConfig(**options, steps=100, precision="bf16" if computes_in_bf16(torch.device("cpu")) else "float32")
    inspection = inspect_data(folder)
    start = start_network(config, inspection, is_resumed=False)
    plan = make_plan(config, inspection, start)
    dataset = make_dataset(config, plan, inspection, start.model)
    module = SegmentationModule(start.model, config, plan, loss_weights(config, inspection, start.model))
    return module.train(), next(iter(make_stream(config, plan, dataset, 0, lambda: 0.0)))
