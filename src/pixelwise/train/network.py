"""The network of a run: how it is built, what it starts from, and how it is fed. Only here is its kind looked at.

A network that sees a window of `window` px and names the class of its centre (`classify`) is trained on windows drawn evenly
by class (Ciresan et al., NIPS 2012); every other network on crops, a class for each pixel.
"""

import statistics
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, cast

from torch import Tensor, nn

from pixelwise.data.check import Inspection
from pixelwise.errors import UsageError
from pixelwise.infer.bundle import CARD_NAME, is_bundle, load_bundle
from pixelwise.losses import cross_entropy, dice_loss, enlarged_cross_entropy
from pixelwise.models import create_model, model_config
from pixelwise.models.backbones import backbone_normalisation
from pixelwise.models.pretrained import Loaded, is_classifier, load_classifier, load_network, load_pretrained
from pixelwise.ops.resize import CoarseLogits
from pixelwise.train.config import Freeze, RunConfig

OF_CROPS = ("crop_px", "scale", "focus", "elastic", "separation", "copy_paste", "warm_size")  # no option for windows
CROP_STEP_PX = 32  # the stride of nearly every encoder: crops of its multiples need no padding
Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel, unit scale


class IsCoarse(Protocol):
    """A network that scores classes on a coarse grid and enlarges the scores linearly."""

    def coarse_logits(self, image: Tensor) -> CoarseLogits:
        """What its `forward` gives, before it is enlarged."""


class Classifies(Protocol):
    """A network that names the class of a window's centre."""

    def classify(self, windows: Tensor) -> Tensor:
        """Scores (N, K) of windows (N, C, window, window)."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """A network as its training begins."""

    model: nn.Module  # the network, filled
    kwargs: dict[str, Any]  # what rebuilds it
    loaded: str | None  # what was loaded and what did not fit, in words, or None
    mean: tuple[float, ...]  # per channel, unit scale; the network sees (image - mean) / std
    std: tuple[float, ...]  # as `mean`


def start_network(config: RunConfig, inspection: Inspection, *, is_resumed: bool) -> Start:
    """Build the network and fill it; one that is resumed gets its weights from the checkpoint."""
    kwargs = network_config(config, inspection)
    model = create_model(config.model, **kwargs)
    check_options(config, model)
    loaded, norm = None, (inspection.mean, inspection.std)
    if not is_resumed and (config.init or config.pretrained):
        loaded, norm = _fill(model, config, inspection)
    for part in frozen_parts(model, config.freeze):
        part.requires_grad_(False)
    return Start(
        model=model, kwargs=kwargs, loaded=None if loaded is None else loaded.summary(), mean=norm[0], std=norm[1]
    )


def _fill(model: nn.Module, config: RunConfig, inspection: Inspection) -> tuple[Loaded, Normalisation]:
    """Weights expect the normalisation they were trained with, whatever the data's own would be."""
    if config.init is None:
        loaded = load_pretrained(model, config.pretrained or "auto")
    elif is_bundle(config.init):
        trained, card = load_bundle(config.init)
        names = inspection.folder.labels.names, card.labels.names
        loaded = load_network(model, trained, f"{card.model} of {config.init}", names)
        if told := card.numbers.mismatch(inspection.numbers) if card.numbers else "":
            loaded = replace(loaded, note="; ".join(filter(None, (loaded.note, told))))
        return loaded, _for_channels((card.mean, card.std), inspection.channels) or (inspection.mean, inspection.std)
    elif is_classifier(config.init):
        loaded = load_classifier(model, config.init)
    else:
        raise UsageError(
            f"--init {config.init}: is neither a run folder (with {CARD_NAME} and its weights) nor a classifier of timm or "
            "torchvision, such as vgg16."
        )
    return loaded, normalisation(loaded.classifier, inspection)


def network_config(config: RunConfig, inspection: Inspection) -> dict[str, Any]:
    """The keyword arguments for `create_model`: the user's, and what the data decide."""
    fixed: dict[str, Any] = {"num_classes": inspection.folder.labels.num_classes, "in_channels": inspection.channels}
    for key, value in fixed.items():
        if config.options.get(key, value) != value:
            raise UsageError(
                f"options.{key}={config.options[key]} disagrees with the data, which have {value}. Leave it out."
            )
    return asdict(model_config(config.model, **(config.options | fixed)))


def normalisation(classifier: str | None, inspection: Inspection) -> Normalisation:
    """Mean and standard deviation per channel: those of the classifier whose weights are used, else the data's own.

    A classifier's are known for 8-bit images only.
    """
    if classifier is None or set(inspection.dtypes) != {"uint8"} or inspection.channels not in (1, 3):
        return inspection.mean, inspection.std
    return _for_channels(backbone_normalisation(classifier), inspection.channels) or (inspection.mean, inspection.std)


def _for_channels(norm: Normalisation, channels: int) -> Normalisation | None:
    """As many values as channels: for grey the average of RGB's; None where that says nothing."""
    if len(norm[0]) == channels:
        return norm
    if channels == 1 and len(norm[0]) == 3:
        return (statistics.fmean(norm[0]),), (statistics.fmean(norm[1]),)
    return None


# -- how it is fed ------------------------------------------------------------------------------------------------------


def window_px(model: nn.Module) -> int | None:
    """The side of the windows that `model` is trained on, or None for a network that is trained on crops."""
    side = getattr(model, "window", None)
    return side if isinstance(side, int) and callable(getattr(model, "classify", None)) else None


def warm_side(config: RunConfig, crop_px: int) -> int:
    """The side of the crops in the first half of the budget, a multiple of 32 px; 0 where it is that of all others."""
    if config.warm_size == 1:
        return 0
    side = max(CROP_STEP_PX, round(crop_px * config.warm_size / CROP_STEP_PX) * CROP_STEP_PX)
    if side >= crop_px:
        raise UsageError(
            f"warm_size={config.warm_size:g}: of crops of {crop_px} px no multiple of {CROP_STEP_PX} px is smaller and as "
            "near to it. Choose a smaller warm_size or a larger crop_px, or leave warm_size out."
        )
    return side


def check_options(config: RunConfig, model: nn.Module) -> None:
    """Refuse options that would be ignored."""
    has_encoder = any(name.startswith("encoder.") for name, _ in model.named_parameters())
    for key in ("encoder_lr", "freeze"):
        if getattr(config, key) != RunConfig.model_fields[key].default and not has_encoder:
            raise UsageError(f"{config.model} has no encoder of its own, so {key} means nothing to it. Leave it out.")
    if config.freeze == "stem" and not frozen_parts(model, "stem"):
        raise UsageError(
            f"the encoder of {config.model} does not begin with a convolution. Use freeze=encoder or none."
        )
    if window_px(model) is None:
        return
    fields = RunConfig.model_fields
    if given := [key for key in OF_CROPS if getattr(config, key) != fields[key].default]:
        raise UsageError(
            f"{config.model} is trained on windows of {window_px(model)} px, not on crops, so {', '.join(given)} means "
            "nothing to it. Leave it out; options.window=… sets the side of the windows."
        )


def frozen_parts(model: nn.Module, freeze: Freeze) -> tuple[nn.Module, ...]:
    """What `freeze` leaves as it is: no gradient, and batch norm with the stored statistics (as in evaluation).

    The stem is the encoder's first convolution and the batch norm directly behind it.
    """
    if freeze == "none":
        return ()
    encoder = model.get_submodule("encoder")
    if freeze == "encoder":
        return (encoder,)
    layers = [item for item in encoder.modules() if isinstance(item, nn.Conv2d | nn.modules.batchnorm._BatchNorm)]
    if not layers or not isinstance(layers[0], nn.Conv2d):
        return ()
    return (layers[0], *(item for item in layers[1:2] if not isinstance(item, nn.Conv2d)))


def training_logits(model: nn.Module, image: Tensor) -> Tensor:
    """Scores of a batch (N, C, s, s): (N, K, s, s) of crops, (N, K, 1, 1) of windows."""
    if window_px(model) is None:
        return model(image)
    return cast(Classifies, model).classify(image)[..., None, None]


def training_loss(
    model: nn.Module, image: Tensor, labels: Tensor, *, dice: float = 0.0, share: Tensor | float = 1.0, **options: Any
) -> Tensor:
    """The loss of a batch: `share` times the cross-entropy with `options`, and `dice` times the Dice loss.

    On CPUs, scores of a coarse grid stay there as far as that is possible; on GPUs their enlargement is cheap.
    """
    if not dice and image.device.type == "cpu" and getattr(model, "is_coarse", False):
        return share * enlarged_cross_entropy(cast(IsCoarse, model).coarse_logits(image), labels, **options)
    logits = training_logits(model, image)
    loss = share * cross_entropy(logits, labels, **options)
    return loss + dice * dice_loss(logits, labels) if dice else loss
