"""What the writers of results share."""

from pixelwise.formats import LABELS, MAPS, WRITERS, Result, Writer, choose_writer

__all__ = ["LABELS", "MAPS", "WRITERS", "Result", "Writer", "choose_writer"]
