"""DICOM files and series written by pydicom: their order, meaning, space, compression, and whatever can be wrong."""

import itertools
import logging
import threading

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_windowing
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats import dicom, open_source
from pixelwise.formats.dicom import is_dicom, open_dicom

TURNED = nib.eulerangles.euler2mat(0.3, -0.2, 0.5)
SPACING = (0.8, 0.7)  # rows, columns


def image(pixels, position=(0, 0, 0), *, series="1.2.3", number=1, turned=TURNED, **fields):
    """One CT slice (H, W[, 3]) that lies at `position`."""
    found = Dataset()
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.SOPClassUID = found.file_meta.MediaStorageSOPClassUID = CTImageStorage
    found.SOPInstanceUID = found.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    found.PatientName, found.PatientID, found.PatientBirthDate, found.PatientSex = (
        "Doe^John",
        "SECRET7",
        "19500101",
        "O",
    )
    found.StudyInstanceUID, found.SeriesInstanceUID, found.FrameOfReferenceUID = "1.2.1", series, "1.2.9"
    found.StudyDate, found.StudyTime, found.StudyID, found.AccessionNumber = "20200101", "120000", "1", "1"
    found.ReferringPhysicianName, found.PositionReferenceIndicator, found.Manufacturer = "", "", "X"
    found.Modality, found.SeriesDescription, found.SeriesNumber, found.InstanceNumber = "CT", "chest", 1, number
    found.ImagePositionPatient = [float(f"{part:.10g}") for part in position]
    found.ImageOrientationPatient = [float(f"{part:.10g}") for part in (*turned[:, 0], *turned[:, 1])]
    found.PixelSpacing, found.SliceThickness = list(SPACING), 2.5
    found.Rows, found.Columns = pixels.shape[:2]
    found.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    found.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        found.PlanarConfiguration = 0
    found.BitsAllocated = found.BitsStored = pixels.dtype.itemsize * 8
    found.HighBit = found.BitsStored - 1
    found.PixelRepresentation = int(pixels.dtype.kind == "i")
    content = pixels.tobytes()
    found.PixelData = content + b"\0" * (len(content) % 2)
    found["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def saved(dataset, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return str(path)


def series(folder, volume, *, gaps=None, seed=3, step=2.5, **fields):
    """A series (slices, H, W) with names and instance numbers that say nothing; returns the folder and the positions."""
    order = np.random.default_rng(seed).permutation(len(volume))
    places = np.arange(len(volume)) * step if gaps is None else np.cumsum(gaps)
    positions = np.array([-100, 50, 7.5]) + places[:, None] * TURNED[:, 2]
    for index, pixels in enumerate(volume):
        mixed = order[index]
        saved(image(pixels, positions[index], number=int(mixed), **fields), folder / f"IM{mixed:04}.dcm")
    return str(folder), positions


def numbers(shape, dtype=np.int16, seed=0):
    return np.random.default_rng(seed).integers(0, 250, shape).astype(dtype)


def whole(source):
    height, width = source.info.height, source.info.width
    return np.stack([source.read(0, 0, height, width, plane=plane) for plane in range(source.info.planes)])


def test_slices_come_in_the_order_in_which_they_lie(tmp_path):
    volume = numbers((7, 6, 5))
    folder, positions = series(tmp_path / "ct", volume, RescaleSlope=2, RescaleIntercept=-100)
    (tmp_path / "ct" / "notes.txt").write_text("not an image")
    (tmp_path / "ct" / "DICOMDIR").write_bytes(bytes(200))
    with open_dicom(folder, intensity=(-100, 500)) as source:
        info = source.info
        assert (info.format, info.height, info.width, info.planes, info.dtype) == ("dicom", 6, 5, 7, "float32")
        np.testing.assert_allclose(whole(source)[..., 0], np.clip(volume * 2 / 600, 0, 1), atol=1e-6)
        known = source.metadata
    lps = np.eye(4)  # PS3.3 C.7.6.2.1.1
    lps[:3, 0], lps[:3, 1], lps[:3, 3] = TURNED[:, 0] * SPACING[1], TURNED[:, 1] * SPACING[0], positions[0]
    lps[:3, 2] = TURNED[:, 2] * 2.5
    np.testing.assert_allclose(known["affine"], np.diag([-1, -1, 1, 1]) @ lps, atol=1e-6)
    np.testing.assert_allclose(known["zooms"], (0.7, 0.8, 2.5), atol=1e-6)
    assert known["shape"] == (5, 6, 7) and known["even"] and not known["warnings"]
    assert not {"Doe", "SECRET7", "19500101"} & set(str(known).replace("^", " ").split())


def test_highdicom_finds_the_same_space(tmp_path):
    import highdicom

    folder, _ = series(tmp_path / "ct", numbers((4, 6, 5)))
    with open_dicom(folder) as source:
        known = source.metadata
    read = [pydicom.dcmread(name) for name, _ in known["frames"]]
    volume = highdicom.get_volume_from_series(read)  # its axes are slices, rows, columns; either end may come first
    corners = np.array(list(itertools.product((0, 3), (0, 5), (0, 4))))
    theirs = volume.map_indices_to_reference(corners) * (-1, -1, 1)
    ours = nib.affines.apply_affine(known["affine"], corners[:, ::-1])
    np.testing.assert_allclose(sorted(map(tuple, ours)), sorted(map(tuple, theirs)), atol=1e-5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_windows_are_parts_of_the_whole(tmp_path, data):
    dtype = data.draw(st.sampled_from([np.uint8, np.int16, np.uint16]))
    shape = tuple(data.draw(st.integers(1, 9)) for _ in range(3))
    volume = numbers(shape, dtype)
    folder, _ = series(tmp_path / f"{len(list(tmp_path.iterdir()))}", volume)
    with open_dicom(folder, intensity=(0, 250)) as source:
        plane, top, left = (data.draw(st.integers(0, length - 1)) for length in shape)
        height, width = data.draw(st.integers(1, shape[1] - top)), data.draw(st.integers(1, shape[2] - left))
        got = source.read(top, left, height, width, plane=plane)
    want = volume[plane, top : top + height, left : left + width] / 250
    np.testing.assert_allclose(got[:, :, 0], want, atol=1e-6)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_auto_is_the_display_window_as_pydicom_applies_it(tmp_path, function, inverted):
    fields = {"RescaleSlope": 1, "RescaleIntercept": -60, "WindowCenter": [40, 1], "WindowWidth": [120, 1]}
    dataset = image(numbers((8, 9)), VOILUTFunction=function, **fields)
    dataset.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    path = saved(dataset, tmp_path / "a.dcm")
    dataset = pydicom.dcmread(path)
    seen = apply_windowing(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    low, high = -(2**15) - 60, 2**15 - 1 - 60
    want = (seen - low) / (high - low)
    with open_dicom(path) as source:
        np.testing.assert_allclose(whole(source)[0, :, :, 0], 1 - want if inverted else want, atol=1e-6)
        used = source.metadata["intensity"]
    assert used["function"] == ("sigmoid" if function == "SIGMOID" else "linear")


def test_each_slice_has_its_own_window(tmp_path):
    for index in range(3):
        dataset = image(numbers((4, 4)), index * TURNED[:, 2], WindowCenter=50 * (index + 1), WindowWidth=101)
        saved(dataset, tmp_path / f"{index}.dcm")
    with open_dicom(str(tmp_path)) as source:
        planes = source.metadata["intensity"]["planes"]
        assert [plane["low"] for plane in planes] == [-0.5, 49.5, 99.5]
        assert not np.array_equal(*whole(source)[:2])


def test_auto_without_a_window_is_the_range_of_the_series(tmp_path):
    volume = numbers((3, 4, 5), np.uint16)
    volume[1, 0, 0] = 65000
    folder, _ = series(tmp_path / "a", volume, PixelPaddingValue=65000)
    with open_dicom(folder) as source:
        kept = volume[volume != 65000]
        want = np.clip((volume - float(kept.min())) / (kept.max() - kept.min()), 0, 1)
        np.testing.assert_allclose(whole(source)[..., 0], want, atol=1e-6)
        assert source.metadata["intensity"] == {"function": "linear", "low": kept.min(), "high": kept.max()}


@pytest.mark.parametrize("inverted", [False, True])
def test_by_type(tmp_path, inverted):
    kind = {"PhotometricInterpretation": "MONOCHROME1" if inverted else "MONOCHROME2"}
    bytes_ = numbers((4, 5), np.uint8)
    for intensity in ("auto", "type"):
        with open_dicom(saved(image(bytes_, **kind), tmp_path / "a.dcm"), intensity=intensity) as source:
            assert source.info.dtype == "uint8" and whole(source).dtype == np.uint8
            assert (whole(source)[0, :, :, 0] == (255 - bytes_ if inverted else bytes_)).all()
    words = numbers((4, 5), np.uint16)
    path = saved(image(words, BitsStored=12, HighBit=11, **kind), tmp_path / "b.dcm")
    with open_dicom(path, intensity="type") as source:
        want = (4095 - words if inverted else words) / 4095
        np.testing.assert_allclose(whole(source)[0, :, :, 0], want, atol=1e-6)


def test_colours(tmp_path):
    colors = numbers((6, 8, 3), np.uint8)
    with open_dicom(saved(image(colors), tmp_path / "a.dcm")) as source:
        assert (source.info.channels, source.info.dtype) == (3, "uint8") and (whole(source)[0] == colors).all()
    planar = image(colors)
    planar.PlanarConfiguration, planar.PixelData = 1, colors.transpose(2, 0, 1).tobytes()
    with open_dicom(saved(planar, tmp_path / "b.dcm")) as source:
        assert (whole(source)[0] == colors).all()
    ybr = pydicom.pixels.convert_color_space(colors, "RGB", "YBR_FULL")
    with open_dicom(saved(image(ybr, PhotometricInterpretation="YBR_FULL"), tmp_path / "c.dcm")) as source:
        assert np.abs(whole(source)[0].astype(int) - colors).max() <= 2
    palette = image(numbers((4, 5), np.uint8) % 4, PhotometricInterpretation="PALETTE COLOR")
    for name, high in (("Red", 200), ("Green", 100), ("Blue", 50)):
        setattr(palette, f"{name}PaletteColorLookupTableDescriptor", [4, 0, 16])
        table = (np.arange(4) * high // 3).astype("<u2") * 257
        setattr(palette, f"{name}PaletteColorLookupTableData", table.tobytes())
    with open_dicom(saved(palette, tmp_path / "d.dcm")) as source:
        assert (source.info.channels, source.info.dtype) == (3, "uint8")
        index = numbers((4, 5), np.uint8) % 4
        want = np.stack([index.astype(int) * high // 3 for high in (200, 100, 50)], axis=-1)
        assert (whole(source)[0] == want).all()


def functional_groups(frames, positions):
    """An enhanced CT of many frames, in another order than they lie."""
    order = np.random.default_rng(1).permutation(len(frames))
    found = image(frames[0])
    found.SOPClassUID = found.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    shared, per_frame = Dataset(), []
    measures, plane, values = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(SPACING), 2.5
    plane.ImageOrientationPatient = found.ImageOrientationPatient
    values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 3, -7, "HU"
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    shared.PixelValueTransformationSequence = [values]
    for index in order:
        place, item = Dataset(), Dataset()
        place.ImagePositionPatient = [float(f"{part:.10g}") for part in positions[index]]
        item.PlanePositionSequence = [place]
        per_frame.append(item)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(found, name)
    found.NumberOfFrames = len(frames)
    found.SharedFunctionalGroupsSequence, found.PerFrameFunctionalGroupsSequence = [shared], per_frame
    found.PixelData = frames[order].tobytes()
    return found


def test_frames_of_an_enhanced_file(tmp_path):
    volume = numbers((5, 4, 6))
    positions = np.array([1, 2, 3]) + np.arange(5)[:, None] * 2.5 * TURNED[:, 2]
    with open_dicom(saved(functional_groups(volume, positions), tmp_path / "a.dcm"), intensity=(-7, 743)) as source:
        np.testing.assert_allclose(whole(source)[..., 0], volume * 3 / 750, atol=1e-6)
        np.testing.assert_allclose(source.metadata["affine"][:3, 3], [-1, -2, 3], atol=1e-6)
        np.testing.assert_allclose(source.metadata["zooms"], (0.7, 0.8, 2.5), atol=1e-6)


def test_frames_without_a_place_stay_in_their_order(tmp_path):
    frames = numbers((4, 5, 6), np.uint8)
    cine = image(frames[0], NumberOfFrames=4, PixelData=frames.tobytes())
    del cine.ImagePositionPatient, cine.ImageOrientationPatient
    with open_dicom(saved(cine, tmp_path / "a.dcm")) as source:
        assert source.info.planes == 4 and (whole(source)[..., 0] == frames).all()
        assert "affine" not in source.metadata


def test_several_images_at_each_place_are_points_in_time(tmp_path):
    volume = numbers((2, 3, 4, 5), np.uint8)
    for time in range(2):
        for k in range(3):
            dataset = image(volume[time, k], k * 2.0 * TURNED[:, 2], number=time * 3 + k + 1)
            saved(dataset, tmp_path / f"{k}{time}.dcm")
    with open_dicom(str(tmp_path)) as source:
        assert source.metadata["shape"] == (5, 4, 3, 2) and source.metadata["time_points"] == 2
        assert (whole(source)[..., 0] == volume.reshape(6, 4, 5)).all()
    (tmp_path / "21.dcm").unlink()
    with pytest.raises(DataError, match="5 images lie at 3 places"):
        open_dicom(str(tmp_path))


def test_a_missing_slice_is_a_warning_and_a_tilted_gantry_none(tmp_path):
    folder, _ = series(tmp_path / "gap", numbers((4, 3, 3)), gaps=[0, 2.5, 5, 2.5])
    with open_dicom(folder) as source:
        assert not source.metadata["even"] and "2.500 to 5.000 mm" in source.metadata["warnings"][0]
    for k in range(4):  # each slice is shifted along the table, not along its normal
        saved(image(numbers((3, 3)), k * np.array([0.2, 0.5, 3])), tmp_path / "tilt" / f"{k}.dcm")
    with open_dicom(str(tmp_path / "tilt")) as source:
        assert source.metadata["even"]
        np.testing.assert_allclose(source.metadata["affine"][:3, 2], [-0.2, -0.5, 3], atol=1e-6)


def test_series_that_are_none(tmp_path):
    folder, _ = series(tmp_path / "a", numbers((2, 4, 5), np.uint8))
    saved(
        image(numbers((9, 9), np.uint8), series="1.2.77", SeriesDescription="scout\x1b[31m"),
        tmp_path / "a" / "scout.dcm",
    )
    with pytest.raises(
        DataError, match=r"holds 2 series: .*1\.2\.77 \(scout\?\[31m, 1 image\).*option series"
    ) as error:
        open_dicom(folder)
    assert "1.2.3 (chest, 2 images)" in str(error.value) and "Doe" not in str(error.value)
    with open_dicom(folder, series="1.2.77") as source:
        assert source.info.height == 9
    with pytest.raises(UsageError, match=r"no series '9'.*1\.2\.3"):
        open_dicom(folder, series="9")
    cases = {
        "size": ({}, numbers((4, 6), np.uint8), "pixels of 1 channels"),
        "turn": ({"turned": np.eye(3)}, numbers((4, 5), np.uint8), "is turned against"),
        "lost": ({"ImagePositionPatient": None}, numbers((4, 5), np.uint8), "have no ImagePositionPatient"),
    }
    for name, (fields, pixels, message) in cases.items():
        folder, _ = series(tmp_path / name, numbers((2, 4, 5), np.uint8))
        saved(image(pixels, (9, 9, 9), **fields), tmp_path / name / "z.dcm")
        with pytest.raises(DataError, match=name + ".*" + message):
            open_dicom(folder)
    folder, _ = series(tmp_path / "twice", numbers((2, 4, 5), np.uint8))
    first = next((tmp_path / "twice").iterdir())
    (tmp_path / "twice" / "copy.dcm").write_bytes(first.read_bytes())
    with pytest.raises(DataError, match="are the same image"):
        open_dicom(folder)
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no DICOM image in this folder\. It has the folders inside"):
        open_dicom(str(tmp_path / "empty"))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_orders_of_bytes(tmp_path, syntax):
    pixels = numbers((4, 5), np.uint16)
    dataset = image(pixels)
    dataset.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        dataset.PixelData = pixels.astype(">u2").tobytes()
    with open_dicom(saved(dataset, tmp_path / "a.dcm"), intensity=(0, 250)) as source:
        np.testing.assert_allclose(whole(source)[0, :, :, 0], pixels / 250, atol=1e-6)


def encoded(pixels, syntax):
    import imagecodecs

    if syntax == RLELossless:
        return None
    kinds = {
        "1.2.840.10008.1.2.4.50": lambda: imagecodecs.jpeg8_encode(pixels, level=100),
        "1.2.840.10008.1.2.4.51": lambda: imagecodecs.jpeg8_encode(pixels, level=100, bitspersample=12),
        "1.2.840.10008.1.2.4.57": lambda: imagecodecs.jpeg8_encode(pixels, lossless=True, bitspersample=12),
        "1.2.840.10008.1.2.4.70": lambda: imagecodecs.ljpeg_encode(pixels, bitspersample=12),
        "1.2.840.10008.1.2.4.80": lambda: imagecodecs.jpegls_encode(pixels),
        "1.2.840.10008.1.2.4.90": lambda: imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True),
        "1.2.840.10008.1.2.4.201": lambda: imagecodecs.htj2k_encode(pixels, reversible=True),
    }
    return kinds[str(syntax)]()


@pytest.mark.parametrize("code", ["5", "4.50", "4.51", "4.57", "4.70", "4.80", "4.90", "4.201"])
def test_compressed_pixels(tmp_path, code):
    syntax = pydicom.uid.UID(f"1.2.840.10008.1.2.{code}")
    frames = np.cumsum(numbers((3, 17, 22), np.uint16, seed=2) % 9, axis=2).astype(
        np.uint8 if code == "4.50" else np.uint16
    )
    bits = 8 if code == "4.50" else 12
    dataset = image(frames[0], BitsStored=bits, HighBit=bits - 1, NumberOfFrames=3, PixelData=frames.tobytes())
    dataset["PixelData"].VR = "OW"
    if code == "5":
        dataset.compress(RLELossless)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([encoded(frame, syntax) for frame in frames])
        dataset["PixelData"].VR = "OB"
    with open_dicom(saved(dataset, tmp_path / "a.dcm"), intensity=(0, 250)) as source:
        tolerance = {"4.50": 8, "4.51": 8}.get(code, 0) / 250 + 1e-6
        np.testing.assert_allclose(whole(source)[..., 0], np.clip(frames / 250, 0, 1), atol=tolerance)


@pytest.mark.parametrize("code", ["4.57", "4.90", "4.201"])
def test_compressed_colours(tmp_path, code):
    import imagecodecs

    colors = numbers((17, 22, 3), np.uint8)
    dataset = image(colors)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.UID(f"1.2.840.10008.1.2.{code}")
    content = {
        "4.57": lambda: imagecodecs.jpeg8_encode(colors, lossless=True, colorspace="RGB", outcolorspace="RGB"),
        "4.90": lambda: imagecodecs.jpeg2k_encode(colors, codecformat="j2k", reversible=True, mct=True),
        "4.201": lambda: imagecodecs.htj2k_encode(colors, reversible=True),
    }[code]()
    dataset.PhotometricInterpretation = "RGB" if code == "4.57" else "YBR_RCT"
    dataset.PixelData = encapsulate([content])
    dataset["PixelData"].VR = "OB"
    with open_dicom(saved(dataset, tmp_path / "a.dcm")) as source:
        assert (whole(source)[0] == colors).all()


@pytest.mark.parametrize(
    ("syntax", "message"),
    [
        ("1.2.840.10008.1.2.4.100", "MPEG2 Main Profile / Main Level"),
        ("1.2.840.10008.1.2.1.99", "deflated as a whole"),
        ("1.2.3.4.5", r"compressed as 1\.2\.3\.4\.5"),
    ],
)
def test_a_missing_decoder_is_named(tmp_path, syntax, message):
    dataset = image(numbers((4, 5), np.uint8))
    saved(dataset, tmp_path / "a.dcm")
    content = (tmp_path / "a.dcm").read_bytes()
    old, new = str(ExplicitVRLittleEndian).encode(), syntax.encode()
    at = content.index(old)
    size = len(new) + len(new) % 2
    old_size = len(old) + len(old) % 2
    changed = content[: at - 2] + size.to_bytes(2, "little") + new.ljust(size, b"\0") + content[at + old_size :]
    group = changed.index(b"\x02\0\0\0UL\x04\0") + 8
    length = int.from_bytes(changed[group : group + 4], "little") + size - old_size
    (tmp_path / "a.dcm").write_bytes(changed[:group] + length.to_bytes(4, "little") + changed[group + 4 :])
    with pytest.raises(DataError, match=r"a\.dcm: .*" + message):
        open_dicom(str(tmp_path / "a.dcm"))


def test_nan_in_float_pixels_names_the_file(tmp_path):
    dataset = image(numbers((4, 5), np.uint8), BitsAllocated=32, BitsStored=32, HighBit=31)
    del dataset.PixelData
    values = np.ones((4, 5), dtype="<f4")
    values[1, 1] = np.nan
    dataset.FloatPixelData = values.tobytes()
    path = saved(dataset, tmp_path / "holes.dcm")
    with (
        open_dicom(path, intensity="type") as source,
        pytest.raises(DataError, match=r"holes\.dcm: 1 of its numbers in frame 0 are NaN"),
    ):
        whole(source)


def test_only_a_few_frames_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "_CACHE_BYTES", 200)
    frames = numbers((6, 8, 8), np.uint8)
    path = saved(image(frames[0], NumberOfFrames=6, PixelData=frames.tobytes()), tmp_path / "a.dcm")
    with open_dicom(path) as source:
        assert (whole(source)[..., 0] == frames).all()
        assert source._stored.cache_info().currsize == 3


def test_many_threads_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom, "_CACHE_BYTES", 500)
    frames = numbers((9, 8, 8), np.uint8)
    dataset = image(frames[0], NumberOfFrames=9, PixelData=frames.tobytes())
    dataset.compress(RLELossless)
    bad = []
    with open_dicom(saved(dataset, tmp_path / "a.dcm")) as source:

        def work(seed):
            for plane in np.random.default_rng(seed).integers(0, 9, 40):
                if not (source.read(0, 0, 8, 8, plane=int(plane))[:, :, 0] == frames[plane]).all():
                    bad.append(plane)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert not bad


def test_fingerprint_and_change(tmp_path):
    folder, _ = series(tmp_path / "a", numbers((3, 4, 5), np.uint8))
    with open_dicom(folder) as source:
        source.check_unchanged()
        before = source.fingerprint()
        name = source.metadata["frames"][1][0]
        saved(image(numbers((4, 9), np.uint8)), tmp_path / "a" / name)
        assert source.fingerprint() != before
        with pytest.raises(DataError, match="the file changed"):
            source.check_unchanged()


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"hello" * 100)
    with pytest.raises(DataError, match=r"a\.dcm: this is no DICOM file"):
        open_dicom(str(tmp_path / "a.dcm"))
    with pytest.raises(DataError, match="no such file"):
        open_dicom(str(tmp_path / "none.dcm"))
    report = image(numbers((4, 5), np.uint8))
    for name in ("Rows", "Columns", "PixelData", "BitsAllocated"):
        delattr(report, name)
    with pytest.raises(
        DataError, match="marked as CT Image Storage, but has no size"
    ):  # else a slice would be left out
        open_dicom(saved(report, tmp_path / "report.dcm"))
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    with pytest.raises(DataError, match="holds no image"):
        open_dicom(saved(report, tmp_path / "report.dcm"))
    slide = image(numbers((4, 5), np.uint8), SOPClassUID="1.2.840.10008.5.1.4.1.1.77.1.6")
    with pytest.raises(DataError, match="whole-slide"):
        open_dicom(saved(slide, tmp_path / "slide.dcm"))
    claims = image(numbers((4, 5), np.uint8), Rows=60000, Columns=60000, NumberOfFrames=100000)
    with pytest.raises(DataError, match=r"bomb\.dcm: .*cannot hold"):
        open_dicom(saved(claims, tmp_path / "bomb.dcm"))
    assert is_dicom((tmp_path / "slide.dcm").read_bytes()[:4096], "x") and not is_dicom(b"", "x.dcm")


@pytest.mark.parametrize("code", ["4.57", "4.80", "4.201"])
def test_a_frame_that_claims_to_be_larger_is_not_decoded(tmp_path, code):
    syntax = pydicom.uid.UID(f"1.2.840.10008.1.2.{code}")
    frame = encoded(numbers((17, 22), np.uint16), syntax)
    old, new = (b"\0\x11\0\x16", b"\xff\xff\xff\xff") if code != "4.201" else (b"\0\0\0\x16\0\0\0\x11", b"\0\2" * 4)
    assert old in frame
    dataset = image(numbers((17, 22), np.uint16), BitsStored=12, HighBit=11)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([frame.replace(old, new, 1)])
    dataset["PixelData"].VR = "OB"
    path = saved(dataset, tmp_path / "a.dcm")
    with pytest.raises(DataError, match=r"a\.dcm: .*damaged"), open_source(path) as source:
        source.read(0, 0, 17, 22)


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(UsageError, match=r'pip install "nibabel>=5\.2"'):
        open_dicom("a.dcm")


def test_damaged_files_end_in_one_error(tmp_path, capfd, caplog):
    """Ninety files with random bytes changed or their end cut off: opened and read, or refused with their name alone."""
    random = np.random.default_rng(6)
    frames = numbers((3, 17, 22), np.uint16)
    plain = image(frames[0], WindowCenter=40, WindowWidth=80)
    rle = image(frames[0], NumberOfFrames=3, PixelData=frames.tobytes())
    rle.compress(RLELossless)
    codes = ("4.57", "4.80", "4.90", "4.201")
    originals = [plain, rle, functional_groups(frames, np.arange(3)[:, None] * TURNED[:, 2])]
    for code in codes:
        syntax = pydicom.uid.UID(f"1.2.840.10008.1.2.{code}")
        packed = image(frames[0], NumberOfFrames=3, BitsStored=12, HighBit=11)
        packed.file_meta.TransferSyntaxUID = syntax
        packed.PixelData = encapsulate([encoded(frame, syntax) for frame in frames])
        packed["PixelData"].VR = "OB"
        originals.append(packed)
    contents = []
    for dataset in originals:
        contents.append((tmp_path / "a.dcm", saved(dataset, tmp_path / "a.dcm"))[0].read_bytes())
    caplog.set_level(logging.DEBUG)
    refused = 0
    for trial in range(91):
        damaged = bytearray(contents[trial % 7])
        if trial % 4 == 0:
            damaged = damaged[: random.integers(0, len(damaged))]
        else:
            for place in random.integers(132, len(damaged), random.integers(1, 20)):
                damaged[place] = random.integers(256)
        path = tmp_path / "damaged.dcm"
        path.write_bytes(damaged)
        try:
            with open_dicom(str(path)) as source:
                whole(source)
                assert source.metadata["frames"]
        except PixelwiseError as error:
            refused += 1
            assert isinstance(error, DataError) and "damaged.dcm" in str(error) and "\n" not in str(error)
            assert not any(secret in str(error) for secret in ("Doe", "SECRET7", "1950"))
    assert refused > 30
    assert capfd.readouterr() == ("", "") and not caplog.records
