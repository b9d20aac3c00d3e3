"""Monte-Carlo dropout: a network with dropout run many times, for a mean prediction and how much it varies."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pixelwise.errors import UsageError

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@torch.no_grad()
def sample_with_dropout(
    model: nn.Module, image: Tensor, *, samples: int = 50, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of the softmax over passes in which dropout acts (Bayesian SegNet, arXiv:1511.02680, section 4).

    All else is as in evaluation: batch norm uses its running statistics. Mean and variance are updated pass by pass
    (Welford 1962), so that memory does not grow with `samples`. Modes and state of `model` are afterwards what they were.

    Args:
        model: maps images (N, C, H, W) to logits (N, K, H, W) and has dropout layers, else it is a UsageError.
        image: (N, C, H, W).
        samples: passes, at least 1; the paper takes 50.
        seed: makes the result repeatable on one device (CPU or CUDA) and leaves torch's own random numbers as they are.

    Returns:
        mean probabilities (N, K, H, W), float32, and uncertainty (N, H, W): the variance of each class's probability over
        the passes (divided by their number), averaged over the classes; 0 to 0.25.
    """
    if samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}.")
    modes = {module: module.training for module in model.modules()}
    dropouts = [module for module in modes if isinstance(module, DROPOUTS)]
    if not dropouts:
        raise UsageError(
            f"{type(model).__name__} has no dropout layers, so that all its passes are equal. Choose bayesian_segnet or "
            "another network with dropout."
        )
    try:
        model.eval()
        for dropout in dropouts:
            dropout.train()
        with seeded(image.device, seed):
            return _mean_and_variance(model, image, samples)
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def seeded(device: torch.device, seed: int | None) -> Iterator[None]:
    """Random numbers on `device` that start from `seed`; afterwards they go on as if nothing had been drawn."""
    if seed is None:
        yield
        return
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _mean_and_variance(model: nn.Module, image: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    mean = model(image).float().softmax(dim=1)  # (N, K, H, W)
    squares = torch.zeros_like(mean[:, 0])  # (N, H, W): squared distances from the mean, averaged over the classes
    for count in range(2, samples + 1):
        probability = model(image).float().softmax(dim=1)
        distance = probability - mean
        mean += distance / count
        squares += (distance * (probability - mean)).mean(dim=1)
    return mean, squares / samples
