"""Training: a configuration, a plan, a run folder."""

from pixelwise.train.config import RunConfig, make_config, merge_options, parse_settings, read_config
from pixelwise.train.plan import Plan
from pixelwise.train.run import Run, command_line, train

__all__ = [
    "Plan",
    "Run",
    "RunConfig",
    "command_line",
    "make_config",
    "merge_options",
    "parse_settings",
    "read_config",
    "train",
]
