"""Which network computes the scores, and that it is compared before it is trusted."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import UsageError
from pixelwise.infer import acceleration
from pixelwise.infer.bundle import ModelCard
from pixelwise.infer.options import OverflowingScores
from pixelwise.infer.predictor import Predictor
from pixelwise.models import create_model

SPEC = LabelSpec(names=("a", "b"), colors=((0, 0, 255), (90, 90, 90)), values=((0,), (1,)))
CONFIG = {"tiny": True, "num_classes": 2, "in_channels": 3}
IMAGE = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)


def predictor(model: nn.Module | None = None, **options: Any) -> Predictor:
    torch.manual_seed(0)
    card = ModelCard(model="linknet", config=CONFIG, labels=SPEC, mean=(0.5,) * 3, std=(0.2,) * 3)
    return Predictor(model or create_model("linknet", **CONFIG), card, device="cpu", **options)


def test_auto_folds_in_bfloat16_and_leaves_float32_as_it_is() -> None:
    assert predictor(precision="bf16").acceleration.kind == "fold"
    plain = predictor(precision="float32")
    assert plain.acceleration.kind == "none" and plain.acceleration.model is plain.model


def test_folded_in_float32_the_scores_are_those_of_the_network_to_rounding() -> None:
    none, fold = (predictor(precision="float32", accelerate=kind).predict(IMAGE) for kind in ("none", "fold"))
    assert none.logits is not None and fold.logits is not None
    assert torch.allclose(none.logits, fold.logits, atol=1e-4) and not torch.equal(none.logits, fold.logits)


@pytest.mark.parametrize("options", [{}, {"tile_px": 32}])
def test_folded_in_bfloat16_the_scores_are_no_further_from_float32_than_those_of_autocast(options: Any) -> None:
    exact = predictor(precision="float32").predict(IMAGE, **options).logits
    far = {}
    for kind in ("none", "fold"):
        scores = predictor(precision="bf16", accelerate=kind).predict(IMAGE, **options).logits
        assert exact is not None and scores is not None
        far[kind] = float((scores - exact).square().mean().sqrt())
    assert far["fold"] <= 1.2 * far["none"]


class Fixed(nn.Module):
    """Whose own numbers are float32 wherever it runs: it cannot be folded in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 2, 1), (torch.ones(2, 2),)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image)
        return torch.einsum("nchw,ck->nkhw", x, self.table[0].to(x.device))


def test_what_cannot_be_folded_runs_as_it_is_unless_folding_was_asked_for() -> None:
    auto = predictor(Fixed(), precision="bf16").acceleration
    assert auto.kind == "none" and auto.is_refused and "cannot be folded" in auto.reason
    with pytest.raises(UsageError, match=r"accelerate fold: this network cannot be folded \(.*Use accelerate none"):
        predictor(Fixed(), precision="bf16", accelerate="fold").predict(IMAGE)


def test_a_folded_network_with_other_scores_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*given: Any) -> nn.Module:
        made = fold(*given)
        made.model.register_forward_hook(lambda _module, _args, scores: scores * 1.1)
        return made

    fold = acceleration.fold
    monkeypatch.setattr(acceleration, "fold", spoilt)
    found = predictor(precision="bf16").acceleration
    assert found.kind == "none" and "its scores differ by" in found.reason
    with pytest.raises(UsageError, match="its scores differ by"):
        predictor(precision="float32", accelerate="fold").predict(IMAGE)


def test_options_that_do_not_exist_or_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="accelerate 'fast' is unknown; use one of auto, none, fold"):
        predictor(accelerate="fast")
    with pytest.raises(UsageError, match="batch statistics: what is folded has the averages of the training"):
        predictor(accelerate="fold", batch_statistics=True)
    assert predictor(precision="bf16", batch_statistics=True).acceleration.kind == "none"


@pytest.mark.parametrize("value", [np.nan, np.inf, -3.4e38])
@pytest.mark.parametrize("name", ["unet", "linknet"])
def test_numbers_that_overflow_are_an_error_in_a_folded_network_too(name: str, value: float) -> None:
    image = np.zeros((70, 90, 3), dtype=np.float32)
    image[20:23, 30:33] = value
    for kind in ("none", "fold"):
        with pytest.raises(OverflowingScores):
            predictor(create_model(name, **CONFIG), precision="bf16", accelerate=kind).predict(image)
