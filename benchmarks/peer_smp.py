"""The peer of the accuracy claims: a plain PyTorch loop around smp's U-Net, on a data folder that pixelwise reads.

AdamW 1e-3 (5 % warm-up, cosine to zero over the budget), weight decay 1e-2, batch 8, random scale, crop, flips, brightness,
unweighted cross-entropy, bfloat16 autocast, channels_last, augmentation on the main thread: what a user writes in an
afternoon. The score is pixelwise's exact confusion matrix over the split, at full size.

    pip install segmentation-models-pytorch
    python benchmarks/peer_smp.py data/camvid --weights efficientnet-lite0.pth --minutes 30 --out benchmarks/results/x.json
"""

import argparse
import math
import time
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import tv_tensors

from pixelwise import ConfusionMatrix, open_data
from pixelwise.data.samples import load_sample
from pixelwise.data.transforms import training_transform
from pixelwise.files import write_json
from pixelwise.models.backbones import classifier_state
from pixelwise.models.pretrained import match_state, read_state

BACKBONE = "tf_efficientnet_lite0"


def build(classes: int, weights: str) -> nn.Module:
    model = smp.Unet(f"tu-{BACKBONE}", encoder_weights=None, classes=classes)
    reference = classifier_state(BACKBONE)
    loaded, state = match_state(model.encoder.model, read_state(weights), reference=reference, source=weights)
    print(loaded.summary())
    model.encoder.model.load_state_dict(state, strict=False)
    return model.to(memory_format=torch.channels_last)


def normalised(image: Tensor) -> Tensor:
    return ((image.float() - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


def fit(
    model: nn.Module, samples: list, *, minutes: float, crop_px: int, flips: str, scale: tuple[float, float]
) -> int:
    transform = training_transform(
        crop_px=crop_px, scale=scale, focus=0, flips=flips, photometric=0.3, fill=(0.5,) * 3, is_uint8=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    model.train()
    started, step, order = time.monotonic(), 0, []
    while (spent := (time.monotonic() - started) / (60 * minutes)) < 1:
        if len(order) < 8:
            order = torch.randperm(len(samples)).tolist() + order
        crops = [transform(*samples[order.pop()]) for _ in range(8)]
        image = normalised(torch.stack([image for image, _ in crops]))
        labels = torch.stack([mask for _, mask in crops]).long()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, spent / 0.05) * (1 + math.cos(math.pi * spent)) / 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(image)
        F.cross_entropy(logits.float(), labels, ignore_index=255).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return step


def score(model: nn.Module, folder: object, split: str) -> dict:
    confusion = ConfusionMatrix(folder.labels.num_classes)
    model.eval()
    for pair in folder.split(split):
        sample = load_sample(pair, folder.labels, 3)
        height, width = sample.image.shape[-2:]
        image = F.pad(sample.image[None].float() / 255, (0, -width % 32, 0, -height % 32), mode="replicate")
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            labels = model(normalised(image)).argmax(1)[0, :height, :width]
        confusion.update(labels.numpy(), sample.mask.numpy())
    return confusion.scores().to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--crop-px", type=int, default=352)
    parser.add_argument("--flips", default="horizontal")
    parser.add_argument("--scale", type=float, nargs=2, default=(0.75, 1.75))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    folder = open_data(args.data)
    loaded = [load_sample(pair, folder.labels, 3) for pair in folder.split("train")]
    samples = [(tv_tensors.Image(sample.image), tv_tensors.Mask(sample.mask)) for sample in loaded]
    model = build(folder.labels.num_classes, args.weights)
    steps = fit(model, samples, minutes=args.minutes, crop_px=args.crop_px, flips=args.flips, scale=tuple(args.scale))
    result = {
        "steps": steps,
        "minutes": args.minutes,
        "scores": {split: score(model, folder, split) for split in ("val", "test")},
    }
    write_json(args.out, result)
    print(steps, {split: round(100 * values["miou"], 2) for split, values in result["scores"].items()})


if __name__ == "__main__":
    main()
