"""Another name of `pixelwise.formats.png`, until its users follow."""

from pixelwise.formats.png import write_png_labels

__all__ = ["write_png_labels"]
