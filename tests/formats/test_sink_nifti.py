"""NIfTI out: the space of the source bit by bit, labels read back by nibabel, and nothing half-written."""

import errno
import gzip
import json

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import PixelwiseError
from pixelwise.formats import nifti as sink
from pixelwise.formats.base import Result, SourceInfo
from pixelwise.formats.nifti import open_nifti, write_nifti

SPEC = LabelSpec(
    names=("background", "liver", "tumour"), colors=((0, 0, 0), (200, 30, 30), (9, 8, 7)), values=((0,), (1,), (2,))
)
OBLIQUE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag([0.7, 0.8, 2.5]), [-40, 12, 7.5])
PLACE = (
    "dim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z", "pixdim", "xyzt_units",
)  # fmt: skip


def result_of(source, *, kind="labels", dtype=np.uint8, seed=0, **more):
    """A result of random numbers, and the planes it holds."""
    info = source.info
    shape = (info.planes, info.height, info.width)
    planes = np.random.default_rng(seed).integers(0, 3, shape).astype(dtype)
    result = Result(
        kind=kind,
        spec=SPEC,
        source=info,
        metadata=source.metadata,
        dtype=np.dtype(dtype),
        rows=lambda plane, top, bottom: planes[plane, top:bottom],
        **more,
    )
    return result, planes


def planes_of(volume, axis):
    """The planes of a volume (I, J, K[, T]) as sources order them."""
    volume = volume.reshape((*volume.shape, 1, 1)[:4])
    return np.moveaxis(volume, (3, axis), (0, 1)).swapaxes(2, 3).reshape(-1, *np.delete(volume.shape[:3], axis)[::-1])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_shape_and_axis_comes_back(tmp_path, monkeypatch, data):
    shape = tuple(data.draw(st.integers(1, 7)) for _ in range(data.draw(st.integers(2, 4))))
    axis, kind = data.draw(st.integers(0, 2)), data.draw(st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]))
    monkeypatch.setattr(sink, "_BAND_BYTES", data.draw(st.sampled_from([1, 9, 40, 10**6])))
    image = kind(np.zeros(shape, dtype=np.float32), OBLIQUE)
    image.set_sform(OBLIQUE, code=data.draw(st.integers(1, 4)))
    image.set_qform(OBLIQUE, code=data.draw(st.integers(0, 4)))
    image.header.set_xyzt_units("mm", "sec")
    image.to_filename(tmp_path / "a.nii")
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16, np.float32]))
    target = tmp_path / data.draw(st.sampled_from(["labels.nii", "labels.nii.gz"]))
    with open_nifti(str(tmp_path / "a.nii"), axis=axis) as source:
        result, planes = result_of(source, dtype=dtype, kind="labels" if dtype != np.float32 else "entropy")
        write_nifti(target, result)
    written, original = nib.load(target), nib.load(tmp_path / "a.nii")
    assert type(written) is kind and written.shape == shape and written.get_data_dtype() == dtype
    assert (planes_of(np.asarray(written.dataobj), axis) == planes).all()
    for field in PLACE:
        np.testing.assert_array_equal(written.header[field], original.header[field], err_msg=field)
    np.testing.assert_allclose(written.affine, original.affine, atol=1e-6)


def test_what_the_file_says_of_itself(tmp_path):
    image = nib.Nifti1Image(np.zeros((3, 4, 5), dtype=np.int16), OBLIQUE)
    image.header["db_name"], image.header["aux_file"], image.header["descrip"] = b"Doe^John", b"x", b"Doe"
    image.header.set_slope_inter(2, 3)
    image.to_filename(tmp_path / "a.nii")
    mark = {"model": "abc", "input": "def"}
    with open_nifti(str(tmp_path / "a.nii")) as source:
        write_nifti(tmp_path / "b.nii.gz", result_of(source, mark=mark, nodata=255)[0])
    written = nib.load(tmp_path / "b.nii.gz")
    assert written.header.get_intent("code")[0] == 1002
    assert b"Doe" not in gzip.decompress((tmp_path / "b.nii.gz").read_bytes())
    assert written.dataobj.slope == 1 and written.dataobj.inter == 0
    text = json.loads(written.header.extensions[0].get_content())
    assert text["classes"][1] == {"label": 1, "name": "liver", "color": [200, 30, 30]}
    assert text["pixelwise"] == mark and text["nodata"] == 255 and text["kind"] == "labels"


def test_equal_labels_give_equal_files_from_pairs_too(tmp_path):
    nib.Nifti1Pair(np.zeros((3, 4, 5), dtype=np.int16), OBLIQUE).to_filename(tmp_path / "a.img")
    for name in ("x.nii.gz", "y.nii.gz"):
        with open_nifti(str(tmp_path / "a.img")) as source:
            write_nifti(tmp_path / name, result_of(source)[0])
    assert (tmp_path / "x.nii.gz").read_bytes() == (tmp_path / "y.nii.gz").read_bytes()
    assert nib.load(tmp_path / "x.nii.gz").shape == (3, 4, 5)


def test_no_place_in_space_stays_none(tmp_path):
    image = nib.Nifti1Image(np.zeros((3, 4, 5), dtype=np.int16), np.eye(4))
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    image.to_filename(tmp_path / "a.nii")
    with open_nifti(str(tmp_path / "a.nii"), allow_no_affine=True) as source:
        write_nifti(tmp_path / "b.nii", result_of(source)[0])
    header = nib.load(tmp_path / "b.nii").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (0, 0)


def test_only_a_slab_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sink, "_BAND_BYTES", 1000)
    asked = []
    info = SourceInfo(location="a", format="nifti", height=60, width=50, channels=1, dtype="uint8", planes=40)

    def rows(plane, top, bottom):
        asked.append((bottom - top) * 50)
        return np.zeros((bottom - top, 50), dtype=np.uint8)

    for axis, shape in ((2, (50, 60, 40)), (1, (50, 40, 60)), (0, (40, 50, 60))):
        metadata = {"affine": np.eye(4), "shape": shape, "axis": axis, "zooms": (1, 1, 1)}
        write_nifti(
            tmp_path / "a.nii",
            Result(kind="labels", spec=SPEC, source=info, metadata=metadata, dtype=np.dtype(np.uint8), rows=rows),
        )
    assert max(asked) <= 1000


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), PixelwiseError("out of rows")])
def test_nothing_half_written_stays(tmp_path, error):
    nib.Nifti1Image(np.zeros((3, 4, 5), dtype=np.int16), OBLIQUE).to_filename(tmp_path / "a.nii")
    with open_nifti(str(tmp_path / "a.nii")) as source:
        result, planes = result_of(source)

        def rows(plane, top, bottom):
            if plane == 3:
                raise error
            return planes[plane, top:bottom]

        broken = Result(**{**vars(result), "rows": rows})
        with pytest.raises(PixelwiseError, match=r"No space left|out of rows"):
            write_nifti(tmp_path / "b.nii.gz", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]
