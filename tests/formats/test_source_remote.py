"""URLs: a real S3 server on this machine (moto), a web server with and without ranges, and memory://."""

import io
import json
import re
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import numpy as np
import pytest
import s3fs
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixelwise.errors import DataError, UsageError
from pixelwise.formats import SOURCE_SUFFIXES, urls
from pixelwise.formats import remote as objects
from pixelwise.formats.in_process import open_in_process as open_source  # where requests can be counted
from pixelwise.formats.local import is_url, local_path, shown
from pixelwise.formats.remote import (
    RemoteStamp,
    fingerprint,
    list_images,
    localise,
    opener,
    read_range,
)

IMAGE = np.random.default_rng(0).integers(0, 255, (1600, 1700, 3), dtype=np.uint8)
SECRET = "s3cr3tsignature"


def encoded(image, kind):
    buffer = io.BytesIO()
    if kind == "tiff":
        tifffile.imwrite(buffer, image, tile=(256, 256), photometric="rgb")
    elif kind == "npy":
        np.save(buffer, image)
    else:
        Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def s3(s3):
    s3.put_object(Bucket="scans", Key="large.tif", Body=encoded(IMAGE, "tiff"))
    s3.put_object(Bucket="scans", Key="day/a.png", Body=encoded(IMAGE[:30, :40], "png"))
    return s3


@pytest.fixture
def requests(monkeypatch):
    """How often each method of S3 is called, and how many bytes are asked for."""
    counts = Counter()
    plain = s3fs.S3FileSystem._call_s3

    async def counting(self, method, *parts, **options):
        counts[method] += 1
        if "Range" in options:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", options["Range"]).groups()
            counts["bytes"] += int(last) - int(first) + 1
        elif method == "get_object":
            counts["whole"] += 1
        return await plain(self, method, *parts, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counting)
    return counts


def test_a_window_of_a_large_tiff_on_s3_is_a_few_requests(s3, requests):
    with open_source("s3://scans/large.tif") as source:
        assert (source.info.location, source.info.format) == ("s3://scans/large.tif", "tiff")
        assert (source.info.height, source.info.width, source.info.channels) == (1600, 1700, 3)
        assert np.array_equal(source.read(1100, 900, 200, 100), IMAGE[1100:1300, 900:1000])
        assert requests["whole"] == 0
        assert requests["get_object"] <= 6
        assert requests["bytes"] <= 3 * 2**20 + 4096  # of 8 MiB
        before = requests["get_object"]
        assert np.array_equal(source.read(1110, 910, 20, 20), IMAGE[1110:1130, 910:930])
        assert requests["get_object"] == before  # from memory
        assert len(source.fingerprint()) == 64
        assert requests["get_object"] == before  # by its tag
        source.check_unchanged()


def test_formats_that_need_a_file_are_copied_and_the_copy_goes(s3, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with open_source("s3://scans/day/a.png") as source:
        assert (source.info.location, source.info.format) == ("s3://scans/day/a.png", "png")
        assert np.array_equal(source.read(3, 4, 20, 30), IMAGE[3:23, 4:34])
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())
    s3.put_object(Bucket="scans", Key="bad.png", Body=encoded(IMAGE[:30, :40], "png")[:60])
    with (
        pytest.raises(DataError, match=r"^s3://scans/bad\.png: ") as caught,
        open_source("s3://scans/bad.png") as source,
    ):
        source.read(0, 0, 30, 40)
    assert str(tmp_path) not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_zarr_on_s3(s3, requests, tmp_path):
    made = zarr.create_array(tmp_path / "a.zarr", shape=(300, 400), dtype="u2", chunks=(50, 50), shards=(100, 100))
    made[:] = IMAGE[:300, :400, 0].astype(np.uint16) * 7
    for path in (tmp_path / "a.zarr").rglob("*"):
        if path.is_file():
            s3.put_object(
                Bucket="scans", Key=f"z/a.zarr/{path.relative_to(tmp_path / 'a.zarr')}", Body=path.read_bytes()
            )
    with open_source("s3://scans/z/a.zarr") as source:
        before = requests.copy()
        assert np.array_equal(source.read(120, 130, 40, 50)[..., 0], made[120:160, 130:180])
        assert requests["get_object"] - before["get_object"] <= 5  # an index and four chunks
        assert np.array_equal(source.read(0, 0, 300, 400)[..., 0], made[:])
        source.check_unchanged()
        known = source.fingerprint()
        s3.put_object(Bucket="scans", Key="z/a.zarr/c/0/0", Body=b"other")
        assert source.fingerprint() != known
        with pytest.raises(DataError, match=r"s3://scans/z/a\.zarr: the array changed"):
            source.check_unchanged()
        with pytest.raises(DataError, match=r"^s3://scans/z/a\.zarr: "):
            source.read(0, 0, 10, 10)


def test_objects_that_change_while_they_are_read(s3):
    s3.put_object(Bucket="scans", Key="b.tif", Body=encoded(IMAGE[:300], "tiff"))
    with open_source("s3://scans/b.tif") as source:
        known = source.fingerprint()
        s3.put_object(Bucket="scans", Key="b.tif", Body=encoded(255 - IMAGE[:300], "tiff"))
        with pytest.raises(DataError, match=r"s3://scans/b\.tif: the object changed .*its tag differs"):
            source.check_unchanged()
        assert fingerprint("s3://scans/b.tif", RemoteStamp.of("s3://scans/b.tif")) != known
    with open_source("s3://scans/b.tif") as source:
        s3.put_object(Bucket="scans", Key="b.tif", Body=b"II*\0")
        with pytest.raises(DataError, match=r"^s3://scans/b\.tif: "):
            source.read(200, 1500, 9, 9)
    s3.delete_object(Bucket="scans", Key="b.tif")


def test_what_is_missing_on_s3(s3):
    for url in ("s3://scans/none.tif", "s3://nowhere/none.tif", "s3://scans/none.zarr", "s3://scans/day"):
        with pytest.raises(DataError, match=rf"^{url}: (there is no|this is a folder)"):
            open_source(url)


def test_folders_and_globs_on_s3(s3):
    for key in (
        "list/a.tif",
        "list/b/c.PNG",
        "list/b/.c.png.1.part.png",
        "list/d.zarr/zarr.json",
        "list/d.zarr/c/0.tif",
        "list/x.txt",
    ):
        s3.put_object(Bucket="scans", Key=key, Body=b"-")
    everything = ["s3://scans/list/a.tif", "s3://scans/list/b/c.PNG", "s3://scans/list/d.zarr"]
    assert list_images("s3://scans/list", SOURCE_SUFFIXES) == everything
    assert list_images("s3://scans/list/", SOURCE_SUFFIXES) == everything
    assert list_images("s3://scans/li*/*.tif", SOURCE_SUFFIXES) == everything[:1]
    assert list_images("s3://scans/list/*", SOURCE_SUFFIXES) == everything
    assert list_images("s3://scans/list/a.tif", SOURCE_SUFFIXES) == everything[:1]
    for url in ("s3://scans/nothing", "s3://scans/list/*.bmp", "s3://nowhere/a"):
        with pytest.raises(DataError, match="there is no such"):
            list_images(url, SOURCE_SUFFIXES)


class Web(BaseHTTPRequestHandler):
    """Files by name; the first part of the path says how the server behaves."""

    files: dict[str, bytes]
    log: Counter
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        way, _, name = self.path.partition("?")[0].strip("/").partition("/")
        if way == "hangs":
            time.sleep(0.6)
        content = self.files.get(name)
        if way == "circles":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status = {"denied": 403, "broken": 500}.get(way, 404 if content is None else 200)
        if way == "signed" and (f"signature={SECRET}" not in self.path or self.command == "HEAD"):
            status = 403
        part = content or b""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        headers = {}
        if status == 200 and asked and way != "plain":
            first, last = int(asked[1]), min(int(asked[2]), len(part) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(part)}"
            status, part = 206, part[first : last + 1]
        if content is not None:
            headers["ETag"] = f'"{hash(content)}"'
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(part) if status < 400 else 0))
        self.end_headers()
        if self.command == "GET" and status < 400:
            half = len(part) // 2 if way == "half" and status == 206 else len(part)
            try:
                for place in range(20 if way == "drips" else 0):
                    self.wfile.write(part[place : place + 1])
                    time.sleep(0.1)
                self.wfile.write(part[:half])
                self.log["bytes"] += half
            except ConnectionError:
                pass
            if half < len(part):
                self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def web():
    Web.files = {
        "large.tif": encoded(IMAGE, "tiff"), "a.png": encoded(IMAGE[:30, :40], "png"), "text.tif": b"no image",
    }  # fmt: skip
    Web.log = Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    kind = fsspec.get_filesystem_class("http")
    for system in list(kind._cache.values()):
        if system._session is not None:
            system.close_session(system.loop, system._session)
    kind.clear_instance_cache()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("way", ["good", "signed"])
def test_windows_over_http(web, way):
    Web.log.clear()
    url = f"{web}/{way}/large.tif?signature={SECRET}"
    with open_source(url) as source:
        assert source.info.location == f"{web}/{way}/large.tif"  # without the signature
        assert np.array_equal(source.read(1100, 900, 200, 100), IMAGE[1100:1300, 900:1000])
        assert len(source.fingerprint()) == 64
        source.check_unchanged()
    assert Web.log["bytes"] < 3 * 2**20 or way == "signed"


def test_servers_without_ranges_are_copied(web, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with open_source(f"{web}/plain/large.tif") as source:
        assert len(list(tmp_path.iterdir())) == 1
        assert np.array_equal(source.read(1100, 900, 200, 100), IMAGE[1100:1300, 900:1000])
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="cannot send parts of it"):
        opener(f"{web}/plain/large.tif", RemoteStamp.of(f"{web}/plain/large.tif"))


def test_zarr_over_http(web, tmp_path):
    made = zarr.create_array(
        tmp_path / "a.zarr", shape=(90, 80), dtype="f4", chunks=(32, 32), fill_value=5, zarr_format=2
    )
    made[:64] = IMAGE[:64, :80, 0]
    for path in (tmp_path / "a.zarr").rglob("*"):
        Web.files[f"a.zarr/{path.name}"] = path.read_bytes()
    for way in ("good", "plain"):
        with open_source(f"{web}/{way}/a.zarr?signature={SECRET}") as source:
            assert np.array_equal(source.read(0, 0, 90, 80)[..., 0], made[:])  # the last chunks are not there
            source.check_unchanged()
            known = source.fingerprint()
        Web.files["a.zarr/.zarray"] = Web.files["a.zarr/.zarray"].replace(b"5.0", b"6.0")
        with open_source(f"{web}/{way}/a.zarr") as source:
            assert source.fingerprint() != known
        Web.files["a.zarr/.zarray"] = Web.files["a.zarr/.zarray"].replace(b"6.0", b"5.0")


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("good/none.tif", "there is no such object"),
        ("good/text.tif", "this is no image"),
        ("denied/large.tif", "you have no permission"),
        ("broken/large.tif", "HTTP status 500"),
        ("half/large.tif", "broke off|cannot send|answer cannot be used"),
    ],
)
def test_errors_of_servers_hold_no_secret(web, way, message, monkeypatch):
    monkeypatch.setattr(urls.time, "sleep", lambda seconds: None)
    url = f"{web.replace('http://', f'http://me:{SECRET}@')}/{way}?signature={SECRET}"
    with pytest.raises(DataError, match=message) as caught, open_source(url) as source:
        source.read(0, 0, 9, 9)
    assert str(caught.value).startswith(f"{web}/{way}: ")
    assert SECRET not in str(caught.value)
    error = caught.value
    while error is not None:  # nor does a traceback print it
        assert SECRET not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@pytest.fixture
def fresh():
    """No file system of an earlier test, and none left for a later one."""
    kinds = [fsspec.get_filesystem_class(name) for name in ("http", "s3")]
    kept = [dict(kind._cache) for kind in kinds]
    for kind in kinds:
        kind._cache.clear()
    yield
    for kind, before in zip(kinds, kept, strict=True):
        for system in kind._cache.values():
            session = getattr(system, "_session", None) or getattr(system, "_s3", None)
            if session is not None:
                system.close_session(system.loop, session)
        kind._cache.clear()
        kind._cache.update(before)


def test_no_network(fresh, monkeypatch):
    monkeypatch.setattr(urls.time, "sleep", lambda seconds: None)
    with pytest.raises(DataError, match=r"^http://127\.0\.0\.1:9/a\.tif: the server cannot be reached"):
        open_source("http://127.0.0.1:9/a.tif")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"^s3://scans/a\.tif: the server cannot be reached"):
        open_source("s3://scans/a.tif")
    assert time.monotonic() - started < 10


def test_no_credentials(fresh, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match=r"s3://scans/a\.tif: no credentials were found.*FSSPEC_S3_ANON"):
        open_source("s3://scans/a.tif")


def test_no_answer(fresh, web, monkeypatch):
    monkeypatch.setattr(urls, "READ_S", 0.2)
    with pytest.raises(DataError, match=r"the server did not answer in time"):
        open_source(f"{web}/hangs/a.png")


@pytest.mark.parametrize(
    "url",
    [
        "simplecache::s3://scans/a.tif",
        "zip://a.tif::s3://scans/a.zip",
        "reference::/tmp/evil.json",
        "filecache::file:///etc/passwd",
        "s3://scans/a::b.tif",
        "reference://a",
        "zip://a.tif",
        "dir://a",
        "github://a:b@c/d",
        "sftp://host/a.tif",
        "data://a",
        "file://host/etc/passwd",
    ],
)
def test_other_urls_are_refused(url):
    with pytest.raises((UsageError, DataError)):
        open_source(url)
    if is_url(url):
        with pytest.raises(UsageError, match=r"not followed|full path"):
            open_source(url)


def test_local_urls_are_paths(tmp_path):
    (tmp_path / "a b.png").write_bytes(encoded(IMAGE[:5, :6], "png"))
    uri = (tmp_path / "a b.png").as_uri()
    assert local_path(uri) == str(tmp_path / "a b.png")
    with open_source(uri) as source:
        assert source.info.height == 5
    assert shown("https://u:p@h/a.tif?x=1#y") == "https://h/a.tif"
    assert shown("a?b") == "a?b"


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(
        UsageError, match=r'gs:// needs the package gcsfs. Install it: pip install "fsspec>=2024.12" .* "gcsfs"'
    ):
        open_source("gs://scans/a.tif")
    with pytest.raises(UsageError, match="web servers do not list"):
        list_images("https://host/a", SOURCE_SUFFIXES)


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def test_memory_and_npy_by_parts(memory):
    memory.pipe("/in/a.npy", encoded(IMAGE, "npy"))
    with open_source("memory://in/a.npy") as source:
        assert np.array_equal(source.read(7, 8, 9, 10), IMAGE[7:16, 8:18])
    memory.pipe("/in/a.zarr/zarr.json", json.dumps({"zarr_format": 3, "node_type": "group"}).encode())
    with pytest.raises(DataError, match=r"^memory://in/a\.zarr: this is a group"):
        open_source("memory://in/a.zarr")
    memory.pipe("/in/empty.tif", b"")
    with pytest.raises(DataError, match=r"^memory://in/empty\.tif: the file is empty"):
        open_source("memory://in/empty.tif")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 999), st.integers(0, 600)), max_size=8), st.integers(1, 400))
def test_files_of_ranges_read_as_files(parts, block):
    content = bytes(np.random.default_rng(1).integers(0, 255, 1000, dtype=np.uint8))
    fsspec.filesystem("memory").pipe("/ranges.bin", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "BLOCK_BYTES", block)
        patch.setattr(objects, "CACHED_BLOCKS", 3)
        patch.setattr(objects, "_UNCACHED_BYTES", 300)
        stamp = RemoteStamp.of("memory://ranges.bin")
        with opener("memory://ranges.bin", stamp)() as file, io.BytesIO(content) as plain:
            for start, count in parts:
                assert file.seek(start) == plain.seek(start)
                assert file.read(count) == plain.read(count)
                buffer, other = bytearray(count), bytearray(count)
                assert file.readinto(buffer) == plain.readinto(other)
                assert (buffer, file.tell()) == (other, plain.tell())
            assert file.seek(-3, io.SEEK_END) == 997
            assert file.read() == content[-3:]
    assert read_range("memory://ranges.bin", 990, 2000) == content[990:]


def test_zip_archives_and_shards_behind_urls(memory, web, tmp_path):
    with zarr.storage.ZipStore(tmp_path / "a.zarr.zip", mode="w") as store:
        made = zarr.create_array(store, shape=(60, 70, 3), dtype="u1", chunks=(10, 10, 3), shards=(30, 30, 3))
        made[:] = IMAGE[:60, :70]
    content = (tmp_path / "a.zarr.zip").read_bytes()
    memory.pipe("/in/a.zarr.zip", content)
    Web.files["a.zarr.zip"] = content
    for url in ("memory://in/a.zarr.zip", f"{web}/good/a.zarr.zip"):
        with open_source(url) as source:
            assert np.array_equal(source.read(5, 6, 40, 50), IMAGE[5:45, 6:56])
            assert len(source.fingerprint()) == 64
            source.check_unchanged()
    with zipfile.ZipFile(tmp_path / "a.zarr.zip") as archive:
        Web.files |= {f"shards.zarr/{name}": archive.read(name) for name in archive.namelist()}
    with open_source(f"{web}/good/shards.zarr") as source:
        assert np.array_equal(source.read(5, 6, 4, 5), IMAGE[5:9, 6:11])
    refused = pytest.raises(DataError, match=r"shards\.zarr.*: the server cannot send parts of it")
    with open_source(f"{web}/plain/shards.zarr") as source, refused:  # whole shards come, whatever is asked for
        source.read(5, 6, 4, 5)


def test_copies_need_room(memory, monkeypatch, tmp_path):
    memory.pipe("/a.bin", b"0" * 1000)
    usage = __import__("collections").namedtuple("Usage", "total used free")(1000, 500, 500)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    stamp = RemoteStamp.of("memory://a.bin")
    with pytest.raises(DataError, match=r"memory://a\.bin: takes 1,000 bytes on this machine, but .* has 500 free"):
        localise("memory://a.bin", stamp, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    with pytest.raises(DataError, match="cannot be copied"):
        localise("memory://a.bin", stamp, tmp_path / "none")
    memory.pipe("/a.bin", b"0" * 10)
    with pytest.raises(DataError, match="10 bytes came, though the server said 1,000"):
        localise("memory://a.bin", stamp, tmp_path)
    assert not list(tmp_path.iterdir())
    memory.pipe("/..hid%2fden", b"x")
    copy = localise("memory://..hid%2fden", RemoteStamp.of("memory://..hid%2fden"), tmp_path)
    assert copy.path.name == "hid_2fden"
    copy.close()
    assert not list(tmp_path.iterdir())


def test_servers_that_never_end_are_given_up(web, monkeypatch, tmp_path):
    for key, value in {"REQUEST_S": 0.5, "SLOWEST_BYTES_S": 10**9}.items():
        monkeypatch.setattr(urls, key, value)
    url = f"{web.replace('http://', 'http://user:pass@')}/drips/a.png?signature={SECRET}"
    stamp = RemoteStamp.of(f"{web}/good/a.png")
    for ask in (lambda: read_range(url, 0, 2000), lambda: localise(url, stamp, tmp_path)):
        with pytest.raises(DataError, match=r"drips/a\.png: .*must send 1,000,000,000 bytes a second") as caught:
            ask()
        assert SECRET not in str(caught.value)
        assert "pass" not in str(caught.value)
    with pytest.raises(DataError, match="from one address to the next without end"):
        RemoteStamp.of(f"{web}/circles/a.png")
    monkeypatch.setattr(urls, "REQUEST_S", 30)
    with pytest.raises(DataError, match="more than the 100 bytes came that the server said"):
        localise(f"{web}/good/a.png", RemoteStamp(100), tmp_path)
    assert not list(tmp_path.iterdir())
