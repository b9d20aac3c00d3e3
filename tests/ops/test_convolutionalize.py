import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import nn

from pixelwise import convolutionalize
from pixelwise.errors import UsageError
from pixelwise.ops.convolutionalize.head import PooledConv2d, WindowPool

# Classifiers of both libraries, each at a small image size of its own choice; "dense" is a finer stride to try besides.
TORCHVISION = {
    "alexnet": (224, 8),
    "convnext_tiny": (64, 8),
    "densenet121": (64, 16),
    "efficientnet_b0": (64, 8),
    "efficientnet_v2_s": (64, None),
    "googlenet": (64, 8),
    "inception_v3": (96, 8),
    "mnasnet0_5": (64, 8),
    "mobilenet_v2": (64, 4),
    "mobilenet_v3_small": (64, 8),
    "regnet_y_400mf": (64, 8),
    "resnet18": (64, 2),
    "resnet50": (64, None),
    "resnext50_32x4d": (64, 16),
    "shufflenet_v2_x0_5": (64, 4),
    "squeezenet1_1": (64, 4),
    "swin_t": (64, None),
    "vgg11": (64, None),
    "vgg16_bn": (64, None),
}
TIMM = {
    "convnext_atto": (64, 8),
    "densenet121": (64, None),
    "dpn48b": (64, None),
    "ecaresnet26t": (64, 16),
    "ghostnet_050": (64, 16),
    "hrnet_w18_small": (64, None),
    "inception_v4": (96, None),
    "mobilenetv3_small_050": (64, 8),
    "nf_resnet26": (64, None),
    "regnetx_002": (64, 4),
    "repvgg_a0": (64, 8),
    "resnet18": (64, 8),
    "resnetv2_50": (64, None),
    "rexnet_100": (64, 8),
    "tf_efficientnet_lite0": (64, 4),
    "vgg11": (224, None),
}
ALL = {f"torchvision/{name}": sizes for name, sizes in TORCHVISION.items()} | {
    f"timm/{name}": sizes for name, sizes in TIMM.items()
}


COMPUTED = ("regnet_y_400mf", "swin_t")  # what these compute as they are built needs memory


def build(name):
    """With random weights, those of its norms included."""
    library, bare = name.split("/")
    extra = {"aux_logits": False, "init_weights": False} if bare in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if bare in COMPUTED else "meta"):  # random numbers are drawn once, below
        model = (
            timm.create_model(bare, num_classes=10)
            if library == "timm"
            else tv.get_model(bare, num_classes=10, **extra)
        )
    if bare not in COMPUTED:
        model = model.to_empty(device="cpu")
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            tensors = [*module.named_parameters(recurse=False)]
            tensors += [(key, tensor) for key, tensor in module.named_buffers(recurse=False) if "running" in key]
            for key, tensor in tensors:
                if tensor.ndim > 1:
                    tensor.uniform_(-1, 1, generator=draws).mul_((3 / tensor[0].numel()) ** 0.5)
                else:
                    tensor.uniform_(-0.2, 0.2, generator=draws).add_(float(key in ("weight", "running_var", "gamma")))
    return model.eval()


def assert_own_size(model, scorer, px):
    image = torch.randn(1, 3, px, px, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, scores = model(image), scorer(image)
    assert scores.shape == (1, 10, 1, 1)
    assert torch.isfinite(expected).all() and expected.abs().max() > 1e-3
    assert (scores[:, :, 0, 0] - expected).abs().max() <= 1e-4 * expected.abs().max()


def assert_same_weights(model, scorer):
    own, made = model.state_dict(), scorer.state_dict()
    used = {name: tensor for name, tensor in own.items() if name in made}
    assert set(made) <= set(own)
    assert set(own) - set(made) <= {name for name in own if "aux" in name}
    assert all(torch.equal(tensor.flatten(), made[name].flatten()) for name, tensor in used.items())


@pytest.mark.parametrize("name", ALL)
def test_on_an_image_of_the_own_size_the_scores_are_the_classifier_s(name):
    px, dense = ALL[name]
    model = build(name)
    scorer = convolutionalize(model, input_size=px)
    assert_own_size(model, scorer, px)
    assert_same_weights(model, scorer)
    stride = scorer.meta["stride"]
    rest = 0 if "hrnet" in name else 7  # it takes whole steps only, as it joins maps of several strides
    with torch.no_grad():
        larger = scorer(torch.randn(1, 3, px + stride + rest, px + rest))
    assert larger.shape == (1, 10, 2, 1)
    if dense is not None:
        finer = convolutionalize(model, input_size=px, dense=dense)
        assert finer.meta["stride"] == dense
        assert_own_size(model, finer, px)
        assert_same_weights(model, finer)
        with torch.no_grad():
            assert finer(torch.randn(1, 3, px + 19, px + 8)).shape == (1, 10, 19 // dense + 1, 8 // dense + 1)


def test_the_proof_covers_many_classifiers():
    assert len(ALL) >= 25


# --- classifiers without padding: every cell is the classifier on the window at that cell


class Functional(nn.Module):
    """Functions in place of modules, poolings of every kind, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, stride=2), nn.Conv2d(8, 8, 3)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x, scale=None, shift=True):
        x = (x - torch.tensor([0.1, 0.2, 0.3], dtype=x.dtype).view(1, 3, 1, 1)) if shift else x
        x = self.pool(F.relu(self.first(x)))
        x = F.avg_pool2d(F.relu(self.second(x)), 2)
        x = F.max_pool2d(self.third(x), 3, stride=2, ceil_mode=True)
        for _ in range(x.shape[1] - 7):  # a size that no image changes
            x = x * 1.5
        return self.fc(F.dropout(x.mean(3).mean(2), training=self.training))


class Branches(nn.Module):
    """Two branches of different depth, joined; the vector of averages and maxima goes through a norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 3, stride=2), nn.MaxPool2d(3, stride=2)
        self.last, self.norm, self.fc = nn.Conv2d(8, 6, 3), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.silu(self.last(torch.cat([self.left(x), self.right(x)], dim=1)))
        x = torch.cat([F.adaptive_avg_pool2d(x, 1), x.amax((2, 3), keepdim=True)], dim=1).flatten(1)
        return F.log_softmax(self.fc(self.norm(x)), dim=1)


class ChannelsLast(nn.Module):
    """Maps (N, H, W, C) that are flattened in this order."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 6, 3, stride=3), nn.LayerNorm(6), nn.Linear(6 * 4 * 5, 5)

    def forward(self, x):
        x = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return self.fc(torch.flatten(x.transpose(1, 2), 1))


class GlobalContext(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gate, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.conv(x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.fc(x.sum((2, 3)) / 7)


UNPADDED = {
    "flattened": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(), nn.Linear(8 * 3 * 3, 7), nn.ReLU(), nn.Linear(7, 5)),
        ),
        (18, 18),
        (1, 2, 4),
    ),
    "odd sizes": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 4), nn.ReLU(), nn.MaxPool2d(3, stride=2), nn.Conv2d(6, 8, 3), nn.AvgPool2d(2)),
            *(nn.Conv2d(8, 8, 2, stride=3), nn.Flatten(), nn.Linear(8 * 1 * 2, 5), nn.LogSoftmax(1)),
        ),
        (21, 33),
        (1, 2, 4, 12),
    ),
    "averaged": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 5)),
        ),
        (25, 25),
        (1, 2, 4),
    ),
    "a fixed average": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.AvgPool2d(7), nn.Conv2d(6, 5, 1), nn.Flatten())
        ),
        (15, 15),
        (1, 2),
    ),
    "functional": (Functional, (44, 44), (1, 8, 16)),
    "branches": (Branches, (16, 20), (1, 2)),
    "channels last": (ChannelsLast, (12, 15), (1, 3)),
}


def at_windows(model, image, window, stride):
    """The classifier on every window, cut out and passed alone."""
    rows, columns = ((length - own) // stride + 1 for length, own in zip(image.shape[2:], window, strict=True))
    cut = [
        image[:, :, y * stride : y * stride + window[0], x * stride : x * stride + window[1]]
        for y in range(rows)
        for x in range(columns)
    ]
    scores = model(torch.cat(cut))  # (rows * columns * N, K)
    return scores.reshape(rows, columns, len(image), -1).permute(2, 3, 0, 1)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", UNPADDED)
def test_without_padding_every_cell_is_the_classifier_on_its_window(name, dtype, bound):
    make, window, strides = UNPADDED[name]
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    image = torch.randn(2, 3, window[0] + 9, window[1] + 14, dtype=dtype)
    for dense in (False, True, *strides):
        scorer = convolutionalize(model, input_size=(3, *window), dense=dense)
        stride = scorer.meta["stride"]
        assert stride == {False: strides[-1], True: 1}.get(dense, dense)
        with torch.no_grad():
            expected, scores = at_windows(model, image, window, stride), scorer(image)
            assert scores.shape == expected.shape
            assert (scores - expected).abs().max() <= bound
            assert scorer(image[:, :, : window[0], : window[1]]).shape == (2, 5, 1, 1)


def test_context_of_the_whole_image_stays_that_and_is_exact_at_the_own_size():
    torch.manual_seed(0)
    model = GlobalContext().eval()
    image = torch.randn(1, 3, 20, 24)
    with torch.no_grad():
        scores = convolutionalize(model, input_size=12)(image)
        expected = at_windows(model, image, (12, 12), 1)
        own = convolutionalize(model, input_size=(3, 20, 24))(image)
        assert (scores - expected).abs().max() > 1e-3
        assert torch.allclose(own[:, :, 0, 0], model(image), atol=1e-6)


# --- the layers themselves


def test_vgg_16_on_a_map_of_22_x_22_cells_gives_16_x_16():
    with torch.device("meta"):
        model = tv.vgg16()
    scorer = convolutionalize(model)
    fc6, fc7, fc8 = (scorer.get_submodule(f"classifier.{index}") for index in (0, 3, 6))
    assert [tuple(layer.weight.shape) for layer in (fc6, fc7, fc8)] == [
        (4096, 512, 7, 7),
        (4096, 4096, 1, 1),
        (1000, 4096, 1, 1),
    ]
    assert all(isinstance(layer, nn.Conv2d) for layer in (fc6, fc7, fc8))
    assert fc6(torch.empty(1, 512, 22, 22, device="meta")).shape == (1, 4096, 16, 16)
    assert scorer(torch.empty(1, 3, 704, 704, device="meta")).shape == (1, 1000, 16, 16)
    assert sum(item.numel() for item in scorer.parameters()) == 138_357_544
    assert scorer.meta == {"input_size": (3, 224, 224), "stride": 32, "head": "window"}


def test_alexnet_s_window_is_6_x_6_and_its_weights_stay_where_they_are_in_memory():
    model = tv.alexnet(num_classes=10)
    scorer = convolutionalize(model)
    fc6 = scorer.get_submodule("classifier.1")
    assert fc6.weight.shape == (4096, 256, 6, 6)
    assert fc6.weight.data_ptr() == model.classifier[1].weight.data_ptr()
    assert scorer.get_parameter("features.0.weight") is model.features[0].weight


def test_a_resnet_pools_windows_of_7_x_7_cells():
    with torch.device("meta"):
        scorer = convolutionalize(tv.resnet50(), dense=8)
    pool = scorer.get_submodule("avgpool")
    assert isinstance(pool, WindowPool) and (pool.kind, pool.window, pool.dilation) == ("mean", (7, 7), 4)
    conv = scorer.get_submodule("layer4.1.conv2")
    assert (conv.stride, conv.dilation, conv.padding) == ((1, 1), (4, 4), (4, 4))
    assert scorer.get_submodule("layer2.0.conv2").stride == (2, 2)
    assert scorer(torch.empty(1, 3, 480, 360, device="meta")).shape == (1, 1000, 33, 18)


def test_the_classifier_is_left_as_it_is():
    model = tv.resnet18(num_classes=4)
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scorer = convolutionalize(model, input_size=64, dense=2)
    after = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    for name, (kind, settings) in before.items():
        assert kind is after[name][0]
        for key in ("stride", "dilation", "padding", "training", "forward"):
            assert settings.get(key) == after[name][1].get(key), (name, key)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert scorer.training and not convolutionalize(model.eval(), input_size=64).training


def test_a_scorer_can_be_trained_copied_and_saved():
    torch.manual_seed(0)
    model = UNPADDED["flattened"][0]()
    scorer = convolutionalize(model, input_size=18, dense=True)
    scorer(torch.randn(2, 3, 22, 20)).square().mean().backward()
    assert all(item.grad is not None and item.grad.abs().sum() > 0 for item in scorer.parameters())
    image = torch.randn(1, 3, 22, 20)
    twin = copy.deepcopy(scorer.eval())
    fresh = convolutionalize(UNPADDED["flattened"][0]().eval(), input_size=18, dense=True)
    assert not torch.equal(fresh(image), scorer(image))
    fresh.load_state_dict(scorer.state_dict())
    for other in (twin, fresh):
        assert torch.equal(other(image), scorer(image))
    assert twin.get_parameter("0.weight") is not scorer.get_parameter("0.weight")


def test_adaptive_pooling_that_is_no_identity_goes_into_the_kernel():
    model = build("torchvision/alexnet")
    scorer = convolutionalize(model, input_size=256)  # its last map has 7 x 7 cells and is averaged to 6 x 6
    conv = scorer.get_submodule("classifier.1")
    assert isinstance(conv, PooledConv2d) and conv.weight.shape == (4096, 256, 6, 6)
    assert_own_size(model, scorer, 256)


def test_a_head_that_joins_averages_and_maxima():
    model = timm.create_model("resnet10t", num_classes=10, global_pool="catavgmax").eval()
    assert_own_size(model, convolutionalize(model, input_size=64, dense=8), 64)


def test_cells_are_class_activation_maps():
    model = build("torchvision/resnet18")
    scorer = convolutionalize(model, input_size=64, head="cells", dense=8)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        cells = convolutionalize(model, input_size=64, head="cells")(image)
        assert cells.shape == (1, 10, 2, 2)
        assert torch.allclose(cells.mean((2, 3)), model(image), atol=1e-4)
        assert scorer(image).shape == (1, 10, 8, 8)
        assert scorer(image[:, :, :20, :33]).shape == (1, 10, 3, 5)  # smaller than the classifier's own size


# --- what cannot be converted


class Stubborn(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.fc, self.part = kind, nn.Conv2d(3, 4, 3), nn.Linear(4, 2), Part(kind)

    def forward(self, x):
        x = self.part(self.conv(x))
        if self.kind == "root" and x.mean() > 0:
            x = x * 2
        if self.kind == "size" and x.shape[-1] != 14:
            raise ValueError("16 px only")
        return self.fc(x.std((2, 3)) if self.kind == "std" else x.mean((2, 3)))


class Part(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return x * 2 if self.kind == "part" and x.mean() > 0 else x


class EvenMapsOnly(nn.Module):
    def forward(self, x):
        if x.shape[-1] % 2:
            raise ValueError("an even map is wanted")
        return F.max_pool2d(x, 2)


class TwoImages(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, left, right):
        return self.conv(left + right).mean((2, 3))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: tv.vit_b_16(), {}, r"encoder \(Encoder\).*one image size|encoder \(Encoder\).*own image size only"),
        (lambda: timm.create_model("vit_tiny_patch16_224"), {}, r"VisionTransformer.*pos_embed is made for one number"),
        (lambda: timm.create_model("swin_tiny_patch4_window7_224"), {}, r"patch_embed \(PatchEmbed\).*it refuses"),
        (lambda: timm.create_model("levit_128s"), {}, r"stages.0.blocks.0.attn.*works on all cells of the 14 x 14 map"),
        (lambda: timm.create_model("resnet50_clip"), {}, r"head \(AttentionPool2d\).*'cat'.*7 x 7 map"),
        (TwoImages, {}, r"classifier itself \(TwoImages\).*2 inputs \(left, right\), where one image is wanted"),
        (lambda: Stubborn("root"), {"input_size": 16}, r"itself \(Stubborn\).*branches on the content of the image\.$"),
        (lambda: Stubborn("part"), {"input_size": 16}, r"part \(Part\).*branches on the content of the image\.$"),
        (lambda: Stubborn("size"), {"input_size": 16}, r"itself \(Stubborn\).*branches on the size of the image"),
        (lambda: Stubborn("std"), {"input_size": 16}, r"itself \(Stubborn\).*'std' works on all cells of the 14 x 14"),
        (lambda: nn.Conv2d(3, 4, 1), {"input_size": 8}, r"no classifier: for images \(2, 3, 8, 8\) it gives \(2, 4, 8, 8\)"),
        (UNPADDED["flattened"][0], {"input_size": 30}, r"8 \(Linear\).*on images \(N, 3, 30, 30\).*pass input_size=PIXELS"),
        (lambda: tv.alexnet(), {"head": "cells"}, r"classifier.1 \(Linear\).*takes the whole 6 x 6 map.*head='window'"),
        (lambda: timm.create_model("hrnet_w18_small"), {"dense": 8}, r"fuse_layers.*Upsample.*strides before it cannot be"),
        (lambda: tv.resnet18(), {"dense": 3}, r"dense must be one of 1, 2, 4, 8, 16, 32 for ResNet.*It is 3"),
        (lambda: tv.resnet18(), {"dense": 0}, r"dense must be True, False or a number of pixels of at least 1, not 0"),
        (lambda: tv.resnet18(), {"head": "pixels"}, r'head must be "window" or "cells", not \'pixels\''),
        (lambda: tv.resnet18(), {"input_size": (3, 0, 9)}, r"input_size must be .* not \(3, 0, 9\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_named_with_the_reason(make, options, message):
    with torch.device("meta" if "input_size" not in options else "cpu"):
        model = make()
    with pytest.raises(UsageError, match=message):
        convolutionalize(model.eval(), **options)


def test_strides_of_a_part_that_takes_even_maps_only_cannot_be_removed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), EvenMapsOnly(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    image = torch.randn(1, 3, 22, 26)
    with torch.no_grad():
        expected = at_windows(model, image, (18, 18), 2)
        assert torch.allclose(convolutionalize(model, input_size=18)(image), expected, atol=1e-5)
    with pytest.raises(UsageError, match=r"Sequential\): its strides cannot be removed.*an even map is wanted"):
        convolutionalize(model, input_size=18, dense=True)


def test_a_norm_over_the_whole_flattened_map_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(4 * 14 * 14), nn.Linear(4 * 14 * 14, 2))
    with pytest.raises(UsageError, match=r"2 \(BatchNorm1d\).*works on all cells of the 14 x 14 map at once"):
        convolutionalize(model.eval(), input_size=16)


def test_an_image_smaller_than_the_window_is_refused_with_the_least_size():
    scorer = convolutionalize(tv.resnet18(num_classes=2).eval(), input_size=64)
    with pytest.raises(UsageError, match=r"image of 64 x 63 px .* window of 64 x 64 px"):
        scorer(torch.zeros(1, 3, 64, 63))
    with pytest.raises(UsageError, match=r"must have shape \(N, 3, H, W\), not \(1, 1, 64, 64\)"):
        scorer(torch.zeros(1, 1, 64, 64))


def test_the_own_size_is_taken_from_timm_s_notes_and_the_first_convolution():
    assert convolutionalize(timm.create_model("test_resnet", in_chans=1)).meta["input_size"] == (1, 160, 160)
    with torch.device("meta"):
        assert convolutionalize(tv.resnet18()).meta["input_size"] == (3, 224, 224)
