"""Every network learns: a tiny one, some dozens of steps on the drawn scenes, scored on scenes it never saw."""

import functools

import pytest
import torch
from torch import Tensor

from pixelwise.data.scenes import SCENE_LABELS, draw_scene
from pixelwise.losses import cross_entropy
from pixelwise.metrics import ConfusionMatrix
from pixelwise.models import create_model, list_models

SIZE = (64, 96)
STEPS, BATCH = 45, 4


@functools.cache
def scenes(first: int, count: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) in [-1, 1] and labels (N, H, W)."""
    pairs = [draw_scene(seed, size=SIZE) for seed in range(first, first + count)]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in pairs])
    return images / 127.5 - 1, torch.stack([torch.from_numpy(mask) for _, mask in pairs])


def miou(predicted: Tensor, truth: Tensor) -> float:
    confusion = ConfusionMatrix(SCENE_LABELS.num_classes)
    confusion.update(predicted.to(torch.uint8).numpy(), truth.numpy())
    return confusion.scores().miou


@pytest.mark.parametrize("name", list_models())
def test_a_tiny_network_scores_more_than_twice_the_most_frequent_class(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, tiny=True, num_classes=SCENE_LABELS.num_classes).train()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=STEPS)
    images, labels = scenes(0, 24)
    for step in range(STEPS):
        chosen = torch.arange(BATCH * step, BATCH * (step + 1)) % len(images)
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    unseen, truth = scenes(1000, 8)
    with torch.no_grad():
        predicted = model.eval()(unseen).argmax(1)
    most_frequent = labels.flatten().bincount(minlength=256)[:255].argmax()
    assert miou(predicted, truth) > 2 * miou(torch.full_like(truth, most_frequent), truth)
