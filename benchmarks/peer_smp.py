"""The peer of all training claims: a plain PyTorch loop around smp's U-Net, as one writes it in an afternoon.

AdamW 1e-3 (5 % warm-up, cosine to zero over the budget), weight decay 1e-2, batch 8; random scale, crop, flips, brightness
and contrast by albumentations in the worker processes of a DataLoader (one for each core but one; images are decoded once
and kept in memory); unweighted cross-entropy, bfloat16 autocast, channels_last. The score is the exact confusion matrix over
a split, at full size.

    python benchmarks/peer_smp.py data/camvid --minutes 30 --out runs/peer.json
"""

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for newer versions

import albumentations as A
import cv2
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from albumentations.pytorch import ToTensorV2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pixelwise import ConfusionMatrix, open_data
from pixelwise.data.layouts import DataFolder
from pixelwise.data.samples import load_sample
from pixelwise.files import write_json
from pixelwise.models.backbones import classifier_state
from pixelwise.models.pretrained import match_state, read_state

BACKBONE = "tf_efficientnet_lite0"
BATCH, VOID = 8, 255


class Crops(Dataset):
    """Augmented crops of the images of a split, which are kept in memory."""

    def __init__(
        self,
        folder: DataFolder,
        split: str,
        *,
        crop_px: int,
        flips: str,
        scale: tuple[float, float],
        most: int | None = None,
    ) -> None:
        loaded = [load_sample(pair, folder.labels, 3) for pair in folder.split(split)[:most]]
        self.samples = [
            (np.ascontiguousarray(sample.image.permute(1, 2, 0).numpy()), sample.mask.numpy()) for sample in loaded
        ]
        self.transform = A.Compose(
            [
                A.RandomScale(scale_limit=(scale[0] - 1, scale[1] - 1), p=1),
                A.PadIfNeeded(crop_px, crop_px, border_mode=cv2.BORDER_CONSTANT, fill=127, fill_mask=VOID),
                A.RandomCrop(crop_px, crop_px),
                A.HorizontalFlip(p=0.5),
                *([A.VerticalFlip(p=0.5)] if flips in ("both", "dihedral") else []),
                A.RandomBrightnessContrast(brightness_limit=0.3, contrast_limit=0.3, p=1),
                A.Normalize(mean=(0.5,) * 3, std=(0.5,) * 3),
                ToTensorV2(),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.samples[index]
        drawn = self.transform(image=image, mask=mask)
        return drawn["image"], drawn["mask"].long()


def batches(crops: Crops, batch: int = BATCH, workers: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled epochs without end."""
    workers = max(1, len(os.sched_getaffinity(0)) - 1) if workers is None else workers
    more = {"persistent_workers": True, "worker_init_fn": _start_worker} if workers else {}
    loader = DataLoader(
        crops, batch_size=batch, shuffle=True, num_workers=workers, drop_last=len(crops) >= batch, **more
    )
    while True:
        yield from loader


def _start_worker(_number: int) -> None:
    cv2.setNumThreads(0)


def build(classes: int, weights: str | None) -> nn.Module:
    """smp's U-Net on the backbone, with ImageNet weights if there are any."""
    model = smp.Unet(f"tu-{BACKBONE}", encoder_weights=None, classes=classes)
    if weights:
        reference = classifier_state(BACKBONE)
        loaded, state = match_state(model.encoder.model, read_state(weights), reference=reference, source=weights)
        if loaded.missing or loaded.mismatched:
            raise SystemExit(loaded.summary())
        model.encoder.model.load_state_dict(state, strict=False)
    return model.to(memory_format=torch.channels_last)


def fit(
    model: nn.Module,
    stream: Iterator[tuple[Tensor, Tensor]],
    spent: Callable[[int], float],
    on_step: Callable[[int], Any],
) -> int:
    """Train until `spent(step)`, the share of the budget that is behind us, reaches 1; returns the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    model.train()
    step = 0
    while (share := spent(step)) < 1:
        image, labels = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, share / 0.05) * (1 + math.cos(math.pi * share)) / 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(image.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits.float(), labels, ignore_index=VOID).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        on_step(step)
    return step


def score(model: nn.Module, folder: DataFolder, split: str) -> dict[str, Any]:
    """The exact scores over a split, each image at its own size."""
    confusion = ConfusionMatrix(folder.labels.num_classes)
    model.eval()
    for pair in folder.split(split):
        sample = load_sample(pair, folder.labels, 3)
        height, width = sample.image.shape[-2:]
        unit = F.pad(sample.image[None].float() / 255, (0, -width % 32, 0, -height % 32), mode="replicate")
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(((unit - 0.5) / 0.5).contiguous(memory_format=torch.channels_last))
        confusion.update(logits.argmax(1)[0, :height, :width], sample.mask)
    return confusion.scores().to_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--weights", help="ImageNet weights of the backbone, a file")
    parser.add_argument("--group-by", help="as that of `pixelwise train`")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--crop-px", type=int, default=352)
    parser.add_argument("--flips", default="horizontal", choices=["horizontal", "both", "dihedral"])
    parser.add_argument("--scale", type=float, nargs=2, default=(0.75, 1.75))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    folder = open_data(args.data, **({"group_by": args.group_by} if args.group_by else {}))
    crops = Crops(folder, "train", crop_px=args.crop_px, flips=args.flips, scale=tuple(args.scale))
    model = build(folder.labels.num_classes, args.weights)
    started, seconds = time.monotonic(), 60 * args.minutes
    steps = fit(model, batches(crops), lambda _step: (time.monotonic() - started) / seconds, lambda _step: None)
    scores = {split: score(model, folder, split) for split in ("val", "test") if folder.split(split)}
    write_json(args.out, {"steps": steps, "seconds": time.monotonic() - started, "scores": scores})


if __name__ == "__main__":
    main()
