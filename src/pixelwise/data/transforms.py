"""Augmentation of image and mask together, with torchvision's v2 transforms.

Masks are resampled by nearest neighbour only, and pixels that a crop takes from outside the image are void. Every transform
draws from torch's global generator, so seeding that generator decides the result. The crop comes first and takes images
and masks that lie in files too (`Windowed`), of which it reads no more than its window.

Colours are changed later, where the network is fed (`data.photometric`), which also sees to it that pixels without data,
and what lies outside the image, come out as exactly 0. Here the numbers stay of the type that they are stored in.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate, pad
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from pixelwise.data.copy_paste import Found, Paste
from pixelwise.data.labels import IGNORE_INDEX
from pixelwise.data.photometric import uniform, with_validity
from pixelwise.errors import UsageError
from pixelwise.ops.resize import mirror_crop

Flips = Literal["none", "horizontal", "both", "dihedral"]


class PixelWeight(tv_tensors.Mask):
    """A float32 weight per pixel that goes through the same geometry as the mask; nearest neighbour, 0 outside the image."""


class Windowed:
    """An image that is too large to load: its size is known, windows of it are read.

    Args:
        shape: (height, width).
        read: (top, left, height, width) -> the window, as `tv_tensors.Image` or `tv_tensors.Mask`.
        draw_pixel: of a mask: row and column of a pixel of a class drawn evenly, None if all is void.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        read: Callable[[int, int, int, int], Tensor],
        draw_pixel: Callable[[], tuple[int, int] | None] | None = None,
    ) -> None:
        self.shape, self.read, self.draw_pixel = shape, read, draw_pixel


class _Crop(v2.Transform):
    """A transform that may come first: inputs are images and masks, in memory or `Windowed`, and an object to paste."""

    def forward(self, *inputs: Any) -> Any:
        params = self.make_params(list(inputs))
        return tuple(item if isinstance(item, Found) else self.transform(item, params) for item in inputs)


def _labels_of(inputs: list[Any]) -> Any:
    return next(item for item in inputs if type(item) is tv_tensors.Mask or getattr(item, "draw_pixel", None))


class RandomScaleCrop(_Crop):
    """A square crop of `crop_px` from the image magnified by a random factor, in one resampling of the needed window only.

    The factor is drawn log-uniformly from `scale`. With probability `focus` the window holds a pixel of a class drawn
    evenly from the classes of the mask, so that rare classes are seen as often as their images are; otherwise it is drawn
    evenly over the image. What lies outside the image, or has no data, is `fill`, per channel, in the image, which tells it
    by one channel more, that of `with_validity`; what lies outside is void in the mask.
    """

    def __init__(
        self,
        crop_px: int,
        *,
        fill: tuple[float, ...],
        scale: tuple[float, float] = (1.0, 1.0),
        focus: float = 0.0,
    ) -> None:
        super().__init__()
        self.crop_px, self.scale, self.focus, self.fill = crop_px, scale, focus, fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = _labels_of(flat_inputs)
        height, width = mask.shape[-2:]
        window = max(1, round(self.crop_px / math.exp(uniform(*map(math.log, self.scale)))))
        row, column = (uniform(0, 1) < self.focus and _draw_labelled(mask)) or (None, None)
        return {"window": window, "top": _start(height, window, row), "left": _start(width, window, column)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        top, left, window = params["top"], params["left"], params["window"]
        height, width = inpt.shape[-2:]
        # Cut what exists, then pad: a window far larger than the image must not be filled twice.
        rows, columns = (max(top, 0), min(top + window, height)), (max(left, 0), min(left + window, width))
        below, right = max(top + window - height, 0), max(left + window - width, 0)
        padding = (max(-left, 0), max(-top, 0), right, below)
        if isinstance(inpt, Windowed):
            inside = inpt = inpt.read(rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0])
        else:
            inside = inpt[..., slice(*rows), slice(*columns)]
        out = inside.as_subclass(torch.Tensor)
        if isinstance(inpt, tv_tensors.Mask):
            out = _pad(out[None], padding, (0,) if isinstance(inpt, PixelWeight) else (IGNORE_INDEX,))
            out = F.resize(out, [self.crop_px] * 2, interpolation=v2.InterpolationMode.NEAREST_EXACT)
            return tv_tensors.wrap(out[0], like=inpt)
        return tv_tensors.Image(F.resize(self._filled(out, padding), [self.crop_px] * 2, antialias=True))

    def _filled(self, image: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
        """The image padded, and `fill` where it has no data, so that resampling mixes nothing else into its neighbours."""
        if len(image) > len(self.fill):
            colors = torch.tensor(self.fill).to(image.dtype)[:, None, None]
            image = torch.cat([torch.where(image[-1:] > 0, image[:-1], colors), image[-1:]])
        elif any(padding):
            image = with_validity(image, torch.ones(image.shape[1:], dtype=torch.bool))
        return _pad(image, padding, (*self.fill, 0))


def _start(length: int, window: int, centre: int | None) -> int:
    """The window's first row or column: evenly drawn, inside the image where it fits, around it where it does not."""
    low, high = sorted((0, length - window))
    if centre is not None:
        low, high = max(low, min(high, centre - window + 1)), min(high, max(low, centre))
    return int(torch.randint(low, high + 1, ()))


def _pad(image: Tensor, padding: tuple[int, int, int, int], fill: tuple[float, ...]) -> Tensor:
    """(C, H, W) padded by `fill` per channel; torchvision's own `pad` takes a fill per channel for RGB only."""
    if not any(padding):
        return image
    left, top, right, bottom = padding
    _, height, width = image.shape
    values = torch.tensor(fill, dtype=torch.float32).to(image.dtype)
    canvas = values[:, None, None].repeat(1, height + top + bottom, width + left + right)
    canvas[:, top : top + height, left : left + width] = image
    return canvas


class RandomDihedral(v2.Transform):
    """One of the eight symmetries of the square, evenly drawn; for images without an upright direction."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"turns": int(torch.randint(4, ())), "flip": bool(torch.randint(2, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        out = torch.rot90(inpt.as_subclass(torch.Tensor), params["turns"], (-2, -1))
        return tv_tensors.wrap(out.flip(-1) if params["flip"] else out, like=inpt)


class RandomElastic(v2.Transform):
    """Displacements drawn on a coarse grid, interpolated to every pixel (U-Net, arXiv:1505.04597, section 3.1).

    Each point of a `grid` x `grid` lattice, whose corners are those of the image, gets a random vector, both parts normal of
    standard deviation `sigma_px`; bicubic interpolation gives the displacement of the pixels between. The image is resampled
    bilinearly, the mask by nearest neighbour. What comes from outside is mirrored in the image and void (255) in the mask;
    in a mask of floats, which are weights of pixels, it is 0.
    """

    def __init__(self, sigma_px: float = 10.0, grid: int = 3) -> None:
        super().__init__()
        if not sigma_px >= 0:
            raise UsageError(f"elastic deformation: sigma_px must be at least 0, not {sigma_px}.")
        if grid < 2:
            raise UsageError(f"elastic deformation: grid must be at least 2, not {grid}.")
        self.sigma_px, self.grid = sigma_px, grid

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        size = next(item.shape[-2:] for item in flat_inputs if isinstance(item, tv_tensors.Image | tv_tensors.Mask))
        height, width = size
        coarse = self.sigma_px * torch.randn(2, self.grid, self.grid)
        # Bicubic interpolation goes along one axis after the other, each a product with the weights of its points.
        rows, columns = _bicubic(height, self.grid) @ coarse @ _bicubic(width, self.grid).T  # (H, W) each
        return {"rows": torch.arange(height)[:, None] + rows, "columns": torch.arange(width) + columns}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        rows, columns = params["rows"], params["columns"]
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(_nearest(inpt.as_subclass(Tensor), rows, columns), like=inpt)
        if isinstance(inpt, tv_tensors.Image):
            return tv_tensors.Image(_bilinear(inpt.as_subclass(Tensor), rows, columns))
        return inpt


@cache
def _bicubic(length: int, points: int) -> Tensor:
    """What each of `points` on a line, of which the outer ones lie at its ends, adds to each pixel: (length, points)."""
    return interpolate(torch.eye(points)[None, None], (length, points), mode="bicubic", align_corners=True)[0, 0]


def _nearest(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The labels, or weights, (..., H, W) at the places (H, W) given in pixels; void outside, which weighs 0."""
    height, width = mask.shape[-2:]
    framed = pad(
        mask, (1, 1, 1, 1), value=0 if mask.is_floating_point() else IGNORE_INDEX
    )  # so that no place is outside
    row, column = (
        place.round().clamp_(-1, length).long().add_(1) for place, length in ((rows, height), (columns, width))
    )
    return framed.flatten(-2)[..., row.mul_(width + 2).add_(column)]


def _bilinear(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The image (C, H, W) at the places (H, W) given in pixels; mirrored outside, the border pixel not repeated."""
    places = torch.stack(
        [
            2 * place / max(length - 1, 1) - 1
            for place, length in zip((columns, rows), image.shape[:-3:-1], strict=True)
        ],
        dim=-1,
    )  # (H, W, 2) in -1..1, x before y
    out = grid_sample(image.float()[None], places[None], "bilinear", "reflection", align_corners=True)[0]
    return out if image.is_floating_point() else out.round().to(image.dtype)


def training_transform(
    *,
    crop_px: int,
    scale: tuple[float, float],
    focus: float,
    flips: Flips,
    fill: tuple[float, ...],
    is_uint8: bool,
    elastic: float = 0.0,
    pastes: bool = False,
) -> v2.Transform:
    """The geometry of training: scale and crop, elastic deformation, flips; numbers stay as they are stored.

    The deformation comes after the crop: the same in effect, and only what is trained on is deformed.
    `fill`, per channel in unit scale, is what the network takes for 0: resampling mixes it into the rims of what lies
    outside the image and of pixels without data. `elastic` is the deviation of the deformation's vectors in crop pixels.
    With `pastes`, an object that comes last among the inputs is pasted into the crop (`data.copy_paste`).
    """
    stored = tuple(value * 255 if is_uint8 else value for value in fill)
    steps: list[v2.Transform] = [RandomScaleCrop(crop_px, scale=scale, focus=focus, fill=stored)]
    if pastes:
        steps.append(Paste(scale, stored))
    if elastic:
        steps.append(RandomElastic(elastic))
    return v2.Compose([*steps, *_flips(flips)])


def window_transform(*, window_px: int, flips: Flips) -> v2.Transform:
    """The geometry of training on windows: one around a pixel of an evenly drawn class, flips."""
    return v2.Compose([RandomWindow(window_px), *_flips(flips)])


def _flips(flips: Flips) -> list[v2.Transform]:
    steps: list[v2.Transform] = []
    if flips in ("horizontal", "both"):
        steps.append(v2.RandomHorizontalFlip())
    if flips == "both":
        steps.append(v2.RandomVerticalFlip())
    if flips == "dihedral":
        steps.append(RandomDihedral())
    return steps


class RandomWindow(_Crop):
    """The window around a pixel of a class that is drawn evenly from the classes of the mask, and that pixel's class.

    So each class of an image is seen as often as any other, however few its pixels (Ciresan et al., NIPS 2012, draw as many
    windows of one class as of the other). Outside the image the window shows its mirror image. Of a mask that is all void
    any pixel is drawn, and its label is void.

    The window of row i begins at row i - window_px // 2, columns alike, as in `pixelwise.models.patch_classifier`. A flip
    keeps the centre of an odd window; that of an even one moves by a pixel.
    """

    def __init__(self, window_px: int) -> None:
        super().__init__()
        self.window_px = window_px

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = _labels_of(flat_inputs)
        height, width = mask.shape[-2:]
        row, column = _draw_labelled(mask) or divmod(int(torch.randint(height * width, ())), width)
        return {"row": row, "column": column}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        row, column = params["row"], params["column"]
        if isinstance(inpt, Windowed) and inpt.draw_pixel:
            return inpt.read(row, column, 1, 1)
        if isinstance(inpt, Windowed):
            top, bottom = _mirrored_span(row - self.window_px // 2, self.window_px, inpt.shape[0])
            left, right = _mirrored_span(column - self.window_px // 2, self.window_px, inpt.shape[1])
            inpt, row, column = inpt.read(top, left, bottom - top, right - left), row - top, column - left
        plain = inpt.as_subclass(Tensor)
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(plain[..., row : row + 1, column : column + 1].clone(), like=inpt)
        before = self.window_px // 2
        return tv_tensors.Image(mirror_crop(plain, row - before, column - before, self.window_px, self.window_px))


def draw_pixel(mask: Tensor) -> tuple[int, int] | None:
    """Row and column of a pixel of a class drawn evenly from those in `mask`, uint8 (H, W); None if all is void."""
    counts = torch.bincount(mask.flatten(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    classes = counts.nonzero().flatten()
    if not len(classes):
        return None
    wanted = classes[torch.randint(len(classes), ())]
    number = int(torch.randint(int(counts[wanted]), ()))  # of its pixels, in reading order
    is_wanted = mask == wanted
    # By rows, since listing all places takes several times as long; float32 counts a row exactly.
    ends = (is_wanted.float() @ torch.ones(mask.shape[-1])).long().cumsum(0)
    row = int(torch.searchsorted(ends, number, right=True))
    number -= int(ends[row - 1]) if row else 0
    return row, int(is_wanted[row].nonzero()[number])


def _draw_labelled(mask: Tensor | Windowed) -> tuple[int, int] | None:
    if isinstance(mask, Windowed):
        return mask.draw_pixel() if mask.draw_pixel else None
    return draw_pixel(mask.as_subclass(Tensor))


def _mirrored_span(start: int, count: int, length: int) -> tuple[int, int]:
    """The first and one after the last row that `mirror_crop` shows of an image of `length` rows."""
    if count >= length:
        return 0, length
    low, high = min(start, 2 * length - 1 - start - count), max(start + count, 1 - start)
    return max(low, 0) if start + count > length else max(start, 0), min(high, length)
