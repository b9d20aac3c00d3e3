import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import create_model
from pixelwise.ops.dropout import SpatialDropout, sample_with_dropout, set_sample, spatial_dropout, with_spatial_dropout


def dropped(shape, p=0.5, seed=0, sample=0, layer=0, top=0, left=0, channelwise=False):
    x = torch.ones(shape)
    return spatial_dropout(x, p, torch.tensor(seed), torch.tensor(sample), layer, top, left, channelwise)


def bits(*shape, **place):
    """What is kept, as -1 and 1."""
    return (dropped((1, *shape), **place)[0] != 0).double().numpy() * 2 - 1


@pytest.mark.parametrize("p", [0.0001, 0.1, 0.2, 0.5, 0.9])
def test_the_share_and_the_scale_are_right(p):
    values = dropped((1, 8, 256, 512), p)
    count, total = int((values == 0).sum()), values.numel()
    assert stats.binomtest(count, total, p).pvalue > 1e-3
    assert torch.allclose(values[values != 0], torch.tensor(1 / (1 - p)))


def test_all_and_nothing():
    assert torch.equal(dropped((1, 2, 3, 4), 0.0), torch.ones(1, 2, 3, 4))
    assert torch.equal(dropped((1, 2, 3, 4), 1.0), torch.zeros(1, 2, 3, 4))
    assert torch.equal(dropped((1, 2, 3, 4), 1.0, channelwise=True), torch.zeros(1, 2, 3, 4))
    assert dropped((1, 2, 0, 4)).shape == (1, 2, 0, 4)


def test_every_block_line_and_column_has_its_share():
    """Chi-square over blocks of 16 x 16, rows, columns and channels: neither too uneven nor too even."""
    kept = (bits(16, 256, 256) + 1) / 2
    blocks = kept.reshape(16, 16, 16, 16, 16).sum((2, 4)).ravel()
    for counts, size in (
        (blocks, 256),
        (kept.sum((0, 1)), 4096),
        (kept.sum((0, 2)), 4096),
        (kept.sum((1, 2)), 65536),
        (kept.sum(0).ravel(), 16),
        (kept.sum(2).ravel(), 256),
    ):
        chi_square = float(((counts - size / 2) ** 2).sum() / (size / 4))
        assert 1e-4 < stats.chi2.sf(chi_square, len(counts)) < 1 - 1e-4


def test_patterns_of_neighbours_are_all_as_frequent():
    kept = (bits(8, 512, 512) > 0).astype(int)
    square = kept[:, :-1, :-1] + 2 * kept[:, 1:, :-1] + 4 * kept[:, :-1, 1:] + 8 * kept[:, 1:, 1:]
    apart = square[:, ::2, ::2]  # squares that share nothing
    assert stats.chisquare(np.bincount(apart.ravel(), minlength=16)).pvalue > 1e-3
    runs = sum(kept[:, :, shift::10][:, :, :51] << shift for shift in range(10))
    assert stats.chisquare(np.bincount(runs.ravel(), minlength=1024)).pvalue > 1e-3


def is_unrelated(first, second):
    return abs((first * second).mean()) < 4.5 / np.sqrt(first.size)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"seed": -1},
        {"seed": 1 << 32},
        {"seed": 1 << 62},
        {"sample": 1},
        {"sample": 1 << 32},
        {"layer": 1},
        {"layer": 1 << 16},
        {"top": 1},
        {"top": 100_000},
        {"left": 1},
        {"left": 2},
        {"left": 65536},
        {"left": 100_000},
    ],
    ids=str,
)
def test_other_seeds_samples_layers_and_places_are_unrelated(other):
    assert is_unrelated(bits(16, 128, 128), bits(16, 128, 128, **other))


def test_seed_sample_and_layer_are_not_exchangeable():
    masks = [bits(2, 64, 64, **{key: 1}) for key in ("seed", "sample", "layer")]
    assert all(is_unrelated(masks[i], masks[j]) for i in range(3) for j in range(i))


def test_products_along_rows_columns_and_channels_are_unrelated():
    """Masks made of a part per row and a part per column would agree at the corners of rectangles."""
    kept = bits(32, 128, 128)
    for step in (1, 2, 7, 64):
        corners = kept[:, :-step] * kept[:, step:]
        corners = corners[:, :, :-step] * corners[:, :, step:]
        assert abs(corners.mean()) < 4.5 / np.sqrt(corners.size)
        across = kept[:-1, :-step] * kept[1:, :-step] * kept[:-1, step:] * kept[1:, step:]
        assert abs(across.mean()) < 4.5 / np.sqrt(across.size)
    spectrum = np.abs(np.fft.fft2(kept)) ** 2 / kept[0].size  # of each channel; white noise: exponential with mean 1
    assert spectrum.max() < 25 and abs(spectrum.var() - 1) < 0.1
    mean = np.abs(np.fft.fft2(kept) / 128).mean(0)
    assert mean.min() > 0.3 and mean.max() < 1.6


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_window_drops_what_the_whole_map_drops(data):
    channels, height, width = (data.draw(st.integers(1, high)) for high in (5, 40, 40))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    channelwise, p = data.draw(st.booleans()), data.draw(st.floats(0, 1))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    memory = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    x = torch.randn(2, channels, height, width, dtype=dtype)
    seed, sample = (
        torch.tensor(data.draw(st.integers(-(2**63), 2**63 - 1))),
        torch.tensor(data.draw(st.integers(0, 99))),
    )
    whole = spatial_dropout(x, p, seed, sample, 4, 0, 0, channelwise)
    cut = x[..., top:bottom, left:right].contiguous(memory_format=memory)
    window = spatial_dropout(cut, p, seed, sample, 4, top, left, channelwise)
    assert window.dtype == dtype and window.stride() == cut.stride()
    assert torch.equal(window, whole[..., top:bottom, left:right])
    view = spatial_dropout(x[..., top:bottom, left:right], p, seed, sample, 4, top, left, channelwise)
    assert torch.equal(view, window)


def test_large_maps_are_done_in_chunks_that_fit_together():
    key = (0.3, torch.tensor(1), torch.tensor(2), 3)
    for shape in ((1, 3, 70, 2000), (1, 2, 3, 70_000), (1, 300, 20, 33), (1, 1, 1, 200_000)):
        x = torch.randn(shape)
        whole = spatial_dropout(x, *key, 0, 0, False)
        assert torch.equal(spatial_dropout(x.contiguous(memory_format=torch.channels_last), *key, 0, 0, False), whole)
        window = spatial_dropout(x[..., -1:, -5:], *key, shape[2] - 1, shape[3] - 5, False)
        assert torch.equal(window, whole[..., -1:, -5:])


def test_images_of_a_batch_share_the_mask():
    values = dropped((3, 4, 9, 9))
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    assert torch.equal(values[:1], dropped((1, 4, 9, 9)))


def test_channelwise_drops_whole_channels():
    values = dropped((1, 4000, 2, 3), 0.25, channelwise=True)
    assert torch.equal(values, values[..., :1, :1].expand_as(values))
    assert stats.binomtest(int((values[0, :, 0, 0] == 0).sum()), 4000, 0.25).pvalue > 1e-3
    assert torch.equal(values[..., :1], dropped((1, 4000, 2, 1), 0.25, top=5, left=9, channelwise=True))


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 7, 5)])
def test_vectors_and_sequences_are_dropped_too(shape):
    values = dropped(shape)
    assert values.shape == shape and set(values.unique().tolist()) <= {0.0, 2.0}


def test_more_dimensions_are_refused():
    with pytest.raises(UsageError, match="not on 5 dimensions"):
        dropped((1, 2, 3, 4, 5))


def test_nan_is_not_hidden():
    x = torch.full((1, 1, 8, 8), torch.nan)
    assert bool(spatial_dropout(x, 0.9, torch.tensor(0), torch.tensor(0), 0, 0, 0, False).isnan().all())


def test_the_mask_is_the_same_in_every_release():
    """Results of earlier versions are repeated; also what another device must give."""
    kept = (bits(2, 3, 8, seed=5, sample=2, layer=65537, top=1000, left=70000) > 0).astype(int).reshape(6, 8)
    assert ["".join(map(str, row)) for row in kept] == [
        "10001000",
        "10100101",
        "11100100",
        "10101111",
        "10111111",
        "11111101",
    ]


def test_the_operation_keeps_the_rules_of_torch():
    x = torch.randn(2, 3, 4, 5)
    arguments = (0.5, torch.tensor(1), torch.tensor(2), 3, 4, 5, False)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.pixelwise.spatial_dropout.default, (x, *arguments), test_utils=checks)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.pixelwise.spatial_dropout.default, (last, *arguments), test_utils=checks)


# ---------------------------------------------------------------------------------------------------------- networks


def network(*dropouts):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), *dropouts, nn.Conv2d(8, 4, 1)).eval()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.again = self.drop

    def forward(self, x):
        return torch.cat([self.drop(x), self.again(x)], dim=1)


def test_the_copy_shares_weights_and_leaves_the_network_as_it_was():
    model = network(nn.Dropout(0.5), nn.Dropout2d(0.2), nn.Dropout(0.0)).train()
    state = list(model.state_dict())
    sampled = with_spatial_dropout(model, seed=1)
    assert [type(item) for item in model][2:5] == [nn.Dropout, nn.Dropout2d, nn.Dropout] and model.training
    assert [type(item) for item in sampled][2:5] == [SpatialDropout, SpatialDropout, nn.Dropout]
    assert (sampled[2].p, sampled[2].channelwise, sampled[3].p, sampled[3].channelwise) == (0.5, False, 0.2, True)
    assert list(sampled.state_dict()) == state and not any(item.training for item in sampled.modules())
    assert all(one is other for one, other in zip(model.parameters(), sampled.parameters(), strict=True))
    assert sampled[1].running_mean is model[1].running_mean


def test_samples_and_seeds_differ_and_repeat():
    sampled, image = with_spatial_dropout(network(nn.Dropout(0.5)), seed=1), torch.rand(1, 3, 9, 8)
    with torch.no_grad():
        first = sampled(image)
        assert torch.equal(first, sampled(image))
        set_sample(sampled, 1)
        second = sampled(image)
        other = with_spatial_dropout(network(nn.Dropout(0.5)), seed=-5)(image)
        assert not torch.equal(first, second) and not torch.equal(first, other)
        set_sample(sampled, 0)
        assert torch.equal(first, sampled(image))
        assert torch.equal(first, with_spatial_dropout(network(nn.Dropout(0.5)), seed=1)(image))


def test_a_module_that_is_used_twice_has_two_masks_in_every_pass():
    sampled = with_spatial_dropout(Twice(), seed=0)
    assert sampled.drop is sampled.again
    values = sampled(torch.ones(1, 4, 16, 16))
    one, other = values[:, :4], values[:, 4:]
    assert 0.4 < float((one == other).double().mean()) < 0.6
    assert torch.equal(sampled(torch.ones(1, 4, 16, 16)), values)
    with pytest.raises(UsageError):
        sampled(torch.ones(1, 1, 1, 1, 1))
    assert torch.equal(copy.deepcopy(sampled)(torch.ones(1, 4, 16, 16)), values)


def test_a_lone_layer_is_a_network_too():
    assert 0 < float((with_spatial_dropout(nn.Dropout(0.5), 0)(torch.ones(1, 4, 9, 9)) == 0).double().mean()) < 1


@pytest.mark.parametrize("model", [network(), network(nn.Dropout(0.0)), nn.Identity()], ids=range(3))
def test_networks_without_dropout_are_refused(model):
    with pytest.raises(UsageError, match="no dropout layers"):
        with_spatial_dropout(model)


@pytest.mark.parametrize("layer", [nn.AlphaDropout(0.1), nn.Dropout3d(0.1), nn.Dropout1d(0.1)])
def test_kinds_without_a_counterpart_are_refused(layer):
    with pytest.raises(UsageError, match=f"2 is a {type(layer).__name__}"):
        with_spatial_dropout(network(layer))


def test_dropout_called_as_a_function_stays_off():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return F.dropout(x, 0.5, self.training) if x.shape[1] == 1 else self.drop(x)

    assert torch.equal(with_spatial_dropout(Functional())(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("name, count", [("bayesian_segnet", 6), ("unet_valid", 2)])
def test_export_keeps_one_node_for_each_call(name, count):
    torch.manual_seed(0)
    sampled = with_spatial_dropout(create_model(name, tiny=True, num_classes=3), seed=3)
    image = torch.rand(1, 3, 40, 48)
    with torch.no_grad():
        program = torch.export.export(sampled, (image,), strict=False)
        nodes = [node for node in program.graph.nodes if node.target is torch.ops.pixelwise.spatial_dropout.default]
        assert len({node.args[4] for node in nodes}) == len(nodes) == count
        graph = program.module()
        for sample in range(2):
            set_sample(sampled, sample)
            assert torch.equal(graph(image), sampled(image))


@pytest.mark.parametrize("name", ["bayesian_segnet", "fcdensenet56"])
def test_mean_and_spread_are_those_of_torchs_own_dropout(name):
    torch.manual_seed(0)
    model, image = create_model(name, tiny=True, num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    samples = 40
    mean, uncertainty = sample_with_dropout(model, image, samples=samples, seed=0)
    sampled, passes = with_spatial_dropout(model, seed=0), []
    with torch.no_grad():
        for sample in range(samples):
            set_sample(sampled, sample)
            passes.append(sampled(image).softmax(1))
    stacked = torch.stack(passes).double()
    variance = stacked.var(0, correction=0)
    assert float(uncertainty.mean()) > 0
    # The means of 40 draws each differ by about the root of 2 variance / 40.
    ratio = (stacked.mean(0) - mean).square().mean() / (2 * variance / samples).mean()
    assert 0.5 < float(ratio) < 2.0
    assert abs(float(variance.mean() / uncertainty.mean()) - 1) < 0.4
