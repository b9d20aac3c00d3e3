import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats.opening import read_mask
from pixelwise.infer.bundle import ModelCard, save_bundle
from pixelwise.infer.options import Tiling
from pixelwise.infer.predictor import Predictor, load
from pixelwise.models import create_model

CONFIG = {"tiny": True, "num_classes": 3, "in_channels": 3}
SPEC = LabelSpec(names=("a", "b", "c"), colors=((250, 0, 0), (0, 250, 0), (0, 0, 250)), values=((0,), (1,), (2,)))
CARD = ModelCard(model="unet", config=CONFIG, labels=SPEC, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


class Same(nn.Module):
    """Class scores are the normalised channels, so the right answer is known."""

    def forward(self, image):
        return image


class Failing(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, image):
        raise self.error


def exact(model=None, **changes):
    return Predictor(model or Same(), CARD, device="cpu", precision="float32", **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_bundle(folder, create_model("unet", **CONFIG), CARD)
    return folder


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)


def test_scores_are_those_of_the_normalised_image(image):
    unit = image.astype(np.float64) / 255
    wanted = ((unit - CARD.mean) / CARD.std).transpose(2, 0, 1)
    prediction = exact().predict(image)
    assert np.allclose(prediction.logits.numpy(), wanted, atol=1e-6)
    assert np.array_equal(prediction.labels, wanted.argmax(axis=0))
    exponential = np.exp(wanted)
    assert np.allclose(prediction.probabilities, exponential / exponential.sum(axis=0), atol=1e-6)
    assert (prediction.labels.dtype, prediction.probabilities.dtype) == (np.uint8, np.float32)


def test_file_array_and_tensor_give_the_same(run, image, tmp_path):
    predictor = load(run, device="cpu", precision="float32")
    Image.fromarray(image).save(tmp_path / "a.png")
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    wanted = predictor.predict(image).probabilities
    assert wanted.shape == (3, 7, 11)
    for same in (tmp_path / "a.png", str(tmp_path / "a.png"), tensor, tensor.float() / 255):
        assert np.array_equal(predictor.predict(same).probabilities, wanted)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "float32", "float64", "int32"])
def test_deep_images_are_scaled_by_their_type(dtype, tmp_path):
    unit = np.random.default_rng(1).random((5, 6, 3))
    deep = unit.astype(dtype) if dtype.startswith("float") else (unit * np.iinfo(dtype).max).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", deep, photometric="rgb")
    wanted = exact().predict(unit.astype(np.float32)).logits
    for given in (deep, tmp_path / "a.tif"):
        assert torch.allclose(exact().predict(given).logits, wanted, atol=1e-3 if dtype == "uint16" else 1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1)])
def test_grey_images_are_repeated(shape):
    grey = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    colour = np.repeat(grey.reshape(4, 6, 1), 3, axis=2)
    assert torch.equal(exact().predict(grey).logits, exact().predict(colour).logits)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 1), (17, 23)])
def test_labels_have_the_size_of_the_image(run, size):
    prediction = load(run, device="cpu").predict(np.zeros((*size, 3), dtype=np.uint8))
    assert prediction.labels.shape == size
    assert prediction.probabilities.shape == (3, *size)
    assert np.allclose(prediction.probabilities.sum(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((4, 4, 3), complex),
        np.array([["a"]]),
        torch.zeros(4, 4),
        torch.zeros(5, 4, 4),
        [[1, 2], [3, 4]],
        None,
    ],
    ids=range(10),
)
def test_unusable_images_are_refused(bad):
    with pytest.raises(DataError, match="image"):
        exact().predict(bad)


def test_broken_files_are_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG but no")
    with pytest.raises(DataError, match=r"a\.png"):
        exact().predict(tmp_path / "a.png")
    Image.new("RGB", (3, 3)).save(tmp_path / "b.png")
    predictor = Predictor(Same(), ModelCard(model="m", config={}, labels=SPEC, mean=(0.5,), std=(1.0,)), device="cpu")
    with pytest.raises(DataError, match=r"b\.png.*3 channels"):
        predictor.predict(tmp_path / "b.png")


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 4, 4), torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4).int()], ids=range(3)
)
def test_unusable_batches_are_refused(bad):
    with pytest.raises(DataError):
        exact().logits(bad)


def test_a_batch_is_predicted_image_by_image_alike(run):
    predictor = load(run, device="cpu", precision="float32")
    batch = torch.randint(0, 256, (3, 3, 9, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    together = predictor.logits(batch)
    assert together.shape == (3, 3, 9, 10)
    for one, scores in zip(batch, together, strict=True):
        assert torch.allclose(predictor.logits(one[None])[0], scores, atol=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
    ids=range(4),
)
def test_running_out_of_memory_names_the_image_and_its_size(error, tmp_path):
    Image.new("RGB", (8, 5)).save(tmp_path / "big.png")
    with pytest.raises(PixelwiseError, match=r"big\.png: 8 x 5 px with 3 channels does not fit into memory"):
        exact(Failing(error)).predict(tmp_path / "big.png")


def test_other_errors_of_a_network_are_not_hidden(image):
    with pytest.raises(RuntimeError, match="a bug"):
        exact(Failing(RuntimeError("a bug"))).predict(image)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_scores_that_are_not_finite_are_refused(value):
    with pytest.raises(PixelwiseError, match="scores overflow"):
        exact().predict(np.full((2, 2, 3), value))


def test_probabilities_must_be_asked_for(image):
    prediction = exact().predict(image, probabilities=False)
    assert np.array_equal(prediction.labels, exact().predict(image).labels)
    with pytest.raises(UsageError, match="probabilities=True"):
        prediction.probabilities  # noqa: B018


def test_saved_labels_are_indices_with_the_palette_of_the_classes(image, tmp_path):
    prediction = exact().predict(image)
    prediction.save(tmp_path / "sub" / "a.png")
    assert np.array_equal(read_mask(tmp_path / "sub" / "a.png"), prediction.labels)
    with Image.open(tmp_path / "sub" / "a.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture.convert("RGB")), SPEC.colorize(prediction.labels))
        assert picture.text == {"pixelwise": '{"model": ""}'}
    with pytest.raises(UsageError, match=r"\.png"):
        prediction.save(tmp_path / "a.jpg")


def test_overlay_lies_between_image_and_colours(image):
    prediction = exact().predict(image)
    assert np.array_equal(prediction.image, image)
    assert np.array_equal(np.asarray(prediction.overlay(0)), image)
    assert np.array_equal(np.asarray(prediction.overlay(1)), SPEC.colorize(prediction.labels))


def test_bf16_is_close_to_float32(run, image):
    exactly = load(run, device="cpu", precision="float32").predict(image)
    roughly = load(run, device="cpu", precision="bf16").predict(image)
    assert roughly.logits.dtype == torch.float32
    assert not torch.equal(roughly.logits, exactly.logits)
    assert np.allclose(roughly.probabilities, exactly.probabilities, atol=0.05)


def test_the_random_state_and_the_training_switch_do_not_matter(run, image):
    predictor = load(run, device="cpu", precision="float32")
    assert not predictor.model.training
    state = torch.get_rng_state()
    first = predictor.predict(image).logits
    assert torch.equal(first, predictor.predict(image).logits)
    assert torch.equal(state, torch.get_rng_state())


def test_wrong_options_are_refused_before_the_weights_are_read(tmp_path):
    with pytest.raises(UsageError, match="precision"):
        load(tmp_path, precision="half")
    with pytest.raises(UsageError, match="device"):
        load(tmp_path, device="tpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_gpu_agrees_with_the_cpu(run, image):
    on_cpu = load(run, device="cpu", precision="float32").predict(image)
    on_gpu = load(run, device="cuda", precision="float32").predict(image)
    assert np.allclose(on_gpu.probabilities, on_cpu.probabilities, atol=1e-3)


# -- several at a time, and the statistics of the batch --


@pytest.fixture(scope="module")
def normed():
    """A network with batch norm whose running averages are far from any batch's."""
    torch.manual_seed(0)
    model = create_model("unet", **CONFIG, batch_norm=True)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


def several(count=3, size=(16, 20)):
    draws = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=draws) for _ in range(count)]


def test_batch_statistics_are_those_of_training_without_a_trace(normed):
    images, before = several(), {name: tensor.clone() for name, tensor in normed.state_dict().items()}
    running = Predictor(normed, CARD, device="cpu", precision="float32")
    by_batch = Predictor(normed, CARD, device="cpu", precision="float32", batch_statistics=True)
    scores = by_batch.logits(torch.stack(images))
    assert all(torch.equal(tensor, before[name]) for name, tensor in normed.state_dict().items())
    assert not torch.allclose(scores, running.logits(torch.stack(images)), atol=1e-3)
    alone = by_batch.logits(images[0][None])
    assert not torch.allclose(alone[0], scores[0], atol=1e-4)  # it depends on the rest of the batch
    unit = (torch.stack(images).float() / 255 - running._mean) / running._std
    with torch.no_grad():
        assert torch.allclose(normed.train()(unit), scores, atol=1e-4)
    normed.eval().load_state_dict(before)


def test_batch_statistics_need_batch_norm():
    with pytest.raises(UsageError, match="unet has no batch norm"):
        exact(batch_statistics=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("tile_px", 10**9), ("tile_px", -5), ("overlap", 1e300), ("overlap", float("nan")), ("memory_bytes", 2**70),
     ("samples", 10**9), ("seed", -1), ("seed", 10**30)],
)  # fmt: skip
def test_a_prediction_that_no_machine_can_do_is_refused_with_the_range(key, value):
    with pytest.raises(UsageError, match=rf"{key.partition('_')[0]} must be .*, not "):
        Tiling(**{key: value})
