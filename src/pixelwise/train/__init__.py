"""Training: a configuration, a plan, a run folder.

This package is callable: `pixelwise.train(data, config, out=run)` means its function `train`, although importing it binds
the name `pixelwise.train` to the package.
"""

import sys
from types import ModuleType
from typing import Any

from pixelwise.train.config import RunConfig, make_config, merge_options, parse_settings, read_config
from pixelwise.train.folder import command_line
from pixelwise.train.plan import Plan
from pixelwise.train.run import Run, train

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


class _Package(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Run:
        return train(*args, **options)


sys.modules[__name__].__class__ = _Package
