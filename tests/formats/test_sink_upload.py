"""Results behind URLs: on a real S3 server (moto), in memory and on disk; never half of one under its name."""

import fsspec
import numpy as np
import pytest
import zarr

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import DataError, PixelwiseError, UsageError
from pixelwise.formats import Result, SourceInfo, open_source
from pixelwise.formats.remote import check_writable, exists, publish, read_small, write_small
from pixelwise.formats.zarr.write import write_ome_zarr, write_zarr

SPEC = LabelSpec(names=("sky", "road"), colors=((10, 20, 250), (90, 80, 70)), values=((0,), (1,)))
CONTENT = np.random.default_rng(0).bytes(100_000)


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def written(path, size=300, write=write_zarr, seed=0):
    labels = np.random.default_rng(seed).integers(0, 2, (size, size), dtype=np.uint8)
    info = SourceInfo(location="a", format="zarr", height=size, width=size, channels=3, dtype="uint8")
    write(
        path,
        Result(
            kind="labels",
            spec=SPEC,
            source=info,
            dtype=labels.dtype,
            rows=lambda plane, top, bottom: labels[top:bottom],
        ),
    )
    return labels


def keys(client):
    return sorted(item["Key"] for item in client.list_objects_v2(Bucket="scans").get("Contents", []))


def stored(client, key):
    return client.get_object(Bucket="scans", Key=key)["Body"].read()


def test_files_on_s3(s3, tmp_path):
    local = tmp_path / "a.png"
    for content in (CONTENT, CONTENT[::-1], b""):
        local.write_bytes(content)
        publish(local, "s3://scans/day/a.png")
        assert stored(s3, "day/a.png") == content
    assert exists("s3://scans/day/a.png")
    assert not exists("s3://scans/day/b.png")
    with pytest.raises(PixelwiseError, match=r"^s3://nowhere/a\.png: cannot be written: there is no such bucket"):
        publish(local, "s3://nowhere/a.png")


def test_records_on_s3(s3):
    assert read_small("s3://scans/done/a.json") is None
    write_small("s3://scans/done/a.json", b'{"a": 1}')
    assert stored(s3, "done/a.json") == b'{"a": 1}'
    assert read_small("s3://scans/done/a.json") == b'{"a": 1}'
    assert read_small("s3://scans/done/a.json", limit=3) is None


@pytest.mark.parametrize("write", [write_zarr, write_ome_zarr])
def test_zarr_on_s3_replaces_an_older_one(s3, tmp_path, write):
    url = f"s3://scans/{write.__name__}.zarr"
    written(tmp_path / "old.zarr", 600, write)
    publish(tmp_path / "old.zarr", url)
    labels = written(tmp_path / "new.zarr", 300, write, seed=1)
    publish(tmp_path / "new.zarr", url)
    local = {
        f"{write.__name__}.zarr/{path.relative_to(tmp_path / 'new.zarr').as_posix()}": path.read_bytes()
        for path in (tmp_path / "new.zarr").rglob("*")
        if path.is_file()
    }
    there = [key for key in keys(s3) if key.startswith(f"{write.__name__}.zarr/")]
    assert there == sorted(local)  # nothing of the larger old one
    for key, content in local.items():
        assert stored(s3, key) == content
    with open_source(url) as source:
        assert np.array_equal(source.read(0, 0, 300, 300)[..., 0], labels)
    assert exists(url)


@pytest.mark.parametrize("version", [2, 3])
def test_a_folder_is_no_zarr_until_all_of_it_is_there(memory, tmp_path, monkeypatch, version):
    first, second = (zarr.create_array(tmp_path / name, shape=(40, 40), chunks=(10, 10), dtype="u1", zarr_format=version)
                     for name in ("a.zarr", "b.zarr"))  # fmt: skip
    first[:], second[:] = 1, 2
    url = "memory://out/a.zarr"
    publish(tmp_path / "a.zarr", url)
    plain = type(memory).put_file

    for broken_at in range(17):
        left = [broken_at]

        def breaking(self, local, path, *args, left=left, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise ConnectionError("the line broke")
            return plain(self, local, path, *args, **kwargs)

        monkeypatch.setattr(type(memory), "put_file", breaking)
        with pytest.raises(DataError, match=r"^memory://out/a\.zarr: the server cannot be reached or broke off"):
            publish(tmp_path / "b.zarr", url)
        monkeypatch.setattr(type(memory), "put_file", plain)
        with pytest.raises(DataError, match=r"no Zarr array"):
            open_source(url)
    publish(tmp_path / "b.zarr", url)
    with open_source(url) as source:
        assert source.read(0, 0, 40, 40).min() == 2


def test_files_are_whole_or_not_there(memory, tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(CONTENT)
    monkeypatch.setattr(type(memory), "put_file", lambda self, local, path, **kwargs: self.store.update({path: None}))
    monkeypatch.setattr(type(memory), "info", lambda self, path, **kwargs: {"size": 7, "type": "file"})
    with pytest.raises(DataError, match="holds 7 bytes after 100,000 were sent"):
        publish(tmp_path / "a.png", "memory://out/a.png")


@pytest.mark.parametrize(
    "url", ["https://host/a.png?signature=abc", "hf://datasets/a/b/c.png", "ftp://host/a", "zip::s3://a/b"]
)
def test_places_that_cannot_be_written(tmp_path, url):
    (tmp_path / "a.png").write_bytes(b"-")
    for attempt in (
        lambda: publish(tmp_path / "a.png", url),
        lambda: write_small(url, b""),
        lambda: check_writable(url),
    ):
        with pytest.raises(UsageError, match=r"cannot be written there|not followed") as caught:
            attempt()
        assert "signature" not in str(caught.value)
    check_writable("s3://scans/a")
