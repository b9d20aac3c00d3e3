import math
from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from pixelwise.errors import UsageError
from pixelwise.models import create_model, describe_model
from pixelwise.models.fcn import FCN, FCNConfig
from pixelwise.models.vgg_encoder import DEPTHS

NAMES = ["fcn32s", "fcn16s", "fcn8s", "fcn8s_at_once"]


@pytest.mark.parametrize(
    ("name", "parameters", "upsampling"),
    [
        ("fcn32s", 134_346_581, 1_806_336),
        ("fcn16s", 134_357_354, 458_640),
        ("fcn8s", 134_362_751, 127_008),
        ("fcn8s_at_once", 134_362_751, 127_008),
    ],
)
def test_parameters_of_the_release(name, parameters, upsampling):
    row = describe_model(name, num_classes=21)
    assert (row["parameters"], row["stride"]) == (parameters, 32)
    assert describe_model(name, num_classes=21, upsampling="learnt")["parameters"] == parameters + upsampling


def test_parameters_at_11_classes():
    assert describe_model("fcn8s", num_classes=11)["parameters"] == 134_314_081


def filled(name, **config):
    """A tiny one without zeros among its weights, in eval mode."""
    torch.manual_seed(0)
    model = create_model(name, tiny=True, num_classes=3, **config).eval().requires_grad_(False)
    for path, parameter in model.named_parameters():
        if path.startswith("score"):
            nn.init.normal_(parameter)
        elif path.startswith("up"):
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def heights(model, image, *paths):
    """The heights of what the modules at `paths` give; of one that runs several times, all of them."""
    seen = {path: [] for path in paths}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _m, _a, out, path=path: seen[path].append(out.shape[2]))
        for path in paths
    ]
    model(image)
    for handle in handles:
        handle.remove()
    return [height for path in paths for height in seen[path]]


@pytest.mark.parametrize(
    ("size", "pools", "scores", "ups"),
    [
        (224, [211, 106, 53, 27, 14], 8, [288, 18, 304, 38, 312]),
        (480, [339, 170, 85, 43, 22], 16, [544, 34, 560, 70, 568]),
        (500, [349, 175, 88, 44, 22], 16, [544, 34, 560, 70, 568]),
        (512, [355, 178, 89, 45, 23], 17, [576, 36, 592, 74, 600]),
    ],
)
def test_the_maps_of_each_level(size, pools, scores, ups):
    image = torch.zeros(1, 3, size, 1, device="meta")
    with torch.device("meta"):
        coarse, middle, fine = (create_model(name, tiny=True, num_classes=2) for name in NAMES[:3])
    assert heights(coarse, image, "pool", "score_fr", "upscore") == [*pools, scores, ups[0]]
    assert heights(middle, image, "pool", "upscore2", "upscore16") == [*pools, ups[1], ups[2]]
    assert heights(fine, image, "pool", "upscore2", "upscore_pool4", "upscore8") == [*pools, ups[1], ups[3], ups[4]]


@pytest.mark.parametrize(
    ("size", "multiply_adds"),
    [((360, 480), 139_329_107_712), ((500, 500), 180_903_432_960), ((512, 512), 189_672_825_600)],
)
def test_multiply_adds_up_to_the_coarse_score(size, multiply_adds):
    with torch.device("meta"):
        model = create_model("fcn32s", num_classes=21)
    seen = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda m, _a, out: seen.append(m.weight[0].numel() * out[0].numel()))
    model(torch.zeros(1, 3, *size, device="meta"))
    assert sum(seen) == multiply_adds


def test_pool5_and_score_at_360():
    with torch.device("meta"):
        model = create_model("fcn32s", tiny=True, num_classes=2)
    assert heights(model, torch.zeros(1, 3, 360, 1, device="meta"), "pool", "score_fr")[4:] == [18, 12]


@pytest.mark.parametrize("name", NAMES[:3])
def test_every_size_from_1_to_600_comes_out_as_it_went_in(name):
    with torch.device("meta"):
        model = create_model(name, tiny=True, num_classes=2)
    for size in range(1, 601, 2):  # odd heights, even widths; the sums of the skips fail where a crop does not fit
        assert model(torch.zeros(1, 3, size, 601 - size, device="meta")).shape == (1, 2, size, 601 - size)


def reference(state, image, finest, scales=(1.0, 1.0)):
    """The release's layer table in plain functions, in Caffe's terms."""

    def conv(name, x, padding=0):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding)

    def pool(x):
        missing = [math.ceil(length / 2) * 2 - length for length in (x.shape[3], x.shape[2])]
        return F.max_pool2d(F.pad(x, (0, missing[0], 0, missing[1]), value=-1e9), 2)

    def deconv(name, x, kernel, stride):
        if f"{name}.weight" in state:
            return F.conv_transpose2d(x, state[f"{name}.weight"], stride=stride)
        factor = (kernel + 1) // 2
        row = torch.tensor([1 - abs(index - (factor - 0.5)) / factor for index in range(kernel)])
        full = torch.eye(x.shape[1])[:, :, None, None] * torch.outer(row, row)
        return F.conv_transpose2d(x, full, stride=stride)

    def crop(x, offset, like):
        return x.narrow(2, offset, like.shape[2]).narrow(3, offset, like.shape[3])

    x, pools = image, {}
    for stage, count in {1: 2, 2: 2, 3: 3, 4: 3, 5: 3}.items():
        for index in range(1, count + 1):
            x = conv(f"conv{stage}_{index}", x, 100 if (stage, index) == (1, 1) else 1).relu()
        x = pools[stage] = pool(x)
    x = conv("score_fr", conv("fc7", conv("fc6", x).relu()).relu())
    if finest == 32:
        return crop(deconv("upscore", x, 64, 32), 19, image)
    x = deconv("upscore2", x, 4, 2)
    x = x + crop(conv("score_pool4", pools[4] * scales[0]), 5, x)
    if finest == 16:
        return crop(deconv("upscore16", x, 32, 16), 27, image)
    x = deconv("upscore_pool4", x, 4, 2)
    x = x + crop(conv("score_pool3", pools[3] * scales[1]), 9, x)
    return crop(deconv("upscore8", x, 16, 8), 31, image)


@pytest.mark.parametrize("upsampling", ["fixed", "inner", "learnt"])
@pytest.mark.parametrize(
    ("name", "finest", "scales"),
    [("fcn32s", 32, ()), ("fcn16s", 16, (1, 1)), ("fcn8s", 8, (1, 1)), ("fcn8s_at_once", 8, (0.01, 0.0001))],
)
def test_logits_equal_a_reference(name, finest, scales, upsampling):
    model = filled(name, upsampling=upsampling)
    image = torch.randn(2, 3, 41, 67)
    wanted = reference(model.state_dict(), image, finest, scales)
    assert wanted.std() > 0.1
    assert torch.allclose(model(image), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_scores_lie_on_the_centres_of_what_they_see(name):
    """Where the grid is symmetric about the image, mirrored kernels on a mirrored image give mirrored logits."""
    model, mirrored = filled(name), filled(name)
    for module in mirrored.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(module.weight.flip(2, 3))
    image = torch.randn(1, 3, 58, 90)  # 58 + 198 = 8 * 32 and 90 + 198 = 9 * 32: no pooling is cut
    assert torch.allclose(mirrored(image.flip(2, 3)), model(image).flip(2, 3), atol=1e-5)


def test_receptive_fields_of_table_1_and_of_the_pools():
    with torch.device("meta"):
        model = create_model("fcn32s", num_classes=21)
    field, jump, fields = 1, 1, []
    for stage, count in enumerate(DEPTHS, start=1):
        for index in range(1, count + 1):
            field += (model.get_submodule(f"conv{stage}_{index}").kernel_size[0] - 1) * jump
        field, jump = field + jump, 2 * jump
        fields.append((field, jump))
    assert fields[2:4] == [(44, 8), (100, 16)]
    assert (field + (model.fc6.kernel_size[0] - 1) * jump, jump) == (404, 32)


def test_weights_start_as_in_the_paper():
    torch.manual_seed(0)
    model = FCN(FCNConfig(widths=(16, 32, 32, 32, 32), head_width=64, upsampling="learnt"))
    assert not any(tensor.any() for path, tensor in model.state_dict().items() if path.startswith("score"))
    for path, layer in model.named_children():
        if isinstance(layer, nn.Conv2d) and not path.startswith("score"):
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / layer.weight[0].numel()), rel=0.1)
            assert not layer.bias.any()
    four = torch.tensor([0.25, 0.75, 0.75, 0.25])
    assert torch.equal(model.upscore2.weight[5, 5], torch.outer(four, four))
    for up in (model.upscore2, model.upscore_pool4, model.upscore8):
        assert torch.equal(up.weight, up.weight * torch.eye(21)[:, :, None, None])


def test_all_enlargements_are_fixed_unless_asked():
    fixed, learnt = (create_model("fcn8s", tiny=True, num_classes=3, upsampling=up) for up in ("fixed", "learnt"))
    ups = {"upscore2.weight", "upscore_pool4.weight", "upscore8.weight"}
    assert FCNConfig().upsampling == "fixed"
    assert set(learnt.state_dict()) - set(fixed.state_dict()) == ups
    assert dict(learnt.named_parameters()).keys() >= ups


@pytest.mark.parametrize(
    ("name", "inner", "parameters"),
    [
        ("fcn32s", set(), 134_346_581),
        ("fcn16s", {"upscore2.weight"}, 134_364_410),
        ("fcn8s", {"upscore2.weight", "upscore_pool4.weight"}, 134_376_863),
    ],
)
def test_the_paper_learns_the_inner_upsampling_and_fixes_the_last(name, inner, parameters):
    with torch.device("meta"):
        model = create_model(name, num_classes=21, upsampling="inner")
    learnt = {path for path, item in model.named_parameters() if path.startswith("up") and item.requires_grad}
    assert learnt == inner
    assert sum(item.numel() for item in model.parameters() if item.requires_grad) == parameters


def test_a_finer_network_starts_from_a_coarser_one():
    coarse, middle, fine, at_once = (filled(name) for name in NAMES)
    for finer, coarser, new in ((middle, coarse, "score_pool4"), (fine, middle, "score_pool3")):
        keys = finer.load_state_dict(coarser.state_dict(), strict=False)
        assert keys.missing_keys == [f"{new}.weight", f"{new}.bias"] and not keys.unexpected_keys
    at_once.load_state_dict(fine.state_dict())
    for model in (coarse, middle, fine):
        assert list(model.state_dict())[:26:25] == ["conv1_1.weight", "conv5_3.bias"]


def test_at_first_a_finer_network_is_a_function_of_the_coarse_score():
    coarse = filled("fcn32s")
    image = torch.randn(1, 3, 58, 58)
    score = coarse.score_fr(coarse.head(coarse.trunk(image)[-1]))
    for name, ups, crop in (
        ("fcn16s", ("upscore2", "upscore16"), 27),
        ("fcn8s", ("upscore2", "upscore_pool4", "upscore8"), 31),
    ):
        torch.manual_seed(1)
        finer = create_model(name, tiny=True, num_classes=3).eval()
        finer.load_state_dict(coarse.state_dict(), strict=False)
        wanted = score
        for up in ups:
            wanted = finer.get_submodule(up)(wanted)
        logits = finer(image)
        assert torch.equal(logits, wanted[..., crop : crop + 58, crop : crop + 58])
        # Bilinear steps composed are close to the single one, not equal to it.
        difference = (logits - coarse(image)).abs().mean() / coarse(image).abs().mean()
        assert 1e-3 < difference < 0.15


def test_at_once_scales_the_pools_before_their_scores():
    at_once, plain = filled("fcn8s_at_once"), filled("fcn8s")
    state = at_once.state_dict()
    state["score_pool4.weight"] = state["score_pool4.weight"] * 0.01
    state["score_pool3.weight"] = state["score_pool3.weight"] * 0.0001
    plain.load_state_dict(state)
    image = torch.randn(1, 3, 30, 50)
    assert torch.allclose(at_once(image), plain(image), atol=1e-5)


def test_dropout_takes_single_values_after_fc6_and_fc7():
    torch.manual_seed(0)
    model = create_model("fcn8s", tiny=True, num_classes=2)
    assert FCNConfig().dropout == 0.5
    seen = []
    model.dropout.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    model(torch.randn(1, 3, 300, 300))
    assert len(seen) == 2
    for given, out in seen:
        dropped = (out == 0) & (given > 0)
        assert (dropped.any((2, 3)) & (out > 0).any((2, 3))).any()  # some of a channel, not all of it
        assert torch.equal(out[out > 0], 2 * given[out > 0])


def narrow_vgg16(batch_norm=False, divisor=16, hidden=20, configuration="D", in_channels=3):
    """torchvision's VGG, layer by layer and by its names, with fewer channels."""
    table = [item if item == "M" else item // divisor for item in cfgs[configuration]]
    features = make_layers(table, batch_norm=batch_norm)
    if in_channels != 3:
        features[0] = nn.Conv2d(in_channels, 64 // divisor, 3, padding=1)
    linears = [nn.Linear(512 // divisor * 49, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 7)]
    head = [linears[0], nn.ReLU(), nn.Dropout(), linears[1], nn.ReLU(), nn.Dropout(), linears[2]]
    parts = {"features": features, "avgpool": nn.AdaptiveAvgPool2d(7), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(parts, classifier=nn.Sequential(*head)))


NARROW = {"widths": (4, 8, 16, 32, 32), "head_width": 20}


def test_a_classifier_gives_the_trunk_and_the_head():
    torch.manual_seed(0)
    classifier = narrow_vgg16().eval().requires_grad_(False)
    for layer in classifier.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.uniform_(layer.bias, -0.1, 0.1)
            nn.init.kaiming_normal_(layer.weight)
    model = create_model("fcn8s", num_classes=5, **NARROW).eval().requires_grad_(False)
    weights = model.weights_from_classifier(classifier)
    own = model.state_dict()
    assert set(own) - set(weights) == {
        f"{score}.{kind}" for score in ("score_fr", "score_pool4", "score_pool3") for kind in ("weight", "bias")
    }
    assert all(tensor.shape == own[name].shape and not tensor.requires_grad for name, tensor in weights.items())
    model.load_state_dict(weights, strict=False)
    # 26 + 198 = 224: one score, which sees what the classifier sees of the padded image.
    for image in (torch.randn(2, 3, 26, 26), torch.randn(1, 3, 26, 58)):
        fc7 = model.head(model.trunk(image)[-1])
        padded = F.pad(image, (99, 99, 99, 99))
        features = classifier.features(padded)
        for column in range(fc7.shape[3]):
            window = features[..., column : column + 7].flatten(1)
            wanted = classifier.classifier[:5](window).relu()
            assert torch.allclose(fc7[..., 0, column], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [torchvision.models.vgg16, lambda: timm.create_model("vgg16")])
def test_the_libraries_own_vgg16_fit(make):
    with torch.device("meta"):
        classifier, model = make(), create_model("fcn8s", num_classes=21)
    own, weights = model.state_dict(), model.weights_from_classifier(classifier)
    assert len(weights) == 30
    assert all(tensor.shape == own[name].shape for name, tensor in weights.items())


def test_the_first_convolution_is_adapted_to_the_images_channels():
    torch.manual_seed(0)
    classifier = narrow_vgg16()
    grey = create_model("fcn32s", num_classes=2, in_channels=1, **NARROW).weights_from_classifier(classifier)
    assert torch.allclose(grey["conv1_1.weight"], classifier.features[0].weight.sum(1, keepdim=True))
    five = narrow_vgg16(in_channels=5)
    given = create_model("fcn32s", num_classes=2, in_channels=5, **NARROW).weights_from_classifier(five)
    assert torch.equal(given["conv1_1.weight"], five.features[0].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_norm": True}, "another network"),
        ({"configuration": "A"}, "another network"),
        ({"divisor": 32}, "Choose widths"),
        ({"hidden": 24}, "fc6"),
    ],
)
def test_a_classifier_that_does_not_fit_is_refused(options, message):
    model = create_model("fcn32s", num_classes=2, **NARROW)
    with pytest.raises(UsageError, match=message):
        model.weights_from_classifier(narrow_vgg16(**options))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("finest", 4),
        ("upsampling", "nearest"),
        ("widths", (8, 8, 8)),
        ("widths", (8, 8, 8, 8, 0)),
        ("head_width", 0),
        ("dropout", 1.0),
    ],
)
def test_impossible_fields_are_named(field, value):
    with pytest.raises(UsageError, match=f"fcn: {field} must be"):
        FCNConfig(**{field: value})


def test_only_the_finest_is_trained_at_once():
    with pytest.raises(UsageError, match="at_once must be False with finest=16"):
        FCNConfig(finest=16, at_once=True)
