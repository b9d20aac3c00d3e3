import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

from pixelwise.errors import UsageError
from pixelwise.models import create_model, describe_model
from pixelwise.models.unet import UNet, UNetConfig


@pytest.mark.parametrize("name", ["unet", "unet_valid"])
@pytest.mark.parametrize(
    ("in_channels", "num_classes", "options", "parameters"),
    [
        (3, 11, {}, 31_032_395),
        (1, 2, {}, 31_030_658),  # the network of figure 1
        (1, 1, {}, 31_030_593),
        (3, 21, {}, 31_033_045),
        (3, 11, {"batch_norm": True}, 31_038_283),  # 5,888 channels: two numbers of a norm for one of a bias
        (1, 2, {"batch_norm": True}, 31_036_546),
        (1, 2, {"skip": "add"}, 27_897_218),
        (3, 11, {"skip": "add"}, 27_898_955),
        (1, 2, {"skip": "reduce"}, 28_594_498),
        (3, 11, {"skip": "reduce"}, 28_596_235),
        (1, 2, {"up": "bilinear"}, 28_941_698),  # one tap for four, of 2 C^2 weights at C = 64, 128, 256, 512
    ],
)
def test_parameters_of_the_paper(name, in_channels, num_classes, options, parameters):
    row = describe_model(name, num_classes=num_classes, in_channels=in_channels, **options)
    assert row["parameters"] == parameters
    assert row["stride"] == 16


def walk(name, size, method):
    """Channels, height and width after each block and up-convolution, and of the scores, without computing them."""
    seen = {"down": [], "up_conv": [], "up": []}
    with torch.device("meta"):
        model = create_model(name, num_classes=2, in_channels=1)
        for part, maps in seen.items():
            for block in getattr(model, part):
                block.register_forward_hook(lambda _module, _args, out, maps=maps: maps.append(tuple(out.shape[1:])))
        scores = getattr(model, method)(torch.zeros(1, 1, *size))
    return seen, tuple(scores.shape)


def test_the_levels_of_the_padded_network():
    seen, scores = walk("unet", (512, 512), "forward")
    assert seen["down"] == [(64, 512, 512), (128, 256, 256), (256, 128, 128), (512, 64, 64), (1024, 32, 32)]
    assert seen["up"] == seen["up_conv"] == seen["down"][-2::-1]
    assert scores == (1, 2, 512, 512)


def test_the_levels_of_figure_1():
    seen, scores = walk("unet_valid", (572, 572), "score_tile")
    widths = (64, 128, 256, 512, 1024)
    assert seen["down"] == [(width, n, n) for width, n in zip(widths, (568, 280, 136, 64, 28), strict=True)]
    assert seen["up_conv"] == [(width, n, n) for width, n in zip(widths[-2::-1], (56, 104, 200, 392), strict=True)]
    assert seen["up"] == [(width, n, n) for width, n in zip(widths[-2::-1], (52, 100, 196, 388), strict=True)]
    assert scores == (1, 2, 388, 388)


@pytest.mark.parametrize(("size", "tile"), [((1, 4), (188, 188)), ((388, 5), (572, 204)), ((389, 20), (588, 204))])
def test_images_are_mirrored_to_the_next_tile(size, tile):
    seen, scores = walk("unet_valid", size, "forward")
    assert seen["down"][0][1:] == (tile[0] - 4, tile[1] - 4)
    assert scores == (1, 2, *size)


def test_multiply_adds_of_the_padded_network():
    with torch.device("meta"):
        model = create_model("unet", num_classes=2, in_channels=1)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 1, 512, 512))
    assert counter.get_total_flops() == 2 * 192_384_335_872


def test_crops_take_the_centre_of_the_skips():
    model = create_model("unet_valid", num_classes=2, widths=(1, 1, 1, 1, 1)).eval()
    assert model.crops == (4, 16, 40, 88) and model.border_px == 92
    joined = []
    model._join = lambda step, x, skip: joined.append(skip) or torch.cat([x, skip], 1)
    for block in model.down:  # a map of coordinates through each level: what a valid convolution leaves is its centre
        block.forward = lambda x: F.avg_pool2d(x.mean(1, keepdim=True), 5, stride=1)
    model.pool = nn.AvgPool2d(2)
    rows = torch.arange(572.0).reshape(1, 1, -1, 1).expand(1, 1, 572, 572)
    model.score_tile(rows)
    for skip, side in zip(joined, (56, 104, 200, 392), strict=True):
        assert skip.shape[-2:] == (side, side)
        assert skip.mean().item() == pytest.approx(571 / 2, abs=0.01)


def reference(state, image, levels, *, padding=1, skip="concat", up="transposed"):
    """The same network in plain functions, for sizes that need no padding."""

    def convolve(name, x, padding=0):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    def block(name, x):
        return convolve(f"{name}.2", convolve(f"{name}.0", x, padding).relu(), padding).relu()

    skips = [block("down.0", image)]
    for level in range(1, levels):
        skips.append(block(f"down.{level}", F.max_pool2d(skips[-1], 2)))
    x = skips.pop()
    for step, kept in enumerate(reversed(skips)):
        if up == "transposed":
            x = F.conv_transpose2d(x, state[f"up_conv.{step}.weight"], state[f"up_conv.{step}.bias"], stride=2)
        else:
            x = convolve(f"up_conv.{step}", F.interpolate(x, scale_factor=2, mode="bilinear"))
        if padding == 0:
            border = (4, 16, 40, 88)[step]
            kept = kept[..., border:-border, border:-border]
        x = x + kept if skip == "add" else torch.cat([x, kept], 1)
        x = convolve(f"reduce.{step}", x) if skip == "reduce" else x
        x = block(f"up.{step}", x)
    return convolve("score", x)


def with_biases(model):
    """Biases start at zero, where a bias that is left out would not show."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("skip", ["concat", "add", "reduce"])
@pytest.mark.parametrize("up", ["transposed", "bilinear"])
def test_logits_equal_a_reference(skip, up):
    torch.manual_seed(0)
    image = torch.randn(2, 3, 24, 40)
    model = with_biases(create_model("unet", num_classes=3, widths=(4, 5, 6, 7), skip=skip, up=up))
    wanted = reference(model.state_dict(), image, 4, skip=skip, up=up)
    assert torch.allclose(model(image), wanted, atol=1e-5)


@pytest.mark.parametrize(("skip", "up"), [("concat", "transposed"), ("add", "transposed"), ("reduce", "bilinear")])
def test_valid_logits_equal_a_reference(skip, up):
    torch.manual_seed(0)
    tile = torch.randn(1, 3, 188, 220)
    model = with_biases(create_model("unet_valid", num_classes=3, widths=(4, 5, 6, 7, 8), skip=skip, up=up))
    wanted = reference(model.state_dict(), tile, 5, padding=0, skip=skip, up=up)
    assert wanted.shape == (1, 3, 4, 36)
    assert torch.allclose(model.score_tile(tile), wanted, atol=1e-5)


def test_other_sizes_are_the_padded_image_cut():
    torch.manual_seed(0)
    model = create_model("unet", num_classes=3, widths=(4, 5, 6)).eval()
    image = torch.randn(1, 3, 21, 30)
    padded = F.pad(image, (0, 2, 0, 3), mode="replicate")
    assert torch.equal(model(image), model(padded)[..., :21, :30])


def test_an_image_is_labelled_from_its_mirrored_surroundings_tile_by_tile():
    torch.manual_seed(0)
    model = with_biases(create_model("unet_valid", tiny=True, num_classes=3))
    image = torch.randn(1, 3, 120, 131)
    logits = model(image)
    mirrored = F.pad(image, (92, 93, 92, 104), mode="reflect")  # 92 px on each side of 132 x 132
    assert torch.allclose(logits, model.score_tile(mirrored)[..., :120, :131], atol=1e-5)
    for top, left in [(0, 0), (32, 64), (64, 80)]:  # places that the poolings share
        scores = model.score_tile(mirrored[..., top : top + 220, left : left + 204])
        assert torch.allclose(scores, logits[..., top : top + 36, left : left + 20], atol=1e-5)


@pytest.mark.parametrize("size", [(172, 188), (188, 187), (189, 188), (190, 572)])
def test_a_tile_that_does_not_fit_is_told(size):
    model = create_model("unet_valid", tiny=True, num_classes=2)
    with pytest.raises(UsageError, match=f"must be 188 px or a multiple of 16 px more, not {size[0]} x {size[1]}"):
        model.score_tile(torch.zeros(1, 3, *size))
    with pytest.raises(UsageError, match="must be 4 px or a multiple of 4 px more, not 8 x 9"):
        create_model("unet", tiny=True, num_classes=2).score_tile(torch.zeros(1, 3, 8, 9))


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_the_geometry_holds_at_every_depth(levels):
    model = create_model("unet_valid", num_classes=2, widths=(2,) * levels, dropout_levels=1)
    first = {2: 18, 3: 44, 4: 92}[levels]  # worked out by hand from the walk
    out = first - 2 * model.border_px
    assert model.score_tile(torch.zeros(1, 3, first, first)).shape == (1, 2, out, out)
    with pytest.raises(UsageError, match=f"must be {first} px"):
        model.score_tile(torch.zeros(1, 3, first - model.stride, first))
    for side in range(1, 12):
        assert model(torch.zeros(1, 3, side, 12 - side)).shape == (1, 2, side, 12 - side)


def test_a_valid_network_with_every_option_is_exported_for_all_sizes():
    torch.manual_seed(0)
    options = {"skip": "reduce", "up": "bilinear", "batch_norm": True}
    model = create_model("unet_valid", tiny=True, num_classes=2, **options).eval()
    sizes = {"image": {2: Dim("height", min=2, max=4096), 3: Dim("width", min=2, max=4096)}}
    exported = export(model, (torch.randn(1, 3, 45, 70),), dynamic_shapes=sizes).module()
    for size in [(45, 70), (2, 33), (100, 3)]:
        image = torch.randn(1, 3, *size)
        assert torch.allclose(exported(image), model(image), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"skip": "reduce", "up": "bilinear"}])
def test_weights_start_as_in_the_paper_and_keep_the_signal(options):
    torch.manual_seed(0)
    model = UNet(UNetConfig(num_classes=8, widths=(32, 64, 128), **options))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            wanted = math.sqrt(2 / layer.weight[0].numel())
        elif isinstance(layer, nn.ConvTranspose2d):
            wanted = math.sqrt(2 / layer.in_channels)
        else:
            continue
        assert layer.weight.std().item() == pytest.approx(wanted, rel=0.1)
        assert (layer.bias == 0).all()
    assert 0.1 < model(torch.randn(1, 3, 32, 32)).std() < 10


def test_dropout_acts_at_the_end_of_the_contracting_path_in_training_only():
    torch.manual_seed(0)
    model = create_model("unet", num_classes=2, widths=(4, 8), dropout=0.5)
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Dropout)] == ["dropout"]
    image = torch.randn(1, 3, 16, 16)
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


@pytest.mark.parametrize(("name", "dropped"), [("unet", [1024]), ("unet_valid", [512, 1024])])
def test_dropout_of_the_release_reaches_the_skip_of_the_last_level_but_one(name, dropped):
    with torch.device("meta"):
        model = create_model(name, num_classes=2)
        assert model.dropout.p == (0.5 if name == "unet_valid" else 0)
        through, kept = [], []
        model.dropout.register_forward_hook(
            lambda _module, args, out: through.append(args[0].shape[1]) or kept.append(out)
        )
        joined = []
        join = model._join
        model._join = lambda step, x, skip: joined.append(skip) or join(step, x, skip)
        model(torch.zeros(1, 3, 20, 20))
    assert through == dropped
    if len(kept) == 2:  # the skip is cut from what dropout returned
        assert joined[0]._base is kept[0]


def test_batch_norm_replaces_the_bias():
    model = create_model("unet", num_classes=2, widths=(4, 8), batch_norm=True)
    for block in (*model.down, *model.up):
        kinds = [type(layer) for layer in block]
        assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 2
        assert block[0].bias is None and block[3].bias is None


def test_names_in_the_state_are_those_of_the_first_release():
    names = set(create_model("unet", num_classes=2, widths=(4, 8)).state_dict())
    layers = ("down.0.0", "down.0.2", "down.1.0", "down.1.2", "up_conv.0", "up.0.0", "up.0.2", "score")
    assert names == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (4,)}, "widths must be at least two"),
        ({"dropout": 1.0}, "less than 1, not 1.0"),
        ({"dropout_levels": 0}, "dropout_levels must be 1 to 3, not 0"),
        ({"dropout_levels": 4}, "dropout_levels must be 1 to 3, not 4"),
        ({"skip": "sum"}, "skip must be one of concat, add, reduce, not 'sum'"),
        ({"up": "nearest"}, "up must be one of transposed, bilinear, not 'nearest'"),
    ],
)
def test_fields_out_of_range_are_told(options, message):
    with pytest.raises(UsageError, match=message):
        create_model("unet", tiny=True, num_classes=2, **options)
