"""Labels and maps as files, one writer per format; `choose_writer` picks it, `upload` puts the file behind a URL."""

from pixelwise.formats.base import LABELS, MAPS, Result, Writer
from pixelwise.formats.sinks.choosing import WRITERS, choose_writer

__all__ = ["LABELS", "MAPS", "WRITERS", "Result", "Writer", "choose_writer"]
