"""How training feeds a network: by crops of images, or by windows around single pixels. Only here is the network looked at.

A network that sees a window of `window` px and names the class of its centre (`classify`) is trained on windows drawn evenly
by class (Ciresan et al., NIPS 2012); every other network on crops, a class for each pixel.
"""

from torch import Tensor, nn
from torchvision.transforms import v2

from pixelwise.data.transforms import training_transform, window_transform
from pixelwise.errors import UsageError
from pixelwise.train.config import RunConfig

CROPS, WINDOWS = 8, 128  # in a step, unless the user says otherwise
OF_CROPS = ("crop_px", "scale", "focus", "elastic", "separation")  # options that mean nothing for windows


def window_px(model: nn.Module) -> int | None:
    """The side of the windows that `model` is trained on, or None for a network that is trained on crops."""
    side = getattr(model, "window", None)
    return side if isinstance(side, int) and callable(getattr(model, "classify", None)) else None


def check_options(config: RunConfig, model: nn.Module) -> None:
    """Refuse options that would be ignored."""
    if window_px(model) is None:
        return
    fields = RunConfig.model_fields
    if given := [key for key in OF_CROPS if getattr(config, key) != fields[key].default]:
        raise UsageError(
            f"{config.model} is trained on windows of {window_px(model)} px, not on crops, so {', '.join(given)} means "
            "nothing to it. Leave it out; options.window=… sets the side of the windows."
        )


def batch_size(config: RunConfig, model: nn.Module) -> int:
    """Crops or windows in a step."""
    return config.batch_size or (CROPS if window_px(model) is None else WINDOWS)


def draws_per_image(model: nn.Module, pixels: float) -> int:
    """How many draws make an epoch for an image of `pixels`: one crop, or as many windows as would cover it."""
    side = window_px(model)
    return 1 if side is None else max(1, round(pixels / side**2))


def label_px(model: nn.Module, crop_px: int) -> int:
    """The side of the labels that belong to an input of `crop_px`: a window has one, that of its centre."""
    return crop_px if window_px(model) is None else 1


def training_logits(model: nn.Module, image: Tensor) -> Tensor:
    """Scores of a batch (N, C, s, s): (N, K, s, s) of crops, (N, K, 1, 1) of windows."""
    if window_px(model) is None:
        return model(image)
    classify: nn.Module = model.classify  # type: ignore[assignment]
    return classify(image)[..., None, None]


def input_transform(
    config: RunConfig, model: nn.Module, *, crop_px: int, fill: tuple[float, ...], is_uint8: bool
) -> v2.Transform:
    """The augmentation: of crops, or of windows."""
    if window_px(model) is not None:
        return window_transform(window_px=crop_px, flips=config.flips, photometric=config.photometric)
    return training_transform(
        crop_px=crop_px,
        scale=config.scale,
        focus=config.focus,
        flips=config.flips,
        photometric=config.photometric,
        fill=fill,
        is_uint8=is_uint8,
        elastic=config.elastic,
    )
