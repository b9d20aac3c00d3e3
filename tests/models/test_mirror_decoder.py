"""The rule on small networks made for it: with tied weights and without norms, the mirror image is the exact adjoint."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models.mirror_chain import Chain
from pixelwise.models.mirror_decoder import Level, plan


def conv(channels, width, kernel=3, stride=1, **options):
    return nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False, **options)


class Residual(nn.Module):
    def __init__(self, channels, width, stride, norm=nn.Identity, act=nn.Identity):
        super().__init__()
        self.one, self.norm_one, self.act_one = conv(channels, width, 3, stride), norm(width), act()
        self.two, self.norm_two, self.act_two = conv(width, width), norm(width), act()
        self.shortcut = conv(channels, width, 3, stride)

    def forward(self, x):
        y = self.norm_two(self.two(self.act_one(self.norm_one(self.one(x)))))
        return self.act_two(y + self.shortcut(x))


class Dense(nn.Module):
    def __init__(self, channels, growth, layers):
        super().__init__()
        self.layers = nn.ModuleList(conv(channels + index * growth, growth) for index in range(layers))

    def forward(self, x):
        maps = [x]
        for layer in self.layers:
            maps.append(layer(torch.cat(maps, 1)))
        return torch.cat(maps, 1)


class Inception(nn.Module):
    """Ways that fork inside, meet partly, and shrink the map by a convolution and by a pooling."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(8, 6, 1), conv(6, 4, 3, 2), conv(6, 4, 5, 2)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x):
        inner = self.a(x)
        return torch.cat([self.b(inner) + self.c(inner), F.avg_pool2d(x, 2), self.pool(inner)], 1)


def mirror_of(network, num_classes=3):
    chain = Chain(network, (3, 32, 64), "toy")
    level = Level(chain, chain.image, {}, num_classes)
    steps = plan(chain)
    x = level.x
    for step in steps:
        x = level.write(step, x)
    return level.module(x), chain, steps


def tie(decoder, network):
    layers = dict(decoder.named_modules())
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            weight, other = layer.weight, layers[path]
            if isinstance(other, nn.Conv2d):
                weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
            other.weight.data.copy_(weight)
    for layer in layers.values():
        if (
            isinstance(layer, nn.ConvTranspose2d)
            and layer.groups == layer.in_channels > 1
            and layer.kernel_size == (2, 2)
        ):
            layer.weight.data.fill_(0.25)  # of an average of four


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(conv(3, 8), conv(8, 8, 5, 2, groups=4), conv(8, 6, 1)),
        nn.Sequential(conv(3, 8, 7, 2), Residual(8, 6, 2), Residual(6, 10, 1)),
        nn.Sequential(conv(3, 8), Dense(8, 3, 5), nn.AvgPool2d(2), Dense(23, 2, 3)),
        nn.Sequential(nn.Conv2d(3, 8, 4, 4, bias=False), Inception(), conv(18, 4)),
        nn.Sequential(Residual(3, 6, 2), Residual(6, 8, 2)),
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), conv(8, 8), nn.Conv2d(8, 4, 5, bias=False)),
    ],
    ids=["chain", "residual", "dense", "inception", "ways first", "unpadded"],
)
def test_forks_sums_and_concatenations_are_turned_round(network):
    torch.manual_seed(0)
    network = network.double()
    decoder, *_ = mirror_of(network)
    decoder.double()
    tie(decoder, network)
    x = torch.randn(2, 3, 32, 64, dtype=torch.float64)
    out = network(x)
    y = torch.randn_like(out)
    back = decoder(y, x)
    assert back.shape == x.shape
    assert torch.allclose((out * y).sum(), (x * back).sum(), rtol=1e-9)


def names_of(decoder):
    return [str(node.target) for node in decoder.graph.nodes if node.op == "call_module"]


def test_norms_and_activations_keep_their_place_behind_the_convolution():
    network = nn.Sequential(
        *(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU()),
        *(conv(8, 16), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(conv(16, 24), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    )
    decoder, *_ = mirror_of(network)
    # The last map's norm and activation (8, 9) are not repeated; the scorer (0) has none.
    assert names_of(decoder) == ["10", "7", "4", "5", "6", "3", "1", "2", "0"]
    assert (decoder.get_submodule("4").num_features, decoder.get_submodule("1").num_features) == (16, 8)


def test_norms_and_activations_keep_their_place_in_front_of_the_convolution():
    class Before(nn.Sequential):
        """Norm, activation, convolution; pooled (DenseNet's transition)."""

    transition = Before(nn.BatchNorm2d(14), nn.ReLU(), conv(14, 10), nn.AvgPool2d(2))
    decoder, *_ = mirror_of(nn.Sequential(conv(3, 8), Dense(8, 2, 3), transition, Dense(10, 2, 2)))
    names = names_of(decoder)
    assert [name for name in names if name.startswith("2.")] == ["2.0", "2.1", "2.3", "2.2"]
    assert decoder.get_submodule("2.0").num_features == 10


def test_a_residual_block_stays_one():
    network = nn.Sequential(conv(3, 8), Residual(8, 16, 2, nn.BatchNorm2d, nn.ReLU))
    decoder, *_ = mirror_of(network)
    assert names_of(decoder) == [
        *("1.shortcut", "1.two", "1.norm_one", "1.act_one", "1.one", "1.norm_two", "1.act_two", "0")
    ]
    widths = [decoder.get_submodule(f"1.{name}").num_features for name in ("norm_one", "norm_two")]
    assert widths == [16, 8]


def test_a_block_that_keeps_its_map_is_a_fresh_one():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = conv(8, 8), nn.ReLU(inplace=True)

        def forward(self, x):
            return x + self.act(self.conv(x))

    network = nn.Sequential(conv(3, 8), nn.Sequential(Keeps(), Keeps()))
    decoder, chain, _ = mirror_of(network)
    assert [part.kind for part in chain.parts] == ["conv", "block", "block"]
    assert names_of(decoder) == ["1.1", "1.0", "0"]
    assert type(decoder.get_submodule("1.0")) is Keeps


def test_a_gate_stays_on_its_map():
    class Gate(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.fc = nn.Conv2d(channels, channels, 1)

        def forward(self, x):
            return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()

    network = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12), nn.ReLU(), Gate(12), conv(12, 6))
    decoder, *_ = mirror_of(network)
    assert names_of(decoder) == ["5", "3", "4", "2", "1", "0"]


def test_functions_stand_for_layers():
    class Functions(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = conv(3, 8), conv(8, 6)

        def forward(self, x):
            x = self.one(x)
            x *= 0.5
            x = F.max_pool2d(F.relu(x, inplace=True), 3, stride=2, padding=1)
            return self.two(x)

    decoder, *_ = mirror_of(Functions())
    assert decoder(torch.randn(1, 6, 4, 5), torch.zeros(1, 3, 8, 10)).shape == (1, 3, 8, 10)
    product, relu = (node for node in decoder.graph.nodes if node.op == "call_function")
    assert product.target is operator.mul and product.args[1] == 0.5
    assert relu.target is F.relu and relu.kwargs == {"inplace": False}


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(3, 8)

    def forward(self, x):
        return self.conv(x).flatten(2)[..., None]


class Times(Flat):
    def forward(self, x):
        y = self.conv(x)
        return y * F.pad(y, (1, 1))[..., 1:-1]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(conv(3, 8), nn.Upsample(scale_factor=2)), r"1 \(Upsample\) has no mirror image"),
        (Flat(), r"'toy' cannot be reflected: flatten in it \(its forward\) has no mirror image"),
        (Times(), r"has no mirror image|joins maps"),
        (nn.Sequential(nn.MaxPool2d(2), conv(3, 8)), r"0 \(MaxPool2d\) comes first"),
    ],
)
def test_what_has_no_mirror_image_is_named(network, message):
    with pytest.raises(UsageError, match=message):
        mirror_of(network)


def test_reading_a_network_changes_nothing_and_draws_no_random_number():
    network = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Dropout(), conv(8, 4)).train()
    network[1].eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    Chain(network, (3, 32, 64), "toy")
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training and not network[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_map_changed_in_place_is_a_new_map():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.same = conv(3, 8), conv(3, 8), nn.Identity()

        def forward(self, image):
            y = self.same(self.one(image))
            y += self.two(image)
            return F.relu(y, inplace=True)

    _, chain, _ = mirror_of(InPlace())
    ways, relu = chain.parts
    assert [part.kind for part in ways.inner] == ["conv", "conv", "add"] and relu.inputs == (ways.output,)
