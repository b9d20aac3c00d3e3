"""A quantised network gives nearly the scores of the folded one, whichever way the image takes through it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.models import create_model
from pixelwise.ops import quantization
from pixelwise.ops.folding import Folded, fold
from pixelwise.ops.quantization import (
    Quantized,
    QuantizedConv2d,
    best_range,
    calibrated,
    has_int8,
    levels_of,
    quantizable,
    quantize,
    quantized,
)
from pixelwise.ops.streaming import WindowedNetwork

pytestmark = pytest.mark.skipif(not has_int8(), reason="this CPU has no instructions for 8 bits")


@pytest.fixture
def all_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks are quantised too."""
    monkeypatch.setattr(quantization, "LEAST_WORK", 0)


def noise(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.contiguous(memory_format=torch.channels_last)


def made(model: nn.Module) -> tuple[Folded, Quantized]:
    folded = fold(model.eval(), torch.rand(1, 3, 64, 64), torch.bfloat16)
    ranges = calibrated(folded, [noise(1, 3, 64, 64, seed=seed) for seed in (1, 2)], in_channels=3)
    return folded, quantize(folded, ranges, in_channels=3)


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "unet":
        return create_model("unet", num_classes=3, widths=(16, 24), batch_norm=True)
    return create_model("encoder_decoder", num_classes=3, backbone=name, widths=(16, 16))


NETWORKS = ["unet", "tf_efficientnet_lite0", "resnet10t"]


@pytest.mark.usefixtures("all_convolutions")
@pytest.mark.parametrize("name", NETWORKS)
def test_scores_are_near_those_of_the_folded_network_at_any_size(name: str) -> None:
    folded, found = made(network(name))
    assert sum(isinstance(module, QuantizedConv2d) for module in found.modules()) >= 4
    assert not any(isinstance(module, QuantizedConv2d) for module in folded.modules())
    for size in ((33, 47), (64, 64)):
        image = noise(2, 3, *size)
        with torch.inference_mode():
            exact, near = folded(image), found(image)
        assert near.dtype == torch.float32 and near.shape == exact.shape
        assert 0 < float((near - exact).square().mean().sqrt()) < 0.3 * float(exact.std())


@pytest.mark.usefixtures("all_convolutions")
@pytest.mark.parametrize("name", NETWORKS)
def test_stripes_of_a_quantised_network_are_its_whole_image(name: str) -> None:
    _, found = made(network(name))
    image = noise(1, 3, 150, 90)
    windows = WindowedNetwork(found, 150, 90, in_channels=3)
    with torch.inference_mode():
        whole = found(image)[0]
        rows = [
            rows
            for _, rows in windows.stripes(
                lambda top, left, height, width: image[0, :, top : top + height, left : left + width],
                top=0, left=0, height=150, width=90, stripe_px=32,
            )
        ]  # fmt: skip
    assert float((torch.cat(rows, dim=1) - whole).abs().max()) <= 0.03 * float(whole.std())


class Row(nn.Module):
    """Convolutions in a row, of which the first result is looked at once and the second twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.one = nn.Conv2d(16, 24, 3, padding=1)
        self.cap = nn.ReLU6()
        self.two = nn.Conv2d(24, 24, 3, padding=2, dilation=2, groups=24)
        self.three = nn.Conv2d(24, 16, 1, stride=2)
        self.score = nn.Conv2d(16, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.two(self.cap(self.one(self.first(image))))
        x = self.three(x) + x[:, :16, ::2, ::2]
        return F.interpolate(self.score(x), size=image.shape[-2:])


@pytest.mark.usefixtures("all_convolutions")
def test_what_one_convolution_alone_looks_at_is_handed_over_in_the_levels_of_a_simulation() -> None:
    torch.manual_seed(0)
    folded, found = made(Row())
    assert quantizable(folded, 3) == {"one": "two", "two": "", "three": ""}
    maps: dict[str, Tensor] = {}
    for name in ("one", "two", "three"):
        module = found.model.get_submodule(name)
        module.register_forward_hook(
            lambda _module, args, out, name=name: maps.update({name: out, f"of {name}": args[0]})
        )
    found(noise(1, 3, 20, 22))
    assert maps["one"].dtype == torch.uint8 and maps["one"] is maps["of two"] and maps["two"].dtype == torch.bfloat16
    for name, cap in (("one", 6.0), ("two", math.inf), ("three", math.inf)):
        conv, out = found.model.get_submodule(name), maps[name]
        assert isinstance(conv, QuantizedConv2d)
        scale, zero = conv.given
        x = maps[f"of {name}"]
        levels = x if x.dtype == torch.uint8 else (x.float() / scale + zero + 0.5).floor().clamp(0, 255)
        weight = conv.weight.double() * conv.weight_scale[:, None, None, None].double()
        geometry = (conv.stride, list(conv.padding), conv.dilation, conv.groups)
        exact = F.conv2d(
            (levels.double() - zero) * scale, weight, None if conv.bias is None else conv.bias.double(), *geometry
        )
        exact = exact.clamp(0, cap) if name == "one" else exact
        if out.dtype == torch.uint8:
            out_scale, out_zero = found.model.get_submodule("two").given  # type: ignore[misc]
            exact = (exact / out_scale + out_zero).round().clamp(0, 255)
            assert float((out.double() - exact).abs().max()) <= 1
        else:
            assert torch.allclose(out.double(), exact, rtol=2**-7, atol=1e-3)


def test_numbers_become_the_nearest_level_and_the_outermost_beyond() -> None:
    values = torch.tensor([-9.0, -1.0, -0.26, 0.0, 0.24, 0.26, 99.0])
    scale, zero = levels_of((-1.0, 126.5))
    assert (scale, zero) == (0.5, 2)
    assert quantized(values.reshape(1, 1, 1, 7), scale, zero).flatten().tolist() == [0, 0, 1, 2, 2, 3, 200]
    large = noise(1, 7, 250, 330)  # in several blocks
    exact = (large / 0.02 + 128.5).floor().clamp(0, 255)
    differ = (quantized(large, 0.02, 128) - exact).abs()
    assert float(differ.max()) <= 1 and float(differ.mean()) < 1e-4  # at the border of two levels float32 may round


def test_the_range_of_a_map_lets_go_of_outliers_and_holds_zero() -> None:
    numbers = noise(1, 1, 1000, 1000).flatten().abs()
    low, high = best_range(torch.cat([numbers, torch.tensor([12.0])]))
    assert low == 0 and 4 < high < 12
    assert best_range(torch.full((5,), 3.0))[0] == 0
    assert levels_of((0.0, 0.0)) == (1.0, 0)


@pytest.mark.usefixtures("all_convolutions")
@pytest.mark.parametrize("amiss", [math.nan, math.inf, 1e20])
def test_a_pixel_that_8_bits_cannot_hold_has_no_scores(amiss: float) -> None:
    _, found = made(Row())
    image = noise(2, 3, 20, 22)
    image[1, 2, 3, 4] = amiss
    assert found(image).isnan().nonzero().tolist() == [[1, 0, 3, 4], [1, 1, 3, 4]]


def test_rows_of_convolutions_with_too_little_work_stay_as_they_are() -> None:
    folded = fold(
        nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 16, 1), nn.Conv2d(16, 256, 3)).eval(),
        torch.rand(1, 3, 64, 64),
        torch.bfloat16,
    )
    # 16 and 16 / 64 * 2,304 multiply-adds for each number that the second is given, 2,304 for the third by itself
    assert quantizable(folded, 3) == {"2": ""}
