"""What the head of a fully convolutional classifier computes with: pooling over windows, and cells as a batch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.ops.convolutionalize.phases import Spread


class WindowPool(nn.Module):
    """The mean or the maximum over every window of a map, at stride 1; the cells of a window are `dilation` apart."""

    def __init__(self, kind: str, window: tuple[int, int], dilation: int = 1) -> None:
        super().__init__()
        self.kind, self.window, self.dilation = kind, window, dilation

    def forward(self, x: Tensor) -> Tensor:
        return Spread(spacing=self.dilation, least=self.window).run(self._pool, x)  # (N, C, h, w)

    def _pool(self, x: Tensor) -> Tensor:
        if self.kind == "max":
            return F.max_pool2d(x, self.window, stride=1)
        return F.avg_pool2d(x, self.window, stride=1, divisor_override=1 if self.kind == "sum" else None)

    def extra_repr(self) -> str:
        return f"{self.kind}, window={self.window}, dilation={self.dilation}"


class PooledConv2d(nn.Module):
    """A convolution over windows that are averaged to fewer cells first, as a linear layer after adaptive pooling is.

    The weight (O, C, a, b) is for a x b averages of a window, whose cells are `dilation` apart.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, window: tuple[int, int], dilation: int = 1
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.dilation = weight, bias, dilation
        self.rows: Tensor
        self.columns: Tensor
        for name, bins, length in zip(("rows", "columns"), weight.shape[2:], window, strict=True):
            shares = F.adaptive_avg_pool1d(torch.eye(length)[:, None], bins)[:, 0].T  # (bins, length)
            self.register_buffer(name, shares.to(weight.device, weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.einsum("ocab,ah,bw->ochw", self.weight, self.rows, self.columns)
        return F.conv2d(x, kernel, self.bias, dilation=self.dilation)  # (N, O, h, w)


def cells_of(x: Tensor, shape: Sequence[int], order: Sequence[int] | None = None) -> Tensor:
    """The cells of a map (N, C, h, w) as a batch (N * h * w, *shape), their channels in the given order."""
    cells = x.permute(0, 2, 3, 1).flatten(0, 2)  # (N * h * w, C)
    cells = cells if order is None else cells[:, torch.as_tensor(order, device=x.device)]
    return cells.reshape(-1, *shape)


def map_of(cells: Tensor, like: Tensor) -> Tensor:
    """A batch of cells (N * h * w, ...) as a map (N, C', h, w), for the map (N, C, h, w) that `cells_of` took apart."""
    return cells.reshape(like.shape[0], like.shape[2], like.shape[3], -1).permute(0, 3, 1, 2)


def require_size(image: Tensor, least: Sequence[int]) -> Tensor:
    """The image (N, C, H, W), if it has the channels of `least` = (C, H, W) and is at least that high and wide.

    Raises:
        UsageError: it is smaller than the classifier's window, or of another shape.
    """
    channels, height, width = least
    if image.ndim != 4 or image.shape[1] != channels:
        raise UsageError(f"the image must have shape (N, {channels}, H, W), not {tuple(image.shape)}.")
    if image.shape[2] < height or image.shape[3] < width:
        raise UsageError(
            f"the image of {image.shape[2]} x {image.shape[3]} px (height x width) is smaller than the classifier's window "
            f"of {height} x {width} px. Pad or enlarge it."
        )
    return image


def whole_windows(scores: Tensor, image: Tensor, window: Sequence[int], stride: int) -> Tensor:
    """The scores (N, K, h, w) of those windows of (height, width) pixels, `stride` apart, that lie within the image.

    Padding and rounding let a network have a few cells more.
    """
    rows, columns = ((length - own) // stride + 1 for length, own in zip(image.shape[2:], window, strict=True))
    return scores[:, :, :rows, :columns]
