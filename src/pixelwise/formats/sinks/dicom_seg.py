"""The writer of DICOM-SEG, under its old name."""

from pixelwise.formats.dicom_seg import read_dicom_seg_mark, write_dicom_seg

__all__ = ["read_dicom_seg_mark", "write_dicom_seg"]
