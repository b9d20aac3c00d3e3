import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pixelwise.errors import UsageError
from pixelwise.models import create_model, describe_model
from pixelwise.models.patch_classifier import PatchClassifier, PatchClassifierConfig
from pixelwise.ops.cost import multiply_adds
from pixelwise.ops.receptive_field import receptive_field

SMALL = {"window": 13, "widths": (3, 4), "kernels": (4, 2), "pools": (2, 2), "hidden": 5}


def ready(seed=0, **config):
    """In eval mode, with norms that do something."""
    torch.manual_seed(seed)
    model = PatchClassifier(PatchClassifierConfig(**config))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval().requires_grad_(False)


def test_parameters_of_the_default():
    # 16 * 3 * 48 + 16 * 48 * 48 + 25 * 48 * 48 + 16 * 48 * 48, norms 4 * 96, then 48 * 200 + 200 and 200 * 2 + 2
    row = describe_model("patch_classifier", num_classes=2)
    assert row["parameters"] == 133_632 + 384 + 9_800 + 402
    assert row["stride"] == 1


def test_the_maps_of_a_window():
    model = PatchClassifier(PatchClassifierConfig())
    sides = []
    for conv in (*model.convs, model.hidden, model.score):
        conv.register_forward_hook(lambda _module, _args, out: sides.append(tuple(out.shape[1:])))
    model.classify(torch.zeros(2, 3, 65, 65))
    assert sides == [(48, 62, 62), (48, 28, 28), (48, 10, 10), (48, 2, 2), (200, 1, 1), (2, 1, 1)]
    assert model.window == 65


def plain(state, x, config):
    """The network in plain functions, from its own table; the logits of each place where the window fits."""
    for stage, pool in enumerate(config.pools):
        x = F.conv2d(x, state[f"convs.{stage}.weight"], state.get(f"convs.{stage}.bias"))
        if config.batch_norm:
            norm = [
                state[f"norms.{stage}.{key}"][:, None, None]
                for key in ("running_mean", "running_var", "weight", "bias")
            ]
            x = (x - norm[0]) / (norm[1] + 1e-5).sqrt() * norm[2] + norm[3]
        x = F.max_pool2d(x.relu(), pool)
    x = F.conv2d(x, state["hidden.weight"], state["hidden.bias"]).relu()
    return F.conv2d(x, state["score.weight"], state["score.bias"])


@pytest.mark.parametrize("batch_norm", [True, False])
def test_logits_equal_a_reference(batch_norm):
    config = PatchClassifierConfig(num_classes=3, **SMALL, batch_norm=batch_norm)
    model = ready(num_classes=3, **SMALL, batch_norm=batch_norm)
    patches = torch.randn(5, 3, 13, 13)
    wanted = plain(model.state_dict(), patches, config).flatten(1)
    assert torch.allclose(model.classify(patches), wanted, atol=1e-5)


@pytest.mark.parametrize(("window", "size"), [(13, (9, 11)), (14, (7, 6)), (17, (1, 1)), (16, (2, 30))])
def test_each_pixel_has_the_class_of_the_window_around_it(window, size):
    model = ready(num_classes=3, **SMALL | {"window": window})
    image = torch.randn(1, 3, *size)
    logits = model(image)
    margin = window // 2  # numpy's reflection goes on beyond the image's size
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (margin, margin), (margin, margin)), mode="reflect")
    for row in range(size[0]):
        for column in range(size[1]):
            # begins window // 2 before the pixel, in the padded image margin later
            patch = torch.from_numpy(padded[:, :, row : row + window, column : column + window].copy())
            assert torch.allclose(model.classify(patch)[0], logits[0, :, row, column], atol=1e-5)


stages = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(
    stages=stages,
    more=st.integers(0, 9),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    batch_norm=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_one_pass_is_the_naive_way(stages, more, size, batch_norm, dtype):
    kernels, widths, pools = zip(*stages, strict=True)
    least = 1
    for kernel, pool in zip(kernels[::-1], pools[::-1], strict=True):
        least = least * pool + kernel - 1
    config = {"window": least + more, "widths": widths, "kernels": kernels, "pools": pools, "hidden": 6}
    model = ready(batch_norm=batch_norm, **config).to(dtype)
    image = torch.randn(2, 3, *size, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert torch.allclose(model(image), model.slide(image, batch=50), rtol=tolerance, atol=tolerance)
    with pytest.raises(UsageError, match=f"at least {least} px"):
        PatchClassifierConfig(**config | {"window": least - 1})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_one_pass_is_the_naive_way_for_the_default_stages(dtype, tolerance):
    model = ready(widths=(6, 6, 6, 6), hidden=12, window=80).to(dtype)  # even, with a last map of 2 x 2 cells
    image = torch.randn(1, 3, 7, 12, dtype=dtype)
    assert torch.allclose(model(image), model.slide(image), rtol=tolerance, atol=tolerance)


def test_one_pass_is_shift_and_stitch():
    # OverFeat: the pooled network on each of the 4 x 4 shifts of the image, results interlaced
    model, config = ready(**SMALL), PatchClassifierConfig(**SMALL)
    image = torch.randn(1, 3, 16, 24)
    stitched = torch.empty(1, 2, 16, 24)
    padded = F.pad(image, (6, 6, 6, 6), mode="reflect")
    for row in range(4):
        for column in range(4):
            logits = plain(model.state_dict(), padded[..., row : row + 25, column : column + 33], config)
            stitched[..., row::4, column::4] = logits
    assert torch.allclose(model(image), stitched, atol=1e-5)


@pytest.mark.parametrize(("window", "radius"), [(13, (6, 6)), (14, (7, 5)), (17, (8, 8)), (18, (9, 7))])
def test_the_receptive_field_is_the_window(window, radius):
    # 14 px and 18 px leave a remainder when pooled: the last row and column are not looked at
    found = receptive_field(ready(**SMALL | {"window": window}))
    assert found.stride == 1 and found.radius_px == radius * 2
    assert found.size_px == (sum(radius) + 1,) * 2


@pytest.mark.parametrize("stride", [3, 5, 40])
def test_sliding_in_steps_is_exact_at_the_middle_of_each_cell_and_interpolates_between(stride):
    model = ready(**SMALL)
    image = torch.randn(2, 3, 15, 30)
    exact, coarse = model(image), model.slide(image, stride=stride)
    assert coarse.shape == exact.shape
    places = [slice(stride // 2, length // stride * stride, stride) for length in image.shape[-2:]]
    assert torch.allclose(coarse[..., places[0], places[1]], exact[..., places[0], places[1]], atol=1e-5)
    assert not torch.allclose(coarse, exact, atol=1e-2)


def test_sliding_looks_once_at_each_cell_and_keeps_no_graph():
    model = ready(**SMALL).requires_grad_(True)
    looked = []
    model.score.register_forward_hook(lambda _module, _args, out: looked.append(len(out)))
    assert not model.slide(torch.randn(1, 3, 10, 21), stride=2, batch=20).requires_grad
    assert looked == [20, 20, 15]  # 5 x 11 cells


def test_one_pass_costs_far_less_than_a_window_for_each_pixel():
    with torch.device("meta"):
        model = create_model("patch_classifier", num_classes=2)
    a_pixel = 16 * 3 * 48 * 62**2 + 16 * 48**2 * 28**2 + 25 * 48**2 * 10**2 + 16 * 48**2 * 2**2 + 48 * 200 + 400
    assert 256**2 * a_pixel / multiply_adds(model, (1, 3, 256, 256)) > 200


def test_windows_are_trained_on_and_images_labelled():
    torch.manual_seed(0)
    model = PatchClassifier(PatchClassifierConfig(in_channels=1, **SMALL))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    labels = torch.arange(64) % 2
    for _ in range(40):
        patches = torch.randn(64, 1, 13, 13) * 0.2
        patches[:, :, 4:9, 4:9] += 2 * labels[:, None, None, None]  # bright in the middle or not
        F.cross_entropy(model.classify(patches), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    image = torch.zeros(1, 1, 40, 40)
    image[..., 20:25, 10:15] = 2
    found = model.eval()(image).argmax(1)[0]
    assert found[22, 12] == 1 and found[5, 30] == 0
    assert 1 <= found.sum() < 200


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"window": 64}, "window must be at least 65 px"),
        ({"kernels": (4, 4)}, "kernels must be positive numbers, one for each stage"),
        ({"pools": (2, 2, 2, 0)}, "pools must be positive"),
        ({"widths": ()}, "widths must be positive"),
        ({"hidden": 0}, "hidden must be at least 1"),
    ],
)
def test_a_wrong_field_is_told(config, message):
    with pytest.raises(UsageError, match=message):
        create_model("patch_classifier", num_classes=2, **config)


def test_wrong_arguments_are_told():
    model = ready(**SMALL)
    with pytest.raises(UsageError, match=r"must be 13 x 13 px .*not 12 x 13"):
        model.classify(torch.zeros(1, 3, 12, 13))
    for arguments in ({"stride": 0}, {"batch": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            model.slide(torch.zeros(1, 3, 5, 5), **arguments)
