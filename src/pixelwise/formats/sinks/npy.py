"""The writers of .npy, under their old name."""

from pixelwise.formats.npy import write_npy, write_probabilities

__all__ = ["write_npy", "write_probabilities"]
