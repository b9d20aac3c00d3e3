"""The writer of NIfTI, under its old name."""

from pixelwise.formats.nifti import read_nifti_mark, write_nifti

__all__ = ["read_nifti_mark", "write_nifti"]
