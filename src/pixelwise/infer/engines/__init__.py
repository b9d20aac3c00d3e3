"""Who does the work of a batch: this process (`local`), or the workers of a Ray cluster (`ray`)."""

from pixelwise.infer.engines.base import Batch, Job, Labeller, Outcome, OutputError

ENGINES = ("local", "ray")

__all__ = ["ENGINES", "Batch", "Job", "Labeller", "Outcome", "OutputError"]
