"""From a run folder to labels for new images, and to scores on labelled ones."""

from pixelwise.infer.batch import Batch, Outcome, plan_batch
from pixelwise.infer.bundle import ModelCard, load_bundle, load_card, save_bundle
from pixelwise.infer.engines.local import run_batch
from pixelwise.infer.evaluate import Evaluation, evaluate
from pixelwise.infer.predictor import Prediction, Predictor, load

__all__ = [
    "Batch",
    "Evaluation",
    "ModelCard",
    "Outcome",
    "Prediction",
    "Predictor",
    "evaluate",
    "load",
    "load_bundle",
    "load_card",
    "plan_batch",
    "run_batch",
    "save_bundle",
]
