import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export

from pixelwise.ops.resize import mirror_pad


@pytest.mark.parametrize("size", [(5, 7), (2, 3), (6, 6)])
def test_narrow_margins_are_those_of_reflect_padding(size):
    image = torch.randn(2, 3, *size)
    margins = (size[1] - 1, 1, 0, size[0] - 1)
    assert torch.equal(mirror_pad(image, *margins), F.pad(image, margins, mode="reflect"))


def mirrored(position, size):
    """Walk from the image to `position` and turn round at each border."""
    place, step = 0, 1
    for _ in range(abs(position)):
        if size == 1:
            return 0
        if not 0 <= place + step < size:
            step = -step
        place += step
    return place


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_wide_margins_mirror_again_and_again(size):
    # to the left of the image the walk is that to the right: pixel -k is pixel k
    image = torch.arange(size * size).reshape(1, 1, size, size)
    padded = mirror_pad(image, 17, 4, 0, 13)
    rows = torch.tensor([mirrored(position, size) for position in range(size + 13)])
    columns = torch.tensor([mirrored(position, size) for position in range(-17, size + 4)])
    assert torch.equal(padded[0, 0], image[0, 0][rows][:, columns])


class PadByHeight(nn.Module):
    def forward(self, image):
        margin = 2 * image.shape[-2] + 3
        return mirror_pad(image, margin, 1, image.shape[-1], 92)


def test_symbolic_sizes_and_margins_are_exported():
    sizes = {"image": {2: Dim("height", min=2, max=512), 3: Dim("width", min=2, max=512)}}
    exported = export(PadByHeight(), (torch.randn(1, 1, 20, 30),), dynamic_shapes=sizes).module()
    for size in [(20, 30), (2, 9), (33, 2)]:
        image = torch.randn(1, 1, *size)
        assert torch.equal(exported(image), PadByHeight()(image))


def test_gradients_come_back_to_the_pixels_that_were_mirrored():
    image = torch.randn(1, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    mirror_pad(image, 2, 1, 0, 0).sum().backward()
    assert image.grad.tolist() == [[[[1.0, 3.0, 2.0]]]]
    assert torch.autograd.gradcheck(lambda x: mirror_pad(x, 5, 0, 3, 1), (image,))
