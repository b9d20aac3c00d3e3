"""Another name of `pixelwise.formats.png`, until its users follow."""

from pixelwise.formats.png import MARK, label_image, read_mark, write_png

__all__ = ["MARK", "label_image", "read_mark", "write_png"]
