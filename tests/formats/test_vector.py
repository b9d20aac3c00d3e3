"""Labels as vectors: polygons drawn again give the labels, runs are those of pycocotools, nothing is lost or doubled."""

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import rasterio
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from rasterio.features import rasterize
from rasterio.transform import Affine
from scipy import ndimage

from pixelwise.data.labels import LabelSpec
from pixelwise.errors import PixelwiseError
from pixelwise.formats import Result, SourceInfo
from pixelwise.formats import geojson as geojson_module
from pixelwise.formats.coco import run_lengths, write_coco
from pixelwise.formats.geojson import simplify, with_shared_corners, write_geojson

pytestmark = [
    pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning"),
    pytest.mark.filterwarnings("ignore:Use `@`:PendingDeprecationWarning"),  # rasterio, of affine
]

SPEC = LabelSpec(names=("sea", "forêt", "city"), colors=((0, 0, 200), (0, 90, 0), (9, 9, 9)), values=((0,), (1,), (2,)))
NORTH = (10.0, 0.0, 5e5, 0.0, -10.0, 5e6)


def result_of(array, *, nodata=None, crs=None, transform=NORTH, asked=None, **more):
    array = array if array.ndim == 3 else array[None]
    planes, height, width = array.shape
    kind = "png" if crs is None else "geotiff"
    info = SourceInfo(
        location="in/a b.tif", format=kind, height=height, width=width, planes=planes, channels=3, dtype="uint8"
    )

    def rows(plane, top, bottom):
        if asked is not None:
            asked.append((plane, top, bottom))
        return array[plane, top:bottom]

    place = {} if crs is None else {"crs": crs, "transform": tuple(transform)[:6]}
    given = {"kind": "labels", "mark": {"model": "abc"}} | more
    return Result(spec=SPEC, source=info, dtype=array.dtype, rows=rows, nodata=nodata, metadata=place, **given)


def noise(height, width, classes=3, seed=0):
    return np.random.default_rng(seed).integers(0, classes, (height, width)).astype(np.uint8)


def blobs(height, width, seed=0):
    fields = np.random.default_rng(seed).normal(size=(3, height, width))
    return np.stack([ndimage.gaussian_filter(field, 4) for field in fields]).argmax(axis=0).astype(np.uint8)


def geojson(path, result, **options):
    write_geojson(path, result, **options)
    return json.loads(path.read_text(encoding="utf-8"))


def geometries(collection):
    return np.array([shapely.geometry.shape(feature["geometry"]) for feature in collection["features"]], dtype=object)


def properties(collection, name):
    return np.array([feature["properties"][name] for feature in collection["features"]])


def drawn(collection, shape):
    pairs = zip(geometries(collection), properties(collection, "class_id").tolist(), strict=True)
    return rasterize(pairs, out_shape=shape, fill=99, dtype="uint8")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(height=st.integers(1, 30), width=st.integers(1, 30), classes=st.integers(1, 3), seed=st.integers(0, 999))
def test_polygons_drawn_again_are_the_labels(tmp_path, height, width, classes, seed):
    labels = noise(height, width, classes, seed)
    collection = geojson(tmp_path / "a.geojson", result_of(labels), simplify_px=0)
    found = geometries(collection)
    assert shapely.is_valid(found).all() and shapely.coverage_is_valid(found)
    assert (shapely.area(found) == properties(collection, "area_px")).all() and shapely.area(found).sum() == labels.size
    assert np.array_equal(drawn(collection, labels.shape), labels)
    structure = ndimage.generate_binary_structure(2, 1)
    assert len(found) == sum(ndimage.label(labels == index, structure)[1] for index in range(3))
    assert all(shapely.is_ccw(polygon.exterior) for polygon in found)


@pytest.mark.parametrize("simplify_px", [0.8, 1.0, 3.0])
def test_simplified_neighbours_have_neither_gaps_nor_overlaps(tmp_path, simplify_px):
    labels = blobs(150, 170)
    labels[40:60, 50:90] = 255
    exact = geojson(tmp_path / "exact.geojson", result_of(labels, nodata=255), simplify_px=0)
    simple = geojson(tmp_path / "simple.geojson", result_of(labels, nodata=255), simplify_px=simplify_px)
    found = geometries(simple)
    assert shapely.is_valid(found).all() and shapely.coverage_is_valid(found)
    assert shapely.get_num_coordinates(found).sum() < shapely.get_num_coordinates(geometries(exact)).sum()
    assert np.array_equal(properties(simple, "area_px"), properties(exact, "area_px"))
    # without the hole the whole is still the rectangle of the image
    assert shapely.union_all(found).envelope.equals(shapely.box(0, 0, 170, 150))
    assert shapely.union_all(found).area == pytest.approx(shapely.area(found).sum(), rel=1e-12)
    assert (drawn(simple, labels.shape) != labels).mean() < 0.2 * simplify_px + 0.02


def test_default_simplification_moves_no_border_by_more_than_a_pixel(tmp_path):
    labels = blobs(200, 200)
    simple = drawn(geojson(tmp_path / "a.geojson", result_of(labels)), labels.shape)
    inner = ndimage.minimum_filter(labels, 3) == ndimage.maximum_filter(labels, 3)
    assert (simple == labels)[inner].mean() > 0.9999


def test_pixels_without_data_are_left_out(tmp_path):
    labels = np.zeros((20, 20), dtype=np.uint8)
    labels[2:5, 2:5], labels[10, 10], labels[15:] = 1, 2, 255
    collection = geojson(tmp_path / "a.geojson", result_of(labels, nodata=255), simplify_px=0)
    found = {feature["properties"]["class"]: feature["properties"]["area_px"] for feature in collection["features"]}
    assert found == {"sea": 300 - 10, "forêt": 9, "city": 1}
    assert sorted(len(polygon.interiors) for polygon in geometries(collection)) == [0, 0, 2]


def test_pixel_coordinates_are_named_as_such(tmp_path):
    collection = geojson(tmp_path / "a b.geojson", result_of(noise(9, 9)))
    assert collection["type"] == "FeatureCollection" and collection["name"] == "a b"
    assert collection["coordinates"].startswith("pixels of the image") and collection["pixelwise"] == {"model": "abc"}
    assert "area_m2" not in collection["features"][0]["properties"]


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:32633", NORTH),
        ("EPSG:32633", Affine(10, 0, 5e5, 0, -10, 5e6) @ Affine.rotation(30)),
        ("EPSG:4326", (0.001, 0, 14, 0, -0.001, 46)),
        ("EPSG:3035", (10, 0, 4.5e6, 0, -10, 2.6e6)),
        ("EPSG:2263", (30, 0, 1e6, 0, -30, 2e5)),
    ],
)
def test_places_are_longitude_and_latitude(tmp_path, crs, transform):
    labels = blobs(80, 90)
    collection = geojson(tmp_path / "a.geojson", result_of(labels, crs=crs, transform=transform), simplify_px=0)
    found = geometries(collection)
    assert collection["coordinates"].startswith("longitude and latitude")
    assert all(shapely.is_ccw(polygon.exterior) for polygon in found)
    ways = {"rings": 80 * 90}
    pixels = Affine(*tuple(transform)[:6])
    back = [
        shapely.transform(polygon, lambda p: np.stack(rasterio.warp.transform("EPSG:4326", crs, *p.T), axis=1))
        for polygon in found
    ]
    area = sum(polygon.area for polygon in back) / abs(pixels.determinant)
    assert area == pytest.approx(ways["rings"], rel=1e-3)
    values = properties(collection, "class_id").tolist()
    again = rasterize(zip(back, values, strict=True), out_shape=labels.shape, transform=pixels, fill=99, dtype="uint8")
    assert np.array_equal(again, labels)


def test_areas_are_true_square_metres(tmp_path):
    labels = blobs(60, 60)

    def area(crs, transform):
        collection = geojson(tmp_path / "a.geojson", result_of(labels, crs=crs, transform=transform))
        return sum(properties(collection, "area_m2"))

    assert area("EPSG:32633", NORTH) == pytest.approx(3600 * 100)
    assert area("EPSG:2263", (30, 0, 1e6, 0, -30, 2e5)) == pytest.approx(3600 * 900 * 0.3048006096**2, rel=1e-4)  # feet
    assert area("EPSG:3035", (10, 0, 4.5e6, 0, -10, 2.6e6)) == pytest.approx(3600 * 100)
    north, south = np.radians([46, 46 - 0.06])  # of WGS 84: the integral of M N cos(latitude)
    steps = np.linspace(south, north, 10_001)
    flat = 1 - 0.00669437999014 * np.sin(steps) ** 2
    square = 6_378_137.0**2 * (1 - 0.00669437999014) / flat**2 * np.cos(steps)
    true = np.trapezoid(square, steps) * np.radians(0.06)
    assert area("EPSG:4326", (0.001, 0, 14, 0, -0.001, 46)) == pytest.approx(true, rel=1e-6)
    # Web Mercator shows it 2.14 times too large at 46.9 degrees (1 / cos^2)
    assert area("EPSG:3857", (10, 0, 1.5e6, 0, -10, 5.93e6)) == pytest.approx(3600 * 100 * 0.4665, rel=2e-3)


def test_a_whole_globe_has_the_area_of_the_earth(tmp_path):
    labels = np.zeros((180, 360), dtype=np.uint8)
    labels[60:120, 100:260] = 1
    collection = geojson(tmp_path / "a.geojson", result_of(labels, crs="EPSG:4326", transform=(1, 0, -180, 0, -1, 90)))
    assert sum(properties(collection, "area_m2")) == pytest.approx(510_065_621_724_000, rel=2e-6)
    assert shapely.area(geometries(collection)).sum() == pytest.approx(180 * 360)


def test_polygons_across_the_antimeridian_are_cut_there(tmp_path):
    labels = np.zeros((40, 40), dtype=np.uint8)
    labels[10:20, 5:35] = 1
    transform = (1000, 0, 140_000, 0, -1000, 1_000_000)  # zone 1 begins at 180 degrees
    found = geometries(geojson(tmp_path / "a.geojson", result_of(labels, crs="EPSG:32601", transform=transform)))
    assert shapely.is_valid(found).all()
    assert {type(polygon).__name__ for polygon in found} == {"MultiPolygon"}
    for part in shapely.get_parts(found):
        west, _, east, _ = part.bounds
        assert east - west < 1 and abs(west) > 179


@pytest.mark.parametrize(
    "crs, transform",
    [
        ("EPSG:32701", (100, 0, 176500, 0, -100, 8190000)),
        ("EPSG:3857", (100, 0, 20037508 - 4500, 0, -100, -1900000)),
        ("EPSG:3031", (500, 0, -20000, 0, -500, -1080000)),
        ("EPSG:3832", (100, 0, 3339584 - 4500, 0, -100, -1900000)),
        ("EPSG:4326", (0.5, 0, 160, 0, -0.5, 20)),  # longitudes up to 200
        ("EPSG:3031", (50_000, 0, -2_000_000, 0, -50_000, 1_900_000)),  # the pole inside
        ("EPSG:3413", (50_000, 0, -1_990_000, 0, -50_000, 1_900_000)),
    ],
    ids=["utm", "web mercator", "antarctic", "pacific", "degrees to 200", "south pole", "north pole"],
)
def test_polygons_beyond_the_antimeridian_cover_their_image_once(tmp_path, crs, transform):
    labels = blobs(80, 90)
    labels[30:50, 30:60] = 1  # also around a pole
    collection = geojson(tmp_path / "a.geojson", result_of(labels, crs=crs, transform=transform), simplify_px=0)
    found = geometries(collection)
    parts = shapely.get_parts(found)
    bounds = shapely.bounds(parts)
    assert shapely.is_valid(found).all()
    assert bounds[:, 0].min() == -180 and bounds[:, 2].max() == 180 and np.abs(bounds[:, 1::2]).max() <= 90
    assert shapely.area(shapely.union_all(found)) == pytest.approx(shapely.area(found).sum(), rel=1e-9)
    middles = np.stack(np.meshgrid(np.arange(90) + 0.5, np.arange(80) + 0.5), axis=-1).reshape(-1, 2)
    a, b, c, d, e, f = transform
    x, y = a * middles[:, 0] + b * middles[:, 1] + c, d * middles[:, 0] + e * middles[:, 1] + f
    lon, lat = (np.array(values) for values in rasterio.warp.transform(crs, "EPSG:4326", x, y))
    points = shapely.points((lon + 180) % 360 - 180, lat)
    tree = shapely.STRtree(found)
    at, which = tree.query(points, predicate="within")
    assert np.array_equal(np.sort(at), np.arange(len(points)))
    assert np.array_equal(properties(collection, "class_id")[which][np.argsort(at)], labels.ravel())


@pytest.mark.parametrize(
    "crs", ['LOCAL_CS["building site",UNIT["metre",1]]', 'PROJCS["odd"]', "+proj=geos +h=35785831 +lon_0=0 +type=crs"]
)
def test_without_longitude_and_latitude_it_stays_in_pixels(tmp_path, crs):
    transform = (3e5, 0, -6e6, 0, -3e5, 6e6)
    collection = geojson(tmp_path / "a.geojson", result_of(noise(40, 40), crs=crs, transform=transform), simplify_px=0)
    assert "no longitude and latitude" in collection["coordinates"]
    assert shapely.area(geometries(collection)).sum() == 1600


def test_control_points_are_named_as_not_followed(tmp_path):
    result = result_of(noise(9, 9), crs="EPSG:4326")
    result = replace(result, metadata={"crs": None, "transform": None, "gcps": ((0, 0, 1, 1, 0),)})
    assert "gdalwarp" in geojson(tmp_path / "a.geojson", result)["coordinates"]


def test_qupath_reads_classes_at_level_0_of_a_slide(tmp_path):
    labels = blobs(40, 50)
    shapes = ((161, 201), (80, 100), (40, 50))
    result = result_of(labels)
    slide = replace(result.source, format="slide")
    result = replace(result, source=slide, metadata={"level": 2, "level_shapes": shapes, "downsample": 4.02})
    collection = geojson(tmp_path / "a.geojson", result)
    west, north, east, south = shapely.total_bounds(geometries(collection))
    assert (west, north, east, south) == pytest.approx((0, 0, 201, 161))
    assert "level 0" in collection["coordinates"] and "level 2 was labelled" in collection["coordinates"]
    for feature in collection["features"]:
        known = feature["properties"]
        assert known["objectType"] == "annotation"
        index = SPEC.names.index(known["class"])
        assert known["classification"] == {"name": known["class"], "color": list(SPEC.colors[index])}
    assert properties(collection, "area_px").sum() == labels.size


def test_background_is_no_object_unless_asked_for(tmp_path):
    spec = LabelSpec(names=("Background", "cell"), colors=((0, 0, 0), (250, 0, 0)), values=((0,), (1,)))
    result = replace(result_of(noise(20, 20, 2)), spec=spec)
    assert set(properties(geojson(tmp_path / "a.geojson", result), "class")) == {"cell"}
    assert len(set(properties(geojson(tmp_path / "a.geojson", result, background=True), "class"))) == 2


def test_planes_are_told_and_rows_are_asked_for_in_bands(tmp_path):
    stack, asked = np.stack([noise(300, 9), noise(300, 9, seed=1)]), []
    collection = geojson(tmp_path / "a.geojson", result_of(stack, asked=asked), simplify_px=0)
    assert asked == [(0, 0, 256), (0, 256, 300), (1, 0, 256), (1, 256, 300)]
    for plane in (0, 1):
        part = {"features": [f for f in collection["features"] if f["properties"]["plane"] == plane]}
        assert np.array_equal(drawn(part, (300, 9)), stack[plane])


def test_more_corners_than_memory_should_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(geojson_module, "MAX_CORNERS", 1000)
    with pytest.raises(PixelwiseError, match=r"more than 1,000 corners.*--min-area"):
        write_geojson(tmp_path / "a.geojson", result_of(noise(50, 50)))
    assert not list(tmp_path.iterdir())


def test_only_all_data_missing_is_an_empty_collection(tmp_path):
    assert geojson(tmp_path / "a.geojson", result_of(noise(5, 5) * 0 + 255, nodata=255))["features"] == []


def test_corners_of_neighbours_are_shared():
    tiles = np.array([shapely.box(0, 0, 1, 9), *(shapely.box(1, y, 3, y + 1) for y in range(9))], dtype=object)
    shared = with_shared_corners(tiles)
    assert shapely.coverage_is_valid(shared) and not shapely.coverage_is_valid(tiles)
    assert shapely.equals(shared, tiles).all()
    assert len(with_shared_corners(tiles[:0])) == 0 and len(simplify(tiles[:0], 1)) == 0


@pytest.mark.parametrize("write", [write_geojson, write_coco])
def test_what_cannot_be_written_leaves_nothing(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(PixelwiseError, match="cannot be written"):
        write(tmp_path / "file" / "a.json", result_of(noise(5, 5)))

    def rows(plane, top, bottom):
        raise PixelwiseError("the network overflows")

    with pytest.raises(PixelwiseError, match="overflows"):
        write(tmp_path / "a.json", replace(result_of(noise(5, 5)), rows=rows))
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 600),
    classes=st.integers(1, 3),
    smooth=st.booleans(),
    seed=st.integers(0, 999),
)
def test_runs_are_those_of_pycocotools(tmp_path, height, width, classes, smooth, seed):
    labels = np.minimum(blobs(height, width, seed), classes - 1) if smooth else noise(height, width, classes, seed)
    write_coco(tmp_path / "a.json", result_of(labels))
    annotations = json.loads((tmp_path / "a.json").read_text())["annotations"]
    assert [item["category_id"] for item in annotations] == np.unique(labels).tolist()
    for item in annotations:
        wanted = coco_mask.encode(np.asfortranarray(labels == item["category_id"]).astype(np.uint8))
        assert item["segmentation"] == {"size": wanted["size"], "counts": wanted["counts"].decode()}
        assert item["area"] == coco_mask.area(wanted) and item["bbox"] == coco_mask.toBbox(wanted).tolist()
        assert item["iscrowd"] == 1


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
def test_pycocotools_opens_the_file(tmp_path, capsys):
    stack = np.stack([blobs(300, 520), blobs(300, 520, seed=1)])
    stack[:, :50] = 255
    write_coco(tmp_path / "a.json", result_of(stack, nodata=255))
    data = COCO(str(tmp_path / "a.json"))
    assert [category["name"] for category in data.loadCats(data.getCatIds())] == list(SPEC.names)
    assert sorted(data.imgs) == [1, 2] and data.imgs[1]["file_name"] == "a b.tif" and data.imgs[2]["plane"] == 1
    for plane in (0, 1):
        again = np.full((300, 520), 255, dtype=np.uint8)
        for annotation in data.loadAnns(data.getAnnIds(imgIds=[1 + plane])):
            again[data.annToMask(annotation) > 0] = annotation["category_id"]
        assert np.array_equal(again, stack[plane])
    assert data.dataset["info"]["pixelwise"] == {"model": "abc"}


def test_counts_beyond_32_bits_are_whole():
    found = run_lengths(np.array([6_000_000_000, 6_000_000_005]), 100_000, 100_000)
    text = found["segmentation"]["counts"]
    counts, place = [], 0
    while place < len(text):
        value, shift, more = 0, 0, True
        while more:
            digit = ord(text[place]) - 48
            value |= (digit & 31) << shift
            more, shift, place = bool(digit & 32), shift + 5, place + 1
        value -= (digit & 16 > 0) << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    assert counts == [6_000_000_000, 5, 10_000_000_000 - 6_000_000_005]
    assert (found["area"], found["bbox"]) == (5, [60_000, 0, 1, 5])


def test_labels_wait_on_disk_in_compressed_pieces(tmp_path, monkeypatch):
    sizes, asked = [], []
    compress = zlib.compress
    monkeypatch.setattr("zlib.compress", lambda data, level: sizes.append(len(data)) or compress(data, level))
    write_coco(tmp_path / "a.json", result_of(blobs(600, 700), asked=asked))
    assert max(sizes) == 256 * 256 and asked == [(0, 0, 256), (0, 256, 512), (0, 512, 600)]
