"""Windows around single pixels, drawn evenly by class: what a patch classifier is trained on."""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from pixelwise.data.labels import IGNORE_INDEX
from pixelwise.ops.mirror import mirror_crop


class RandomWindow(v2.Transform):
    """The window around a pixel of a class that is drawn evenly from the classes of the mask, and that pixel's class.

    So each class of an image is seen as often as any other, however few its pixels (Ciresan et al., NIPS 2012, draw as many
    windows of one class as of the other). Outside the image the window shows its mirror image. Of a mask that is all void
    any pixel is drawn, and its label is void.

    The window of row i begins at row i - window_px // 2, columns alike, as in `pixelwise.models.patch_classifier`. A flip
    keeps the centre of an odd window; that of an even one moves by a pixel.

    Args:
        window_px: side of the window in pixels, of any size.

    Example:
        >>> image = tv_tensors.Image(torch.zeros(3, 40, 60, dtype=torch.uint8))
        >>> mask = tv_tensors.Mask(torch.ones(40, 60, dtype=torch.uint8))
        >>> window, label = RandomWindow(65)(image, mask)
        >>> tuple(window.shape), label.tolist()
        ((3, 65, 65), [[1]])
    """

    def __init__(self, window_px: int) -> None:
        super().__init__()
        self.window_px = window_px

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(item for item in flat_inputs if type(item) is tv_tensors.Mask)
        row, column = draw_pixel(mask.as_subclass(Tensor))
        return {"row": row, "column": column}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        row, column = params["row"], params["column"]
        plain = inpt.as_subclass(Tensor)
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(plain[..., row : row + 1, column : column + 1].clone(), like=inpt)
        before = self.window_px // 2
        return tv_tensors.Image(mirror_crop(plain, row - before, column - before, self.window_px, self.window_px))


def draw_pixel(mask: Tensor) -> tuple[int, int]:
    """Row and column of a pixel of a class drawn evenly from those in `mask`, uint8 (H, W); of any pixel if all is void.

    Example:
        >>> draw_pixel(torch.tensor([[255, 255], [255, 3]], dtype=torch.uint8))
        (1, 1)
    """
    cells = mask.flatten()
    classes = torch.bincount(cells, minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX].nonzero().flatten()
    wanted = classes[torch.randint(len(classes), ())] if len(classes) else IGNORE_INDEX
    places = (cells == wanted).nonzero().flatten()
    return divmod(int(places[torch.randint(len(places), ())]), mask.shape[-1])
