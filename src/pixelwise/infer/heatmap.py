"""Where in a photo an image classifier sees a class: its scores for a window around every point, as a heat map.

The classifier is made fully convolutional (`pixelwise.ops.convolutionalize`), and the photo is continued by mirroring at its
borders, so that every point has a whole window around it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.models as tv
from numpy.typing import NDArray
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from pixelwise.data.samples import to_tensor
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats import open_source
from pixelwise.infer.devices import resolve_device
from pixelwise.infer.overlay import displayable
from pixelwise.machine import is_out_of_memory
from pixelwise.models.backbones import backbone_normalisation, create_classifier, resolve_backbone
from pixelwise.models.pretrained import library_weights, match_state, read_state
from pixelwise.models.registry import suggestion
from pixelwise.ops.convolutionalize import HeadKind, convolutionalize

COLOURS = "inferno"  # matplotlib's; its brightness rises evenly
LISTED = 12  # names in an error message


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassScores:
    """A classifier's scores for windows all over one photo.

    Attributes:
        names: Of the K classes.
        logits: Scores, float32 (K, h, w) on the CPU.
        stride: Pixels between neighbouring cells, in the photo as it was scored.
        extent: Height and width that the cells divide evenly, in pixels, from the photo's top left corner on.
        size: Height and width of the photo as it was scored, in pixels.
        source: The photo as it was read, (C, H, W).
    """

    names: tuple[str, ...]
    logits: Tensor
    stride: int
    extent: tuple[int, int]
    size: tuple[int, int]
    source: Tensor

    def heatmap(self, name: str | int) -> NDArray[np.float32]:
        """The probability of a class (softmax over all classes) at every pixel of the photo, float32 (H, W), 0..1.

        Args:
            name: Of the class, in any case, or a part of it that no other name has; or its number.

        Raises:
            UsageError: no such class, or several.
        """
        cells = self.logits.softmax(dim=0)[None, self.index(name), None]  # (1, 1, h, w)
        pixels = F.interpolate(cells, size=self.extent, mode="bilinear", align_corners=False)
        pixels = pixels[..., : self.size[0], : self.size[1]]
        if self.size != tuple(self.source.shape[1:]):
            pixels = F.interpolate(pixels, size=self.source.shape[1:], mode="bilinear", align_corners=False)
        return pixels[0, 0].numpy()

    def best(self, count: int = 5) -> list[tuple[str, float]]:
        """The classes with the highest probability in any cell, and that probability."""
        peaks = self.logits.softmax(dim=0).amax(dim=(1, 2))  # (K,)
        order = peaks.argsort(descending=True)[:count].tolist()
        return [(self.names[index], float(peaks[index])) for index in order]

    def overlay(self, name: str | int) -> Image.Image:
        """The heat map over the photo in grey: what is hotter is brighter and covers more, up to the highest value."""
        import matplotlib as mpl

        heat = self.heatmap(name)
        shares = heat / max(float(heat.max()), 1e-12)
        colours = mpl.colormaps[COLOURS](shares)[..., :3] * 255
        photo = displayable(self.source)
        grey = photo.mean(axis=2, keepdims=True) * np.ones(3)  # so that every colour in the picture is heat
        weight = 0.75 * np.sqrt(shares)[..., None]
        return Image.fromarray(np.rint(grey * (1 - weight) + colours * weight).astype(np.uint8))

    def index(self, name: str | int) -> int:
        """The number of the class that is meant.

        Raises:
            UsageError: none, or several.
        """
        if isinstance(name, int) or (name.isdecimal() and name not in self.names):
            if not 0 <= int(name) < len(self.names):
                count = len(self.names)
                raise UsageError(f"class {name}: the classifier knows {count}, from 0 to {count - 1}.")
            return int(name)
        folded, wanted = [known.casefold() for known in self.names], name.casefold()
        word = re.compile(rf"(?<!\w){re.escape(wanted)}(?!\w)")
        for is_meant in (
            lambda at: self.names[at] == name,
            lambda at: folded[at] == wanted,
            lambda at: word.search(folded[at]),
            lambda at: wanted in folded[at],
        ):
            found = [at for at in range(len(folded)) if is_meant(at)]
            if len(found) == 1:
                return found[0]
            if found:
                several = ", ".join(f"{self.names[at]} ({at})" for at in found[:LISTED])
                more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
                raise UsageError(f"class {name!r} may mean {several}{more}. Give the whole name or the number.")
        raise UsageError(f"the classifier knows no class {name!r}.{suggestion(wanted, folded)}")


class WindowClassifier:
    """An image classifier that scores a window around every point of a photo. Make one with `open_classifier`.

    Args:
        classifier: Maps images (N, 3, H, W) to scores (N, K); scored in evaluation mode.
        names: Of the K classes.
        mean: By channel, in unit scale.
        std: As `mean`.
        input_px: The classifier's own image size.
        dense: As for `convolutionalize`.
        head: As for `convolutionalize`.
        device: "auto", or a torch device.

    Raises:
        UsageError: it cannot be made fully convolutional, or there is no such device.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> white = WindowClassifier(net, names=("tabby", "fire truck"), input_px=9, device="cpu")
        >>> white.classify(np.zeros((20, 31, 3), dtype=np.uint8)).heatmap("tabby").shape
        (20, 31)
    """

    def __init__(
        self,
        classifier: nn.Module,
        *,
        names: tuple[str, ...],
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        input_px: int = 224,
        dense: bool | int = False,
        head: HeadKind = "window",
        device: str | torch.device = "auto",
    ) -> None:
        self.device = resolve_device(device)
        self.names, self.head, self.input_px = names, head, input_px
        scorer: Any = convolutionalize(classifier.eval(), input_size=input_px, dense=dense, head=head)
        self.scorer, self.stride = scorer.to(self.device), int(scorer.meta["stride"])
        self._mean, self._std = (torch.tensor(item, device=self.device).reshape(1, -1, 1, 1) for item in (mean, std))

    @torch.inference_mode()
    def classify(self, image: str | Path | NDArray[np.generic], *, scale_px: int | None = None) -> ClassScores:
        """Score a window around every `stride`-th pixel of a photo.

        Args:
            image: A file, or an array (H, W, 3), 8-bit or float in unit scale.
            scale_px: Enlarge or shrink the photo to this shorter side first: the classifier looks for things of the size
                of its window.

        Raises:
            DataError: The photo cannot be read.
            UsageError: `scale_px` is not positive.
            PixelwiseError: The photo does not fit into memory.
        """
        if scale_px is not None and scale_px < 1:
            raise UsageError(f"scale_px must be at least 1 pixel, not {scale_px}.")
        name = str(image) if isinstance(image, str | Path) else "the image"
        if isinstance(image, str | Path):
            with open_source(image, channels=3) as opened:
                array = opened.read(0, 0, opened.info.height, opened.info.width)
                valid = opened.valid(0, 0, opened.info.height, opened.info.width)
        else:
            array, valid = np.asarray(image), None
        try:
            source = to_tensor(array[:, :, None] if array.ndim == 2 else array, 3)  # (3, H, W)
        except (DataError, IndexError) as error:
            raise DataError(f"{name}: {error}") from error
        try:
            unit = (source / 255 if source.dtype == torch.uint8 else source)[None].to(self.device)
            if valid is not None:  # where the photo has no data it is as the mean
                unit = torch.where(torch.from_numpy(np.array(valid)).to(self.device), unit, self._mean)
            if scale_px is not None:
                height, width = source.shape[1:]
                factor = scale_px / min(height, width)
                size = (max(1, round(height * factor)), max(1, round(width * factor)))
                unit = F.interpolate(unit, size=size, mode="bilinear", align_corners=False, antialias=True)
            padded, extent = self._surround((unit - self._mean) / self._std)
            logits = self.scorer(padded)[0].float().cpu()  # (K, h, w)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise PixelwiseError(
                f"{name}: {source.shape[2]} x {source.shape[1]} px do not fit into memory with a score every {self.stride} "
                "px. Shrink the photo (--scale 400), or take a larger --dense."
            ) from error
        size = (unit.shape[2], unit.shape[3])
        return ClassScores(names=self.names, logits=logits, stride=self.stride, extent=extent, size=size, source=source)

    def _surround(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The image (1, 3, H, W) continued by mirroring, and the height and width that its cells stand for.

        For windows it is continued on all sides, so that a window is centred on each step of `stride` pixels; for single
        cells on the right and below only, to whole steps.
        """
        extent = []
        for axis in (2, 3):
            length = image.shape[axis]
            steps = -(-length // self.stride)
            before, whole = (self.input_px - self.stride) // 2, self.input_px + (steps - 1) * self.stride
            extent.append(steps * self.stride)
            if self.head == "cells":
                before, whole = 0, max(steps * self.stride, self.input_px)
                extent[-1] = whole
            at = torch.arange(whole, device=image.device).sub(before).remainder(2 * length)
            image = image.index_select(axis, torch.minimum(at, 2 * length - 1 - at))
        return image, (extent[0], extent[1])


def open_classifier(
    name: str = "torchvision/mobilenet_v2",
    *,
    weights: str | Path = "auto",
    dense: bool | int = False,
    head: HeadKind = "window",
    device: str | torch.device = "auto",
) -> WindowClassifier:
    """An image classifier of torchvision or timm, ready to show where in a photo it sees a class.

    Args:
        name: As timm or torchvision write it; `torchvision/NAME` where both have it.
        weights: "auto" asks the library that owns it (its cache first, else its download); a file with a state dict;
            "random" for none.
        dense: The pixels between neighbouring scores: 16, 8, ... 1; False for the classifier's own stride. Half the
            distance costs four times the time.
        head: "window" for the scores of whole windows, "cells" for class activation maps.
        device: "auto", or a torch device.

    Raises:
        UsageError: No such classifier, weights that are not to be had or do not fit, or a network that cannot be made fully
            convolutional.

    Example:
        >>> classifier = open_classifier("resnet10t", weights="random", device="cpu")
        >>> labels = classifier.classify(np.zeros((60, 50, 3), dtype=np.uint8), scale_px=40)
        >>> labels.heatmap("tabby").shape
        (60, 50)
    """
    library, bare = resolve_backbone(name)
    classifier = create_classifier(name)
    if weights != "random":
        _fill(classifier, name, weights)
    mean, std = backbone_normalisation(name)
    if library == "timm":
        px = int(classifier.default_cfg["input_size"][-1])  # type: ignore[index]
    else:
        choices = list(tv.get_model_weights(bare))
        px = int(choices[0].transforms.keywords["crop_size"]) if choices else 224
    names = _class_names(classifier, library)
    return WindowClassifier(
        classifier, names=names, mean=mean, std=std, input_px=px, dense=dense, head=head, device=device
    )


def _fill(classifier: nn.Module, name: str, weights: str | Path) -> None:
    if weights == "auto":
        try:
            given, label = library_weights(name)
        except UsageError as error:
            reason = str(error).partition(". Connect")[0]
            raise UsageError(
                f"{reason}. Connect to a network once, or pass a file of weights (--weights FILE); --weights random shows "
                "how it works without any."
            ) from error
    else:
        try:
            given, label = read_state(weights), Path(weights).name
        except UsageError as error:
            raise UsageError(str(error).replace("--pretrained", "--weights")) from error
    loaded, state = match_state(classifier, given, reference=classifier.state_dict(), source=label)
    if loaded.missing or loaded.mismatched:
        raise UsageError(f"the weights are not those of {name}: {loaded.summary()}.")
    classifier.load_state_dict(state, strict=False)


def _class_names(classifier: nn.Module, library: str) -> tuple[str, ...]:
    """ImageNet's names where the number of classes says which of its editions was learnt, else numbers."""
    channels = classifier.num_classes if library == "timm" else 1000
    if channels == 1000:
        return tuple(tv.MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"])
    edition = infer_imagenet_subset(classifier)
    if edition is None:
        return tuple(f"class {index}" for index in range(int(channels)))  # type: ignore[arg-type]
    return tuple(str(item) for item in ImageNetInfo(edition).label_descriptions())
