import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import create_model
from pixelwise.ops.pooling import MaxPoolKeepingIndices

SKIPS = ["none", "add", "concat", "reduce"]
BACKBONES = ["resnet10t", "mobilenetv3_small_050", "convnext_atto", "alexnet", "torchvision/squeezenet1_1", "vgg11"]


def build(backbone="resnet10t", **options):
    torch.manual_seed(0)
    return create_model("encoder_decoder", num_classes=3, backbone=backbone, **{"widths": (8, 6), **options})


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_backbone_with_any_skip(backbone, skip):
    up = {"none": "bilinear", "add": "transposed", "concat": "bilinear", "reduce": "transposed"}[skip]
    with torch.device("meta"):
        model = build(backbone, skip=skip, up=up, in_channels=4).eval()
        for size in ((1, 1), (33, 31), (65, 97)):
            assert model(torch.zeros(2, 4, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("skip", SKIPS)
def test_unpooling_goes_with_any_skip(skip):
    with torch.device("meta"):
        model = build("vgg11", skip=skip, up="unpool", finest=1).eval()
        assert model(torch.zeros(2, 3, 33, 70)).shape == (2, 3, 33, 70)
    assert len(model.steps) == 5 and all(step.pool for step in model.steps)


@pytest.mark.parametrize("skip", ["add", "concat"])
def test_every_parameter_learns_with_unpooling(skip):
    model = build("vgg11", skip=skip, up="unpool", finest=1)
    logits = model(torch.randn(2, 3, 32, 31))
    assert logits.shape == (2, 3, 32, 31)
    (logits * torch.randn(logits.shape)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("up", ["bilinear", "transposed"])
@pytest.mark.parametrize("skip", SKIPS)
def test_every_decoder_parameter_learns(skip, up):
    model = build(skip=skip, up=up, finest=1)
    (model(torch.randn(2, 3, 64, 40)) * torch.randn(2, 3, 64, 40)).sum().backward()
    for name, parameter in (*model.steps.named_parameters(), *model.score.named_parameters()):
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("skip", SKIPS)
def test_a_skip_carries_the_fine_map_unless_there_is_none(skip):
    step = build(skip=skip).steps[0].eval()
    x, fine = torch.randn(1, 512, 4, 4), torch.randn(1, 256, 8, 8)
    same = torch.equal(step(x, fine), step(x, fine + 1))
    assert same is (skip == "none")


def test_transposed_convolutions_start_as_bilinear_interpolation():
    model = build(up="transposed")
    assert len(model.steps) == 3
    for step, width in zip(model.steps, (8, 6, 6), strict=True):
        x = torch.randn(2, width, 7, 9)
        learnt, fixed = step.enlarge(x), F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        assert learnt.shape == fixed.shape
        assert torch.allclose(learnt[..., 1:-1, 1:-1], fixed[..., 1:-1, 1:-1], atol=1e-6)
        assert step.enlarge.weight.requires_grad


def test_a_transposed_decoder_starts_as_the_bilinear_one_away_from_the_border():
    fixed, learnt = build(up="bilinear").eval(), build(up="transposed").eval()
    learnt.load_state_dict(fixed.state_dict(), strict=False)
    image = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        a, b = fixed(image), learnt(image)
    middle = (..., slice(160, 224), slice(160, 224))
    assert torch.allclose(a[middle], b[middle], atol=1e-5)
    assert not torch.allclose(a, b, atol=1e-5)


def test_unpooling_puts_the_decoder_s_values_where_the_encoder_took_its_maxima():
    model = build("vgg11", skip="none", up="unpool", finest=16)
    (step,) = model.steps
    (pool,) = step.pool
    assert isinstance(pool, MaxPoolKeepingIndices)
    seen = {}
    pool.register_forward_hook(lambda _module, args, out: seen.update(fine=args[0], coarse=out))
    step.mix.register_forward_pre_hook(lambda _module, args: seen.update(unpooled=args[0]))
    step.narrow.register_forward_hook(lambda _module, _args, out: seen.update(narrow=out))
    model(torch.randn(1, 3, 64, 64))
    _, places = F.max_pool2d(seen["fine"], 2, return_indices=True)
    wanted = torch.zeros_like(seen["fine"]).flatten(2).scatter(2, places.flatten(2), seen["narrow"].flatten(2))
    assert torch.equal(seen["unpooled"].flatten(2), wanted)


def test_the_encoder_s_pools_are_no_second_time_in_the_state():
    model = build("vgg11", up="unpool")
    assert not any("pool" in name for name in model.state_dict())
    names = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, MaxPoolKeepingIndices)
    ]
    assert names and all(name.startswith("encoder.") for name in names)


@pytest.mark.parametrize("backbone", ["resnet10t", "convnext_atto", "torchvision/squeezenet1_1"])
def test_unpooling_is_refused_where_nothing_was_pooled_by_2x2(backbone):
    with (
        torch.device("meta"),
        pytest.raises(UsageError, match=r"no such pooling. Use a VGG backbone, or up='bilinear'"),
    ):
        build(backbone, up="unpool")


@pytest.mark.parametrize(("finest", "steps"), [(1, 4), (2, 4), (4, 3), (8, 2), (16, 1), (32, 0)])
def test_the_finest_grid_decides_the_number_of_steps(finest, steps):
    with torch.device("meta"):
        model = build(finest=finest).eval()
        grids = []
        model.score.register_forward_hook(lambda _module, _args, out: grids.append(tuple(out.shape[-2:])))
        assert model(torch.zeros(1, 3, 100, 64)).shape == (1, 3, 100, 64)
    assert len(model.steps) == steps
    side = max(finest, 2)
    assert grids == [(128 // side, 64 // side)]


def test_the_last_width_repeats():
    with torch.device("meta"):
        assert [step.mix[0].out_channels for step in build(widths=(9,)).steps] == [9, 9, 9]
        assert [step.mix[0].out_channels for step in build(widths=(9, 8, 7, 6)).steps] == [9, 8, 7]


def test_a_transformer_of_one_map_is_scored_at_its_patches():
    with torch.device("meta"):
        model = build("vit_tiny_patch16_224").eval()
        assert model(torch.zeros(1, 3, 65, 97)).shape == (1, 3, 65, 97)
    assert len(model.steps) == 0 and model.stride == 16


def test_an_encoder_that_does_not_pad_gets_what_it_needs():
    with torch.device("meta"):
        model = build("alexnet")
    assert model.smallest_px == 64 and model.stride == 32


@pytest.mark.parametrize("backbone", ["mixer_s32_224", "maxvit_pico_rw_256", "efficientformer_l1"])
def test_a_backbone_for_one_size_is_refused(backbone):
    with torch.device("meta"), pytest.raises(UsageError, match=f"backbone '{backbone}' takes images of one size"):
        build(backbone)


def test_probing_leaves_mode_and_statistics_alone():
    model = build()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert model.training and all(module.training for module in model.modules())
    assert all((norm.running_mean == 0).all() and (norm.running_var == 1).all() for norm in norms)


def test_the_state_names_the_encoder():
    names = build().state_dict()
    assert {name.split(".")[0] for name in names} == {"encoder", "steps", "score"}
