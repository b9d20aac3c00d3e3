import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelwise.errors import PixelwiseError
from pixelwise.formats import SourceInfo
from pixelwise.infer.store import DiskStore, Store, store_folder, uncovered
from pixelwise.infer.tiling import Region

KINDS = {"labels": np.dtype(np.uint8), "entropy": np.dtype(np.float32)}


def info(height=10, width=7, planes=1):
    return SourceInfo(location="a", format="tiff", height=height, width=width, planes=planes, channels=3, dtype="uint8")


def make(folder, planes=1):
    return DiskStore(folder / "parts", info(planes=planes), KINDS)


def cut(arrays, region):
    return {kind: array[region.top : region.bottom, region.left : region.right] for kind, array in arrays.items()}


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {"labels": rng.integers(0, 9, (10, 7), dtype=np.uint8), "entropy": rng.random((10, 7), dtype=np.float32)}


regions = st.builds(Region, st.integers(0, 12), st.integers(0, 12), st.integers(1, 9), st.integers(1, 9))


@given(regions, st.lists(regions, max_size=8))
@settings(max_examples=200, deadline=None)
def test_what_is_left_and_what_is_done_make_the_whole(target, done):
    counts = np.zeros((24, 24), dtype=int)
    for region in done:
        counts[region.top : region.bottom, region.left : region.right] = 1
    left = uncovered(target, done)
    assert all(region.height > 0 and region.width > 0 for region in left)
    for region in left:
        counts[region.top : region.bottom, region.left : region.right] += 10
    inside = counts[target.top : target.bottom, target.left : target.right]
    assert set(np.unique(inside)) <= {1, 10}
    assert (counts >= 10).sum() == (inside >= 10).sum()


def test_rows_come_back_whatever_the_parts_were(tmp_path, arrays):
    store = make(tmp_path)
    for region in (Region(6, 3, 4, 4), Region(0, 0, 6, 7), Region(6, 0, 4, 3)):
        store.add(0, region, cut(arrays, region))
    for again in (store, make(tmp_path)):
        assert again.missing(0) == []
        assert again.done_px == 70
        for top, bottom in ((0, 10), (5, 7), (9, 10)):
            for kind in KINDS:
                rows = again.rows(kind, 0, top, bottom)
                assert rows.dtype == KINDS[kind]
                assert np.array_equal(rows, arrays[kind][top:bottom])


def test_planes_are_apart(tmp_path, arrays):
    store = make(tmp_path, planes=2)
    whole = Region(0, 0, 10, 7)
    store.add(1, whole, arrays)
    assert (store.missing(0), store.missing(1)) == ([whole], [])
    with pytest.raises(PixelwiseError, match="not finished"):
        store.rows("labels", 0, 0, 1)


def test_a_part_is_npy_that_anybody_reads(tmp_path, arrays):
    make(tmp_path).add(0, Region(0, 0, 10, 7), arrays)
    (path,) = (tmp_path / "parts").glob("labels-*")
    assert path.name == "labels-0-0-10-0-7.npy"
    assert np.array_equal(np.load(path, allow_pickle=False), arrays["labels"])


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


def damage_header(path):
    path.write_bytes(path.read_bytes().replace(b"False", b"True "))


def damage_type(path):
    np.save(path, np.zeros((10, 7), dtype=np.float64))


def damage_lost(path):
    path.unlink()


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, damage_header, damage_type, damage_lost])
@pytest.mark.parametrize("kind", list(KINDS))
def test_damaged_parts_are_missing(tmp_path, arrays, damage, kind):
    whole = Region(0, 0, 10, 7)
    make(tmp_path).add(0, whole, arrays)
    damage(next((tmp_path / "parts").glob(f"{kind}-*")))
    store = make(tmp_path)
    assert store.missing(0) == [whole]
    store.add(0, whole, arrays)
    assert np.array_equal(make(tmp_path).rows(kind, 0, 0, 10), arrays[kind])


def test_foreign_files_and_links_do_not_count(tmp_path, arrays):
    store = make(tmp_path)
    store.add(0, Region(0, 0, 10, 7), arrays)
    folder = store.folder
    good = (folder / "labels-0-0-10-0-7.npy").read_bytes()
    for name in ("labels-0-0-11-0-7.npy", "labels-5-0-10-0-7.npy", "colours-0-0-10-0-7.npy", "labels-0-9-2-0-7.npy"):
        (folder / name).write_bytes(good)
    (folder / ".labels.part.npy").write_bytes(good)
    (folder / "labels-0-0-1-0-1.npy").mkdir()
    (folder / "entropy-0-0-10-0-7.npy").rename(tmp_path / "else.npy")
    (folder / "entropy-0-0-10-0-7.npy").symlink_to(tmp_path / "else.npy")
    assert make(tmp_path).done_px == 0


def test_other_writers_are_seen_after_a_scan(tmp_path, arrays):
    mine, other = make(tmp_path), make(tmp_path)
    other.add(0, Region(0, 0, 4, 7), cut(arrays, Region(0, 0, 4, 7)))
    assert mine.missing(0) == [Region(0, 0, 10, 7)]
    mine.scan()
    assert mine.missing(0) == [Region(4, 0, 6, 7)]
    assert mine.missing(0, Region(0, 0, 5, 2)) == [Region(4, 0, 1, 2)]


def test_folders_of_other_settings_are_known(tmp_path):
    output = tmp_path / "a.tif"
    for key in ("0" * 16, "1" * 16):
        store_folder(output, key).mkdir()
    others = [".a.tif.store-mine", ".ab.tif.store-" + "0" * 16, ".a.tif.store-" + "0" * 17]
    for name in others:
        (tmp_path / name).mkdir()
    DiskStore(store_folder(output, "0" * 64), info(3, 3), KINDS).remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    assert len(store_folder(tmp_path / ("ä" * 120), "0" * 64).name.encode()) < 255


def test_a_store_in_memory_gives_what_it_was_given(arrays):
    store = Store(info(planes=2), KINDS | {"logits": np.dtype(np.float32)})
    logits = np.arange(2 * 70, dtype=np.float32).reshape(2, 10, 7)
    for region in (Region(6, 3, 4, 4), Region(0, 0, 6, 7), Region(6, 0, 4, 3)):
        part = logits[:, region.top : region.bottom, region.left : region.right]
        with store.adding(1) as add:
            add(region, cut(arrays, region) | {"logits": part})
    assert store.missing(1) == [] and store.missing(0) == [Region(0, 0, 10, 7)] and store.done_px == 70
    for kind, wanted in (*arrays.items(), ("logits", logits)):
        assert np.array_equal(store.rows(kind, 1, 2, 9), wanted[..., 2:9, :])


def test_a_full_disk_is_an_error_that_names_the_part(tmp_path, arrays, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    store = make(tmp_path)
    monkeypatch.setattr("pixelwise.files.os.fsync", full)
    with pytest.raises(PixelwiseError, match=r"labels-0-0-10-0-7\.npy: cannot be written \(No space"):
        store.add(0, Region(0, 0, 10, 7), arrays)
    assert store.missing(0)
    store.remove()
    assert not store.folder.exists()


def test_a_part_that_vanishes_is_an_error(tmp_path, arrays):
    store = make(tmp_path)
    store.add(0, Region(0, 0, 10, 7), arrays)
    store.remove()
    with pytest.raises(PixelwiseError, match="Run again"):
        store.rows("labels", 0, 0, 1)
