import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelwise.ops.resize import bilinear_kernel, crop_like, pad_to_multiple, upsample_to


@settings(deadline=None, max_examples=50)
@given(height=st.integers(1, 70), width=st.integers(1, 70), multiple=st.integers(1, 33), times=st.integers(1, 4))
def test_padding_gives_whole_multiples_and_cropping_undoes_it(height, width, multiple, times):
    image = torch.randn(1, 2, height, width)
    padded = pad_to_multiple(image, multiple, at_least=multiple * times)
    for before, after in zip((height, width), padded.shape[-2:], strict=True):
        assert after % multiple == 0
        assert after == max(-(-before // multiple) * multiple, multiple * times)
    assert torch.equal(crop_like(padded, image), image)
    # What was added repeats the border.
    assert torch.equal(padded[..., height:, :width], image[..., -1:, :].expand(-1, -1, padded.shape[-2] - height, -1))
    assert torch.equal(padded[..., width:], padded[..., width - 1 : width].expand(-1, -1, -1, padded.shape[-1] - width))


def test_an_image_that_fits_is_not_copied():
    image = torch.zeros(1, 3, 64, 32)
    assert pad_to_multiple(image, 32) is image
    assert upsample_to(image, (64, 32)) is image


def test_upsampling_keeps_a_constant_and_the_mean_of_a_ramp():
    assert torch.allclose(upsample_to(torch.full((1, 1, 3, 5), 7.0), (12, 20)), torch.tensor(7.0))
    ramp = torch.arange(8.0).expand(1, 1, 2, 8)
    assert upsample_to(ramp, torch.Size((4, 16))).mean() == pytest.approx(3.5)


def test_the_kernel_of_a_factor_of_two_is_that_of_the_fcn_paper():
    kernel = bilinear_kernel(4)
    assert kernel[1].tolist() == pytest.approx([0.1875, 0.5625, 0.5625, 0.1875])  # .75 times .25 .75 .75 .25
    assert (kernel[1] / 0.75).tolist() == pytest.approx([0.25, 0.75, 0.75, 0.25])
    assert torch.equal(kernel, kernel.T) and torch.equal(kernel, kernel.flip(0))


def test_the_kernel_of_odd_size_has_its_peak_in_the_middle():
    assert bilinear_kernel(3)[1].tolist() == pytest.approx([0.5, 1.0, 0.5])


@pytest.mark.parametrize(("size", "stride", "padding"), [(4, 2, 1), (8, 4, 2), (16, 8, 4)])
def test_a_transposed_convolution_with_that_kernel_interpolates_bilinearly(size, stride, padding):
    torch.manual_seed(0)
    features = torch.randn(1, 1, 6, 7)
    learnt = F.conv_transpose2d(features, bilinear_kernel(size)[None, None], stride=stride, padding=padding)
    fixed = F.interpolate(features, scale_factor=stride, mode="bilinear", align_corners=False)
    assert learnt.shape == fixed.shape
    inside = (
        ...,
        slice(stride, -stride),
        slice(stride, -stride),
    )  # outside the image one takes 0, the other the border
    assert torch.allclose(learnt[inside], fixed[inside], atol=1e-6)
