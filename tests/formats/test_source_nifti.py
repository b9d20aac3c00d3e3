"""NIfTI volumes written by nibabel: every slice, window and axis; geometry; intensities; and whatever can be wrong."""

import gzip
import logging
import struct
import threading

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats import intensity as intensities
from pixelwise.formats import nifti
from pixelwise.formats.nifti import is_nifti, open_nifti

OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag([0.7, 0.8, 2.5]), [-40, 12, 7.5])
KEPT = {2: lambda volume, k: volume[:, :, k].T, 1: lambda volume, k: volume[:, k].T, 0: lambda volume, k: volume[k].T}


def saved(path, volume, affine=OBLIQUE, kind=nib.Nifti1Image, **fields):
    image = kind(volume, affine)
    for name, value in fields.items():
        image.header[name] = value
    image.to_filename(path)
    return str(path)


def numbers(shape, dtype=np.int16, seed=0):
    return np.random.default_rng(seed).integers(0, 200, shape).astype(dtype)


def whole(source):
    height, width = source.info.height, source.info.width
    return np.stack([source.read(0, 0, height, width, plane=plane) for plane in range(source.info.planes)])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".img", ".hdr", ".img.gz"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_are_the_slices_along_the_axis(tmp_path, suffix, axis):
    volume = numbers((7, 5, 4), np.uint8)
    kind = nib.Nifti1Image if "nii" in suffix else nib.Nifti1Pair
    with open_nifti(saved(tmp_path / f"a{suffix}", volume, kind=kind), axis=axis) as source:
        assert source.info.planes == volume.shape[axis]
        assert (source.info.format, source.info.dtype, source.info.channels) == ("nifti", "uint8", 1)
        for plane in range(source.info.planes):
            want = KEPT[axis](volume, plane)
            assert want.shape == (source.info.height, source.info.width)
            got = source.read(0, 0, *want.shape, plane=plane)
            assert got.dtype == np.uint8 and (got[:, :, 0] == want).all()


def test_points_in_time_follow_each_other(tmp_path):
    volume = numbers((4, 5, 3, 2), np.uint8)
    with open_nifti(saved(tmp_path / "a.nii", volume), axis=0) as source:
        planes = whole(source)
    assert source.metadata["time_points"] == 2 and source.metadata["slices"] == 4
    for time in range(2):
        for i in range(4):
            assert (planes[time * 4 + i, :, :, 0] == volume[i, :, :, time].T).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_windows_are_parts_of_the_whole(tmp_path, monkeypatch, data):
    shape = tuple(data.draw(st.integers(1, 9)) for _ in range(data.draw(st.integers(2, 4))))
    dtype = data.draw(st.sampled_from(["u1", "<i2", ">i2", ">f4", "<f8", "<u4", "<i8"]))
    axis = data.draw(st.integers(0, 2))
    monkeypatch.setattr(nifti, "_SLAB_BYTES", data.draw(st.sampled_from([1, 60, 10**6])))
    header = nib.Nifti1Header(endianness=">" if dtype.startswith(">") else "<")
    header.set_data_dtype(dtype)
    image = nib.Nifti1Image(numbers(shape, dtype[-2:]), OBLIQUE, header)
    path = tmp_path / data.draw(st.sampled_from(["a.nii", "a.nii.gz"]))
    image.to_filename(path)
    volume = np.asarray(nib.load(path).dataobj, dtype=np.float64).reshape((*shape, 1, 1)[:4])
    with open_nifti(str(path), axis=axis, intensity=(0, 200)) as source:
        plane = data.draw(st.integers(0, source.info.planes - 1))
        top = data.draw(st.integers(0, source.info.height - 1))
        left = data.draw(st.integers(0, source.info.width - 1))
        height = data.draw(st.integers(1, source.info.height - top))
        width = data.draw(st.integers(1, source.info.width - left))
        got = source.read(top, left, height, width, plane=plane)
    time, index = divmod(plane, volume.shape[axis])
    want = np.take(volume[..., time], index, axis=axis).T[top : top + height, left : left + width] / 200
    assert got.shape == (height, width, 1) and got.dtype == np.float32
    np.testing.assert_allclose(got[:, :, 0], want, atol=1e-6)


def test_metadata_is_that_of_nibabel(tmp_path):
    image = nib.Nifti1Image(numbers((4, 5, 6, 2)), OBLIQUE)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_zooms((0.7, 0.8, 2.5, 1.25))
    image.set_sform(OBLIQUE, code=4)
    image.set_qform(OBLIQUE, code=2)
    image.to_filename(tmp_path / "a.nii")
    with open_nifti(str(tmp_path / "a.nii"), axis=1) as source:
        known = source.metadata
    np.testing.assert_allclose(known["affine"], nib.load(tmp_path / "a.nii").affine, atol=1e-6)
    assert known["shape"] == (4, 5, 6, 2) and known["axis"] == 1
    assert (known["sform_code"], known["qform_code"], known["units"]) == (4, 2, ("mm", "sec"))
    np.testing.assert_allclose(known["zooms"], (0.7, 0.8, 2.5, 1.25), rtol=1e-6)


def test_slope_and_intercept_count(tmp_path):
    volume = np.linspace(-1, 2, 60).reshape(3, 4, 5)
    image = nib.Nifti1Image(volume, OBLIQUE)
    image.set_data_dtype(np.uint8)
    image.to_filename(tmp_path / "a.nii")
    meant = nib.load(tmp_path / "a.nii").get_fdata()
    with open_nifti(str(tmp_path / "a.nii"), intensity=(-1, 2)) as source:
        got = whole(source)[..., 0]
    np.testing.assert_allclose(got, (meant.transpose(2, 1, 0) + 1) / 3, atol=1e-6)
    with open_nifti(str(tmp_path / "a.nii")) as source:
        assert source.info.dtype == "float32", "scaled bytes are no bytes any more"


def test_intensity_by_type(tmp_path):
    volume = numbers((3, 4, 5), np.uint16)
    volume[0, 0, 0] = 65535
    with open_nifti(saved(tmp_path / "a.nii", volume), intensity="type") as source:
        np.testing.assert_allclose(whole(source)[..., 0], volume.T / 65535, atol=1e-7)
        assert source.metadata["intensity"] == {"function": "type"}
    with open_nifti(saved(tmp_path / "b.nii", volume.astype(np.float32)), intensity="type") as source:
        assert (whole(source)[..., 0] == volume.T).all(), "floats stay"


def test_auto_is_half_a_percent_off_both_ends(tmp_path, monkeypatch):
    volume = np.random.default_rng(1).normal(100, 30, (20, 30, 40)).astype(np.float32)
    path = saved(tmp_path / "a.nii.gz", volume)
    low, high = np.percentile(volume, (0.5, 99.5))
    with open_nifti(path) as source:
        np.testing.assert_allclose(whole(source)[..., 0], np.clip((volume.T - low) / (high - low), 0, 1), atol=1e-5)
        used = source.metadata["intensity"]
        assert used["low"] == pytest.approx(low) and used["high"] == pytest.approx(high)
    monkeypatch.setattr(nifti, "_SAMPLE_VOXELS", 4096)
    found = []
    for _ in range(2):
        with open_nifti(path) as source:
            found.append(source.metadata["intensity"])
    assert found[0] == found[1] != used, "the sample is the same each time"
    assert found[0]["low"] == pytest.approx(low, abs=8) and found[0]["high"] == pytest.approx(high, abs=8)


@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_volume_gives_finite_numbers(tmp_path, value):
    with open_nifti(saved(tmp_path / "a.nii", np.full((3, 3, 3), value, dtype=np.int16))) as source:
        assert (whole(source) == 0).all()


def test_colours_are_three_channels(tmp_path):
    colors = np.random.default_rng(0).integers(0, 255, (4, 5, 3, 3)).astype(np.uint8)
    volume = np.ascontiguousarray(colors).view([("R", "u1"), ("G", "u1"), ("B", "u1")]).reshape(4, 5, 3)
    for axis in range(3):
        with open_nifti(saved(tmp_path / "a.nii", volume), axis=axis) as source:
            assert (source.info.channels, source.info.dtype) == (3, "uint8")
            assert (whole(source) == np.moveaxis(colors, axis, 0).swapaxes(1, 2)).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_labels_are_whole_numbers(tmp_path, axis):
    volume = numbers((4, 5, 6), np.int16) - 3
    files = {
        "stored": (saved(tmp_path / "a.nii.gz", volume), volume, "int16"),
        "floats": (saved(tmp_path / "b.nii", volume.astype(np.float32)), volume, "int64"),
        "scaled": (str(tmp_path / "c.nii"), volume * 2 + 1, "int64"),
    }
    image = nib.Nifti1Image(volume, OBLIQUE)
    image.header.set_slope_inter(2, 1)
    with (tmp_path / "c.nii").open("wb") as file:  # nibabel's own saving would choose another slope
        image.header["vox_offset"] = 352
        image.header.write_to(file)
        file.write(volume.tobytes("F"))
    for path, want, dtype in files.values():
        with open_nifti(path, axis=axis, labels=True) as source:
            assert source.info.dtype == dtype and "intensity" not in source.metadata
            planes = whole(source)
            assert planes.dtype == dtype
            assert (planes[..., 0] == np.stack([KEPT[axis](want, k) for k in range(want.shape[axis])])).all()


def test_colours_as_labels(tmp_path):
    colors = np.random.default_rng(0).integers(0, 255, (4, 5, 3, 3)).astype(np.uint8)
    volume = np.ascontiguousarray(colors).view([("R", "u1"), ("G", "u1"), ("B", "u1")]).reshape(4, 5, 3)
    with open_nifti(saved(tmp_path / "a.nii", volume), labels=True) as source:
        assert (source.info.channels, source.info.dtype) == (3, "uint8")
        assert (whole(source) == colors.transpose(2, 1, 0, 3)).all()


def test_numbers_that_are_not_whole_are_no_labels(tmp_path):
    path = saved(tmp_path / "a.nii", np.full((2, 2, 2), 0.5, np.float32))
    with open_nifti(path, labels=True) as source, pytest.raises(DataError, match=r"a\.nii: .*not whole"):
        whole(source)


def test_many_threads_read_at_once(tmp_path):
    volume = numbers((40, 30, 20), np.uint8)
    with open_nifti(saved(tmp_path / "a.nii.gz", volume), axis=0) as source:
        bad = []

        def work(seed):
            for plane in np.random.default_rng(seed).integers(0, 40, 50):
                if not (source.read(0, 0, 20, 30, plane=int(plane))[:, :, 0] == volume[plane].T).all():
                    bad.append(plane)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert not bad


def test_fingerprint_and_change(tmp_path):
    path = saved(tmp_path / "a.img", numbers((3, 4, 5)), kind=nib.Nifti1Pair)
    with open_nifti(path) as source:
        source.check_unchanged()
        before = source.fingerprint()
        (tmp_path / "a.img").write_bytes(b"short")
        assert source.fingerprint() != before
        with pytest.raises(DataError, match=r"a\.img: the file changed"):
            source.check_unchanged()
        with pytest.raises(DataError, match=r"a\.img: the file ends before its numbers"):
            source.read(0, 0, 4, 3, plane=4)


def without_affine(path, **fields):
    image = nib.Nifti1Image(numbers((3, 4, 5)), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    for name, value in fields.items():
        image.header[name] = value
    with path.open("wb") as file:  # nibabel's own saving would set a code
        image.header["vox_offset"] = 352
        image.header.write_to(file)
        file.write(numbers((3, 4, 5)).tobytes("F"))
    return str(path)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({}, "no affine"),
        ({"sform_code": 1, "srow_x": 0}, "sform.* is singular"),
        ({"sform_code": 1, "srow_x": [np.nan, 0, 0, 0]}, "singular or not finite"),
        ({"qform_code": 1, "pixdim": [1, np.inf, 1, 1, 1, 1, 1, 1]}, "qform|header"),
    ],
)
def test_a_volume_without_a_place_in_space_is_refused_unless_asked(tmp_path, fields, match):
    path = without_affine(tmp_path / "lost.nii", **fields)
    with pytest.raises(DataError, match=r"lost\.nii.*" + match) as error:
        open_nifti(path)
    if "qform" not in str(fields):
        assert "allow_no_affine" in str(error.value)
        with open_nifti(path, allow_no_affine=True) as source:
            assert np.isfinite(source.metadata["affine"]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_names_the_file_and_the_slice(tmp_path, bad):
    volume = numbers((4, 5, 6), np.float32)
    volume[1, 2, 3] = bad
    with open_nifti(saved(tmp_path / "holes.nii", volume)) as source:
        assert np.isfinite(source.read(0, 0, 5, 4, plane=2)).all()
        with pytest.raises(DataError, match=r"holes\.nii: 1 of its numbers in slice 3 along axis 2 .* are NaN"):
            source.read(0, 0, 5, 4, plane=3)


def test_what_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"c\.nii: .*complex"):
        open_nifti(saved(tmp_path / "c.nii", np.ones((2, 2, 2), dtype=np.complex64)))
    with pytest.raises(DataError, match=r"d\.nii: .*two to four axes"):
        open_nifti(saved(tmp_path / "d.nii", np.ones((2, 2, 2, 1, 3), dtype=np.float32)))
    with pytest.raises(DataError, match="no such file"):
        open_nifti(str(tmp_path / "none.nii"))
    with pytest.raises(DataError, match="a folder"):
        open_nifti(str(tmp_path))
    (tmp_path / "text.nii").write_text("hello " * 100)
    with pytest.raises(DataError, match="no NIfTI file"):
        open_nifti(str(tmp_path / "text.nii"))
    (tmp_path / "old.hdr").write_bytes(struct.pack("<i", 348) + bytes(344))
    (tmp_path / "old.img").write_bytes(bytes(8))
    with pytest.raises(DataError, match=r"Analyze 7\.5"):
        open_nifti(str(tmp_path / "old.img"))
    for wrong in ({"axis": 3}, {"axis": True}, {"intensity": "bright"}, {"intensity": (3, 3)}, {"intensity": "1,2,3"}):
        with pytest.raises(UsageError):
            open_nifti(str(tmp_path / "c.nii"), **wrong)


def test_claims_that_no_file_can_hold_are_refused_at_once(tmp_path):
    for name, opener in (("bomb.nii", open), ("bomb.nii.gz", gzip.open)):
        header = nib.Nifti2Header()
        header.set_data_shape((100_000, 100_000, 1000))
        header.set_sform(OBLIQUE, code=1)
        header["vox_offset"] = 544
        with opener(tmp_path / name, "wb") as file:
            file.write(header.binaryblock + bytes(10_000))
        with pytest.raises(DataError, match=name + ".*cannot hold"):
            open_nifti(str(tmp_path / name))


def test_no_room_for_the_decompressed_voxels(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.nii.gz", numbers((3, 4, 5)))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with open_nifti(path) as source, pytest.raises(DataError, match=r"a\.nii\.gz: .*TMPDIR"):
        source.read(0, 0, 4, 3)


def test_what_nifti_is_the_content_says(tmp_path):
    saved(tmp_path / "a.nii.gz", numbers((3, 4, 5)))
    saved(tmp_path / "b.img", numbers((3, 4, 5)), kind=nib.Nifti1Pair)
    saved(tmp_path / "c.nii", numbers((3, 4, 5)), kind=nib.Nifti2Image)
    for name in ("a.nii.gz", "b.img", "b.hdr", "c.nii"):
        assert is_nifti((tmp_path / name).read_bytes()[:4096], str(tmp_path / name))
    assert not is_nifti(b"EHFA_HEADER_TAG", str(tmp_path / "x.img"))
    assert not is_nifti(b"\x1f\x8b" + bytes(100), "a.nii.gz")
    assert not is_nifti(b"", "a.nii")


def test_a_missing_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    with pytest.raises(UsageError, match=r'pip install "nibabel>=5\.2"'):
        open_nifti(str(tmp_path / "a.nii"))


def test_damaged_files_end_in_one_error(tmp_path, capfd, caplog):
    """Sixty files with random bytes changed or their end cut off: opened and read, or refused with their name."""
    random = np.random.default_rng(5)
    kinds = {"a.nii": nib.Nifti1Image, "b.nii.gz": nib.Nifti1Image, "c.nii": nib.Nifti2Image}
    originals = [
        (name, (tmp_path / name).read_bytes())
        for name in kinds
        if saved(
            tmp_path / name, numbers((6, 5, 4), np.float32), kind=nib.Nifti2Image if name[0] == "c" else nib.Nifti1Image
        )
    ]
    caplog.set_level(logging.DEBUG)
    refused = 0
    for trial in range(66):
        name, content = originals[trial % 3]
        damaged = bytearray(content)
        if trial % 4 == 0:
            damaged = damaged[: random.integers(0, len(damaged))]
        else:
            for place in random.integers(0, 352 if trial % 2 else len(damaged), random.integers(1, 12)):
                damaged[place % len(damaged)] = random.integers(256)
        path = tmp_path / f"damaged_{name}"
        path.write_bytes(damaged)
        try:
            with open_nifti(str(path), axis=trial % 3) as source:
                whole(source)
                assert source.metadata["affine"].shape == (4, 4)
        except PixelwiseError as error:
            refused += 1
            assert isinstance(error, DataError) and f"damaged_{name}" in str(error) and "\n" not in str(error)
    assert refused > 20
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize(("function", "least"), [("LINEAR", 1), ("LINEAR_EXACT", 0.5), ("SIGMOID", 0.5)])
def test_the_display_window_is_that_of_pydicom(function, least):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.pixels import apply_windowing

    dataset = pydicom.Dataset()
    dataset.PhotometricInterpretation, dataset.BitsStored, dataset.PixelRepresentation = "MONOCHROME2", 16, 1
    values = np.arange(-600, 600, 7, dtype=np.int16)
    for center, width in ((40, 400), (0.5, 300 if function == "SIGMOID" else least), (-100, 33.5)):
        dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = center, width, function
        want = (apply_windowing(values, dataset) + 2**15) / (2**16 - 1)
        got = intensities.display_window(center, width, function).apply(values)
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert intensities.display_window(1, least - 1, function) is None
    assert intensities.display_window(float("nan"), 5, function) is None
