"""What a run is trained with: every option, its range and its default, in one place."""

import contextlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pixelwise.data.transforms import Flips
from pixelwise.errors import DataError, UsageError, brief
from pixelwise.files import parse_yaml, read_yaml
from pixelwise.losses.pixel import Reduction
from pixelwise.losses.weights import Scheme
from pixelwise.models.registry import suggestion

Freeze = Literal["none", "stem", "encoder"]
Schedule = Literal["poly", "onecycle", "constant", "exponential"]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e9)]
ClassWeights = Annotated[  # told apart by the value, so that an error speaks of what was meant
    Annotated[Scheme, Tag("scheme")] | Annotated[tuple[Weight, ...], Tag("list")],
    Discriminator(lambda value: "scheme" if isinstance(value, str) else "list"),
]
Magnification = Annotated[float, Field(gt=0, le=100)]
Factor = Annotated[float, Field(ge=0, le=1e6)]
PositiveFactor = Annotated[float, Field(gt=0, le=1e6)]
Minutes = Annotated[float, Field(gt=0, le=5_256_000)]  # ten years
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Count = Annotated[int, Field(ge=1, le=10**9)]
MAX_WORKERS = 256
"""More processes on one machine are a mistake, and would bring it down; the other limits are there for the same reason."""


# An option that would be ignored is a mistake: what another one must be (None: anything but its default) for it to count.
NEEDS: dict[str, tuple[str, str | None]] = {
    "momentum": ("optimizer", "sgd"),
    "decay": ("schedule", "exponential"),
    "decay_epochs": ("schedule", "exponential"),
    "poly_power": ("schedule", "poly"),
    "separation_sigma_px": ("separation", None),
    "stage_lr": ("stages", None),
}


class RunConfig(BaseModel):
    """The options of a training run; unknown ones fail.

    Exactly one of `minutes`, `epochs` and `steps` is the budget; none means 50 epochs.

    Example:
        >>> RunConfig(minutes=5, crop_px=128).budget
        ('minutes', 5.0)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(default="encoder_decoder", description="network, one of `pixelwise models`")
    options: dict[str, Any] = Field(
        default_factory=dict, description="the network's own fields: backbone, skip, widths, …"
    )
    pretrained: str | None = Field(default=None, description="'auto' for the library's weights, or a file")
    init: str | None = Field(default=None, description="a run folder, or a classifier's name: weights to start from")
    freeze: Freeze = Field(
        default="none", description="what keeps the weights it starts from: the encoder's stem, or all of the encoder"
    )
    stages: tuple[str, ...] = Field(
        default=(), max_length=100, description="networks to train first, each from the one before"
    )
    stage_lr: PositiveFactor = Field(default=1.0, description="factor on the learning rate from each stage to the next")

    minutes: Minutes | None = Field(default=None, description="budget in minutes, validation included")
    epochs: Count | None = Field(default=None, description="budget in passes over the training images")
    steps: Count | None = Field(default=None, description="budget in optimiser steps")

    max_minutes: Minutes | None = Field(
        default=None, description="largest time for a budget in epochs or steps; the learning rate falls with it"
    )

    crop_px: int | None = Field(
        default=None, ge=16, le=2**16, description="side of the training crops; chosen from the image sizes if unset"
    )
    batch_size: int | None = Field(
        default=None, ge=1, le=2**16, description="crops in a step; 8, or 128 for a network that is trained on windows"
    )
    scale: tuple[Magnification, Magnification] = Field(
        default=(0.6, 1.8), description="smallest and largest random magnification"
    )
    focus: Share = Field(default=0.5, description="share of crops placed on an evenly drawn class of the image")
    flips: Flips = Field(default="horizontal", description="none, horizontal, both, or dihedral (also quarter turns)")
    photometric: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.3, description="strength of brightness, contrast, saturation"
    )
    elastic: float = Field(
        default=0.0, ge=0, le=10_000, description="elastic deformation: deviation of its 3x3 vectors in pixels"
    )

    copy_paste: Share = Field(
        default=0.0, description="share of crops into which an object of a rare class of another image is pasted"
    )
    warm_size: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="side of the crops in the first half of the budget, as a share of crop_px"
    )

    bands: tuple[Annotated[int, Field(ge=1, le=10**6)], ...] | None = Field(
        default=None,
        min_length=1,
        max_length=4096,
        description="the bands of each image to use, counted from 1, in this order; all",
    )
    axis: Literal[0, 1, 2] | None = Field(default=None, description="NIfTI: voxel axis along which slices are cut; 2")
    axes: str | None = Field(
        default=None, description="Zarr, .npy: a letter for each axis, such as tczyx; y rows, x columns, c channels"
    )
    nan_is_nodata: bool = Field(default=False, description="NIfTI: voxels that are NaN or infinite hold no data")
    slices: int = Field(
        default=1, ge=1, le=4095, description="neighbouring slices of a volume read as channels, an odd number"
    )
    intensity: Literal["auto", "type"] | tuple[Number, Number] | None = Field(
        default=None, description="NIfTI, DICOM: auto, type, or the two numbers that become 0 and 1"
    )
    level: int | None = Field(
        default=None, ge=0, le=1000, description="slides, COG, OME-Zarr: level of the pyramid; 0 is the finest"
    )
    series: int | str | None = Field(
        default=None, description="DICOM: SeriesInstanceUID; TIFF, OME-Zarr: number of the image"
    )
    allow_no_affine: bool = Field(default=False, description="NIfTI: accept volumes without an affine")

    class_weights: ClassWeights = Field(
        default="sqrt_median_frequency",
        description="none, median_frequency, its square root, enet, or linknet; or one number per class",
    )
    reduction: Reduction = Field(default="mean", description="divide the loss by the labelled pixels, or only sum")
    separation: Factor = Field(default=0.0, description="U-Net's w0: weight of the gaps between touching objects")
    separation_sigma_px: float = Field(
        default=5.0, gt=0, le=10_000, description="how far from two objects that weight reaches"
    )
    dice: Factor = Field(default=0.0, description="weight of a Dice term beside the cross-entropy")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    optimizer: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    lr: PositiveFactor = Field(default=1e-3, description="peak learning rate")
    encoder_lr: Factor = Field(default=1.0, description="the encoder's learning rate, as a factor of lr")
    bias_lr: Factor = Field(default=1.0, description="the learning rate of convolutions' biases, likewise")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="of sgd")
    weight_decay: Factor = Field(default=1e-2)
    schedule: Schedule = "poly"
    decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.995, description="factor of the exponential schedule, every decay_epochs"
    )
    decay_epochs: PositiveFactor = Field(default=1.0)
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05, description="share of the budget in which the learning rate rises"
    )
    poly_power: Annotated[float, Field(gt=0, le=1000)] = Field(default=0.9)
    clip: float | None = Field(
        default=None, ge=0, le=1e30, description="largest gradient norm, 0 for none; 1, or none with reduction=sum"
    )
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.99, description="decay of the averaged weights; 0 switches them off"
    )

    precision: Literal["auto", "bf16", "float32"] = "auto"
    channels_last: bool = True
    device: str = Field(default="auto", description="auto, cpu, cuda, …")
    devices: int = Field(default=1, ge=1, le=MAX_WORKERS, description="how many; more than one trains with DDP")
    sync_batch_norm: bool = Field(default=False, description="batch norm by the crops of all devices (GPUs) together")
    workers: int | None = Field(
        default=None, ge=0, le=MAX_WORKERS, description="processes that prepare crops; chosen by timing if unset"
    )
    seed: int = Field(default=0, ge=0, lt=2**31)

    validate_every: PositiveFactor | None = Field(
        default=None, description="epochs between validations; 1, or rarer under `minutes`"
    )
    patience: Count | None = Field(default=None, description="stop after so many validations without a better score")
    checkpoint_minutes: Factor = Field(default=2.0, description="largest time between checkpoints")
    max_val_images: Count | None = Field(default=None, description="validate on so many images only, evenly spread")

    @field_validator("stages", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """`fcn32s,fcn16s` as it is typed."""
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @field_validator("intensity", "bands", mode="before")
    @classmethod
    def _numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """`-160,240` as it is typed, and `4` for a single band."""
        if info.field_name == "bands" and isinstance(value, int):
            return (value,)
        is_list = isinstance(value, str) and ("," in value or info.field_name == "bands")
        return tuple(value.split(",")) if is_list else value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        given = [key for key in ("minutes", "epochs", "steps") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are budgets; give one of them")
        if self.max_minutes is not None and self.minutes is not None:
            raise ValueError(
                "max_minutes caps a budget in epochs or steps, but minutes is a budget; leave one of them out"
            )
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be two positive numbers, the smaller first, not {self.scale}")
        if self.init is not None and self.pretrained is not None:
            raise ValueError("init and pretrained both name the weights to start from; give one of them")
        if self.freeze != "none" and self.init is None and self.pretrained is None:
            raise ValueError(
                f"freeze={self.freeze} keeps the weights that training starts from, and these are random without "
                "pretrained or init; give one of them, or leave freeze out"
            )
        if self.freeze == "encoder" and self.encoder_lr != 1:
            raise ValueError("encoder_lr means nothing with freeze=encoder; leave one of them out")
        if self.slices % 2 == 0:
            raise ValueError(f"slices must be an odd number: a slice and as many on each side, not {self.slices}")
        if isinstance(self.intensity, tuple) and not self.intensity[0] < self.intensity[1]:
            raise ValueError(f"intensity must be two numbers, the smaller first, not {self.intensity}")
        if self.copy_paste and self.separation:
            raise ValueError(
                "copy_paste and separation exclude each other: the gaps around an object that is pasted have no weights"
            )
        if self.devices > 1 and ":" in self.device:
            raise ValueError(f"device={self.device} names one device, but devices asks for {self.devices}; write cuda")
        if self.sync_batch_norm and (self.devices == 1 or self.device == "cpu"):
            raise ValueError("sync_batch_norm means nothing but with several devices, which must be GPUs")
        for key, (other, wanted) in NEEDS.items():
            given, unset = getattr(self, other), type(self).model_fields[other].default
            counts = given == wanted if wanted else given != unset
            if getattr(self, key) != type(self).model_fields[key].default and not counts:
                raise ValueError(f"{key} means nothing without {other}{f'={wanted}' if wanted else ''}")
        return self

    @property
    def clip_norm(self) -> float:
        """The largest gradient norm, 0 for none; a sum over pixels has a gradient thousands of times a mean's."""
        if self.clip is not None:
            return self.clip
        return 1.0 if self.reduction == "mean" else 0.0

    @property
    def reading(self) -> dict[str, Any]:
        """The options with which images are read, as far as they are set; kept in the model card."""
        keys = ("bands", "axis", "axes", "nan_is_nodata", "slices", "intensity", "level", "series", "allow_no_affine")
        return {key: getattr(self, key) for key in keys if getattr(self, key) != type(self).model_fields[key].default}

    @property
    def budget(self) -> tuple[str, float]:
        """('minutes', 'epochs' or 'steps', how many)."""
        for key in ("minutes", "epochs", "steps"):
            if getattr(self, key) is not None:
                return key, getattr(self, key)
        return "epochs", 50


def make_config(values: dict[str, Any]) -> RunConfig:
    """A validated configuration."""
    known = RunConfig.model_fields
    for key in values:
        if key not in known:
            raise UsageError(f"there is no training option {key!r}.{suggestion(key, known)} Known: {', '.join(known)}.")
    try:
        return RunConfig(**values)
    except ValidationError as error:
        rows = [
            f"{'.'.join(map(str, item['loc'])) or 'options'}: {item['msg']} (given {brief(item['input'])})"
            for item in error.errors()[:10]
        ]
        raise UsageError("the training options are not valid. " + "; ".join(rows)[:800] + ".") from error


def read_config(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file."""
    try:
        values = read_yaml(path)
    except DataError as error:
        raise UsageError(f"--config {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: must hold 'option: value' lines, not a {type(values).__name__}.")
    return {str(key): value for key, value in values.items()}


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`key=value` texts as options; values are read as YAML, and `options.skip=add` sets one of the network's own."""
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting!r}: write it as key=value, for example --set lr=0.001.")
        try:
            value = parse_yaml(text)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise UsageError(f"--set {setting!r}: the value cannot be read ({error}).") from error
        if isinstance(value, str):  # YAML takes 1e-3 for a text
            with contextlib.suppress(ValueError):
                value = float(value)
        key = key.strip()
        layer = {"options": {key.removeprefix("options."): value}} if key.startswith("options.") else {key: value}
        values = merge_options(values, layer)
    return values


def merge_options(*layers: dict[str, Any]) -> dict[str, Any]:
    """Later layers win; the network's own `options` are merged key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        given = layer.get("options") or {}
        if not isinstance(given, dict):
            raise UsageError(f"options are the network's own fields, such as options.skip=add, not {brief(given)}.")
        options = {**merged.get("options", {}), **given}
        merged |= layer
        if options:
            merged["options"] = options
    return merged
