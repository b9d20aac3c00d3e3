"""What a stream takes and computes, measured on its tensors, against what was told before."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pixelwise.models import create_model
from pixelwise.ops.streaming import WindowedNetwork
from pixelwise.ops.streaming.forecast import Forecast, cost_of, item_sizes, multiply_adds, peaks, scratch_bytes
from pixelwise.ops.streaming.graph import whole
from pixelwise.ops.streaming.memory import Span, SpillFile, Window
from pixelwise.ops.streaming.network import LEAST_STEP_PX, Stream


class Live(TorchDispatchMode):
    """Counts the memory behind the tensors that operations give, for as long as one of them is there."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:  # operations made of others are looked into
            out = func.decompose(*args, **(kwargs or {}))
        if out is not NotImplemented:
            return out
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self._see(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _see(self, storage):
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, key, size):
        self.known.discard(key)
        self.now -= size


def network(name, height, width):
    torch.manual_seed(0)
    return WindowedNetwork(create_model(name, tiny=True, num_classes=3).eval(), height, width, in_channels=3)


def read(top, left, height, width):
    return torch.zeros(3, height, width).add_(1)  # an operation, so that it is counted


@pytest.mark.parametrize("columns", [Span(0, 140), Span(50, 90)])
@pytest.mark.parametrize("name", ["unet", "segnet", "linknet", "fcdensenet56"])
def test_what_is_held_and_the_most_of_it_are_as_told(name, columns):
    graph = network(name, 150, 140).graph
    region, sizes, stripe = Window(Span(0, 150), columns), item_sizes(graph, 4), 32
    told, stream, live = Forecast(graph, region, sizes), Stream(graph, region), Live()
    for row in range(stripe, 150 + stripe, stripe):
        row = min(row, 150)
        told.walk(row, stripe)
        with torch.inference_mode(), live:
            stream.advance(row, read, stripe)
        assert live.now == pytest.approx(sum(told.held), rel=0.02, abs=10_000)  # but for tables of places
    assert told.peaks == peaks(graph, region, stripe, sizes)
    # Beside the maps there are the weights, in another order, and what an operation makes for itself.
    assert 0.85 * told.peak <= live.peak <= 1.3 * told.peak + 3 * scratch_bytes(graph)


def test_rows_that_wait_on_the_disk_are_as_told(tmp_path):
    graph = network("fcdensenet56", 900, 40).graph
    region, sizes = whole(900, 40), item_sizes(graph, 4)
    told, live = Forecast(graph, region, sizes, has_spill_file=True), Live()
    with SpillFile(tmp_path) as spill_file:
        stream = Stream(graph, region, spill_file=spill_file)
        for row in range(32, 932, 32):
            row = min(row, 900)
            told.walk(row, 32)
            with torch.inference_mode(), live:
                stream.advance(row, read, 32)
            assert live.now == pytest.approx(sum(told.held), rel=0.02, abs=10_000)
            assert spill_file.size == told.peaks.disk
    assert told.peaks == peaks(graph, region, 32, sizes, has_spill_file=True)
    without = peaks(graph, region, 32, sizes)
    assert without.disk == 0 and told.peaks.memory < 0.8 * without.memory
    assert told.peaks.disk > 0.8 * (without.memory - told.peaks.memory)
    assert not list(tmp_path.iterdir())  # the file has no name


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2


def streamed(windowed, region, stripe):
    stream = Stream(windowed.graph, region)
    with torch.inference_mode():
        for row in range(region.rows.start, region.rows.stop, stripe):
            stream.advance(min(row + stripe, region.rows.stop), read, max(stripe, LEAST_STEP_PX))


@pytest.mark.parametrize("name", ["segnet", "unet", "fcdensenet56", "enet_encoder"])
def test_multiply_adds_are_those_of_torch(name):
    torch.manual_seed(0)
    model = create_model(name, tiny=True, num_classes=3).eval()
    windowed = WindowedNetwork(model, 64, 96, in_channels=3)
    told = multiply_adds(windowed.graph, windowed.graph.windows(whole(64, 96)))
    with torch.no_grad():
        assert told == counted(lambda: model(torch.zeros(1, 3, 64, 96)))
    # Transposed convolutions whose windows overlap take a row again at each stripe; nothing else does.
    more = counted(lambda: streamed(windowed, whole(64, 96), 8)) / told
    assert more == 1 if name in ("segnet", "enet_encoder") else 1 <= more < 1.05


def test_linear_layers_and_groups_count():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.groups = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=4)
            self.linear, self.up = nn.Linear(8, 6), nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)

        def forward(self, image):
            x = self.groups(self.wide(image)).permute(0, 2, 3, 1)
            return self.up(self.linear(x).permute(0, 3, 1, 2))

    windowed = WindowedNetwork(Mixed().eval(), 20, 30, in_channels=3)
    cells = 10 * 15
    told = multiply_adds(windowed.graph, windowed.graph.windows(whole(20, 30)))
    assert told == 8 * 3 * 9 * 600 + 8 * 2 * 25 * cells + 8 * 6 * cells + 6 * 2 * 4 * cells


def test_the_cost_of_columns_is_what_they_compute():
    windowed = network("segnet", 64, 128)
    bands = [Window(Span(0, 64), Span(0, 64)), Window(Span(0, 64), Span(64, 128))]
    once = counted(lambda: streamed(windowed, whole(64, 128), 64))
    twice = sum(counted(lambda band=band: streamed(windowed, band, 64)) for band in bands)
    assert cost_of(windowed.graph, bands) == pytest.approx(twice / once) and twice > 1.3 * once
    assert cost_of(windowed.graph, [whole(64, 128)]) == 1


def test_without_convolutions_everything_costs_one_pass():
    windowed = WindowedNetwork(nn.MaxPool2d(3, 1, 1).eval(), 20, 20, in_channels=3)
    assert cost_of(windowed.graph, [Window(Span(0, 20), Span(0, 10))]) == 1


@pytest.mark.parametrize("name", ["unet", "segnet", "fcn8s"])
def test_the_height_of_the_image_does_not_count(name):
    found = []
    for height in (600, 6000):
        graph = network(name, height, 64).graph
        found.append(peaks(graph, whole(height, 64), 32, item_sizes(graph, 4)).memory)
    assert found[1] <= 1.05 * found[0]


def test_sixteen_bits_take_half():
    graph = network("unet", 200, 64).graph
    wide, narrow = (peaks(graph, whole(200, 64), 32, item_sizes(graph, size)).memory for size in (4, 2))
    assert 0.5 <= narrow / wide < 0.6  # the image has four bytes
