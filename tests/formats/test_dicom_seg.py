"""DICOM-SEG out, read back by highdicom, and DICOM in to NIfTI out: same labels at the same places in the patient.

DICOM masks in: segmentations made by highdicom lie plane by plane on their series; label series are raw numbers.
"""

import errno

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats import choose_writer, open_source
from pixelwise.formats import dicom_seg as sink
from pixelwise.formats.base import Result, SourceInfo
from pixelwise.formats.dicom import open_dicom
from pixelwise.formats.dicom_seg import write_dicom_seg
from pixelwise.formats.nifti import write_nifti

SPEC = LabelSpec(
    names=("Background", "liver", "tumour"), colors=((0, 0, 0), (200, 30, 30), (9, 8, 7)), values=((0,), (1,), (2,))
)
TURNED = nib.eulerangles.euler2mat(0.3, -0.2, 0.5)
DIRECTIONS = [float(f"{part:.10g}") for part in (*TURNED[:, 0], *TURNED[:, 1])]


def ct(position, number=1):
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
    found.StudyInstanceUID, found.SeriesInstanceUID, found.FrameOfReferenceUID = "1.2.1", "1.2.3", "1.2.9"
    found.StudyDate, found.StudyTime, found.StudyID, found.AccessionNumber = "20200101", "120000", "1", "1"
    found.ReferringPhysicianName, found.PositionReferenceIndicator, found.Manufacturer = "", "", "X"
    found.Modality, found.SeriesNumber, found.InstanceNumber = "CT", 1, number
    found.ImagePositionPatient = [float(f"{part:.10g}") for part in position]
    found.ImageOrientationPatient, found.PixelSpacing, found.SliceThickness = DIRECTIONS, [0.8, 0.7], 2.5
    found.Rows, found.Columns, found.SamplesPerPixel, found.PhotometricInterpretation = 6, 5, 1, "MONOCHROME2"
    found.BitsAllocated, found.BitsStored, found.HighBit, found.PixelRepresentation = 16, 16, 15, 1
    found.PixelData = np.arange(30, dtype=np.int16).tobytes()
    return found


def series(folder, gaps=(0, 2.5, 2.5, 2.5)):
    """Four slices under names that say nothing; returns the folder and their positions."""
    positions = np.array([-100, 50, 7.5]) + np.cumsum(gaps)[:, None] * TURNED[:, 2]
    folder.mkdir()
    for name, number, position in zip("cadb", (3, 1, 4, 2), positions, strict=True):
        ct(position, number).save_as(folder / f"{name}.dcm", enforce_file_format=True)
    return str(folder), positions


def enhanced(path):
    """An enhanced CT of four frames, in another order than they lie."""
    found = ct((0, 0, 0))
    found.SOPClassUID = found.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    shared, frames = Dataset(), []
    measures, plane = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [0.8, 0.7], 2.5
    plane.ImageOrientationPatient = DIRECTIONS
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    dimensions = generate_uid()
    for number, index in enumerate((2, 0, 3, 1)):
        place, item, content = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [float(f"{part:.10g}") for part in index * 2.5 * TURNED[:, 2]]
        content.DimensionIndexValues = [1, number + 1]
        item.PlanePositionSequence, item.FrameContentSequence = [place], [content]
        frames.append(item)
    organization = Dataset()
    organization.DimensionOrganizationUID = dimensions
    found.DimensionOrganizationSequence = [organization]
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(found, name)
    found.NumberOfFrames, found.PixelData = 4, np.arange(120, dtype=np.int16).tobytes()
    found.SharedFunctionalGroupsSequence, found.PerFrameFunctionalGroupsSequence = [shared], frames
    found.save_as(path, enforce_file_format=True)
    return str(path)


def result_of(source, *, kind="labels", dtype=np.uint8, planes=None, spec=SPEC, **more):
    info = source.info
    if planes is None:
        planes = np.random.default_rng(0).integers(0, 3, (info.planes, info.height, info.width)).astype(dtype)
    result = Result(
        kind=kind,
        spec=spec,
        source=info,
        metadata=source.metadata,
        dtype=np.dtype(dtype),
        rows=lambda plane, top, bottom: planes[plane, top:bottom],
        **more,
    )
    return result, planes


@pytest.mark.parametrize("folder", [True, False])
def test_highdicom_reads_the_labels_back(tmp_path, folder):
    location = series(tmp_path / "ct")[0] if folder else enhanced(tmp_path / "enhanced.dcm")
    with open_dicom(location) as source:
        result, planes = result_of(source, mark={"model": "0123abc", "input": "x"})
        write_dicom_seg(tmp_path / "seg.dcm", result)
        frames = source.metadata["frames"]
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    if folder:
        uids = [pydicom.dcmread(name, stop_before_pixels=True).SOPInstanceUID for name, _ in frames]
        got = seg.get_pixels_by_source_instance(uids, combine_segments=True, skip_overlap_checks=True)
    else:
        uid = pydicom.dcmread(location, stop_before_pixels=True).SOPInstanceUID
        numbers = [frame + 1 for _, frame in frames]
        got = seg.get_pixels_by_source_frame(uid, numbers, combine_segments=True, ignore_spatial_locations=False)
    assert (got == planes).all()  # class k is segment k, for only class 0 is background
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["liver", "tumour"]


def test_space_and_origin_are_those_of_the_source(tmp_path):
    location, positions = series(tmp_path / "ct")
    with open_dicom(location) as source:
        write_dicom_seg(tmp_path / "seg.dcm", result_of(source, mark={"model": "0123abc"})[0])
    seg, first = pydicom.dcmread(tmp_path / "seg.dcm"), pydicom.dcmread(tmp_path / "ct" / "c.dcm")
    for name in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg[name].value == first[name].value, name
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.3"
    assert len(seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 4
    shared = seg.SharedFunctionalGroupsSequence[0]
    assert list(shared.PixelMeasuresSequence[0].PixelSpacing) == [0.8, 0.7]
    np.testing.assert_allclose(shared.PlaneOrientationSequence[0].ImageOrientationPatient, DIRECTIONS, atol=1e-6)
    places = {
        tuple(map(float, item.PlanePositionSequence[0].ImagePositionPatient))
        for item in seg.PerFrameFunctionalGroupsSequence
    }
    np.testing.assert_allclose(sorted(places), sorted(map(tuple, positions)), atol=1e-6)
    segment = seg.SegmentSequence[0]
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "85756007"
    assert segment.SegmentAlgorithmType == "AUTOMATIC" and "RecommendedDisplayCIELabValue" in segment
    assert seg.SegmentationType == "BINARY" and seg.DeviceSerialNumber == "0123abc" and seg.Modality == "SEG"
    assert seg.SoftwareVersions and seg.ManufacturerModelName == "pixelwise"


def test_dicom_in_nifti_out_lies_at_the_same_place(tmp_path):
    location, positions = series(tmp_path / "ct")
    with open_dicom(location) as source:
        result, planes = result_of(source)
        write_nifti(tmp_path / "labels.nii.gz", result)
    written = nib.load(tmp_path / "labels.nii.gz")
    assert (np.asarray(written.dataobj).transpose(2, 1, 0) == planes).all()
    for column, row, k in ((0, 0, 0), (4, 0, 3), (0, 5, 1), (4, 5, 2)):
        lps = positions[k] + TURNED[:, 0] * 0.7 * column + TURNED[:, 1] * 0.8 * row  # PS3.3 C.7.6.2.1.1
        found = nib.affines.apply_affine(written.affine, (column, row, k))
        np.testing.assert_allclose(found, lps * (-1, -1, 1), atol=1e-4)
    np.testing.assert_allclose(written.affine, written.header.get_qform(), atol=1e-4)
    assert written.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(written.header.get_zooms(), (0.7, 0.8, 2.5), atol=1e-5)


def test_uneven_slices_are_no_nifti_but_a_segmentation(tmp_path):
    location, positions = series(tmp_path / "ct", gaps=(0, 2.5, 5, 2.5))
    with open_dicom(location) as source:
        result, _ = result_of(source)
        with pytest.raises(UsageError, match=r"uneven distances.*Possible are .*dicom-seg"):
            choose_writer(source.info, "labels", "nifti", source.metadata)
        write_dicom_seg(tmp_path / "seg.dcm", result)
    frames = pydicom.dcmread(tmp_path / "seg.dcm").PerFrameFunctionalGroupsSequence
    assert len({tuple(frame.PlanePositionSequence[0].ImagePositionPatient) for frame in frames}) == len(positions)


def test_every_class_but_background_by_name_is_a_segment(tmp_path):
    location, _ = series(tmp_path / "ct")
    organs = LabelSpec(names=("liver", "kidney"), colors=((9, 0, 0), (0, 9, 0)), values=((0,), (1,)))
    planes = np.random.default_rng(0).integers(0, 2, (4, 6, 5)).astype(np.uint8)
    planes[0, 0, 0] = 255
    with open_dicom(location) as source:
        write_dicom_seg(tmp_path / "seg.dcm", result_of(source, spec=organs, planes=planes, nodata=255)[0])
        uids = [pydicom.dcmread(name).SOPInstanceUID for name, _ in source.metadata["frames"]]
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    got = seg.get_pixels_by_source_instance(uids, combine_segments=True)
    assert (got == np.where(planes == 255, 0, planes + 1)).all()
    only = LabelSpec(names=("void",), colors=((0, 0, 0),), values=((0,),))
    with open_dicom(location) as source, pytest.raises(UsageError, match="no class is left"):
        write_dicom_seg(tmp_path / "none.dcm", result_of(source, spec=only)[0])


def test_nothing_found_is_a_valid_file(tmp_path, capfd):
    location, _ = series(tmp_path / "ct")
    with open_dicom(location) as source:
        write_dicom_seg(tmp_path / "seg.dcm", result_of(source, planes=np.zeros((4, 6, 5), dtype=np.uint8))[0])
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert not seg.pixel_array.any() and seg.NumberOfFrames == 8
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_a_segmentation_is_refused(tmp_path, monkeypatch):
    location, _ = series(tmp_path / "ct")
    info = SourceInfo(location="photo.png", format="png", height=2, width=2, channels=3, dtype="uint8")
    with pytest.raises(UsageError, match=r"photo\.png: .* as dicom-seg: it refers to DICOM images, not to png"):
        choose_writer(info, "labels", "dicom-seg")
    with open_dicom(location) as source:
        result, _ = result_of(source)
        assert choose_writer(source.info, "entropy", "dicom-seg", source.metadata)[0] == ".nii.gz"
        monkeypatch.setattr(sink, "_MAX_BYTES", 10)
        with pytest.raises(PixelwiseError, match="GiB of memory"):
            write_dicom_seg(tmp_path / "seg.dcm", result)
    for keywords in (("ImagePositionPatient", "ImageOrientationPatient"), ("FrameOfReferenceUID",)):
        plain = ct((0, 0, 0))
        for keyword in keywords:
            delattr(plain, keyword)
        plain.save_as(tmp_path / "plain.dcm", enforce_file_format=True)
        with (
            open_dicom(str(tmp_path / "plain.dcm")) as source,
            pytest.raises(UsageError, match="nothing about its place in space"),
        ):
            choose_writer(source.info, "labels", "dicom-seg", source.metadata)
    assert not (tmp_path / "seg.dcm").exists()


def test_a_source_that_changed_or_lacks_what_the_standard_demands(tmp_path):
    location, _ = series(tmp_path / "ct")
    with open_dicom(location) as source:
        result, _ = result_of(source)
        ct((1, 2, 3)).save_as(tmp_path / "ct" / "a.dcm", enforce_file_format=True)
        with pytest.raises(DataError, match=r"a\.dcm: the file changed"):
            write_dicom_seg(tmp_path / "seg.dcm", result)
    poor = ct((0, 0, 0))
    del poor.StudyInstanceUID
    poor.save_as(tmp_path / "poor.dcm", enforce_file_format=True)
    with (
        open_dicom(str(tmp_path / "poor.dcm")) as source,
        pytest.raises(DataError, match=r"poor\.dcm: .*StudyInstanceUID"),
    ):
        write_dicom_seg(tmp_path / "seg.dcm", result_of(source)[0])
    assert not (tmp_path / "seg.dcm").exists()


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    location, _ = series(tmp_path / "ct")

    def full(self, path, *more, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pydicom.Dataset, "save_as", full)
    with open_dicom(location) as source, pytest.raises(PixelwiseError, match=r"seg\.dcm: cannot be written \(No space"):
        write_dicom_seg(tmp_path / "seg.dcm", result_of(source)[0])
    assert [path.name for path in tmp_path.iterdir()] == ["ct"]


def masks(seed=0):
    """Labels (4, 6, 5) of which one slice is empty."""
    planes = np.random.default_rng(seed).integers(0, 3, (4, 6, 5)).astype(np.uint8)
    planes[1] = 0
    return planes


def segmentation(path, folder, pixels, kind="BINARY", labels=("liver", "tumour")):
    """What highdicom writes of label maps (N, H, W) or of segments (N, H, W, S), in the order of the series."""
    with open_dicom(folder) as source:
        images = [pydicom.dcmread(name) for name, _ in source.metadata["frames"]]
    code = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue")
    described = [
        highdicom.seg.SegmentDescription(number, label, code, code, "MANUAL")
        for number, label in enumerate(labels, start=1)
    ]
    highdicom.seg.Segmentation(
        images, pixels, kind, described, generate_uid(), 1, generate_uid(), 1, "x", "x", "1", "1"
    ).save_as(path)
    return str(path)


def whole(source):
    info = source.info
    return np.stack([source.read(0, 0, info.height, info.width, plane)[..., 0] for plane in range(info.planes)])


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
@pytest.mark.parametrize("through", [open_dicom, open_source])
def test_a_segmentation_has_the_planes_of_its_series(tmp_path, kind, through):
    folder, _ = series(tmp_path / "ct")
    path = segmentation(tmp_path / "seg.dcm", folder, masks(), kind)
    with open_dicom(folder) as image, through(path, labels=True, like=folder) as source:
        assert (source.info.planes, source.info.channels, source.info.dtype) == (4, 1, "uint8")
        assert (whole(source) == masks()).all()
        assert (source.read(2, 1, 3, 4, plane=3)[..., 0] == masks()[3, 2:5, 1:5]).all()
        assert source.metadata["segments"] == {"1": "liver", "2": "tumour"}
        np.testing.assert_array_equal(source.metadata["affine"], image.metadata["affine"])
        assert source.metadata["shape"] == image.metadata["shape"] == (5, 6, 4)
        source.check_unchanged()
        (tmp_path / "seg.dcm").write_bytes(b"other")
        with pytest.raises(DataError, match=r"seg\.dcm: the file changed"):
            source.check_unchanged()


def test_without_like_it_has_the_planes_of_its_frames(tmp_path):
    folder, _ = series(tmp_path / "ct")
    path = segmentation(tmp_path / "seg.dcm", folder, masks())
    with open_dicom(path, labels=True) as source:
        assert (whole(source) == masks()[[0, 2, 3]]).all()
        assert not source.metadata["even"], "the empty slice is missing"


def test_of_a_folder_of_both_the_segmentation_is_the_mask(tmp_path):
    folder, _ = series(tmp_path / "ct")
    segmentation(tmp_path / "ct" / "seg.dcm", folder, masks())
    with open_dicom(folder) as source:
        assert source.info.planes == 4 and source.metadata["modality"] == "CT"
    with open_dicom(folder, labels=True, like=folder) as source:
        assert (whole(source) == masks()).all()


@pytest.mark.parametrize("folder", [True, False])
def test_what_is_written_is_read_back(tmp_path, folder):
    location = series(tmp_path / "ct", gaps=(0, 2.5, 5, 2.5))[0] if folder else enhanced(tmp_path / "enhanced.dcm")
    with open_dicom(location) as source:
        write_dicom_seg(tmp_path / "seg.dcm", result_of(source, planes=masks())[0])
    with open_dicom(str(tmp_path / "seg.dcm"), labels=True, like=location) as source:
        assert (whole(source) == masks()).all()


def test_points_in_time_share_a_segmentation(tmp_path):
    folder, positions = series(tmp_path / "ct")
    path = segmentation(tmp_path / "seg.dcm", folder, masks())
    for number, position in enumerate(positions):
        ct(position, 10 + number).save_as(tmp_path / "ct" / f"later{number}.dcm", enforce_file_format=True)
    with open_dicom(path, labels=True, like=folder) as source:
        assert source.metadata["shape"] == (5, 6, 4, 2)
        assert (whole(source) == np.concatenate([masks(), masks()])).all()


def test_a_segmentation_on_a_nifti_volume(tmp_path):
    folder, _ = series(tmp_path / "ct")
    path = segmentation(tmp_path / "seg.dcm", folder, masks())
    with open_dicom(folder) as source:
        write_nifti(tmp_path / "volume.nii.gz", result_of(source)[0])
    with open_dicom(path, labels=True, like=str(tmp_path / "volume.nii.gz")) as source:
        assert (whole(source) == masks()).all()
    volume = nib.load(tmp_path / "volume.nii.gz")
    mirrored = nib.Nifti1Image(np.asarray(volume.dataobj)[::-1], volume.affine @ np.diag([-1, 1, 1, 1]))
    mirrored.to_filename(tmp_path / "mirrored.nii")
    with pytest.raises(DataError, match=r"seg\.dcm: .*grid of .*mirrored\.nii: it has planes of another direction"):
        open_dicom(path, labels=True, like=str(tmp_path / "mirrored.nii"))


def test_segments_that_overlap_are_named(tmp_path):
    folder, _ = series(tmp_path / "ct")
    pixels = np.zeros((4, 6, 5, 2), dtype=bool)
    pixels[2, 1:4, 1:4, 0], pixels[2, 3:, 3:, 1] = True, True
    path = segmentation(tmp_path / "seg.dcm", folder, pixels)
    with open_dicom(path, labels=True, like=folder) as source:
        assert not source.read(0, 0, 6, 5, plane=1).any()
        message = r"seg\.dcm: segments 1 \(liver\) and 2 \(tumour\) overlap in 1 pixels of plane 2"
        with pytest.raises(DataError, match=message):
            source.read(0, 0, 6, 5, plane=2)


def test_what_cannot_be_a_mask_is_refused(tmp_path):
    folder, _ = series(tmp_path / "ct")
    path = segmentation(tmp_path / "seg.dcm", folder, masks())
    with pytest.raises(DataError, match=r"seg\.dcm: this is a segmentation \(DICOM-SEG\), no image"):
        open_dicom(path)
    with pytest.raises(UsageError, match="like is an option of masks"):
        open_dicom(folder, like=folder)
    halves = np.full((4, 6, 5, 2), 0.4)
    fractions = segmentation(tmp_path / "fractions.dcm", folder, halves, "FRACTIONAL")
    with pytest.raises(DataError, match=r"fractions\.dcm: its segments are FRACTIONAL"):
        open_dicom(fractions, labels=True)


def test_a_segmentation_of_another_series_is_refused(tmp_path):
    folder, positions = series(tmp_path / "ct")
    path = segmentation(tmp_path / "seg.dcm", folder, masks())
    changes = {
        "other": ({"FrameOfReferenceUID": "1.2.10"}, "another frame of reference"),
        "zoom": ({"PixelSpacing": [0.9, 0.9]}, r"pixels of \(0\.8, 0\.7\) mm, that one of \(0\.9, 0\.9\)"),
        "turn": ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}, "planes of another direction"),
        "size": ({"Rows": 5, "PixelData": bytes(50)}, "6 x 5 pixels, that one 5 x 5"),
        "gone": ({}, r"frame \d of the segmentation, at .* mm, lies on no plane of"),
        "shift": ({}, "lies on no plane of"),
    }
    for name, (fields, message) in changes.items():
        (tmp_path / name).mkdir()
        for number, position in enumerate(positions[1:] if name == "gone" else positions):
            found = ct(position + (0.2 if name == "shift" else 0), number)
            for field, value in fields.items():
                setattr(found, field, value)
            found.save_as(tmp_path / name / f"{number}.dcm", enforce_file_format=True)
        with pytest.raises(DataError, match=r"seg\.dcm: .*" + message):
            open_dicom(path, labels=True, like=str(tmp_path / name))


def test_a_label_series_is_raw_numbers(tmp_path):
    location, _ = series(tmp_path / "ct")
    for path in (tmp_path / "ct").iterdir():
        found = pydicom.dcmread(path)
        found.PhotometricInterpretation = "MONOCHROME1"
        found.RescaleSlope, found.RescaleIntercept, found.WindowCenter, found.WindowWidth = 2, -100, 5, 10
        found.save_as(path)
    with open_dicom(location, labels=True) as source:
        assert source.info.dtype == "int16" and "intensity" not in source.metadata
        planes = whole(source)
    assert planes.dtype == np.int16
    assert (planes == np.arange(30).reshape(6, 5)).all()


def test_palettes_bits_and_floats_as_masks(tmp_path):
    numbers = np.random.default_rng(7).integers(0, 4, (6, 5)).astype(np.uint8)
    palette = ct((0, 0, 0))
    palette.BitsAllocated, palette.BitsStored, palette.HighBit, palette.PixelRepresentation = 8, 8, 7, 0
    palette.PhotometricInterpretation, palette.PixelData = "PALETTE COLOR", numbers.tobytes()
    for name, high in (("Red", 200), ("Green", 100), ("Blue", 50)):
        setattr(palette, f"{name}PaletteColorLookupTableDescriptor", [4, 0, 16])
        table = (np.arange(4) * high // 3).astype("<u2") * 257
        setattr(palette, f"{name}PaletteColorLookupTableData", table.tobytes())
    palette["PixelData"].VR = "OB"
    palette.save_as(tmp_path / "palette.dcm", enforce_file_format=True)
    with open_dicom(str(tmp_path / "palette.dcm"), labels=True) as source:
        assert (whole(source)[0] == numbers).all() and source.info.channels == 1
        assert source.metadata["palette"] == ((0, 0, 0), (66, 33, 16), (133, 66, 33), (200, 100, 50))

    bits = ct((0, 0, 0))
    bits.BitsAllocated, bits.BitsStored, bits.HighBit, bits.PixelRepresentation = 1, 1, 0, 0
    bits.PixelData = np.packbits(numbers > 1, bitorder="little").tobytes()
    bits.save_as(tmp_path / "bits.dcm", enforce_file_format=True)
    with open_dicom(str(tmp_path / "bits.dcm"), labels=True) as source:
        assert (whole(source)[0] == (numbers > 1) * 255).all() and source.info.dtype == "uint8"

    for values, match in ((numbers, None), (numbers + 0.5, r"floats\.dcm: .*not whole")):
        floats = ct((0, 0, 0))
        floats.BitsAllocated, floats.BitsStored, floats.HighBit = 32, 32, 31
        del floats.PixelData
        floats.FloatPixelData = values.astype("<f4").tobytes()
        floats.save_as(tmp_path / "floats.dcm", enforce_file_format=True)
        with open_dicom(str(tmp_path / "floats.dcm"), labels=True) as source:
            if match is None:
                assert (whole(source)[0] == numbers).all() and source.info.dtype == "int64"
            else:
                with pytest.raises(DataError, match=match):
                    whole(source)


def test_labels_written_by_the_package_keep_their_names(tmp_path):
    folder, _ = series(tmp_path / "ct")
    with open_dicom(folder) as source:
        write_dicom_seg(tmp_path / "seg.dcm", result_of(source)[0])
    with open_dicom(str(tmp_path / "seg.dcm"), labels=True) as source:
        assert list(source.metadata["segments"].values()) == list(SPEC.names[1:])
