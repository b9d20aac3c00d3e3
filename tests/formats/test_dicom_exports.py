"""DICOM as old and odd exports have it: no preamble, tables for display, positions with few digits."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_voi_lut
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from pixelwise.data.image_files import is_series
from pixelwise.errors import DataError
from pixelwise.formats import open_source
from pixelwise.formats.dicom import open_dicom
from pixelwise.formats.local import is_dicom_head


def write(path, pixels, place=0.0, *, preamble=True, implicit=True, **fields):
    found = Dataset()
    found.SOPClassUID, found.SOPInstanceUID = CTImageStorage, generate_uid(entropy_srcs=[str(path)])
    found.SeriesInstanceUID, found.StudyInstanceUID, found.Modality = "1.2.3", "1.2.1", "CT"
    found.Rows, found.Columns = pixels.shape
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated, found.BitsStored, found.HighBit, found.PixelRepresentation = 16, 12, 11, 0
    found.PixelSpacing, found.SliceThickness = [0.8, 0.7], 3
    found.ImagePositionPatient, found.ImageOrientationPatient = [-20, -30, place], [1, 0, 0, 0, 1, 0]
    found.WindowCenter, found.WindowWidth = 128, 256
    for name, value in fields.items():
        setattr(found, name, value)
    found.PixelData = pixels.astype("<u2").tobytes()
    if not preamble:
        pydicom.dcmwrite(path, found, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
        return path
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = found.SOPClassUID
    found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID
    found.save_as(path, enforce_file_format=True)
    return path


def slices(count=5):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 9))


def whole(source):
    return np.stack([source.read(0, 0, 8, 9, plane)[..., 0] for plane in range(source.info.planes)])


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("without", [5, 2], ids=["all", "some"])
def test_files_without_a_preamble_are_slices_as_well(tmp_path, implicit, without):
    volume = slices()
    for number, pixels in enumerate(volume):
        path = tmp_path / f"{number}.dcm"
        write(path, pixels, 3.0 * number, preamble=number >= without, implicit=implicit)
    with open_source(tmp_path, intensity=(0, 255)) as source:
        np.testing.assert_allclose(whole(source), volume / 255, atol=1e-6)
    with open_source(tmp_path / "0.dcm", intensity=(0, 255)) as source:
        np.testing.assert_allclose(whole(source), volume[:1] / 255, atol=1e-6)
    for path in list(tmp_path.iterdir()):
        path.rename(path.with_suffix(""))
    assert is_series(tmp_path, [path.name for path in tmp_path.iterdir()])


def test_a_damaged_slice_is_not_left_out(tmp_path):
    for number, pixels in enumerate(slices()):
        write(tmp_path / f"{number}.dcm", pixels, 3.0 * number)
    (tmp_path / "4.dcm").write_bytes(bytes(2000))
    with pytest.raises(DataError, match=r"1 are named as DICOM but are not, or are damaged: 4\.dcm"):
        open_dicom(str(tmp_path))


@pytest.mark.parametrize("head", [b"", b"\x08\0", b"\x08\0\x05\0CS", bytes(200), b"\x08\0\x05\0" * 40, b"\x02\0" * 99])
def test_what_only_looks_like_it_is_no_dicom(head):
    assert not is_dicom_head(head)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("slope, intercept", [(1, 0), (2, -100)])
def test_a_voi_lut_sequence_is_the_display(tmp_path, photometric, slope, intercept):
    table = Dataset()
    table.LUTDescriptor = [200, 20, 8]
    table.add_new(0x00283006, "OW", (255 * np.linspace(0, 1, 200) ** 3).astype("<u2").tobytes())
    fields = {"VOILUTSequence": [table], "PhotometricInterpretation": photometric}
    path = write(tmp_path / "a.dcm", slices(1)[0], **fields, RescaleSlope=slope, RescaleIntercept=intercept)
    dataset = pydicom.dcmread(path)
    meant = np.minimum(dataset.pixel_array.astype(int) * slope + intercept, 219)  # pydicom wraps numbers beyond its end
    right = apply_voi_lut(meant, dataset) / 255
    with open_dicom(str(path)) as source:
        assert source.metadata["intensity"]["function"] == "table"
        np.testing.assert_allclose(whole(source)[0], 1 - right if photometric == "MONOCHROME1" else right, atol=1e-6)
    with open_dicom(str(path), intensity=(0, 255)) as source:  # the user's range comes first
        assert source.metadata["intensity"]["function"] == "linear"


def test_positions_and_spacings_need_not_agree_to_the_last_digit(tmp_path):
    volume = slices(8)
    for number, pixels in enumerate(volume):
        place, time = divmod(number, 2)
        jitter = 0.004 * time
        fields = {"PixelSpacing": [0.8 + 1e-5 * time, 0.7], "TemporalPositionIdentifier": time + 1}
        write(tmp_path / f"{number}.dcm", pixels, 3.0 * place + jitter, **fields)
    with open_dicom(str(tmp_path), intensity=(0, 255)) as source:
        assert source.metadata["time_points"] == 2 and source.metadata["even"]
        np.testing.assert_allclose(whole(source), np.concatenate([volume[::2], volume[1::2]]) / 255, atol=1e-6)


def table(values):
    """A Modality LUT Sequence of 16-bit numbers for stored 0, 1, 2, ..."""
    item = Dataset()
    item.LUTDescriptor, item.ModalityLUTType, item.LUTData = (
        [len(values), 0, 16],
        "US",
        np.array(values, "<u2").tobytes(),
    )
    return [item]


def test_a_table_of_meanings_in_dicom_is_not_cut_to_the_stored_type(tmp_path):
    pixels = np.arange(256).reshape(16, 16)
    path = write(tmp_path / "a.dcm", pixels, BitsStored=8, HighBit=7, ModalityLUTSequence=table([*range(0, 2560, 10)]))
    dataset = pydicom.dcmread(path)
    for name in ("WindowCenter", "WindowWidth"):
        delattr(dataset, name)
    dataset.save_as(path)
    with open_dicom(str(path)) as source:  # auto: the range of the meanings
        np.testing.assert_allclose(source.read(0, 0, 16, 16)[..., 0], pixels / 255, atol=1e-6)
    with open_dicom(str(path), intensity=(0, 5100)) as source:
        np.testing.assert_allclose(source.read(0, 0, 16, 16)[..., 0], pixels * 10 / 5100, atol=1e-6)
    with open_dicom(str(path), intensity="type") as source:  # the stored numbers
        found = source.read(0, 0, 16, 16)[..., 0]
        assert np.array_equal(found if found.dtype == np.uint8 else np.round(found * 255), pixels)
