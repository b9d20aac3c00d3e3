import copy
import functools
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.export import Dim

from pixelwise.errors import UsageError
from pixelwise.models import count_parameters, create_model
from pixelwise.models.pretrained import load_pretrained
from pixelwise.ops.pooling import MaxPoolKeepingIndices

SKIPS = ["none", "add", "concat", "reduce"]
# Families that pool, pool with overlap, average; widen with and without a shortcut; pad, pad as they need, do not pad.
BACKBONES = [
    *("alexnet", "vgg11", "torchvision/squeezenet1_1", "torchvision/googlenet", "resnet18", "resnet26d", "seresnet18"),
    *(
        "resnetv2_18",
        "densenet121",
        "mobilenetv2_035",
        "mobilenetv3_small_050",
        "efficientnet_lite0",
        "tf_efficientnet_b0",
    ),
    *("convnext_atto", "regnetx_002", "regnety_002", "repvgg_a0", "ghostnet_050", "test_byobnet", "test_nfnet"),
    *("torchvision/resnet18", "torchvision/mobilenet_v3_small"),
]
SLOW = (
    "torchvision/googlenet",
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "tf_efficientnet_b0",
    "vgg11",
)


def build(backbone, **options):
    torch.manual_seed(0)
    return create_model("mirror", num_classes=11, backbone=backbone, **options)


@functools.cache
def on_meta(backbone, **options):
    """Shared by the tests, which must not change it."""
    with torch.device("meta"):
        return build(backbone, **options)


@functools.cache
def vgg():
    """Likewise, with numbers."""
    model = build("vgg11_bn", skip="none")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return model.eval().requires_grad_(False)


def convolutions(module):
    """The shapes of the weights of all convolutions, by path."""
    return {
        name: layer.weight.shape
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    }


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_mirror_image_has_as_many_convolutions_of_the_same_size(backbone):
    model = on_meta(backbone)
    there, back = convolutions(model.encoder.body), {}
    for level in model.decoder:
        back |= convolutions(level)
    # The image of a 1x1 shortcut is a convolution and its repetition.
    back = {name if name in there else name.removesuffix(".0"): shape for name, shape in back.items()}
    for name, shape in there.items():
        assert shape[1] == 3 or back[name].numel() == shape.numel(), name
        assert shape[1] != 3 or 11 in back[name][:2], name
    # Besides them, there are only the transposed convolutions that stand for poolings.
    assert all(shape[1] == 1 for name, shape in back.items() if name not in there)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_rows_lead_from_the_image_to_the_last_map_and_back_to_the_scores(backbone):
    model = on_meta(backbone)
    rows = model.reflection()
    assert rows[0].channels[0] == 3 and rows[-1].channels[1] == model.encoder.channels[-1]
    assert rows[0].back[1] == 11  # classes
    for before, after in itertools.pairwise(rows):
        assert before.channels[1] == after.channels[0] and before.back[0] == after.back[1]
    assert all(row.back == row.channels[::-1] for row in rows[1:])
    stride = 1
    for row in rows:
        stride *= row.stride
    assert stride == model.stride


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name not in SLOW])
def test_any_size_and_every_parameter_learns(backbone):
    model = build(backbone, skip=SKIPS[BACKBONES.index(backbone) % 4])
    for module in model.modules():
        if isinstance(
            module, nn.BatchNorm2d
        ):  # so that no branch is off, as it is where a last norm or gain starts at zero
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, timm.layers.ScaledStdConv2d):
            nn.init.uniform_(module.gain, 0.5, 1.5)
    logits = model(torch.randn(2, 3, 32, 64))
    assert logits.shape == (2, 11, 32, 64)
    (logits * torch.randn(logits.shape)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    model.eval()
    with torch.no_grad():
        for size in ((1, 1), (33, 30)):
            assert model(torch.randn(1, 3, *size)).shape == (1, 11, *size)


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("backbone", ["alexnet", "vgg11", "resnet18", "test_efficientnet", "convnext_atto"])
def test_any_skip_any_channels(backbone, skip):
    with torch.device("meta"):
        model = build(backbone, skip=skip, in_channels=4).eval()
        for size in ((1, 1), (65, 97)):
            assert model(torch.zeros(2, 4, *size)).shape == (2, 11, *size)


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [
        ("vgg16", 29_433_483),
        ("vgg16_bn", 29_449_355),  # SegNet's number
        ("resnet18", 22_376_907),
        ("resnet50", 47_033_803),
        ("densenet121", 13_873_803),
        ("mobilenetv2_100", 3_625_099),
        ("efficientnet_b0", 7_192_451),
        ("convnext_tiny", 55_649_867),
    ],
)
def test_parameters(backbone, parameters):
    model = on_meta(backbone)
    assert (count_parameters(model), model.stride) == (parameters, 32)


# SegNet


def test_vgg_16_becomes_segnet():
    model = on_meta("vgg16_bn")
    levels = [[(shape[1], shape[0]) for shape in convolutions(level).values()] for level in model.decoder]
    assert levels == [
        [],  # the fifth unpooling
        [(512, 512), (512, 512), (512, 512)],
        [(512, 512), (512, 512), (512, 256)],
        [(256, 256), (256, 256), (256, 128)],
        [(128, 128), (128, 64)],
        [(64, 64), (64, 11)],
    ]
    unpooled = [row for row in model.reflection() if row.decoder == "unpooling by indices"]
    assert [row.channels[0] for row in unpooled] == [64, 128, 256, 512, 512]


def segnet(state, image, stages):
    """SegNet on a VGG with batch norm, in plain functions; `stages` are the numbers of convolutions, finest first."""

    def block(prefix, x):
        x = F.conv2d(x, state[f"{prefix[0]}.weight"], state[f"{prefix[0]}.bias"], padding=1)
        norm = [state[f"{prefix[1]}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *norm).relu()

    x, index, places, layers = image, 0, [], []
    for count in stages:
        for _ in range(count):
            x = block((f"encoder.body.features_{index}", f"encoder.body.features_{index + 1}"), x)
            layers.append(index)
            index += 3
        size = x.shape[2:]
        x, where = F.max_pool2d(x, 2, return_indices=True)
        places.append((where, size))
        index += 1
    for level, count in enumerate(stages[::-1], start=1):
        where, size = places.pop()
        x = F.max_unpool2d(x, where, 2, output_size=size)
        for _ in range(count):
            index = layers.pop()
            if not layers:
                return F.conv2d(
                    x,
                    state[f"decoder.{level}.features_{index}.weight"],
                    state[f"decoder.{level}.features_{index}.bias"],
                    padding=1,
                )
            # The norm that follows is the one of the map it gives, which the layer before made in the encoder.
            x = block((f"decoder.{level}.features_{index}", f"decoder.{level}.features_{layers[-1] + 1}"), x)
    raise AssertionError


def test_logits_of_a_mirrored_vgg_equal_segnet_s():
    image = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(vgg()(image), segnet(vgg().state_dict(), image, [1, 1, 2, 2, 2]), atol=1e-5)


def test_unpooling_or_transposed_convolutions():
    pools = [module for module in on_meta("vgg11").modules() if isinstance(module, MaxPoolKeepingIndices)]
    assert len(pools) == 5
    other = on_meta("vgg11", up="transposed")
    assert not any(isinstance(module, MaxPoolKeepingIndices) for module in other.modules())
    transposed = [module for module in other.decoder.modules() if isinstance(module, nn.ConvTranspose2d)]
    assert [layer.kernel_size for layer in transposed] == [(2, 2)] * 5
    assert all(layer.groups == layer.in_channels for layer in transposed)


def test_a_copy_unpools_by_its_own_indices():
    model, other = vgg(), copy.deepcopy(vgg())
    mine, its = (
        {id(item) for item in net.modules() if isinstance(item, MaxPoolKeepingIndices)} for net in (model, other)
    )
    used = {id(item.pool[0]) for item in other.decoder.modules() if type(item).__name__ == "Unpool"}
    assert used == its and not used & mine
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits = model(image)
    assert torch.equal(other(image), logits)
    channels_last = other.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last))
    assert torch.allclose(channels_last, logits, atol=1e-4)
    assert not any("pool" in name for name in model.state_dict())


# ResNet


def test_resnet_18_has_eight_blocks_on_each_side():
    rows = [row for row in on_meta("resnet18").reflection() if row.kind == "BasicBlock"]
    assert len(rows) == 8
    assert [row.decoder for row in rows] == [
        *("BasicBlock, fresh", "BasicBlock, fresh"),
        *("BasicBlock reflected", "BasicBlock, fresh") * 3,
    ]
    assert [row.stride for row in rows] == [1, 1, 2, 1, 2, 1, 2, 1]


def resnet_decoder(state, maps, size):
    """ResNet-18 reflected, with added skips, in plain functions; `maps` are the encoder's, finest first."""

    def norm(x, name):
        return F.batch_norm(x, *(state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")))

    def fresh(x, name):
        y = norm(F.conv2d(x, state[f"{name}.conv1.weight"], padding=1), f"{name}.bn1").relu()
        return (norm(F.conv2d(y, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2") + x).relu()

    def reflected(x, name):
        y = norm(F.conv2d(x, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn1").relu()
        y = F.conv_transpose2d(y, state[f"{name}.conv1.weight"], stride=2, padding=1, output_padding=1)
        short = F.conv2d(x, state[f"{name}.downsample.0.0.weight"])
        short = short.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return (norm(y, f"{name}.bn2") + norm(short, f"{name}.downsample.1")).relu()

    x = maps[-1]
    for level, layer in enumerate((4, 3, 2)):
        name = f"decoder.{level}.layer{layer}"
        x = reflected(fresh(x, f"{name}.1"), f"{name}.0") + maps[-2 - level]
    x = fresh(fresh(x, "decoder.3.layer1.1"), "decoder.3.layer1.0")
    x = F.conv_transpose2d(x, state["decoder.3.maxpool.weight"], stride=2, padding=1, output_padding=1, groups=64)
    x = norm(x, "decoder.3.bn1").relu() + maps[0]
    weight, bias = state["decoder.4.conv1.weight"], state["decoder.4.conv1.bias"]
    x = F.conv_transpose2d(x, weight, bias, stride=2, padding=3, output_padding=1)
    return x[..., : size[0], : size[1]]


def test_logits_of_a_mirrored_resnet_equal_a_reference():
    model = build("resnet18")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = model.eval().encoder(image)
        wanted = resnet_decoder(model.state_dict(), maps, (64, 96))
        assert torch.allclose(model(image), wanted, atol=1e-5)


def test_shortcuts_of_another_resnet_average_and_are_repeated():
    level = on_meta("resnet26d").decoder[0]
    kinds = [type(level.get_submodule(f"layer4.0.downsample.{index}")) for index in (0, 1, 2)]
    assert kinds == [nn.ConvTranspose2d, nn.Conv2d, nn.BatchNorm2d]
    assert level.get_submodule("layer4.0.downsample.2").num_features == 1024


# DenseNet


def test_densenet_s_transitions_go_up_and_its_blocks_give_their_maps_back():
    rows = on_meta("densenet121").reflection()
    assert [(row.kind, row.back, row.stride) for row in rows[2:]] == [
        ("DenseBlock", (256, 64), 1),
        ("DenseTransition", (128, 256), 2),
        ("DenseBlock", (512, 128), 1),
        ("DenseTransition", (256, 512), 2),
        ("DenseBlock", (1024, 256), 1),
        ("DenseTransition", (512, 1024), 2),
        ("DenseBlock", (1024, 512), 1),
    ]
    layers = dict(on_meta("densenet121").decoder.named_modules())
    last = "features_denseblock4.denselayer16"  # 992 maps in, 32 out: 32 in, 992 back
    assert layers[f"0.{last}.conv2"].weight.shape == (128, 32, 3, 3)
    assert layers[f"0.{last}.conv1"].weight.shape == (992, 128, 1, 1)
    assert layers[f"0.{last}.norm1"].num_features == 32 and layers[f"0.{last}.norm2"].num_features == 128


# MobileNet, EfficientNet, ConvNeXt


def test_an_inverted_residual_narrows_as_it_widened():
    layers = dict(on_meta("mobilenetv2_035").decoder[0].named_modules())
    names = ["conv_pwl", "bn2", "conv_dw", "bn1", "conv_pw", "bn3"]
    block = [layers[f"blocks.5.0.{name}"] for name in names]
    assert [type(layer) for layer in block[::2]] == [nn.Conv2d, nn.ConvTranspose2d, nn.Conv2d]
    wide = block[2].groups
    assert (block[0].out_channels, block[1].num_features, block[3].num_features) == (wide, wide, wide)
    assert block[4].out_channels == block[5].num_features < wide
    assert isinstance(block[3].act, nn.ReLU6) and isinstance(block[5].act, nn.Identity)


def test_a_stage_of_convnext_is_its_blocks_and_a_way_up():
    rows = on_meta("convnext_atto").reflection()
    assert [row.kind for row in rows].count("ConvNeXtBlock") == 2 + 2 + 6 + 2
    up = next(row for row in rows if row.encoder == "stages_3.downsample.1")
    assert (up.decoder, up.back, up.stride) == ("ConvTranspose2d 2x2", (320, 160), 2)
    assert on_meta("convnext_atto").decoder[0].get_submodule("stages_3.downsample.0").normalized_shape == (320,)


def test_fresh_blocks_have_weights_of_their_own():
    model = build("test_resnet")
    fresh = model.decoder[3].get_submodule("layer1.0.conv1").weight
    assert not torch.equal(model.encoder.body.layer1[0].conv1.weight, fresh)


# Skips


@pytest.mark.parametrize(("skip", "wide"), [("none", 512), ("add", 512), ("reduce", 512), ("concat", 1024)])
def test_the_next_plain_convolution_takes_the_stack(skip, wide):
    model = on_meta("vgg11", skip=skip)
    first = [next(iter(convolutions(level).values()))[1] for level in model.decoder[1:]]
    assert first == [width * wide // 512 for width in (512, 512, 256, 128, 64)]
    mixes = [join.mix for join in model.joins]
    assert all(isinstance(mix, nn.Conv2d) is (skip == "reduce") for mix in mixes)


def test_before_a_residual_block_one_more_convolution_takes_the_stack():
    joins = on_meta("resnet18", skip="concat").joins
    kinds = [[type(layer) for layer in join.mix] for join in joins[:-1]]
    assert kinds == [[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]] * 3
    assert joins[0].mix[0].weight.shape == (256, 512, 3, 3) and joins[0].mix[1].num_features == 256
    assert joins[-1].mix is None  # the scorer takes it
    assert on_meta("resnet18", skip="concat").decoder[-1].get_submodule("conv1").in_channels == 128


@pytest.mark.parametrize("skip", SKIPS)
def test_a_skip_carries_the_encoder_s_map_unless_there_is_none(skip):
    join = build("test_resnet", skip=skip).joins[0].eval()
    x, fine = torch.randn(1, 192, 4, 4), torch.randn(1, 192, 4, 4)
    assert torch.equal(join(x, fine), join(x, fine + 1)) is (skip == "none")


# The rest of the contract


@pytest.mark.parametrize("backbone", ["vgg11_bn", "alexnet"])
def test_an_exported_model_takes_other_sizes(backbone):
    model = vgg() if backbone == "vgg11_bn" else build(backbone).eval().requires_grad_(False)
    image = torch.randn(1, 3, 77, 102)
    sizes = {axis: Dim(side, min=model.smallest_px + 1, max=4096) for axis, side in ((2, "height"), (3, "width"))}
    exported = torch.export.export(model, (image,), dynamic_shapes={"image": sizes}).module()
    for other in (image, torch.randn(1, 3, 129, 96)):
        assert torch.allclose(exported(other), model(other), atol=1e-5)


def test_an_encoder_that_does_not_pad_gets_what_it_needs():
    assert (on_meta("alexnet").smallest_px, on_meta("alexnet").stride) == (64, 32)


def test_the_state_names_the_encoder_and_the_part_that_was_reflected():
    names = on_meta("test_resnet").state_dict()
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}
    assert "encoder.body.layer4.0.conv1.weight" in names and "decoder.0.layer4.0.conv1.weight" in names


def test_weights_of_a_classifier_fill_the_encoder(tmp_path):
    classifier = timm.create_model("test_resnet", num_classes=7)
    save_file(classifier.state_dict(), tmp_path / "weights.safetensors")
    model = build("test_resnet")
    loaded = load_pretrained(model, tmp_path / "weights.safetensors")
    assert not loaded.missing
    assert torch.equal(model.encoder.body.layer4[0].conv1.weight, classifier.layer4[0].conv1.weight)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("vit_tiny_patch16_224", r"'vit_tiny_patch16_224' cannot be reflected: .* in model.patch_embed \(PatchEmbed\)"),
        ("swin_tiny_patch4_window7_224", r"its maps are not \(N, C, H, W\) inside"),
        ("hrnet_w18_small", r"fuse_layers.* \(Upsample\) has no mirror image.*--model encoder_decoder"),
        ("cspresnet50", r"split in stages_0 \(CrossStage\) has no mirror image"),
        ("coatnet_nano_rw_224", r"'coatnet_nano_rw_224' does not take images of any size"),
        ("xception41", r"from the middle of a part with several ways"),
        ("resnet81", r"there is no backbone called 'resnet81'"),
    ],
)
def test_what_cannot_be_reflected_is_named(backbone, message):
    with torch.device("meta"), pytest.raises(UsageError, match=message):
        build(backbone)


@pytest.mark.parametrize(("option", "message"), [("skip", "none.*reduce"), ("up", "unpool.*transposed")])
def test_an_unknown_choice_is_refused(option, message):
    with pytest.raises(UsageError, match=f"mirror: {option} must be one of .*{message}.*not 'sum'"):
        build("resnet18", **{option: "sum"})
