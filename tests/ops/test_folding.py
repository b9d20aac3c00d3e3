"""A folded network gives the scores of the network as it is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixelwise.models import create_model, list_models
from pixelwise.ops.folding import FoldedConv2d, fold
from pixelwise.ops.streaming import WindowedNetwork


def trained(model: nn.Module) -> nn.Module:
    """With statistics that are not those of the start, so that a norm that is left out shows."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.5, generator=generator)
    return model.eval().requires_grad_(False)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)


def norms_of(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name", list_models())
def test_the_scores_of_every_network_stay_in_float32_and_are_near_in_bfloat16(name: str) -> None:
    model = trained(create_model(name, tiny=True, num_classes=3))
    before = copy.deepcopy(model.state_dict())
    single, half = (fold(model, noise(1, 3, 64, 64), dtype) for dtype in (torch.float32, torch.bfloat16))
    for size in ((33, 47), (64, 64)):
        image = noise(2, 3, *size)
        with torch.inference_mode():
            exact, found, near = model(image), single(image), half(image)
        assert found.dtype == near.dtype == torch.float32
        spread = float(exact.std()) + 1e-6
        assert float((found - exact).abs().max()) <= 1e-4 * spread + 1e-6
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            usual = model(image).float()  # which may be far, where rounding moves the maximum of a pooling
        far, wide = (float((scores - exact).abs().mean()) for scores in (near, usual))
        assert far <= 2 * wide + 5e-3 * spread
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Branches(nn.Module):
    """Norms of which some may not be folded: what is before them is looked at elsewhere, or runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.seen = nn.BatchNorm2d(4)  # its convolution's map is used again
        self.twice = nn.Conv2d(4, 4, 1)
        self.shared = nn.BatchNorm2d(4)
        self.changed = nn.Conv2d(4, 4, 1)
        self.of_changed = nn.BatchNorm2d(4)  # behind an in-place sum
        self.by_batch = nn.Conv2d(4, 4, 1)
        self.of_batch = nn.BatchNorm2d(4, track_running_stats=False)
        self.dropped = nn.Conv2d(4, 4, 1)
        self.dropout = nn.Dropout(0.5)
        self.of_dropped = nn.BatchNorm2d(4)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(4, 4, 5, padding="same")
        self.relu = nn.ReLU(inplace=True)  # runs twice, so neither call is folded
        self.grouped = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False)
        self.of_grouped = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 5, 3, padding=1, bias=False)
        self.of_up = nn.BatchNorm2d(5)  # the one that is folded
        self.act = nn.LeakyReLU(0.2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.first(image)
        x = self.seen(x) + x
        x = self.shared(self.twice(x)) + self.shared(self.twice(F.relu(x)))
        y = self.changed(x)
        y += x
        x = self.of_batch(self.by_batch(self.relu(self.of_changed(y))))
        x = self.relu(self.of_dropped(self.dropout(self.dropped(x))))
        x = self.of_grouped(self.grouped(self.same(self.mirrored(x))))
        return self.act(self.of_up(self.up(x)))


def test_only_what_nothing_else_looks_at_is_folded() -> None:
    torch.manual_seed(0)
    model, image = trained(Branches()), noise(2, 3, 20, 24)
    folded = fold(model, noise(1, 3, 64, 64), torch.float32)
    with torch.inference_mode():
        assert torch.allclose(folded(image), model(image), atol=1e-5)
    assert norms_of(folded) == norms_of(model) - 1
    assert isinstance(folded.model.act, nn.Identity) and isinstance(folded.model.relu, nn.ReLU)
    assert not isinstance(folded.model.mirrored, FoldedConv2d) and not isinstance(folded.model.twice, FoldedConv2d)


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "torchvision/resnet18", "mobilenetv3_small_050"])
def test_all_norms_of_the_usual_encoders_are_folded(backbone: str) -> None:
    model = trained(create_model("encoder_decoder", num_classes=3, backbone=backbone, widths=(8, 8)))
    folded = fold(model, noise(1, 3, 64, 64), torch.float32)
    assert norms_of(model) > 15 and norms_of(folded) == 0
    image = noise(1, 3, 65, 70)
    with torch.inference_mode():
        exact, found = model(image), folded(image)
    assert float((found - exact).abs().max()) <= 1e-3 * float(exact.std())


@pytest.mark.parametrize("name", ["unet", "linknet", "segnet"])
def test_stripes_of_a_folded_network_are_its_whole_image(name: str) -> None:
    model = trained(create_model(name, tiny=True, num_classes=3))
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        folded, image = fold(model, noise(1, 3, 64, 64), dtype), noise(1, 3, 150, 90)
        network = WindowedNetwork(folded, 150, 90, in_channels=3)

        def read(top: int, left: int, height: int, width: int, image: Tensor = image) -> Tensor:
            return image[0, :, top : top + height, left : left + width]

        with torch.inference_mode():
            whole = folded(image)[0]
            rows = [rows for _, rows in network.stripes(read, top=0, left=0, height=150, width=90, stripe_px=32)]
        assert float((torch.cat(rows, dim=1) - whole).abs().max()) <= bound * float(whole.std())


def test_the_network_itself_stays_trainable_and_gets_no_hooks() -> None:
    model = create_model("unet", tiny=True, num_classes=3, batch_norm=True).eval()
    fold(model, noise(1, 3, 64, 64), torch.bfloat16)
    assert all(item.requires_grad for item in model.parameters())
    assert not any(item._forward_hooks or item._forward_pre_hooks for item in model.modules())


def test_what_has_hooks_or_an_own_dropout_behind_its_norm_is_not_folded() -> None:
    from timm.layers import BatchNormAct2d

    seen = []
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), BatchNormAct2d(4, drop_layer=nn.Dropout2d)
    ).eval()
    model[0].register_forward_hook(lambda _module, _args, out: seen.append(out))
    folded, image = fold(model, noise(1, 3, 64, 64), torch.float32), noise(1, 3, 9, 8)
    seen.clear()
    with torch.inference_mode():
        assert torch.allclose(folded(image), model(image), atol=1e-6)
    assert len(seen) == 2 and norms_of(folded) == 2
