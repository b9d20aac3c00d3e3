import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import create_model, describe_model
from pixelwise.models.enet import Bottleneck, ENetConfig


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters", "of_a_class"),
    [("enet", 11, 363_791, 65), ("enet_encoder", 12, 339_704, 129)],
)
def test_parameters_of_the_paper(name, num_classes, parameters, of_a_class):
    row = describe_model(name, num_classes=num_classes)
    assert row["parameters"] == parameters and row["stride"] == 8
    counts = {"enet": {12: 363_856, 19: 364_311, 20: 364_376}, "enet_encoder": {11: 339_575, 19: 340_607, 20: 340_736}}
    for other, wanted in counts[name].items():
        assert parameters + (other - num_classes) * of_a_class == wanted


def test_the_levels_at_360x480():
    seen = {}
    with torch.device("meta"):
        model = create_model("enet", num_classes=11).eval()
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda _module, _args, out, name=name: seen.update({name: out[0] if isinstance(out, tuple) else out})
            )
        model(torch.zeros(1, 3, 360, 480))
    shapes = {name: tuple(out.shape[1:]) for name, out in seen.items()}
    table = {
        "encoder.initial.conv": (13, 180, 240),
        "encoder.initial": (16, 180, 240),
        "encoder.down1": (64, 90, 120),
        "encoder.stage1": (64, 90, 120),
        "encoder.down2": (128, 45, 60),
        "encoder.stage2": (128, 45, 60),
        "encoder.stage3": (128, 45, 60),
        "up4": (64, 90, 120),
        "stage4": (64, 90, 120),
        "up5": (16, 180, 240),
        "stage5": (16, 180, 240),
        "score": (11, 360, 480),
    }
    assert {name: shapes[name] for name in table} == table


# Table 1: the kernels and dilation in the middle of each bottleneck of stage 2, and again of stage 3.
CONTEXT = [
    [((3, 3), 1)],
    [((3, 3), 2)],
    [((1, 5), 1), ((5, 1), 1)],
    [((3, 3), 4)],
    [((3, 3), 1)],
    [((3, 3), 8)],
    [((1, 5), 1), ((5, 1), 1)],
    [((3, 3), 16)],
]


def test_the_bottlenecks_of_table_1():
    with torch.device("meta"):
        model = create_model("enet", num_classes=11)
    for stage in (model.encoder.stage2, model.encoder.stage3):
        middles = [[layer for layer in block.branch if isinstance(layer, nn.Conv2d)][1:-1] for block in stage]
        assert [[(conv.kernel_size, conv.dilation[0]) for conv in middle] for middle in middles] == CONTEXT
    assert [len(model.encoder.stage1), len(model.stage4)] == [4, 2] and isinstance(model.stage5, Bottleneck)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.eps == 1e-3


def test_activations_dropout_and_biases_stand_where_the_authors_put_them():
    with torch.device("meta"):
        model = create_model("enet", num_classes=11)
    kinds = {name: type(module) for name, module in model.named_modules()}
    prelus = [name for name, kind in kinds.items() if kind is nn.PReLU]
    assert len(prelus) == 1 + 3 * (2 + 4 + 16) and all(name.startswith("encoder.") for name in prelus)
    assert not any(kind is nn.ReLU for name, kind in kinds.items() if name.startswith("encoder."))
    assert all(module.num_parameters > 1 for module in model.modules() if isinstance(module, nn.PReLU))
    dropout = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout2d)}
    assert list(dropout.values()) == [0.01] * 5 + [0.1] * 17
    assert all(name.startswith("encoder.") for name in dropout)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            is_3x3 = module.kernel_size == (3, 3)
            assert (module.bias is not None) == (is_3x3 or module.kernel_size == (5, 1) or name == "score"), name


def reference(state, image):
    """encoder.lua and decoder.lua in plain functions, in evaluation."""

    def norm(name, x):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-3)

    def activate(name, x):
        if f"{name}.weight" not in state:
            return x.clamp(min=0)
        return torch.where(x > 0, x, x * state[f"{name}.weight"][:, None, None])

    def conv(name, x, function=F.conv2d, **geometry):
        return function(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **geometry)

    def branch(name, x, middle, step=1):
        x = activate(f"{name}.2", norm(f"{name}.1", conv(f"{name}.0", x, stride=step)))
        for index, geometry in enumerate(middle, start=3):
            x = conv(f"{name}.{index}", x, **geometry)
        last = 3 + len(middle)
        x = activate(f"{name}.{last + 1}", norm(f"{name}.{last}", x))
        return norm(f"{name}.{last + 3}", conv(f"{name}.{last + 2}", x))

    def plain(dilation=1):
        return [{"padding": dilation, "dilation": dilation}]

    def bottleneck(name, x, middle=None):
        return activate(f"{name}.activation", x + branch(f"{name}.branch", x, middle or plain()))

    def down(name, x):
        maxima, places = F.max_pool2d(x, 2, 2, return_indices=True)
        out = branch(f"{name}.branch", x, plain(), step=2)
        out[:, : maxima.shape[1]] += maxima  # the other maps of the shortcut are zeros
        return activate(f"{name}.activation", out), places

    def up(name, x, places):
        shortcut = norm(f"{name}.shortcut.1", conv(f"{name}.shortcut.0", x))
        shortcut = F.max_unpool2d(shortcut, places, 2)
        middle = [{"function": F.conv_transpose2d, "stride": 2, "padding": 1, "output_padding": 1}]
        return (branch(f"{name}.branch", x, middle) + shortcut).clamp(min=0)

    x = torch.cat([conv("encoder.initial.conv", image, stride=2, padding=1), F.max_pool2d(image, 2)], 1)
    x = activate("encoder.initial.activation", norm("encoder.initial.norm", x))
    x, first = down("encoder.down1", x)
    for index in range(4):
        x = bottleneck(f"encoder.stage1.{index}", x)
    x, second = down("encoder.down2", x)
    row = [{"padding": (0, 2)}, {"padding": (2, 0)}]
    for stage in ("stage2", "stage3"):
        for index, middle in enumerate((plain(), plain(2), row, plain(4), plain(), plain(8), row, plain(16))):
            x = bottleneck(f"encoder.{stage}.{index}", x, middle)
    if "classifier.weight" in state:
        return conv("classifier", x)
    x = up("up4", x, second)
    for index in range(2):
        x = bottleneck(f"stage4.{index}", x)
    x = bottleneck("stage5", up("up5", x, first))
    return conv("score", x, F.conv_transpose2d, stride=2)


def small(name, **options):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, **{"widths": (8, 12, 16), **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.1, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -0.5, 0.5)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(24, 40), (64, 48)])
@pytest.mark.parametrize("options", [{}, {"widths": (16, 64, 128)}])
def test_logits_equal_a_reference(size, options):
    model, image = small("enet", **options), torch.randn(2, 3, *size)
    wanted = reference(model.state_dict(), image)
    assert wanted.std() > 0.01
    assert torch.allclose(model(image), wanted, atol=1e-5)


def test_the_encoder_scores_a_grid_of_8_px_and_starts_the_whole_network():
    first, image = small("enet_encoder"), torch.randn(2, 3, 21, 30)
    padded = F.pad(image, (0, 2, 0, 3), mode="replicate")
    scores = reference(first.state_dict(), padded)
    assert scores.shape == (2, 3, 3, 4)
    assert torch.allclose(first.score_grid(image), scores, atol=1e-5)
    wanted = F.interpolate(scores, size=(24, 32), mode="bilinear", align_corners=False)[..., :21, :30]
    assert torch.allclose(first(image), wanted, atol=1e-5)
    second = small("enet")
    missing, unexpected = second.load_state_dict(first.state_dict(), strict=False)
    assert unexpected == ["classifier.weight", "classifier.bias"]
    assert not any(name.startswith("encoder.") for name in missing)


def test_other_sizes_are_the_padded_image_cut():
    model, image = small("enet"), torch.randn(1, 3, 21, 30)
    padded = F.pad(image, (0, 2, 0, 3), mode="replicate")
    assert torch.allclose(model(image), reference(model.state_dict(), padded)[..., :21, :30], atol=1e-5)


@pytest.mark.parametrize(("in_channels", "convolved", "pooled"), [(1, 15, 1), (2, 14, 2), (3, 13, 3), (7, 13, 3)])
def test_the_initial_block_has_16_maps_whatever_the_channels(in_channels, convolved, pooled):
    block = create_model("enet", num_classes=2, in_channels=in_channels).encoder.initial.eval()
    assert block.conv.out_channels == convolved
    image = torch.rand(1, in_channels, 8, 6)
    maps = block(image)
    assert maps.shape == (1, 16, 4, 3)
    scale = (1 + 1e-3) ** -0.5  # of a norm with fresh averages; the image is positive, so PReLU keeps it
    assert torch.allclose(maps[:, convolved:], F.max_pool2d(image[:, :pooled], 2) * scale, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("widths", (16, 64)),
        ("widths", (16, 66, 128)),
        ("widths", (64, 16, 128)),
        ("widths", (0, 64, 128)),
        ("dropout", (0.1,)),
        ("dropout", (0.1, 1.0)),
    ],
)
def test_impossible_configurations_are_refused(field, value):
    with pytest.raises(UsageError, match=f"enet: {field} must be"):
        ENetConfig(**{field: value})
