"""Opacity or a band: the numbers of a band that is marked as opacity tell, in every kind of TIFF and for every reader."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import tifffile
from PIL import Image
from rasterio.enums import ColorInterp

import pixelwise
from pixelwise.cli import main
from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.data.samples import open_image
from pixelwise.errors import DataError
from pixelwise.formats.opening import open_source
from pixelwise.formats.tiff.opacity import look
from pixelwise.train import make_config

TINY = {
    "model": "unet", "options": {"widths": [4, 6]}, "crop_px": 16, "batch_size": 2, "steps": 2, "workers": 0,
    "precision": "float32", "device": "cpu",
}  # fmt: skip
UTM = {"crs": "EPSG:32633", "transform": rasterio.Affine(1, 0, 4e5, 0, -1, 5e6)}
H, W = 40, 56


def infrared(dtype: str = "uint8", seed: int = 0) -> np.ndarray:
    """Water is 0, plants are bright: many values, (H, W)."""
    values = np.random.default_rng(seed).normal(120, 25, (H, W)).clip(1, 254)
    values[:12] = 0
    return (values * (257 if dtype == "uint16" else 1)).astype(dtype)


def cut_out(dtype: str = "uint8", rim: bool = False) -> np.ndarray:
    """Opacity: nothing on the left, a rim of half covered pixels if asked for, full on the right."""
    full = 1 if dtype == "float32" else np.iinfo(dtype).max
    values = np.full((H, W), full, dtype)
    values[:, :20] = 0
    if rim:
        values[:, 20] = (np.arange(H) * 5 + 20) / (255 if dtype == "float32" else 1)
    return values


def colours(count: int = 3, dtype: str = "uint8", seed: int = 1) -> np.ndarray:
    drawn = np.random.default_rng(seed).integers(1, 255, (count, H, W))
    return (drawn / 255 if dtype == "float32" else drawn).astype(dtype)


def write_geotiff(path: Path, bands: np.ndarray) -> None:
    """As rasterio does unless it is told otherwise, but for types and numbers of bands that it would not mark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": len(bands), "height": H, "width": W, "dtype": bands.dtype, **UTM}
    with rasterio.open(path, "w", **profile) as file:
        if len(bands) != 4 or bands.dtype != np.uint8:
            undefined = [ColorInterp.undefined] * (len(bands) - 2)
            file.colorinterp = [ColorInterp.gray, *undefined, ColorInterp.alpha]
        file.write(bands)


def write_tiff(path: Path, bands: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    photometric = "rgb" if len(bands) == 4 else "minisblack"
    extra = {"extrasamples": ["unassalpha"], "planarconfig": "contig", "metadata": None}
    tifffile.imwrite(path, np.ascontiguousarray(bands.transpose(1, 2, 0)), photometric=photometric, **extra)


WRITERS = {"geotiff": write_geotiff, "tiff": write_tiff}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_measurement_is_a_band_and_opacity_is_none(tmp_path, kind, dtype):
    path, rgb = tmp_path / "a.tif", colours(dtype=dtype)
    for last, channels in (
        (infrared(dtype), 4), (np.where(infrared(dtype) > 0, 200, 40).astype(dtype), 4),
        (cut_out(dtype), 3), (cut_out(dtype, rim=True), 3), (np.full((H, W), 255, dtype), 3),
    ):  # fmt: skip
        stored = np.concatenate([rgb, last[None]])
        WRITERS[kind](path, stored)
        with open_source(path) as source:
            assert source.info.channels == channels
            assert np.array_equal(source.read(0, 0, H, W), stored[:channels].transpose(1, 2, 0))
            assert "band 4" in source.metadata["opacity"]
            assert ("leaves it out" in source.metadata["opacity"]) == (channels == 4)
            valid = source.valid(0, 0, H, W)
            if kind == "geotiff" and channels == 3:
                assert np.array_equal(valid, last != 0)
            else:
                assert valid is None


@pytest.mark.parametrize("last", [infrared(), cut_out()], ids=["infrared", "opacity"])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_it_may_be_any_band(tmp_path, count, last):
    write_geotiff(tmp_path / "a.tif", np.concatenate([colours(count), last[None]]))
    is_band = bool((last == infrared()).all())
    with open_source(tmp_path / "a.tif") as source:
        assert source.info.channels == count + is_band
        assert (source.valid(0, 0, H, W) is None) == is_band


@pytest.mark.parametrize("kind", WRITERS)
def test_a_network_gets_the_bands_it_takes(tmp_path, kind):
    """One that takes all gets a band of one value too, but never opacity; one that takes one less gets the others."""
    path = tmp_path / "a.tif"
    for last, wanted, channels in (
        (infrared(), 4, 4), (infrared(), 3, 3), (cut_out(), 4, 3), (cut_out(), 3, 3),
        (np.full((H, W), 255, np.uint8), 4, 4), (np.full((H, W), 255, np.uint8), 3, 3), (np.zeros((H, W), np.uint8), 4, 4),
    ):  # fmt: skip
        WRITERS[kind](path, np.concatenate([colours(), last[None]]))
        with open_source(path, channels=wanted) as source:
            assert source.info.channels == channels
            if (last == infrared()).all():
                assert source.valid(0, 0, H, W) is None  # water is no hole
                assert ("takes 3 bands" in source.metadata["opacity"]) == (wanted == 3)


def test_the_bands_that_are_asked_for_are_read(tmp_path):
    for last, most in ((infrared(), 4), (cut_out(), 3), (np.full((H, W), 255, np.uint8), 4)):
        stored = np.concatenate([colours(), last[None]])
        write_geotiff(tmp_path / "a.tif", stored)
        for bands in ((1, 2, 3), (3, 1), (4, 1), (1, 2, 3, 4)):
            if max(bands) > most:
                with pytest.raises(DataError, match="has 3 bands, counted from 1 and without opacity, but band 4"):
                    open_image(tmp_path / "a.tif", {"bands": bands})
                continue
            with open_image(tmp_path / "a.tif", {"bands": bands}) as source:
                wanted = stored[[band - 1 for band in bands]].transpose(1, 2, 0)
                assert np.array_equal(source.read(0, 0, H, W), wanted)
                assert "opacity" not in source.metadata


def test_a_large_band_is_judged_by_windows_all_over_it():
    class Large:
        size = (1, 90_000, 80_000, 4)
        asked = 0

        def read(self, plane, rows, columns):
            self.asked += (rows[1] - rows[0]) * (columns[1] - columns[0])
            found = np.zeros((rows[1] - rows[0], columns[1] - columns[0], 4), np.uint8)
            found[..., 3] = 255 if rows[0] < 80_000 else (np.arange(columns[0], columns[1]) % 250)
            return found

    pixels = Large()
    assert look(pixels, 3, None).is_kept
    assert pixels.asked <= 1 << 20


@pytest.fixture
def tiles(tmp_path):
    """Tiles of four bands of which only the fourth shows the class; in one of them it is 255 everywhere."""

    def write(last_of=lambda seed, band: band):
        for seed, split in enumerate(("train", "train", "train", "val", "test")):
            band, mask = infrared(seed=seed), np.zeros((H, W), np.uint8)
            mask[20:, 10:40], band[20:, 10:40] = 1, 230
            write_geotiff(tmp_path / "data" / split / "images" / f"{seed}.tif", np.concatenate(
                [colours(seed=seed), last_of(seed, band)[None]]
            ))  # fmt: skip
            path = tmp_path / "data" / split / "masks" / f"{seed}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(mask).save(path)
        return tmp_path / "data"

    return write


def labels_of(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["pixelwise", "predict", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, " ".join(capsys.readouterr())


def test_training_and_prediction_take_the_same_bands(tmp_path, tiles, monkeypatch, capsys):
    data = tiles(lambda seed, band: np.full_like(band, 255) if seed == 1 else band)
    inspection = inspect_data(open_data(data))
    assert inspection.channels == 4
    told = [problem.message for problem in inspection.problems]
    assert [problem.severity for problem in inspection.problems] == ["warning"]
    assert told[0].startswith("5 images (") and "is read as a band (--bands 1,2,3 leaves it out)" in told[0]
    run = pixelwise.train(data, make_config(TINY), out=tmp_path / "run")
    predictor = pixelwise.load(run.folder)
    for seed, split in ((1, "train"), (4, "test")):
        image = data / split / "images" / f"{seed}.tif"
        labels = predictor.predict(image).labels
        assert (labels < 2).all()
        code, output = labels_of(monkeypatch, capsys, run.folder, image, "--out", tmp_path / "out")
        assert not code and "is read as a band" in " ".join(output.split())
        with rasterio.open(tmp_path / "out" / f"{seed}.tif") as file:
            assert np.array_equal(file.read(1), labels)
    assert pixelwise.evaluate(run.folder, data).scores.pixels == H * W


def test_opacity_among_measurements_is_asked_about(tiles):
    inspection = inspect_data(open_data(tiles(lambda seed, band: cut_out() if seed == 1 else band)))
    fatal = [problem.message for problem in inspection.problems if problem.severity == "fatal"]
    assert len(fatal) == 1 and "--bands 1,2,3 leaves it out of all" in fatal[0]
    reading = {"bands": (1, 2, 3)}
    chosen = inspect_data(inspection.folder, reading=reading)
    assert chosen.channels == 3 and not chosen.problems


def test_opacity_of_a_picture_is_told_if_it_hides_something(tmp_path, tiles):
    data = tiles()
    for path in data.rglob("images/*.tif"):
        last = cut_out() if path.stem != "0" else np.full((H, W), 255, np.uint8)
        Image.fromarray(np.dstack([*colours(), last])).save(path.with_suffix(".png"))
        path.unlink()
    inspection = inspect_data(open_data(data))
    told = [problem.message for problem in inspection.problems if "opacity" in problem.message]
    assert inspection.channels == 3 and len(told) == 1 and told[0].startswith("4 images (")
