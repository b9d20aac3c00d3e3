"""From a run folder to labels for new images, and to scores on labelled ones."""

from pixelwise.infer.batch import plan_batch
from pixelwise.infer.engines.local import run_batch
from pixelwise.infer.evaluate import evaluate
from pixelwise.infer.predictor import load

__all__ = ["evaluate", "load", "plan_batch", "run_batch"]
