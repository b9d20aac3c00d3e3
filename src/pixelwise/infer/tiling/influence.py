"""How far a network really looks: the halo beyond which the rest of the image hardly changes its scores.

Of a receptive field the outer parts weigh little. What they weigh is measured as it will matter: images are predicted
whole, and again cut off, and the scores on this side of the cut are compared, by their distance from it. That takes in
what a derivative leaves out, such as the zeros with which every layer pads at the cut.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pixelwise.errors import UsageError
from pixelwise.infer.tiling.halo import Radius
from pixelwise.ops.cost import PassMemory, Run
from pixelwise.ops.receptive_field import ReceptiveField

Draw = Callable[[int, int, int, torch.Generator], Tensor]
"""(channels, height, width, chance) -> an image (C, H, W)."""

IMAGES = 2
BROAD_PX = 256  # the other side of the images that are cut
COMMON = 0.9  # share of the variance that all channels have in common, about that of the colours of photos


@dataclass(frozen=True)
class Influence:
    """What cutting the halo changes, by side.

    Attributes:
        stride: of the network, in pixels.
        sides: above, below, left, right: at k the largest change in a row (or column) of scores that has k strides or more
            between itself and the cut: the root mean square over its pixels, the classes and the images, over the standard
            deviation of the scores (of a class over the pixels of whole images; root mean square of the classes).
    """

    stride: int
    sides: tuple[Tensor, ...]

    def radius(self, tolerance: float, most: Radius) -> Radius:
        """The fewest whole strides for each side whose change is at most half of the tolerance, and never more than `most`.

        Four sides change a score by more than one does: with errors of chance, by twice as much.
        """
        strides = [int((side <= tolerance / 2).logical_not().sum()) for side in self.sides]
        above, below, left, right = (min(count * self.stride, px) for count, px in zip(strides, most, strict=True))
        return above, below, left, right


def cut_radius(
    run: Run,
    field: ReceptiveField,
    tolerance: float,
    *,
    in_channels: int,
    device: str | torch.device = "cpu",
    memory: PassMemory | None = None,
    budget_bytes: int | None = None,
) -> Radius:
    """The halo above, below, left and right that tiles need for scores that are right but for a tolerance.

    A tolerance of 1e-3 means: where a tile ends, its scores differ from those of the whole image by a thousandth of how
    much the scores of a class differ from pixel to pixel (both root mean square); farther inside by less. Labels change
    only where two classes are that close. It is a mean over images like photos, not a bound: single scores may differ by
    several times as much, and on unusual images more.

    The images are random and the same for each call: normalised (mean 0, standard deviation 1), with the spectrum of photos
    (amplitudes fall as 1 / frequency). What the field holds is known, so the result is never more than `field.radius_px`;
    it is in whole strides, with which tiles stay aligned. It costs about eight passes over images of three radii x 256 px.
    """
    _, radius = _with_an_end(field)
    if tolerance <= 0:
        return radius

    def fits(height: int, width: int) -> bool:
        return memory is None or budget_bytes is None or memory(1, height, width) <= budget_bytes

    found = influence(run, field, in_channels=in_channels, device=device, fits=fits)
    return found.radius(tolerance, radius)


def _with_an_end(field: ReceptiveField) -> tuple[int, Radius]:
    """Stride and radius."""
    if not field.bounded or field.stride is None or field.radius_px is None:
        raise UsageError(
            "tolerance cuts the halo of a network whose receptive field has an end, and this one's has none (it looks at "
            "the whole image, or farther than was tried), so that every cut changes it. Use blended tiles: --blend gaussian."
        )
    return field.stride, field.radius_px


def influence(
    run: Run,
    field: ReceptiveField,
    *,
    in_channels: int,
    device: str | torch.device = "cpu",
    fits: Callable[[int, int], bool] = lambda height, width: True,
    images: int = IMAGES,
    broad_px: int = BROAD_PX,
    draw: Draw | None = None,
) -> Influence:
    """Measure what cuts change; see `cut_radius`."""
    stride, (above, below, left, right) = _with_an_end(field)
    generator = torch.Generator()

    def sides(before: int, after: int, turned: bool) -> Iterator[Tensor]:
        """For a cut after the first rows and one before the last: the largest change k strides or more away."""
        before, after = (-(-px // stride) * stride for px in (before, after))
        # Each part is as long as a field, as networks that pad what is shorter would see something else.
        length = before + after + stride + max(before, after)
        broad = _breadth(length, stride, broad_px, fits)
        changed = [torch.zeros(before + stride), torch.zeros(after + stride)]  # by distance from the cut
        variance = torch.zeros(())
        generator.manual_seed(0)
        for _ in range(images):
            image = (draw or like_a_photo)(in_channels, length, broad, generator).to(device)
            whole = _scores(run, image, turned)  # (K, length, broad)
            variance = variance + whole.var((1, 2), correction=0).mean().cpu()
            below_cut = _scores(run, image[:, before:], turned) - whole[:, before:]
            above_cut = (_scores(run, image[:, : length - after], turned) - whole[:, : length - after]).flip(1)
            for near, change in zip(changed, (below_cut, above_cut), strict=True):
                near += change[:, : len(near)].square().mean((0, 2)).cpu()
        for near in changed:
            rows = (near / variance).nan_to_num(0.0 if variance == 0 else torch.inf).sqrt()
            yield rows.view(-1, stride).amax(1).flip(0).cummax(0).values.flip(0)

    return Influence(stride, (*sides(above, below, False), *sides(left, right, True)))


def _breadth(length: int, stride: int, broad_px: int, fits: Callable[[int, int], bool]) -> int:
    """Of the images: whole strides, as many as wished if the memory allows it."""
    strides = -(-broad_px // stride)
    while not fits(length, strides * stride):
        if strides == 1:
            raise UsageError(
                f"tolerance: {length} x {stride} px must go through the network at once to measure how far it looks, which "
                "is more than the memory that is allowed. Give more --memory."
            )
        strides //= 2
    return strides * stride


def _scores(run: Run, image: Tensor, turned: bool) -> Tensor:
    """(K, H, W); where the images are `turned`, the network sees rows as columns."""
    # Numbers of 10 bits (TF32), which a GPU may take for float32, would change more than the cut.
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        x = (image.transpose(1, 2) if turned else image)[None]
        scores = run(x.contiguous(memory_format=torch.channels_last))[0].float()
    return scores.transpose(1, 2) if turned else scores


def like_a_photo(channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """A random image (C, H, W) with the spectrum of photos, mean 0 and standard deviation 1."""
    rows = torch.fft.fftfreq(height)[:, None]
    columns = torch.fft.rfftfreq(width)
    frequency = torch.hypot(rows, columns).clamp(min=1 / max(height, width, 2))
    noise = torch.randn(channels + 1, height, width, generator=generator)
    noise = COMMON**0.5 * noise[:1] + (1 - COMMON) ** 0.5 * noise[1:]
    image = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(height, width))
    image = image - image.mean((1, 2), keepdim=True)
    return image / image.std((1, 2), correction=0, keepdim=True).clamp(min=1e-6)
