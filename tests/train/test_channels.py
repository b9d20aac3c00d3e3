"""Channels in files of their own (case_0_0000, case_0_0001) are one image in training, scoring and prediction."""

import nibabel
import numpy as np
import pytest
from PIL import Image

import pixelwise
from pixelwise.cli import main
from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.errors import DataError
from pixelwise.train import make_config

TINY = {
    "model": "unet", "options": {"widths": [4, 6]}, "crop_px": 32, "batch_size": 2, "steps": 2, "workers": 0,
    "precision": "float32", "device": "cpu",
}  # fmt: skip


def write(path, voxels, kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "png":
        Image.fromarray(voxels[0]).save(f"{path}.png")
    else:
        nibabel.Nifti1Image(voxels.T, np.eye(4)).to_filename(f"{path}.nii.gz")


def write_data(root, kind, cases=6):
    """Volumes of 2 slices of 32 x 40; class 1 is bright in the first channel and dark in the second."""
    for case in range(cases):
        mask = np.zeros((2, 32, 40), np.uint8)
        mask[:, 4 + case : 16 + case, 8:24] = 1
        for channel, sign in enumerate((1, -1)):
            noise = np.random.default_rng(2 * case + channel).integers(0, 30, mask.shape)
            values = 110 + sign * 60 * mask.astype(int) + noise
            write(
                root / f"imagesTr/case_{case}_{channel:04d}",
                values.astype(np.uint8 if kind == "png" else np.int16),
                kind,
            )
        write(root / f"labelsTr/case_{case}", mask, kind)
    return root


@pytest.mark.parametrize(("kind", "suffix"), [("png", ".png"), ("nifti", ".nii.gz")])
def test_files_of_channels_are_one_image_everywhere(tmp_path, monkeypatch, kind, suffix):
    data = write_data(tmp_path / "data", kind)
    inspection = inspect_data(open_data(data))
    assert not inspection.problems
    assert (inspection.channels, inspection.reading) == (2, {"channel_files": 2})
    assert [pair.name for pair in sorted(inspection.folder.pairs, key=lambda pair: pair.name)] == [
        f"case_{case}" for case in range(6)
    ]
    assert (inspection.mean[0] > inspection.mean[1]) == (kind == "png")  # of a volume each channel has its own range
    run = pixelwise.train(data, make_config(TINY), out=tmp_path / "run")
    evaluation = pixelwise.evaluate(run.folder, data)
    (pair,) = inspection.folder.split("test")
    arguments = ["pixelwise", "predict", str(run.folder), str(data / "imagesTr"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert sorted(path.name for path in (tmp_path / "out").glob("case*")) == [
        f"case_{case}{suffix}" for case in range(6)
    ]
    path = tmp_path / "out" / f"{pair.name}{suffix}"
    labels = np.array(Image.open(path))[None] if kind == "png" else np.asarray(nibabel.load(path).dataobj).T
    mask = labels * 0
    case = int(pair.name[-1])
    mask[:, 4 + case : 16 + case, 8:24] = 1
    matrix = np.zeros((2, 2), int)
    np.add.at(matrix, (mask.astype(int), labels.astype(int)), 1)
    assert evaluation.matrix == matrix.tolist()
    (data / f"imagesTr/case_0_0001{suffix}").unlink()
    with pytest.raises(DataError, match=f"case_0_0001{suffix}: there is no such file"):
        pixelwise.load(run.folder).predict(data / f"imagesTr/case_0_0000{suffix}")


def test_a_channel_that_is_missing_is_named(tmp_path):
    data = write_data(tmp_path, "png")
    (data / "imagesTr/case_3_0001.png").unlink()
    (data / "imagesTr/case_4_0000.png").unlink()
    fatal = [problem.message for problem in inspect_data(open_data(data)).problems if problem.severity == "fatal"]
    assert (
        "2 channels in files of their own, but 2 files are missing: imagesTr/case_3_0001.png, imagesTr/case_4_0000"
        in fatal[0]
    )


def test_channels_of_another_size_are_refused(tmp_path):
    data = write_data(tmp_path, "png")
    Image.new("L", (9, 9)).save(data / "imagesTr/case_3_0001.png")
    fatal = " ".join(
        problem.message for problem in inspect_data(open_data(data)).problems if problem.severity == "fatal"
    )
    assert "case_3_0001.png: the channel is 9 x 9 px, but its image" in fatal


def test_frames_with_masks_of_their_own_are_no_channels(tmp_path):
    for frame in range(6):
        for kind in ("images", "masks"):
            write(tmp_path / kind / f"film_{frame:04d}", np.full((1, 8, 8), frame % 2, np.uint8), "png")
    assert len(open_data(tmp_path).pairs) == 6
