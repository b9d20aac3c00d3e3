import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelwise.losses import cross_entropy, dice_loss

VOID = 255


def make(seed, *, images=2, classes=4, size=(5, 7), void=0.3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, *size, generator=generator).to(dtype)
    labels = torch.randint(classes, (images, *size), generator=generator, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < void] = VOID
    return logits.requires_grad_(), labels


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "images": st.integers(1, 3),
        "classes": st.integers(2, 6),
        "size": st.tuples(st.integers(1, 6), st.integers(1, 6)),
        "void": st.sampled_from([0.0, 0.4, 1.0]),
    }
)


def naive_dice(logits, labels):
    """By the book: a one-hot truth, the sums per class, the mean of those that occur."""
    classes = logits.shape[1]
    valid = labels != VOID
    probabilities = logits.softmax(1).movedim(1, -1)[valid]  # (pixels, K)
    truth = F.one_hot(labels[valid].long(), classes).float()
    losses = [
        1 - 2 * (probabilities[:, k] * truth[:, k]).sum() / (probabilities[:, k].sum() + truth[:, k].sum())
        for k in range(classes)
        if truth[:, k].sum()
    ]
    return sum(losses) / len(losses) if losses else torch.tensor(0.0)


# -- cross-entropy --


@settings(deadline=None, max_examples=40)
@given(shape=shapes, smoothing=st.sampled_from([0.0, 0.1, 0.7]))
def test_unweighted_it_is_the_mean_of_torch(shape, smoothing):
    logits, labels = make(**shape)
    ours = cross_entropy(logits, labels, label_smoothing=smoothing)
    if (labels == VOID).all():
        assert ours == 0
        return
    theirs = F.cross_entropy(logits, labels.long(), ignore_index=VOID, label_smoothing=smoothing)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_label_smoothing_by_hand():
    logits = torch.tensor([[2.0, 0.0, 0.0]]).reshape(1, 3, 1, 1)
    log_p = logits.flatten().log_softmax(0)
    by_hand = -(0.7 + 0.1) * log_p[0] - 0.1 * log_p[1] - 0.1 * log_p[2]
    assert cross_entropy(logits, torch.zeros(1, 1, 1, dtype=torch.uint8), label_smoothing=0.3) == pytest.approx(
        by_hand.item()
    )


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (cross_entropy, {}),
        (cross_entropy, {"label_smoothing": 0.2}),
        (cross_entropy, {"weight": torch.tensor([1.0, 5.0, 0.5, 2.0])}),
        (cross_entropy, {"reduction": "sum"}),
        (dice_loss, {}),
    ],
)
def test_ignored_pixels_have_exactly_zero_gradient(loss, options):
    logits, labels = make(1)
    loss(logits, labels, **options).backward()
    by_pixel = logits.grad.abs().sum(1)
    assert (by_pixel[labels == VOID] == 0).all()
    assert (by_pixel[labels != VOID] > 0).all()


@pytest.mark.parametrize("loss", [cross_entropy, dice_loss])
def test_another_index_may_be_ignored(loss):
    logits, labels = make(2)
    other = labels.long().where(labels != VOID, -1)
    assert loss(logits, other, ignore_index=-1) == loss(logits, labels)


@pytest.mark.parametrize("loss", [cross_entropy, dice_loss])
def test_a_batch_without_labels_gives_zero_and_zero_gradient(loss):
    logits, labels = make(3, void=1.1)
    value = loss(logits, labels)
    value.backward()
    assert value == 0 and (logits.grad == 0).all()


def test_the_divisor_is_the_number_of_labelled_pixels_not_the_sum_of_weights():
    logits, labels = make(4)
    weight = torch.tensor([0.1, 1.0, 3.0, 10.0])
    by_pixel = F.cross_entropy(logits, labels.long(), ignore_index=VOID, reduction="none")
    factor = weight[labels.long().clamp(max=3)].where(labels != VOID, 0)
    wanted = (by_pixel * factor).sum() / (labels != VOID).sum()
    assert torch.allclose(cross_entropy(logits, labels, weight=weight), wanted)
    assert torch.allclose(cross_entropy(logits, labels, weight=2 * weight), 2 * wanted)
    weighted_mean = F.cross_entropy(logits, labels.long(), ignore_index=VOID, weight=weight)
    assert not torch.allclose(wanted, weighted_mean)


def test_all_pixels_of_a_batch_count_the_same_whatever_their_image():
    logits, labels = make(5)
    labels[0, 1:] = VOID
    parts = [cross_entropy(logits[i : i + 1], labels[i : i + 1]) * (labels[i] != VOID).sum() for i in range(2)]
    assert torch.allclose(cross_entropy(logits, labels), sum(parts) / (labels != VOID).sum())


def test_the_sum_is_the_mean_times_the_labelled_pixels():
    logits, labels = make(8)
    weight = torch.tensor([0.1, 1.0, 3.0, 10.0])
    valid = (labels != VOID).sum()
    for options in ({}, {"weight": weight}, {"label_smoothing": 0.2}, {"pixel_weight": torch.rand(labels.shape)}):
        mean = cross_entropy(logits, labels, **options)
        assert torch.allclose(cross_entropy(logits, labels, reduction="sum", **options), mean * valid)
    theirs = F.cross_entropy(logits, labels.long(), ignore_index=VOID, reduction="sum")
    assert torch.equal(cross_entropy(logits, labels, reduction="sum"), theirs)


def test_a_sum_counts_an_image_as_often_as_it_has_labelled_pixels():
    logits, labels = make(9)
    labels[0, 1:] = VOID
    parts = [cross_entropy(logits[i : i + 1], labels[i : i + 1], reduction="sum") for i in range(2)]
    assert torch.allclose(cross_entropy(logits, labels, reduction="sum"), sum(parts))


def test_pixel_weights_by_hand():
    logits, labels = make(10)
    pixel_weight = 11 * torch.rand(labels.shape, generator=torch.Generator().manual_seed(0))
    by_pixel = F.cross_entropy(logits, labels.long(), ignore_index=VOID, reduction="none")
    wanted = (by_pixel * pixel_weight).sum() / (labels != VOID).sum()
    assert torch.allclose(cross_entropy(logits, labels, pixel_weight=pixel_weight), wanted)
    ones = torch.ones(labels.shape)
    assert torch.allclose(cross_entropy(logits, labels, pixel_weight=ones), cross_entropy(logits, labels))
    gradient = torch.autograd.grad(cross_entropy(logits, labels, pixel_weight=pixel_weight), logits)[0].abs().sum(1)
    assert (gradient[labels == VOID] == 0).all() and (gradient[labels != VOID] > 0).all()


def test_pixel_weights_multiply_those_of_the_classes():
    logits, labels = make(11)
    weight, pixel_weight = torch.tensor([0.1, 1.0, 3.0, 10.0]), torch.rand(labels.shape)
    factor = weight[labels.long().clamp(max=3)] * pixel_weight
    both = cross_entropy(logits, labels, weight=weight, pixel_weight=pixel_weight)
    assert torch.allclose(both, cross_entropy(logits, labels, pixel_weight=factor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [cross_entropy, dice_loss])
def test_half_precision_scores_are_summed_in_float32(loss, dtype):
    logits, labels = make(6, size=(64, 64), dtype=dtype)
    value = loss(logits, labels)
    assert value.dtype == torch.float32
    assert torch.allclose(value, loss(logits.float(), labels), rtol=1e-5)


# -- Dice --


@settings(deadline=None, max_examples=60)
@given(shape=shapes)
def test_dice_is_that_of_a_one_hot_truth(shape):
    logits, labels = make(**shape)
    ours, naive = dice_loss(logits, labels), naive_dice(logits, labels)
    assert torch.allclose(ours, naive, atol=1e-5)
    if naive.requires_grad:
        grad = torch.autograd.grad(ours, logits)[0]
        assert torch.allclose(grad, torch.autograd.grad(naive, logits)[0], atol=1e-5)


def test_dice_does_not_see_what_stands_on_void():
    logits, labels = make(7)
    changed = torch.where((labels == VOID)[:, None], 50 * torch.randn_like(logits), logits)
    assert torch.allclose(dice_loss(changed, labels), dice_loss(logits, labels), atol=1e-6)


def test_dice_ranges_from_nothing_right_to_all_right():
    labels = torch.tensor([[[0, 1, 1, 0]]], dtype=torch.uint8)
    right = 100 * F.one_hot(labels.long(), 2).movedim(-1, 1).float()
    assert dice_loss(right, labels) == pytest.approx(0, abs=1e-6)
    assert dice_loss(-right, labels) == pytest.approx(1, abs=1e-6)
    assert math.isclose(dice_loss(0 * right, labels), 0.5, abs_tol=1e-6)
