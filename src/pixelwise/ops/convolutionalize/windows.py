"""What the head of a fully convolutional classifier computes with: pooling over windows, and cells as a batch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.ops.convolutionalize.phases import Spread


class WindowPool(nn.Module):
    """The mean or the maximum over every window of a map, at stride 1; the cells of a window are `dilation` apart.

    Example:
        >>> WindowPool("mean", (2, 2))(torch.arange(9.0).reshape(1, 1, 3, 3))
        tensor([[[[2., 3.],
                  [5., 6.]]]])
    """

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

    Args:
        weight: (O, C, a, b), for a x b averages.
        bias: (O,) or None.
        window: rows and columns of the window that is averaged to a x b cells.
        dilation: cells between neighbours of a window.

    Example:
        >>> conv = PooledConv2d(nn.Parameter(torch.ones(1, 1, 2, 2)), None, (4, 4))
        >>> conv(torch.arange(16.0).reshape(1, 1, 4, 4)).item()  # 4 averages, summed
        30.0
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
    """The cells of a map (N, C, h, w) as a batch (N * h * w, *shape), their channels in the given order.

    Example:
        >>> cells_of(torch.arange(4.0).reshape(1, 2, 1, 2), (2,))
        tensor([[0., 2.],
                [1., 3.]])
    """
    cells = x.permute(0, 2, 3, 1).flatten(0, 2)  # (N * h * w, C)
    cells = cells if order is None else cells[:, torch.as_tensor(order, device=x.device)]
    return cells.reshape(-1, *shape)


def map_of(cells: Tensor, like: Tensor) -> Tensor:
    """A batch of cells (N * h * w, ...) as a map (N, C', h, w), for the map (N, C, h, w) that `cells_of` took apart.

    Example:
        >>> like = torch.zeros(1, 3, 1, 2)
        >>> tuple(map_of(torch.zeros(2, 5), like).shape)
        (1, 5, 1, 2)
    """
    return cells.reshape(like.shape[0], like.shape[2], like.shape[3], -1).permute(0, 3, 1, 2)


def require_size(image: Tensor, least: Sequence[int]) -> Tensor:
    """The image (N, C, H, W), if it has the channels of `least` = (C, H, W) and is at least that high and wide.

    Raises:
        UsageError: it is smaller than the classifier's window, or of another shape.

    Example:
        >>> require_size(torch.zeros(1, 3, 100, 300), (3, 224, 224))
        Traceback (most recent call last):
            ...
        pixelwise.errors.UsageError: the image of 100 x 300 px (height x width) is smaller than the classifier's window of 224 x 224 px. Pad or enlarge it.
    """  # noqa: E501
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

    Example:
        >>> tuple(whole_windows(torch.zeros(1, 5, 3, 9), torch.zeros(1, 3, 255, 480), (224, 224), 32).shape)
        (1, 5, 1, 9)
    """
    rows, columns = ((length - own) // stride + 1 for length, own in zip(image.shape[2:], window, strict=True))
    return scores[:, :, :rows, :columns]
