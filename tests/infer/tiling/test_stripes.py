"""Stripes against one pass over the whole image, for every network of the registry."""

import threading
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pixelwise.errors import PixelwiseError
from pixelwise.infer.prefetch import NextRows
from pixelwise.infer.tiling import Region
from pixelwise.infer.tiling.stripes import Stripes
from pixelwise.models import create_model, list_models
from pixelwise.ops.receptive_field import receptive_field
from pixelwise.ops.streaming import NotWindowed
from pixelwise.ops.streaming.memory import SpillFile

CLASSES = 3


def lively(model, seed=0):
    """Random weights and statistics that keep maps at the size they had, so that every pixel can be seen in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
        elif isinstance(module, nn.ConvTranspose2d):
            each = module.weight[0, 0].numel() / (module.stride[0] * module.stride[1])
            module.weight.data.normal_(0, (2 / (len(module.weight) * each)) ** 0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
        if getattr(module, "bias", None) is not None:
            module.bias.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def reader(image):
    """Reads windows, none of them empty or beyond the image."""

    def read(top, left, height, width):
        assert 0 <= top < top + height <= image.shape[1] and 0 <= left < left + width <= image.shape[2]
        return image[:, top : top + height, left : left + width]

    return read


def scored(scorer, image, region, classes=CLASSES):
    """The scores of a region, of which every pixel must come once."""
    found = torch.full((classes, region.height, region.width), torch.nan)
    for part in scorer.score(reader(image), region):
        window = part.region
        assert part.values.dtype == torch.float32 and part.values.shape == (classes, window.height, window.width)
        rows = slice(window.top - region.top, window.bottom - region.top)
        columns = slice(window.left - region.left, window.right - region.left)
        assert found[:, rows, columns].shape == part.values.shape and bool(found[:, rows, columns].isnan().all())
        found[:, rows, columns] = part.values
    assert not bool(found.isnan().any())
    return found


def whole_pass(model, image):
    with torch.no_grad():
        return model(image[None])[0]


def assert_same(found, expected, scale, tolerance=1e-5):
    """Logits are close, and labels equal but for ties."""
    assert float((found - expected).abs().max()) <= tolerance * scale
    best = expected.topk(2, dim=0).values
    clear = best[0] - best[1] > 2 * tolerance * scale
    assert torch.equal(found.argmax(0)[clear], expected.argmax(0)[clear])


@st.composite
def regions(draw, height, width):
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    return Region(top, left, draw(st.integers(1, height - top)), draw(st.integers(1, width - left)))


sides = st.one_of(st.integers(1, 9), st.integers(10, 60))


def _tiles(size):
    """Sides of tiles, for three columns at most; one pixel where there are few."""
    return -(-size[1] // 3), -(-size[1] // 2)


@pytest.mark.parametrize("name", list_models())
@settings(deadline=None, max_examples=2, derandomize=True)
@given(data=st.data())
def test_every_network_is_exact(name, data):
    model = lively(create_model(name, tiny=True, num_classes=CLASSES))
    size = (data.draw(sides), data.draw(sides))
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(size[0] * 100 + size[1]))
    expected = whole_pass(model, image)
    scale = float(expected.abs().max())
    assert max(size) < 33 or float(expected.std((1, 2)).max()) > 1e-3 * scale  # or the image would not matter
    try:
        scorer = Stripes(model, *size, in_channels=3, tile_px=data.draw(st.sampled_from([None, *_tiles(size)])))
    except NotWindowed:
        assert not receptive_field(model).bounded
        return
    for region in (Region(0, 0, *size), data.draw(regions(*size))):
        part = expected[:, region.top : region.bottom, region.left : region.right]
        assert_same(scored(scorer, image, region), part, scale)
        scorer.stripe_px = data.draw(st.integers(-(-size[0] // 6), 50))  # fewer rows take longer


def u_net():
    return lively(create_model("unet", tiny=True, num_classes=CLASSES))


def test_columns_cost_what_they_compute_twice():
    model, size = u_net(), (64, 96)
    scorer = Stripes(model, *size, in_channels=3, tile_px=32)
    assert scorer.cuts == (0, 32, 64, 96) and scorer.stripe_px == 32
    assert scorer.way == "stripes of 32 rows in 3 columns"
    scorer.stripe_px = 64
    counted = []
    for tiled in (scorer, Stripes(model, *size, in_channels=3, tile_px=96)):
        with FlopCounterMode(display=False) as counter:
            scored(tiled, torch.randn(3, *size), Region(0, 0, *size))
        counted.append(counter.get_total_flops())
    assert scorer.cost == pytest.approx(counted[0] / counted[1], rel=0.01) and scorer.cost > 1.2
    assert Stripes(model, *size, in_channels=3).cost == 1


def test_the_budget_is_kept_by_fewer_rows_and_then_by_columns():
    model, size, found = u_net(), (2000, 3000), []
    for budget in (2**28, 2**26, 2**24, 2**22):
        scorer = Stripes(model, *size, in_channels=3, budget_bytes=budget)
        assert scorer.memory_bytes <= budget
        assert scorer.cuts[0] == 0 and scorer.cuts[-1] == 3000 and sorted(set(scorer.cuts)) == list(scorer.cuts)
        found.append((len(scorer.cuts) - 1, scorer.stripe_px, scorer.cost))
    columns, rows, costs = zip(*found, strict=True)
    assert columns[0] == 1 and sorted(columns) == list(columns) and columns[-1] > 1
    assert rows[0] > rows[-1] and sorted(costs) == list(costs) and costs[0] == 1


def test_where_columns_cost_much_rows_wait_on_the_disk(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = lively(create_model("fcdensenet56", tiny=True, num_classes=CLASSES))
    size, budget = (300, 400), {"in_channels": 3, "budget_bytes": 13_000_000}
    in_memory, scorer = Stripes(model, *size, **budget), Stripes(model, *size, **budget, scratch=tmp_path)
    assert in_memory.cost > 1.3 and in_memory.disk_bytes == 0
    assert scorer.cost == 1 and scorer.memory_bytes <= 13_000_000 and 5e6 < scorer.disk_bytes < 9e6
    image = torch.randn(3, *size)
    sizes = []
    put = SpillFile.put
    monkeypatch.setattr(
        SpillFile, "put", lambda spill_file, rows: (put(spill_file, rows), sizes.append(spill_file.size))[0]
    )
    expected = whole_pass(model, image)
    assert_same(scored(scorer, image, Region(0, 0, *size)), expected, float(expected.abs().max()))
    assert max(sizes) == scorer.disk_bytes and not list(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=8_000_000))  # half is for others
    assert Stripes(model, *size, **budget, scratch=tmp_path).cuts == in_memory.cuts


def test_each_column_has_a_file_of_its_own(tmp_path, monkeypatch):
    model = lively(create_model("fcdensenet56", tiny=True, num_classes=CLASSES))
    scorer = Stripes(model, 300, 1500, in_channels=3, budget_bytes=13_000_000, scratch=tmp_path)
    assert len(scorer.cuts) > 3 and scorer.disk_bytes > 0  # the columns at the sides are narrower
    sizes = []
    put = SpillFile.put
    monkeypatch.setattr(
        SpillFile, "put", lambda spill_file, rows: (put(spill_file, rows), sizes.append(spill_file.size))[0]
    )
    scored(scorer, torch.randn(3, 300, 1500), Region(0, 0, 300, 1500))
    assert 0.9 * scorer.disk_bytes <= max(sizes) <= scorer.disk_bytes


def test_a_tile_takes_the_least_way_that_fits():
    model = lively(create_model("fcdensenet56", tiny=True, num_classes=CLASSES))
    free = Stripes(model, 700, 700, in_channels=3, tile_px=256)
    tight = Stripes(model, 700, 700, in_channels=3, tile_px=256, budget_bytes=int(0.9 * free.memory_bytes))
    assert tight.memory_bytes < 0.9 * free.memory_bytes and tight.cost == free.cost


def test_a_full_disk_is_told_with_its_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with SpillFile(tmp_path) as spill_file:
        monkeypatch.setattr(spill_file, "_file", SimpleNamespace(seek=full, close=spill_file._file.close))
        with pytest.raises(PixelwiseError, match=f"{tmp_path}: no room .*No space left.* allow more memory"):
            spill_file.put(torch.ones(3, 4))
    with pytest.raises(PixelwiseError, match="nowhere: rows that wait cannot be stored there"):
        SpillFile(tmp_path / "nowhere")


def test_columns_that_save_nothing_are_not_cut():
    model = lively(create_model("fcdensenet56", tiny=True, num_classes=CLASSES))
    scorer = Stripes(model, 300, 400, in_channels=3, budget_bytes=1_000_000)  # it looks 439 px around: nothing fits
    assert scorer.memory_bytes > 1_000_000 and scorer.cost < 4


def test_memory_does_not_grow_with_the_height():
    model = u_net()
    low, high = (Stripes(model, height, 256, in_channels=3).memory_bytes for height in (1000, 30_000))
    assert high <= 1.05 * low


def test_in_sixteen_bits_stripes_are_what_one_pass_is():
    model, size = u_net(), (70, 45)
    image = torch.randn(3, *size)
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
    with autocast():
        expected = whole_pass(model, image).float()
    exact = whole_pass(model, image)
    scale = float(exact.abs().max())
    assert float((expected - exact).abs().max()) > 1e-4 * scale  # so it makes a difference
    scorer = Stripes(model, *size, in_channels=3, autocast=autocast, compute_bytes=2, tile_px=20)
    assert scorer.memory_bytes < Stripes(model, *size, in_channels=3, tile_px=20).memory_bytes
    for region in (Region(0, 0, *size), Region(13, 7, 40, 30)):
        part = expected[:, region.top : region.bottom, region.left : region.right]
        assert_same(scored(scorer, image, region), part, scale, tolerance=2e-2)


def test_other_networks_are_refused_by_the_operation():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)).eval()
    with pytest.raises(NotWindowed, match="group_norm"):
        Stripes(model, 10, 10, in_channels=3)


@pytest.mark.parametrize("rows", [(4, 4, 4), (4, 2, 6), (1, 9, 2), (12,), (5, 5, 2)])
def test_rows_come_as_asked_for_whatever_was_expected(rows):
    image, seen = torch.arange(2 * 12 * 3.0).view(2, 12, 3), []

    def read(top, left, height, width):
        seen.append(height)
        return image[:, top : top + height, left : left + width]

    top = 0
    with closing(NextRows(read, bottom=12)) as ahead:
        for height in rows:
            assert torch.equal(ahead(top, 1, height, 2), image[:, top : top + height, 1:])
            top += height
    assert sum(seen) <= 12 + max(rows)  # no more than one stripe too far


def test_reading_goes_on_while_the_network_works():
    reading, threads = threading.Event(), set()

    def read(top, left, height, width):
        threads.add(threading.current_thread().name)
        if top:
            reading.set()
        return torch.zeros(3, height, width)

    with closing(NextRows(read, bottom=20)) as ahead:
        ahead(0, 0, 10, 4)
        assert reading.wait(10)  # the next rows, which were not yet asked for
    assert len(threads) == 2


def test_errors_of_reading_come_out_and_nothing_is_left_running():
    def read(top, left, height, width):
        if top > 40:
            raise OSError("the disk is gone")
        return torch.zeros(3, height, width)

    scorer = Stripes(u_net(), 200, 20, in_channels=3)
    with pytest.raises(OSError, match="the disk is gone"):
        list(scorer.score(read, Region(0, 0, 200, 20)))
    parts = scorer.score(read, Region(0, 0, 16, 20))
    next(parts)
    parts.close()  # who stops half-way leaves no thread behind
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("next-rows")]
