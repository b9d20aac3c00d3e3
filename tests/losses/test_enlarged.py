"""The loss of coarse scores is that of the enlarged ones: value, gradient, every option."""

import pytest
import torch
import torch.nn.functional as F

from pixelwise.losses import cross_entropy, enlarged, enlarged_cross_entropy
from pixelwise.models import create_model
from pixelwise.ops.resize import CoarseLogits, bilinear_matrix

VOID = 255
SIZES = [((3, 4), (12, 16), (11, 13)), ((1, 1), (4, 4), (1, 3)), ((5, 2), (5, 2), (5, 2)), ((4, 3), (30, 7), (30, 7))]
OPTIONS = {
    "plain": {},
    "weighted": {"weight": torch.tensor([0.5, 2.0, 0.0])},
    "by pixel": {"pixel_weight": torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(1))},
    "smoothed": {"label_smoothing": 0.2},
    "summed": {"reduction": "sum"},
    "all": {
        "weight": torch.tensor([0.5, 2.0, 1.0]),
        "pixel_weight": torch.rand(2, 40, 40, generator=torch.Generator().manual_seed(2)),
        "label_smoothing": 0.3,
    },
}


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setattr(enlarged, "CHUNK", 100)


def case(sizes, dtype=torch.float64):
    torch.manual_seed(0)
    (h, w), (whole_h, whole_w), (height, width) = sizes
    scores = (3 * torch.randn(2, 3, h, w, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(3, (2, height, width), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < 0.2] = VOID
    rows, columns = bilinear_matrix(h, whole_h)[:height], bilinear_matrix(w, whole_w)[:width]
    return scores, CoarseLogits(scores, rows, columns), labels


def plain(scores, sizes):
    _, whole, (height, width) = sizes
    return F.interpolate(scores, size=whole, mode="bilinear")[..., :height, :width]


def fitted(options, labels):
    if "pixel_weight" not in options:
        return options
    return options | {"pixel_weight": options["pixel_weight"][:, : labels.shape[1], : labels.shape[2]]}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", OPTIONS)
def test_value_and_gradient_are_those_of_the_plain_loss(name, sizes):
    scores, coarse, labels = case(sizes, torch.float32)
    options = fitted(OPTIONS[name], labels)
    want = cross_entropy(plain(scores, sizes), labels, **options)
    got = enlarged_cross_entropy(coarse, labels, **options)
    assert got.dtype == torch.float32 and torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(3 * loss, scores)[0] for loss in (got, want)]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_gradient_is_that_of_the_value(name):
    scores, coarse, labels = case(SIZES[0])
    options = fitted(OPTIONS[name], labels)

    def loss(values):
        return enlarged_cross_entropy(CoarseLogits(values, coarse.rows, coarse.columns), labels, **options)

    assert torch.autograd.gradcheck(loss, scores)


def test_the_size_of_the_chunks_changes_nothing(monkeypatch):
    scores, coarse, labels = case(SIZES[3])
    small = enlarged_cross_entropy(coarse, labels)
    monkeypatch.setattr(enlarged, "CHUNK", 1 << 20)
    whole = enlarged_cross_entropy(coarse, labels)
    assert torch.allclose(small, whole, rtol=1e-12)
    grads = [torch.autograd.grad(loss, scores)[0] for loss in (small, whole)]
    assert torch.allclose(*grads, rtol=1e-10, atol=1e-15)


def test_void_gives_neither_loss_nor_gradient():
    scores, coarse, labels = case(SIZES[0])
    loss = enlarged_cross_entropy(coarse, torch.full_like(labels, VOID))
    loss.backward()
    assert loss == 0 and not scores.grad.any()


@pytest.mark.parametrize("label", [3, 254])
def test_a_label_that_is_no_class_is_an_error(label):
    _, coarse, labels = case(SIZES[0])
    with pytest.raises((IndexError, RuntimeError)):
        enlarged_cross_entropy(coarse, labels.masked_fill(labels == 0, label))


def test_under_autocast_the_enlarged_scores_are_not_rounded():
    scores, coarse, labels = case(SIZES[0], torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = enlarged_cross_entropy(coarse, labels)
    loss.backward()
    want = cross_entropy(plain(scores.detach().float(), SIZES[0]), labels)
    assert scores.grad.dtype == torch.bfloat16 and torch.allclose(loss, want, rtol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (1, 19)])
def test_a_network_s_coarse_logits_are_those_of_its_forward(size):
    torch.manual_seed(0)
    model = create_model("encoder_decoder", tiny=True, num_classes=3).eval()
    image = torch.rand(2, 3, *size)
    assert model.is_coarse
    coarse = model.coarse_logits(image)
    assert coarse.scores.shape[-1] < size[1] and torch.allclose(coarse.enlarge(), model(image), atol=1e-5)
    assert not create_model("encoder_decoder", tiny=True, num_classes=3, finest=1).is_coarse
