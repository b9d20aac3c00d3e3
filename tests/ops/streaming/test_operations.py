"""Every operation that has a rule, on windows and in stripes, against the same network on the whole image."""

import math
from itertools import pairwise
from pathlib import Path
from tempfile import gettempdir

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pixelwise.ops.streaming.network as network_module
from pixelwise.ops.streaming import NotWindowed, WindowedNetwork
from pixelwise.ops.streaming.memory import SpillFile
from pixelwise.ops.streaming.network import RULES
from pixelwise.ops.streaming.places import UNTAGGED

aten = torch.ops.aten


class Do(nn.Module):
    """A convolution, then an operation, then a convolution, brought back to the size of the image."""

    def __init__(self, operation, channels=4):
        super().__init__()
        self.first, self.operation = nn.Conv2d(3, channels, 3, padding=1), operation

    def forward(self, image):
        y = self.operation(self.first(image))
        return y if y.shape[2:] == image.shape[2:] else F.interpolate(y, size=image.shape[2:], mode="nearest")


class Fill(nn.Module):
    """An operation with constants of its own."""

    def __init__(self, operation, **constants):
        super().__init__()
        self.operation = operation
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.operation(x, *self.buffers())


def lively(model):
    """Random weights and statistics, so that nothing is zero or one by chance of its start."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.5 if parameter.ndim < 2 else (1.5 / parameter[0].numel()) ** 0.5)
    return model.eval()


def whole_pass(model, image):
    with torch.no_grad():
        return model(image[None].clone())[0]


def reader(image):
    """Reads windows, none of them empty or beyond the image."""

    def read(top, left, height, width):
        assert 0 <= top < top + height <= image.shape[1] and 0 <= left < left + width <= image.shape[2]
        return image[:, top : top + height, left : left + width].clone()

    return read


def streamed(network, image, top, left, height, width, stripe_px, spill_file=None):
    place = {"top": top, "left": left, "height": height, "width": width}
    parts = list(network.stripes(reader(image), **place, stripe_px=stripe_px, spill_file=spill_file))
    assert [first for first, _ in parts] == list(range(top, top + height, stripe_px))
    return torch.cat([logits for _, logits in parts], 1)


def check(model, size, windows, step_px=4):
    """Equality of windows (top, left, height, width, stripe_px) with the whole pass."""
    image = torch.randn(3, *size)
    expected = whole_pass(model, image)
    network = WindowedNetwork(model, *size, in_channels=3)
    scale = max(1e-3, float(expected.abs().max()))
    with pytest.MonkeyPatch.context() as patch, SpillFile(Path(gettempdir())) as spill_file:
        patch.setattr(network_module, "LEAST_STEP_PX", step_px)
        patch.setattr(network_module, "_SOON_PX", 0)  # whatever waits at all goes to the spill file, if there is one
        for number, (top, left, height, width, stripe_px) in enumerate(windows):
            found = streamed(
                network, image, top, left, height, width, stripe_px, spill_file if number % 2 == 0 else None
            )
            wanted = expected[:, top : top + height, left : left + width]
            assert found.shape == wanted.shape
            assert float((found - wanted).abs().max()) <= 1e-5 * scale, (top, left, height, width, stripe_px)


@st.composite
def windows_of(draw, height, width, count=3):
    found = [(0, 0, height, width, draw(st.integers(1, height)))]
    for _ in range(count):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        found.append(
            (
                top,
                left,
                draw(st.integers(1, height - top)),
                draw(st.integers(1, width - left)),
                draw(st.integers(1, 12)),
            )
        )
    return found


WINDOWS = [(0, 0, 13, 11, 3), (0, 0, 13, 11, 13), (5, 4, 7, 5, 2), (12, 10, 1, 1, 1), (0, 3, 2, 8, 1)]

UNARY = [
    "abs", "celu", "clone", "contiguous", "cos", "detach", "elu", "erf", "exp", "floor", "gelu", "hardsigmoid", "hardswish",
    "hardtanh", "leaky_relu", "log_sigmoid", "mish", "neg", "relu", "relu6", "selu", "sigmoid", "silu", "sin", "softplus",
    "tanh", "alias",
]  # fmt: skip
POSITIVE = ["log", "log1p", "reciprocal", "rsqrt", "sqrt"]
IN_PLACE = [
    "relu_", "relu6_", "hardtanh_", "hardswish_", "hardsigmoid_", "silu_", "mish_", "leaky_relu_", "elu_", "celu_", "selu_",
    "sigmoid_", "tanh_", "exp_", "gelu_",
]  # fmt: skip


def all_of(*operations):
    return lambda x: torch.cat([operation(x) for operation in operations], 1)


def several(x):
    """Pooled twice as the paths of an inception block are, unpooled and joined."""
    maxima, places = aten.max_pool2d_with_indices(x, [2, 2], [2, 2])
    return aten.max_unpool2d(F.relu(maxima), places, x.shape[2:])


GROUPS = {
    "unary": all_of(*(lambda x, name=name: getattr(aten, name).default(x) for name in UNARY)),
    "positive": all_of(*(lambda x, name=name: getattr(aten, name).default(x.abs() + 0.5) for name in POSITIVE)),
    "in place": all_of(*(lambda x, name=name: getattr(aten, name).default(x * 1.5) for name in IN_PLACE)),
    "in place with numbers": all_of(
        lambda x: (x * 1.0).add_(1.0),
        lambda x: aten.add_.Scalar(x * 1.0, 2),
        lambda x: (x * 1.0).sub_(x),
        lambda x: (x * 1.0).mul_(x),
        lambda x: aten.mul_.Scalar(x * 1.0, 2),
        lambda x: (x * 1.0).div_(2),
        lambda x: (x * 1.0).clamp_(-0.5, 0.5),
        lambda x: (x * 1.0).clamp_min_(0.1),
        lambda x: (x * 1.0).clamp_max_(0.1),
    ),
    "numbers": all_of(
        lambda x: aten.add.Scalar(x, 2),
        lambda x: aten.sub.Scalar(x, 2),
        lambda x: aten.mul.Scalar(x, 2),
        lambda x: aten.div.Scalar(x, 2),
        lambda x: 1 - x,
        lambda x: x.abs() ** 1.5,
        lambda x: x.clamp(-0.5, 0.5),
        lambda x: x.clamp_min(0.1),
        lambda x: x.clamp_max(0.1),
        lambda x: aten.lift_fresh_copy.default(x),
        lambda x: aten.detach_.default(x * 2.0),
    ),
    "two maps": all_of(
        lambda x: x + x.flip(1),
        lambda x: x - 2 * x.flip(1),
        lambda x: x * x.sigmoid(),
        lambda x: x / (x.abs() + 1),
        lambda x: torch.maximum(x, x.flip(1)),
        lambda x: torch.minimum(x, -x),
        lambda x: (x.abs() + 0.1) ** x,
        lambda x: torch.xlogy(x, x.abs() + 0.1),
        lambda x: torch.where(torch.logical_not(aten.eq.Scalar(x.floor(), 0)), x, -x),
        lambda x: torch.add(x, x.tanh(), alpha=0.3),
    ),
    "types": all_of(lambda x: x.double().to(torch.float32), lambda x: aten._to_copy.default(x, dtype=torch.float32)),
    "dropout at rest": all_of(
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.dropout2d(x, 0.5, training=False),
        lambda x: F.alpha_dropout(x, 0.5, training=False),
        lambda x: F.dropout(x * 2, 0.5, training=False, inplace=True),
    ),
    "over channels": all_of(
        lambda x: x.softmax(1),
        lambda x: F.log_softmax(x, -3),
        lambda x: aten._softmax.default(x, 1, False),
        lambda x: aten._log_softmax.default(x, 1, False),
        lambda x: x.sum(1, keepdim=True),
        lambda x: x.mean((1,), keepdim=True),
        lambda x: x.amax(1, keepdim=True),
        lambda x: x.logsumexp(1, keepdim=True),
        lambda x: x.sum(1)[:, None],
        lambda x: F.local_response_norm(x, 3),
    ),
    "parts": all_of(
        lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
        lambda x: torch.cat(x.split(3, 1)[::-1], 1),
        lambda x: torch.cat(x.split([1, 2, 1], 1)[::-1], 1),
        lambda x: x.chunk(2, 1)[0],
    ),
    "axes": all_of(
        lambda x: x.view(1, 2, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
        lambda x: x.unsqueeze(1).squeeze(1),
        lambda x: aten.squeeze.dims(x.unsqueeze(1), [1]),
        lambda x: x.permute(0, 2, 3, 1).cos().permute(0, 3, 1, 2),
        lambda x: F.pad(x.transpose(2, 3), (1, 0, 2, 0)).transpose(2, 3)[:, :, 1:, 2:],
    ),
    "batch": lambda x: torch.cat([x, x.flip(3)], 0).chunk(2, 0)[1] + x,
    "max pooling": all_of(
        lambda x: F.max_pool2d(x, 3, 1, 1), lambda x: F.max_pool2d(x, 2, 1, 1, ceil_mode=True)[..., :-1, :-1]
    ),
    "unpooling": several,
    "average pooling": all_of(
        lambda x: F.avg_pool2d(x, 3, 1, 1),
        lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
        lambda x: F.avg_pool2d(x, (3, 5), 1, (1, 2), divisor_override=2),
    ),
    "padding": all_of(
        lambda x: F.pad(x, (2, 1, 3, 0), value=1.5)[..., 1:-2, 2:-1],
        lambda x: aten.constant_pad_nd.default(x, [0, 0, 1, 0])[:, :, :-1],
        lambda x: F.pad(x, (2, 1, 3, 0), mode="reflect")[..., :-3, :-3],
        lambda x: aten.reflection_pad2d.default(x, [0, 0, 1, 0])[:, :, :-1],
        lambda x: F.pad(x, (2, 1, 3, 0), mode="replicate")[..., :-3, :-3],
        lambda x: aten.replication_pad2d.default(x, [0, 0, 1, 0])[:, :, :-1],
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    ),
    "slices": all_of(
        lambda x: F.pad(x[:, :, 2:-1], (0, 0, 1, 2)),
        lambda x: F.pad(x.narrow(3, 1, 4), (3, x.shape[3] - 7)),
        lambda x: x[:, 1:3],
        lambda x: F.interpolate(x[:, :, ::3, 1::2], size=x.shape[2:]),
        lambda x: x.flip(2),
        lambda x: x.flip((1, 3)),
    ),
    "enlarging": all_of(
        lambda x: F.interpolate(x[..., ::2, ::2], size=x.shape[2:], mode="bilinear"),
        lambda x: F.interpolate(x[..., ::2, ::2], size=x.shape[2:], mode="bilinear", align_corners=True),
        lambda x: aten.upsample_bilinear2d.default(x[..., ::3, ::3], list(x.shape[2:]), False),
        lambda x: aten.upsample_nearest2d.default(x[..., ::3, ::3], list(x.shape[2:])),
        lambda x: F.interpolate(x, scale_factor=4, mode="bilinear")[..., 1::4, 2::4],
        lambda x: F.interpolate(F.interpolate(x, scale_factor=0.7, mode="bilinear"), size=x.shape[2:]),
        lambda x: F.pixel_shuffle(x, 2)[..., 1::2, ::2],
    ),
}  # fmt: skip
MODULES = {
    "conv": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(4, 1), dilation=(1, 2), groups=2),
    "conv same": nn.Conv2d(4, 3, (4, 2), padding="same", bias=False),
    "conv by reflection": nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    "transposed conv": nn.ConvTranspose2d(4, 6, (3, 5), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), groups=2),
    "transposed conv with gaps": nn.ConvTranspose2d(4, 2, (2, 1), stride=4, output_padding=3, dilation=(3, 1)),
    "batch norm": nn.BatchNorm2d(4),
    "prelu": nn.Sequential(nn.PReLU(4), nn.PReLU()),
    "linear": nn.Sequential(
        Fill(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(4), nn.Linear(4, 3), Fill(lambda x: x.permute(0, 3, 1, 2))
    ),
    "index": Fill(
        lambda x, rows, columns: x.index_select(2, rows).index_select(-1, columns).index_select(1, columns[:2]),
        rows=torch.tensor([3, 0, 12, 12, 5]),
        columns=torch.tensor([2, 1, 10, 0]),
    ),
    "constants with places": Fill(
        lambda x, rows, whole: torch.cat(
            [x + rows, x * whole, whole, torch.where(whole > 0, x, 2 * x), (x * 1).add_(rows)], 1
        ),
        rows=torch.linspace(0, 1, 13)[:, None],
        whole=torch.linspace(-1, 1, 4 * 13 * 11).view(1, 4, 13, 11),
    ),
}  # fmt: skip
OF_OTHER_TESTS = {"pixelwise.spatial_dropout.default", "pixelwise.int8_convolution.default"}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("operation", [*GROUPS, *MODULES])
def test_each_operation(operation):
    torch.manual_seed(0)
    model = lively(Do(GROUPS.get(operation) or MODULES[operation]))
    check(model, (13, 11), WINDOWS)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_no_operation_was_left_out():
    known = set()
    for operation in [*GROUPS, *MODULES]:
        model = lively(Do(GROUPS.get(operation) or MODULES[operation]))
        known.update(str(call.op) for call in WindowedNetwork(model, 13, 11, in_channels=3).graph.calls if call)
    assert ({str(op) for op in UNTAGGED} | set(RULES)) - known - OF_OTHER_TESTS == set()


@st.composite
def layers(draw, channels):
    """A layer for maps (1, channels, H, W), and how many channels it gives."""
    two = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, some = draw(two), draw(two), draw(st.integers(1, 4))
    padding = (draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2)))
    flag = draw(st.booleans())
    size = (draw(st.integers(1, 40)), draw(st.integers(1, 40)))
    kinds = {
        "conv": lambda: nn.Conv2d(channels, some, kernel, stride, draw(two), draw(two)),
        "conv by itself": lambda: nn.Conv2d(channels, channels * 2, kernel, padding="same", groups=channels),
        "transposed": lambda: nn.ConvTranspose2d(
            channels, some, kernel, stride, padding, (draw(st.integers(0, stride[0] - 1)), 0)
        ),
        "max": lambda: nn.MaxPool2d(kernel, stride, padding, ceil_mode=flag),
        "average": lambda: nn.AvgPool2d(kernel, stride, padding, ceil_mode=flag, count_include_pad=draw(st.booleans())),
        "unpool": lambda: Unpool(kernel, channels),
        "bilinear": lambda: Fill(lambda x: F.interpolate(x, size, mode="bilinear", align_corners=flag)),
        "nearest": lambda: Fill(lambda x: F.interpolate(x, size)),
        "double": lambda: nn.Upsample(scale_factor=some, mode="bilinear", align_corners=flag),
        "shuffle": lambda: nn.Sequential(nn.Conv2d(channels, 8, 1), nn.PixelShuffle(2)),
        "flip": lambda: Fill(lambda x: x.flip(2 + flag)),
        "pad": lambda: Fill(lambda x: F.pad(x, (some, -1, *padding), value=0.5)),
        "reflect": lambda: Fill(lambda x: F.pad(x, (some, 0, *padding), mode="reflect" if flag else "replicate")),
        "slice": lambda: Fill(lambda x: x[:, :, some:, :: stride[0]]),
        "norm": lambda: nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=flag)),
        "act": lambda: nn.Sequential(nn.PReLU(channels), nn.SiLU(inplace=flag)),
    }
    return kinds[draw(st.sampled_from(sorted(kinds)))]()


class Unpool(nn.Module):
    def __init__(self, kernel, channels):
        super().__init__()
        self.kernel, self.conv = kernel, nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        maxima, places = F.max_pool2d(x, self.kernel, return_indices=True)
        return F.max_unpool2d(self.conv(maxima), places, self.kernel, output_size=x.shape[2:])


class Random(nn.Module):
    """Layers that each take the last map or one before it, and are added to or joined with another of their size."""

    def __init__(self, draw, image, depth):
        super().__init__()
        self.layers, self.plan = nn.ModuleList(), []
        maps = [image]
        for _ in range(depth):
            source = draw(st.sampled_from([len(maps) - 1, draw(st.integers(0, len(maps) - 1))]))
            layer = lively(draw(layers(maps[source].shape[1])))
            try:
                with torch.no_grad():
                    given = layer(maps[source].clone())
            except (RuntimeError, ValueError):  # the map is too small for it
                continue
            alike = [place for place, item in enumerate(maps) if item.shape[2:] == given.shape[2:]]
            other = draw(st.sampled_from([None, *alike]))
            self.layers.append(layer)
            self.plan.append((source, other))
            maps.append(_meet(given, None if other is None else maps[other]))

    def forward(self, image):
        maps = [image]
        for layer, (source, other) in zip(self.layers, self.plan, strict=True):
            taken = maps[source].clone() if source else maps[source] * 1  # in-place layers may change it
            maps.append(_meet(layer(taken), None if other is None else maps[other]))
        last = maps[-1]
        return last if last.shape[2:] == image.shape[2:] else F.interpolate(last, size=image.shape[2:], mode="bilinear")


def _meet(given, other):
    if other is None:
        return given
    return given + other if given.shape == other.shape else torch.cat([given, other], 1)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data())
def test_random_networks_are_exact(data):
    height, width = data.draw(st.integers(1, 34)), data.draw(st.integers(1, 34))
    torch.manual_seed(data.draw(st.integers(0, 100)))
    model = Random(data.draw, torch.randn(1, 3, height, width), data.draw(st.integers(1, 9)))
    check(model, (height, width), data.draw(windows_of(height, width)), step_px=data.draw(st.sampled_from([1, 3, 32])))


class Skips(nn.Module):
    """Skips of other columns, one of which ends early: what is left of a map's rows is narrowed twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(channels, 4, 3, padding=1) for channels in (3, 4, 4))

    def forward(self, image):
        x = self.first(image)
        early = F.pad(x[:, :, :150, 60:70], (60, 10, 0, 250))
        middle = self._up(self.second(x)) + F.pad(x[..., :30], (0, 50))
        return self.third(self._up(middle)) + F.pad(x[..., 20:30], (20, 50)) + early

    def _up(self, x):
        return F.pad(x[:, :, 50:], (0, 0, 0, 50))


def test_rows_that_are_narrowed_twice():
    check(Skips(), (400, 80), [(0, 0, 400, 80, 8), (0, 0, 400, 80, 8)])


class Refused(nn.Module):
    def __init__(self, operation, *modules):
        super().__init__()
        self.conv, self.operation, self.others = nn.Conv2d(3, 4, 3, padding=1), operation, nn.ModuleList(modules)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, image):
        return self.operation(self, self.conv(image))


def attention(self, x):
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).view(x.shape)


def changed_view(self, x):
    y = x * 1.0
    y[:, :1].mul_(2)
    return y


def old_name(self, x):
    y = x * 1.0
    before = y.view(y.shape)
    return y.relu_() + before


def set_row(self, x):
    y = x * 1.0
    y[:, :, 0] = 0
    return y


def counted(self, x):
    self.count.add_(1)
    return x * self.count


def constant_changed_later(self, x):
    table = torch.ones(4, 1, 1, device=x.device)
    y = x + table
    return y * table.add_(1)


REFUSED = {
    "global mean": (lambda self, x: x * x.mean((2, 3), keepdim=True), "aten.mean.dim"),
    "mean over rows": (lambda self, x: x * x.mean(2, keepdim=True), "aten.mean.dim"),
    "mean of all": (lambda self, x: x * x.mean(), "aten.mean.default"),
    "global maximum": (lambda self, x: x * x.amax((2, 3), keepdim=True), "aten.amax.default"),
    "softmax over columns": (lambda self, x: x.softmax(3), "aten.softmax.int"),
    "pooling to a size": (lambda self, x: x * F.adaptive_avg_pool2d(x, 1), "adaptive_avg_pool2d"),
    "attention": (attention, "aten.flatten|aten.view|aten.reshape"),
    "matrix of columns": (lambda self, x: F.linear(x, self.others[0].weight), "aten.linear"),
    "group norm": (lambda self, x: F.group_norm(x, 2), "aten.group_norm"),
    "instance norm": (lambda self, x: F.instance_norm(x), "aten.instance_norm"),
    "layer norm over columns": (lambda self, x: F.layer_norm(x, (9,)), "aten.layer_norm"),
    "unknown": (lambda self, x: torch.special.i0(x), "aten.special_i0"),
    "bicubic": (lambda self, x: F.interpolate(x, size=(9, 9), mode="bicubic"), "bicubic"),
    "wrapped around": (lambda self, x: F.pad(x, (1, 0, 0, 0), mode="circular")[..., :-1], "aten.pad.default.*circular"),
    "rolled": (lambda self, x: x.roll(1, 2), "aten.roll"),
    "beside each other": (lambda self, x: torch.cat([x[:, :, :4], x[:, :, 4:]], 2), "aten.cat.default"),
    "weights of the image": (lambda self, x: F.conv2d(x, x[:, :, :3, :3]), "aten.conv2d"),
    "sorted": (lambda self, x: x.sort(1)[0], "aten.sort"),
    "places that were moved": (
        lambda self, x: F.max_unpool2d(*(y.flip(1) for y in F.max_pool2d(x, 3, return_indices=True)), 3),
        "max_unpool2d",
    ),
    "overlapping unpooling": (
        lambda self, x: F.max_unpool2d(*F.max_pool2d(x, 3, 1, 1, return_indices=True), 3, 1, 1),
        "max_unpool2d",
    ),
    "scale beside the size": (
        lambda self, x: F.interpolate(x, scale_factor=1.05, mode="bilinear"),
        "upsample_bilinear2d",
    ),
    "a view changed": (changed_view, "aten.mul_"),
    "an old name": (old_name, "aten.relu_"),
    "a row set": (set_row, "aten.(copy_|fill_|select)"),
    "calls counted": (counted, "aten.add_"),
    "a constant changed later": (constant_changed_later, "aten.add_"),
    "the content asked for": (lambda self, x: x if float(x.max()) > 0 else -x, "torch.export"),
    "another size": (lambda self, x: x[:, :, :5], "the network gives"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_more_than_windows_is_refused_by_name(case):
    operation, name = REFUSED[case]
    model = Refused(operation, nn.Linear(9, 9)).eval()
    with pytest.raises(NotWindowed, match=name):
        WindowedNetwork(model, 9, 9, in_channels=3)
    assert float(model.count) == 0


@pytest.mark.parametrize(
    ("layer", "name"), [(nn.BatchNorm2d(4), "batch_norm"), (nn.Dropout(0.5), "dropout"), (nn.Dropout2d(), "dropout")]
)
def test_layers_in_training_are_refused(layer, name):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.ConvTranspose2d(4, 2, 3)).eval()
    WindowedNetwork(model, 9, 9, in_channels=3)
    layer.train()
    with pytest.raises(NotWindowed, match=name):
        WindowedNetwork(model, 9, 9, in_channels=3)


def test_several_results_are_refused():
    class Two(nn.Module):
        def forward(self, image):
            return image, image * 2

    with pytest.raises(NotWindowed, match="one map"):
        WindowedNetwork(Two(), 9, 9, in_channels=3)


def test_what_is_not_used_does_not_matter():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3, padding=1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, image):
            self.calls.add_(1)  # nobody looks at it
            self.conv(image).abs()
            return self.conv(image.float())

    model = lively(Idle())
    network = WindowedNetwork(model, 8, 9, in_channels=3)
    assert float(model.calls) == 0 and len(network.graph.calls) <= 3
    check(model, (8, 9), [(0, 0, 8, 9, 3)])


def test_the_network_and_the_image_stay_as_they_are():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, image):
            y = image.mul_(2)
            return F.relu_(self.conv(y)) + y

    model = lively(Careless())
    image = torch.randn(3, 20, 7)
    kept, weights = image.clone(), model.conv.weight.clone()
    read = lambda top, left, height, width: image[:, top : top + height, left : left + width]  # noqa: E731
    network = WindowedNetwork(model, 20, 7, in_channels=3)
    found = torch.cat([part for _, part in network.stripes(read, top=0, left=0, height=20, width=7, stripe_px=3)], 1)
    assert torch.equal(image, kept) and torch.equal(model.conv.weight, weights)
    assert torch.allclose(found, whole_pass(model, image), atol=1e-5)


def test_weights_are_shared_not_copied():
    model = lively(nn.Sequential(nn.Conv2d(3, 2, 3, padding=1)))
    network, image = WindowedNetwork(model, 6, 6, in_channels=3), torch.randn(3, 6, 6)
    model[0].weight.data.mul_(3)
    assert torch.allclose(streamed(network, image, 0, 0, 6, 6, 2), whole_pass(model, image), atol=1e-5)


def test_only_the_pixels_that_count_are_read():
    model = lively(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3, padding=1), nn.Upsample(scale_factor=2)
        )
    )
    network, image = WindowedNetwork(model, 40, 40, in_channels=3), torch.randn(3, 40, 40)
    expected = whole_pass(model, image)
    blind = torch.full_like(image, math.nan)
    blind[:, 13:25, 5:17] = image[:, 13:25, 5:17]  # 16 ... 21: cells 8 ... 10, so 7 ... 11, so 14 ... 23, so 13 ... 24
    found = streamed(network, blind, 16, 8, 6, 6, 6)
    assert torch.allclose(found, expected[:, 16:22, 8:14], atol=1e-5)


def test_rows_are_read_once_and_in_order():
    model = lively(
        nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.MaxPool2d(4), nn.Upsample(scale_factor=4, mode="bilinear"))
    )
    network, image, seen = WindowedNetwork(model, 64, 8, in_channels=3), torch.randn(3, 64, 8), []

    def read(top, left, height, width):
        seen.append((top, top + height))
        return reader(image)(top, left, height, width)

    list(network.stripes(read, top=0, left=0, height=64, width=8, stripe_px=5))
    assert seen[0][0] == 0 and seen[-1][1] == 64
    assert all(stop == start for (_, stop), (start, _) in pairwise(seen))
