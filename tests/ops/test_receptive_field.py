"""Against receptive fields of the papers, and against intervals worked out layer by layer, without any tensor."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import create_model
from pixelwise.ops.receptive_field import ReceptiveField, receptive_field, structure


class Cells(nn.Module):
    """The layers of a classifier, unpadded, along the height only; each 32 rows get the scores of one cell."""

    def __init__(self, layers, margin_px):
        super().__init__()
        self.layers, self.stride, self.margin_px = nn.Sequential(*layers), 32, margin_px

    def forward(self, image):
        cells = self.layers(F.pad(image, (0, 0, self.margin_px, self.margin_px)))
        return cells.repeat_interleave(self.stride, -2)[..., : image.shape[-2], :]


def conv(kernel, stride=1):
    return nn.Sequential(nn.Conv2d(1, 1, (kernel, 1), (stride, 1)), nn.ReLU())


def vgg16():
    layers = []
    for convs in (2, 2, 3, 3, 3):
        layers += [*(conv(3) for _ in range(convs)), nn.MaxPool2d((2, 1))]
    return Cells([*layers, conv(7)], 202)


def alexnet():
    pool = nn.MaxPool2d((3, 1), (2, 1))
    return Cells([conv(11, 4), pool, conv(5), pool, conv(3), conv(3), conv(3), pool, conv(6)], 177)


@pytest.mark.parametrize(("build", "size"), [(vgg16, 404), (alexnet, 355)])
def test_the_fields_of_the_fcn_paper(build, size):
    found = receptive_field(build(), in_channels=1)
    assert found.bounded and found.stride == 32
    assert found.size_px == (size, 1)
    # all 32 rows of a cell see the same pixels
    assert found.radius_px[0] + found.radius_px[1] + 1 == size + 31


@pytest.mark.parametrize("kernels", [(3,), (3, 5, 7), (1, 1), (9, 1, 3)])
def test_convolutions_of_stride_1_add_up(kernels):
    stack = nn.Sequential(*(nn.Conv2d(2, 2, kernel, padding=kernel // 2) for kernel in kernels))
    found = receptive_field(stack, in_channels=2)
    radius = sum(kernel // 2 for kernel in kernels)
    assert found.stride == 1 and found.radius_px == (radius,) * 4 and found.size_px == (2 * radius + 1,) * 2


def test_height_and_width_above_and_below_are_told_apart():
    class Skewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, (5, 2))

        def forward(self, image):
            return self.conv(F.pad(image, (1, 0, 3, 1)))

    found = receptive_field(Skewed(), in_channels=1)
    assert found.radius_px == (3, 1, 1, 0)
    assert found.size_px == (5, 2)


def u_net_sees(row, levels):
    """First and last row that a padded U-Net's logits of `row` depend on, layer by layer backwards."""

    def convs(first, last):
        return first - 2, last + 2

    def features(level, first, last):  # of the expanding path, `level` poolings deep; rows in its own cells
        first, last = convs(first, last)
        if level == levels - 1:
            return contracted(level, first, last)
        below = features(level + 1, first // 2, last // 2)
        beside = contracted(level, *((first, last)))
        return min(below[0], beside[0]), max(below[1], beside[1])

    def contracted(level, first, last):
        for step in range(level, -1, -1):
            # at the deepest level the convolutions are those of the expanding call
            first, last = (first, last) if step == levels - 1 else convs(first, last)
            if step:
                first, last = 2 * first, 2 * last + 1
        return first, last

    return features(0, row, row)


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_a_u_net_against_intervals(levels):
    found = receptive_field(create_model("unet", num_classes=2, widths=(2,) * levels))
    stride = 2 ** (levels - 1)
    assert found.stride == stride
    rows = [(1024 + phase, *u_net_sees(1024 + phase, levels)) for phase in range(stride)]
    assert found.radius_px[:2] == (max(row - first for row, first, _ in rows), max(last - row for row, _, last in rows))
    assert found.size_px == (max(last - first + 1 for _, first, last in rows),) * 2
    assert found.radius_px[2:] == found.radius_px[:2]


class Unpooled(nn.Module):
    """conv 3, pooled twice, and unpooled twice with a convolution after each."""

    stride = 4

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in range(4))

    def forward(self, image):
        x, first = F.max_pool2d(self.convs[0](image), 2, return_indices=True)
        x, second = F.max_pool2d(self.convs[1](x), 2, return_indices=True)
        x = self.convs[2](F.max_unpool2d(x, second, 2))
        return self.convs[3](F.max_unpool2d(x, first, 2))


def test_unpooling_depends_on_all_of_its_window():
    found = receptive_field(Unpooled(), in_channels=1)

    def sees(row):
        first, last = row - 1, row + 1  # the last convolution, then unpooling: windows of two cells
        first, last = first // 2 - 1, last // 2 + 1
        first, last = first // 2, last // 2
        first, last = 2 * first - 1, 2 * last + 2
        return 2 * first - 1, 2 * last + 2

    assert found.stride == 4
    assert found.size_px[0] == max(sees(row)[1] - sees(row)[0] + 1 for row in range(4))
    assert found.radius_px[:2] == (max(r - sees(r)[0] for r in range(4)), max(sees(r)[1] - r for r in range(4)))


def test_it_is_what_a_gradient_says():
    torch.manual_seed(0)
    model = create_model("unet", num_classes=2, widths=(4, 5, 6)).double().eval()
    found = receptive_field(model)
    low, high = 100, 100
    for phase in range(4):
        image = torch.randn(1, 3, 200, 8, dtype=torch.float64, requires_grad=True)
        model(image)[:, :, 100 + phase].sum().backward()
        rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten() - phase
        low, high = min(low, int(rows[0])), max(high, int(rows[-1]))
    assert found.radius_px[:2] == (100 - low, high - 100)


class Squeezed(nn.Module):
    def __init__(self, axes):
        super().__init__()
        self.axes, self.conv = axes, nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image):
        x = self.conv(image)
        return x * x.mean(self.axes, keepdim=True).sigmoid()


@pytest.mark.parametrize("axes", [(2, 3), (2,), (3,)])
def test_a_mean_over_the_image_has_no_bound(axes):
    found = receptive_field(Squeezed(axes), limit_px=1024)
    assert not found.bounded
    assert (found.stride, found.radius_px, found.size_px) == (None, None, None)


def test_a_field_larger_than_the_limit_has_no_bound():
    class Wide(nn.Module):
        def forward(self, image):
            return image + image.roll(150, -2)

    assert not receptive_field(Wide(), limit_px=256).bounded
    assert receptive_field(Wide(), limit_px=1024).radius_px == (150, 0, 0, 0)


class Gridded(nn.Module):
    def forward(self, image):
        return F.interpolate(F.avg_pool2d(image, 12, ceil_mode=True), scale_factor=12)[
            ..., : image.shape[-2], : image.shape[-1]
        ]


@pytest.mark.parametrize("hint", [12, 24, 48])
def test_the_stride_is_found_whatever_the_hint(hint):
    found = receptive_field(Gridded(), stride=hint)
    assert (found.stride, found.size_px, found.radius_px) == (12, (12, 12), (11, 11, 11, 11))


def test_a_hint_that_is_too_small_is_enlarged():
    class Coarse(nn.Module):
        stride = 1

        def forward(self, image):
            return F.interpolate(F.avg_pool2d(image, 8), scale_factor=8)

    assert receptive_field(Coarse()).stride == 8


def test_without_a_period_there_is_no_field():
    with pytest.raises(UsageError, match="no shift of up to 256 px"):
        receptive_field(Gridded(), stride=1)  # 12 is no power of two


def test_what_depends_on_nothing_sees_nothing():
    class Constant(nn.Module):
        def forward(self, image):
            return torch.zeros_like(image)

    found = receptive_field(Constant())
    assert found.bounded and found.size_px == (0, 0) and found.radius_px == (0, 0, 0, 0)


def test_the_model_is_left_as_it_is_and_its_channels_are_known():
    model = create_model("unet", num_classes=2, in_channels=5, widths=(3, 4), batch_norm=True).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert receptive_field(model).bounded
    assert model.training
    state = model.state_dict()
    assert all(torch.equal(before[key], state[key]) and before[key].dtype == state[key].dtype for key in state)


def test_unusable_models_are_told():
    with pytest.raises(UsageError, match=r"makes \(128, 4\) of an image of \(256, 8\) px"):
        receptive_field(nn.Conv2d(3, 2, 2, stride=2), stride=2)
    numbered = nn.Conv2d(3, 2, 1, device="meta")
    numbered.register_buffer("order", torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(UsageError, match="whole numbers on the meta device"):
        receptive_field(numbered)


@pytest.mark.parametrize("name", ["enet", "segnet", "fcdensenet56", "unet_valid"])
def test_weights_do_not_matter(name):
    with torch.device("meta"):
        empty = create_model(name, num_classes=2, tiny=True)
    assert receptive_field(empty) == receptive_field(create_model(name, num_classes=2, tiny=True))


class Stack(nn.Module):
    """Two convolutions along the height, with a step between them."""

    def __init__(self, between, groups=1):
        super().__init__()
        self.first, self.between = nn.Conv2d(3, 6, (3, 1), padding=(1, 0)), between
        self.last = nn.Conv2d(6, 6, (5, 1), padding=(2, 0), groups=groups)

    def forward(self, image):
        return self.last(self.between(self.first(image)))


def one_channel_cleared(x):
    x[:, 0].zero_()
    return x


def one_channel_replaced(x):
    x[:, :1] = 0
    return x


def some_channels_added_to(x):
    left, right = x.chunk(2, 1)
    left += right.roll(3, -2)
    return x


def one_channel_left(x):
    return torch.cat([x[:, :1], x.new_zeros(1, 5, *x.shape[2:])], 1)


def standardised(x):
    x = x - x.mean(1, keepdim=True)
    return x / x.std(1, keepdim=True)


@pytest.mark.parametrize(
    ("between", "radius"),
    [
        (one_channel_cleared, (3, 3)),
        (one_channel_replaced, (3, 3)),
        (some_channels_added_to, (6, 3)),
        (one_channel_left, (3, 3)),
        (standardised, (3, 3)),
        (lambda x: F.layer_norm(x.movedim(1, -1), (6,)).movedim(-1, 1), (3, 3)),
        (nn.ReLU(inplace=True), (3, 3)),
        (nn.Sequential(nn.BatchNorm2d(6), nn.SiLU(inplace=True), nn.Dropout2d()), (3, 3)),
        (nn.Sequential(nn.Conv2d(6, 6, (7, 1), padding=(3, 0), groups=6), nn.PReLU(6)), (6, 6)),
        (nn.Sequential(nn.Conv2d(6, 6, (2, 1), (2, 1)), nn.ConvTranspose2d(6, 6, (2, 1), (2, 1))), (4, 4)),
    ],
)
def test_steps_between_convolutions(between, radius):
    assert receptive_field(Stack(between)).radius_px == (*radius, 0, 0)


def test_groups_are_told_apart():
    class Apart(nn.Module):
        """Half of the channels look farther; only the others are used."""

        def __init__(self, used):
            super().__init__()
            self.far = nn.Conv2d(2, 2, (9, 1), padding=(4, 0))
            self.grouped = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=2)
            self.used = used

        def forward(self, image):
            return self.grouped(torch.cat([image[:, :2], self.far(image[:, :2])], 1))[:, self.used]

    assert receptive_field(Apart(slice(0, 2)), in_channels=2).radius_px == (1, 1, 0, 0)
    assert receptive_field(Apart(slice(2, 4)), in_channels=2).radius_px == (5, 5, 0, 0)


def test_tiles_cost_what_their_halos_add():
    field = ReceptiveField(bounded=True, stride=8, radius_px=(20, 20, 20, 20), size_px=(41, 41))
    assert field.tile_cost(48) == 4.0
    assert ReceptiveField(bounded=False).tile_cost(48) == float("inf")


def test_the_weights_of_large_convolutions_take_no_memory():
    with torch.device("meta"):
        large = nn.Conv2d(4096, 4096, 7)
    assert structure(large).weight.untyped_storage().nbytes() == 4
