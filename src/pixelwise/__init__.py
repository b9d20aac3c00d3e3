"""pixelwise: a class for every pixel of an image.

Three lines do the main job:

    run = pixelwise.train("data/camvid", pixelwise.RunConfig(minutes=30), out="runs/camvid")
    print(pixelwise.evaluate(run.folder, "data/camvid").scores.miou)
    pixelwise.load(run.folder).predict("street.jpg").save("street_labels.png")

The names below are the public API; nothing else is promised.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixelwise.data.check import Inspection, inspect_data
    from pixelwise.data.classes import load_labels
    from pixelwise.data.labels import LabelSpec
    from pixelwise.data.layouts import DataFolder, open_data
    from pixelwise.data.scenes import draw_scene, write_scenes
    from pixelwise.errors import DataError, PixelwiseError, UsageError
    from pixelwise.infer.evaluate import Evaluation, evaluate
    from pixelwise.infer.heatmap import open_classifier
    from pixelwise.infer.predictor import Prediction, Predictor, load
    from pixelwise.losses import class_weights, cross_entropy, dice_loss
    from pixelwise.metrics import ConfusionMatrix, Scores
    from pixelwise.models import create_model, list_models
    from pixelwise.models.registry import register_model
    from pixelwise.ops.convolutionalize import convolutionalize
    from pixelwise.ops.receptive_field import receptive_field
    from pixelwise.report import write_report
    from pixelwise.train import Run, RunConfig, train

# Where each public name lives. They are imported on first use: torch and its company take seconds, and `pixelwise --help`
# and a misspelt option should not wait for them.
_HOMES = {
    "ConfusionMatrix": "metrics",
    "DataError": "errors",
    "DataFolder": "data.layouts",
    "Evaluation": "infer.evaluate",
    "Inspection": "data.check",
    "LabelSpec": "data.labels",
    "PixelwiseError": "errors",
    "Prediction": "infer.predictor",
    "Predictor": "infer.predictor",
    "Run": "train",
    "RunConfig": "train",
    "Scores": "metrics",
    "UsageError": "errors",
    "class_weights": "losses",
    "convolutionalize": "ops.convolutionalize",
    "create_model": "models",
    "cross_entropy": "losses",
    "dice_loss": "losses",
    "draw_scene": "data.scenes",
    "evaluate": "infer.evaluate",
    "inspect_data": "data.check",
    "list_models": "models",
    "load": "infer.predictor",
    "load_labels": "data.classes",
    "open_classifier": "infer.heatmap",
    "open_data": "data.layouts",
    "receptive_field": "ops.receptive_field",
    "register_model": "models.registry",
    "train": "train",
    "write_report": "report",
    "write_scenes": "data.scenes",
}

__all__ = [
    "ConfusionMatrix",
    "DataError",
    "DataFolder",
    "Evaluation",
    "Inspection",
    "LabelSpec",
    "PixelwiseError",
    "Prediction",
    "Predictor",
    "Run",
    "RunConfig",
    "Scores",
    "UsageError",
    "class_weights",
    "convolutionalize",
    "create_model",
    "cross_entropy",
    "dice_loss",
    "draw_scene",
    "evaluate",
    "inspect_data",
    "list_models",
    "load",
    "load_labels",
    "open_classifier",
    "open_data",
    "receptive_field",
    "register_model",
    "train",
    "write_report",
    "write_scenes",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # it stands in pyproject.toml alone
        from importlib.metadata import version

        return version("pixelwise")
    if name not in _HOMES:
        raise AttributeError(f"module 'pixelwise' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pixelwise.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
