import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torch.fx.experimental import _config as symbolic_shapes

from pixelwise.errors import UsageError
from pixelwise.models import count_parameters, create_model, describe_model
from pixelwise.models.fcdensenet import DenseLayer, FCDenseNet, FCDenseNetConfig
from pixelwise.ops.batch_statistics import batch_statistics


@pytest.mark.parametrize(
    ("depth", "parameters"),
    [
        (56, {11: 1_376_795, 12: 1_376_988, 8: 1_376_216, 1: 1_374_865, 2: 1_375_058}),
        (67, {11: 3_463_243, 12: 3_463_532, 8: 3_462_376, 1: 3_460_353, 2: 3_460_642}),
        (103, {11: 9_322_091, 12: 9_322_348, 8: 9_321_320, 1: 9_319_521, 2: 9_319_778}),
    ],
)
def test_parameters_of_the_paper(depth, parameters):
    row = describe_model(f"fcdensenet{depth}")
    assert row["parameters"] == parameters[11] and row["stride"] == 32
    model, _ = walk(depth)
    for num_classes, wanted in parameters.items():  # a class is a row of the score
        assert count_parameters(model) + (num_classes - 11) * (model.score.in_channels + 1) == wanted
    # The number in the name counts convolutions, the transposed ones too.
    assert sum(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in model.modules()) == depth
    # The authors' framework counts running averages as parameters: the paper's 9.4 million (1,397,963 and 3,502,923).
    averages = sum(2 * norm.num_features for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    lasagne = {56: 1_397_963, 67: 3_502_923, 103: 9_425_163}
    assert count_parameters(model) + averages == lasagne[depth]


@functools.cache
def walk(depth):
    """(in, out) shapes without the batch of each block and transition of a pass at 360x480."""
    seen = {}
    with torch.device("meta"):
        model = create_model(f"fcdensenet{depth}", num_classes=11).eval()
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda _module, args, out, name=name: seen.update(
                    {name: (tuple(args[0].shape[1:]), tuple(out.shape[1:]))}
                )
            )
        model(torch.zeros(1, 3, 360, 480))
    return model, seen


SIZES = [(360, 480), (180, 240), (90, 120), (45, 60), (22, 30), (11, 15)]


def test_the_blocks_of_fcdensenet103():
    model, seen = walk(103)
    assert count_parameters(model.first) == 1_344 and seen["first"][1] == (48, 360, 480)
    down = [(42_112, 12_880, 112), (105_200, 37_440, 192), (245_392, 93_328, 304)]
    down += [(549_120, 216_688, 464), (967_296, 432_304, 656)]
    for level, (block, transition, maps) in enumerate(down):
        assert count_parameters(model.down[level]) == block
        assert count_parameters(model.transitions_down[level]) == transition
        assert seen[f"down.{level}"][1] == (maps, *SIZES[level])  # the input and the new maps
        assert seen[f"transitions_down.{level}"][1] == (maps, *SIZES[level + 1])  # 45 rows are pooled to 22
    assert count_parameters(model.bottleneck) == 1_682_160
    assert seen["bottleneck"] == ((656, 11, 15), (240, 11, 15))  # 240 new maps of 896
    up = [
        (518_640, 240, (23, 31), 1_724_160, 896, 192),
        (331_968, 192, (45, 61), 1_063_040, 656, 160),
        (230_560, 160, (91, 121), 523_376, 464, 112),
        (113_008, 112, (181, 241), 245_360, 304, 80),
        (57_680, 80, (361, 481), 126_208, 192, 256),  # the last block hands all its maps to the score
    ]
    for level, (transition, maps, raw, block, maps_in, maps_out) in enumerate(up):
        size = SIZES[4 - level]
        assert count_parameters(model.transitions_up[level]) == transition
        assert seen[f"transitions_up.{level}"] == ((maps, *SIZES[5 - level]), (maps, *raw))
        assert count_parameters(model.up[level]) == block
        assert seen[f"up.{level}"] == ((maps_in, *size), (maps_out, *size))
    assert count_parameters(model.score) == 2_827 and seen["score"] == ((256, 360, 480), (11, 360, 480))


@pytest.mark.parametrize(
    ("depth", "down", "bottleneck", "up"),
    [
        (56, [96, 144, 192, 240, 288], 336, [384, 336, 288, 240, 192]),
        (67, [128, 208, 288, 368, 448], 528, [608, 528, 448, 368, 288]),
        (103, [112, 192, 304, 464, 656], 896, [1088, 816, 576, 384, 256]),
    ],
)
def test_maps_of_each_block(depth, down, bottleneck, up):
    """The numbers m of table 2 (with 576 for the misprint 578): all maps that a block holds at its end."""
    model, seen = walk(depth)
    growth = model.config.growth

    def held(name, block):
        return seen[name][0][0] + len(block.layers) * growth

    assert [held(f"down.{level}", block) for level, block in enumerate(model.down)] == down
    assert held("bottleneck", model.bottleneck) == bottleneck
    assert [held(f"up.{level}", block) for level, block in enumerate(model.up)] == up
    assert [seen[f"up.{level}"][1][0] for level in range(4)] == [len(block.layers) * growth for block in model.up[:4]]
    assert seen["up.4"][1][0] == up[-1]


def reference(state, image, layers, by_batch=False):
    """The authors' layer list in plain functions over the stack; no dropout."""

    def layer(name, x, padding):
        mean, var = state[f"{name}.norm.running_mean"], state[f"{name}.norm.running_var"]
        if by_batch:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-4)
        x = x * state[f"{name}.norm.weight"][:, None, None] + state[f"{name}.norm.bias"][:, None, None]
        return F.conv2d(x.clamp(min=0), state[f"{name}.conv.weight"], state[f"{name}.conv.bias"], padding=padding)

    def grow(name, stack, count):
        new = []
        for index in range(count):
            new.append(layer(f"{name}.layers.{index}", stack, 1))
            stack = torch.cat([stack, new[-1]], 1)
        return stack, torch.cat(new, 1)

    pools = len(layers) // 2
    stack, skips = F.conv2d(image, state["first.weight"], state["first.bias"], padding=1), []
    for level in range(pools):
        stack, _ = grow(f"down.{level}", stack, layers[level])
        skips.append(stack)
        stack = F.max_pool2d(layer(f"transitions_down.{level}.0", stack, 0), 2)
    _, new = grow("bottleneck", stack, layers[pools])
    for level in range(pools):
        weight, bias = state[f"transitions_up.{level}.weight"], state[f"transitions_up.{level}.bias"]
        up, skip = F.conv_transpose2d(new, weight, bias, stride=2), skips.pop()
        top, left = ((a - b) // 2 for a, b in zip(up.shape[-2:], skip.shape[-2:], strict=True))  # from the centre
        up = up[..., top : top + skip.shape[-2], left : left + skip.shape[-1]]
        stack, new = grow(f"up.{level}", torch.cat([up, skip], 1), layers[pools + 1 + level])
    return F.conv2d(stack, state["score.weight"], state["score.bias"])


LAYERS = (1, 2, 3, 1, 2, 4, 2, 1, 3, 2, 1)


def small(**options):
    """All norms with averages and weights of their own."""
    torch.manual_seed(0)
    fields = {"num_classes": 3, "growth": 4, "layers": LAYERS, "first_width": 8, **options}
    model = FCDenseNet(FCDenseNetConfig(**fields))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(32, 32), (45, 70), (63, 33), (64, 96), (90, 111)])
def test_logits_equal_a_reference(size):
    model, image = small(), torch.randn(2, 3, *size)
    assert torch.allclose(model(image), reference(model.state_dict(), image, LAYERS), atol=1e-5)


def test_batch_statistics_equal_a_reference():
    model, image = small(), torch.randn(3, 3, 64, 70)
    with batch_statistics(model):
        logits = model(image)
    assert torch.allclose(logits, reference(model.state_dict(), image, LAYERS, by_batch=True), atol=1e-4)
    assert not torch.allclose(logits, model(image), atol=1e-2)


@pytest.mark.parametrize("size", [(1, 1), (31, 40), (50, 7)])
def test_only_sides_that_cannot_be_pooled_are_padded(size):
    model, image = small(), torch.randn(1, 3, *size)
    below, right = (max(32 - length, 0) for length in size)
    padded = F.pad(image, (0, right, 0, below), mode="replicate")
    wanted = reference(model.state_dict(), padded, LAYERS)[..., : size[0], : size[1]]
    assert torch.allclose(model(image), wanted, atol=1e-5)


def test_exported_once_for_all_sizes():
    model = small(layers=(1,) * 11)
    sizes = {2: Dim("height", min=2, max=4096), 3: Dim("width", min=2, max=4096)}
    # A map may be one cell high or wide, which torch else takes for a different case.
    with symbolic_shapes.patch(backed_size_oblivious=True):
        exported = torch.export.export(model, (torch.randn(1, 3, 45, 70),), dynamic_shapes={"image": sizes}).module()
    for size in ((45, 70), (20, 129), (64, 32)):
        image = torch.randn(1, 3, *size)
        assert torch.allclose(exported(image), model(image), atol=1e-5)


def test_weights_start_uniform_after_he():
    torch.manual_seed(0)
    model = FCDenseNet(FCDenseNetConfig(growth=16, layers=(4, 4, 4)))
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            continue
        fan_in = layer.in_channels * math.prod(layer.kernel_size)
        bound = math.sqrt(6 / fan_in)
        assert layer.weight.abs().max() <= bound, name
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
        assert (layer.bias == 0).all(), name
    assert {norm.eps for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)} == {1e-4}


def test_dropout_follows_each_dense_and_down_convolution_element_by_element():
    model, _ = walk(103)
    layers = [module for module in model.modules() if isinstance(module, DenseLayer)]
    assert len(layers) == sum(model.config.layers) + 5
    shares = [module.p for module in model.modules() if type(module) is nn.Dropout]
    assert shares == [0.2] * len(layers)
    layer = DenseLayer(2, 3, 1, FCDenseNetConfig(dropout=0.5))
    out = layer(torch.randn(1, 2, 16, 16))
    assert 0.3 < (out == 0).float().mean() < 0.7 and not (out == 0).all((2, 3)).any()


def trained(model, image, backward_passes=1):
    """Logits, gradients, state and the next random number after one pass; the same seed each time."""
    model = copy.deepcopy(model).requires_grad_(True).train()
    torch.manual_seed(1)
    logits = model(image)
    for left in reversed(range(backward_passes)):
        model.zero_grad()
        logits.square().mean().backward(retain_graph=left > 0)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), grads, model.state_dict(), torch.rand(3)


@pytest.mark.parametrize("backward_passes", [1, 2])
def test_recomputing_gives_the_same_results(backward_passes):
    image = torch.randn(2, 3, 40, 64)
    plain, thrifty = small(), small(memory_efficient=True)
    logits, grads, state, after = trained(plain, image)
    logits2, grads2, state2, after2 = trained(thrifty, image, backward_passes)
    assert torch.equal(logits, logits2) and torch.equal(after, after2)  # so dropout drew the same numbers
    for name, grad in grads.items():
        assert grad.abs().max() > 0, name
        assert torch.allclose(grad, grads2[name], rtol=1e-5, atol=1e-7), name
    assert all(torch.equal(value, state2[name]) for name, value in state.items())  # averages are updated once
    assert state["down.0.layers.0.norm.num_batches_tracked"] == 1
    assert torch.equal(plain(image), thrifty(image))


def kept_bytes(model, image):
    """What the graph of one training pass holds on to: what it saved, and the maps that recomputing starts from."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    def keep_all(_module, tensors):
        for tensor in tensors:
            keep(tensor)

    for layer in model.modules():
        if isinstance(layer, DenseLayer):
            layer.register_forward_pre_hook(keep_all)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.requires_grad_(True).train()(image)
    return sum(storage.nbytes() for storage in storages.values())


def test_recomputing_keeps_less():
    layers, image = (6,) * 5, torch.randn(1, 3, 64, 64)
    assert kept_bytes(small(layers=layers, memory_efficient=True), image) < 0.3 * kept_bytes(
        small(layers=layers), image
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("layers", (2, 2)), ("layers", (2, 0, 2)), ("layers", ()), ("growth", 0), ("first_width", 0), ("dropout", 1.0)],
)
def test_impossible_configurations_are_refused(field, value):
    with pytest.raises(UsageError, match=f"fcdensenet: {field} must be"):
        FCDenseNetConfig(**{field: value})
