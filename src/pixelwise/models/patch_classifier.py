"""The patch classifier: a network names the class of a window's centre pixel, and labels an image window by window.

Paper:  Ciresan, Giusti, Gambardella, Schmidhuber. Deep Neural Networks Segment Neuronal Membranes in Electron Microscopy
        Images. NIPS 2012. `PatchClassifier.slide` is that network at work; `forward` gives the same scores in one pass:
        Giusti, Ciresan, Masci, Gambardella, Schmidhuber. Fast Image Scanning with Deep Max-Pooling Convolutional Neural
        Networks. ICIP 2013 (arXiv:1302.1700), here with dilations for their fragments, which are the same numbers.
Differs from the paper: the paper's table of layers is not restated; the default is a network of its kind (four
        convolutions, each with 2x2 max pooling, then two fully connected layers, on windows of 65 px). Batch norm follows
        each convolution (`batch_norm=False` leaves it out), the non-linearity is the ReLU. One network for any number of
        classes, without the paper's average of several, foveation of the windows and calibration of the probabilities.
Shapes: N batch, C channels, K classes, H W image size.

Centre rule: the window of pixel (i, j) covers rows i - window // 2 ... i - window // 2 + window - 1, columns alike. So the
pixel is the middle of an odd window, and of an even one the lower right of the four middle pixels. Outside the image
windows show its reflection.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.errors import UsageError
from pixelwise.models.registry import check_fields, register_model
from pixelwise.ops.pooling import max_pool_dense
from pixelwise.ops.resize import crop_like, mirror_pad, upsample_to


@dataclass(frozen=True, kw_only=True)
class PatchClassifierConfig:
    """The fields of a patch classifier; stage i is a convolution of `widths[i]` and `kernels[i]`, pooled by `pools[i]`."""

    num_classes: int = 2
    in_channels: int = 3
    window: int = 65  # side of what it sees, in pixels
    widths: tuple[int, ...] = (48, 48, 48, 48)
    kernels: tuple[int, ...] = (4, 4, 5, 4)
    pools: tuple[int, ...] = (2, 2, 2, 2)  # kernel and stride of the max pooling; 1 for none
    hidden: int = 200  # units of the first fully connected layer
    batch_norm: bool = True

    def __post_init__(self) -> None:
        for key in ("widths", "kernels", "pools"):
            values = getattr(self, key)
            if not values or min(values) < 1 or len(values) != len(self.widths):
                raise UsageError(
                    f"patch_classifier: {key} must be positive numbers, one for each stage ({len(self.widths)} by widths), "
                    f"not {values}."
                )
        check_fields("patch_classifier", self, "hidden")
        if self.window < self.seen_px(1):
            raise UsageError(
                f"patch_classifier: window must be at least {self.seen_px(1)} px for kernels {self.kernels} and pools "
                f"{self.pools}, not {self.window}. Smaller kernels or fewer stages see less."
            )

    @property
    def last_side(self) -> int:
        """Side of the map that the fully connected layers take, in cells."""
        side = self.window
        for kernel, pool in zip(self.kernels, self.pools, strict=True):
            side = (side - kernel + 1) // pool
        return side

    def seen_px(self, cells: int) -> int:
        """Side of the part of the image that `cells` x `cells` of the last map depend on.

        Pooling leaves out a remainder, so this is `window` or a little less for `last_side` cells.
        """
        for kernel, pool in zip(self.kernels[::-1], self.pools[::-1], strict=True):
            cells = cells * pool + kernel - 1
        return cells


class PatchClassifier(nn.Module):
    """Classifies windows (`classify`), images window by window (`slide`), and images in one pass (`forward`).

    Attributes:
        window: side of the windows in pixels.
    """

    stride = 1

    def __init__(self, config: PatchClassifierConfig) -> None:
        super().__init__()
        self.window, self.pools = config.window, config.pools
        self.seen_px = config.seen_px(config.last_side)
        channels = pairwise((config.in_channels, *config.widths))
        self.convs = nn.ModuleList(
            nn.Conv2d(before, width, kernel, bias=not config.batch_norm)
            for (before, width), kernel in zip(channels, config.kernels, strict=True)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(width) if config.batch_norm else nn.Identity() for width in config.widths
        )
        # The fully connected layers, as convolutions: over the whole last map, then over 1x1.
        self.hidden = nn.Conv2d(config.widths[-1], config.hidden, config.last_side)
        self.score = nn.Conv2d(config.hidden, config.num_classes, 1)
        self.apply(_init_he)

    def forward(self, image: Tensor) -> Tensor:
        before = self.window // 2
        after = self.seen_px - 1 - before
        x = mirror_pad(image, before, after, before, after)  # (N, C, H + 64, W + 64)
        dilation = 1  # the cells that a window sees are as far apart as poolings would have moved them
        for conv, norm, pool in zip(self.convs, self.norms, self.pools, strict=True):
            x = F.conv2d(x, conv.weight, conv.bias, dilation=dilation)  # type: ignore[arg-type]
            x = F.relu(norm(x))
            x = max_pool_dense(x, pool, dilation)  # (N, 48, H + 60, W + 60), ... + 52, ... + 28, (N, 48, H, W)
            dilation *= pool
        x = F.relu(F.conv2d(x, self.hidden.weight, self.hidden.bias, dilation=dilation))
        return self.score(x)  # (N, K, H, W)

    def classify(self, patches: Tensor) -> Tensor:
        """Logits of the centre pixels of windows, (N, C, window, window) -> (N, K).

        Raises:
            UsageError: the patches have another size.
        """
        if patches.shape[-2:] != (self.window, self.window):
            raise UsageError(
                f"patch_classifier: patches must be {self.window} x {self.window} px (window), "
                f"not {patches.shape[-2]} x {patches.shape[-1]}."
            )
        x = patches
        for conv, norm, pool in zip(self.convs, self.norms, self.pools, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), pool)  # (N, 48, 31, 31), ... 14, ... 5, (N, 48, 1, 1)
        return self.score(F.relu(self.hidden(x))).flatten(1)  # (N, K)

    @torch.no_grad()
    def slide(self, image: Tensor, stride: int = 1, batch: int = 32) -> Tensor:
        """Logits of an image the naive way: a window of its own for each pixel, without gradients.

        Args:
            image: (N, C, H, W), any H, W >= 1.
            stride: 1 classifies every pixel; s one in each s x s cells, near the cell's middle, between which the logits are
                interpolated bilinearly: s * s times cheaper, and blind to what is finer.
            batch: windows at a time.

        Returns:
            (N, K, H, W); with stride 1 and in eval mode what `forward` gives.

        Raises:
            UsageError: `stride` or `batch` is less than 1.
        """
        if stride < 1 or batch < 1:
            raise UsageError(f"patch_classifier: stride and batch must be at least 1, not {stride} and {batch}.")
        before = self.window // 2
        after = self.window - 1 - before
        padded = mirror_pad(image, before, after, before, after)
        windows = padded.unfold(2, self.window, 1).unfold(3, self.window, 1)  # (N, C, H, W, window, window), a view
        windows = windows.movedim(1, 3)
        (n, height, width), device = windows.shape[:3], image.device
        rows, columns = (
            torch.arange(0, length, stride, device=device).add(stride // 2).clamp(max=length - 1)
            for length in (height, width)
        )
        places = torch.cartesian_prod(torch.arange(n, device=device), rows, columns)
        logits = torch.cat([self.classify(windows[part.unbind(1)]) for part in places.split(batch)])
        grid = logits.reshape(n, len(rows), len(columns), -1).movedim(-1, 1)  # (N, K, H/s, W/s), rounded up
        return crop_like(upsample_to(grid, (len(rows) * stride, len(columns) * stride)), image)  # (N, K, H, W)


def _init_he(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


PAPER = "Ciresan, Giusti, Gambardella, Schmidhuber. Deep Neural Networks Segment Neuronal Membranes. NIPS 2012"
TINY = {"widths": (6, 6, 6, 6), "hidden": 12}
register_model("patch_classifier", PatchClassifier, PatchClassifierConfig(), paper=PAPER, tiny=TINY)
