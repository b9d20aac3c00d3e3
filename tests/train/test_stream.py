import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelwise.data.check import inspect_data
from pixelwise.data.layouts import open_data
from pixelwise.data.photometric import Photometric, network_input
from pixelwise.data.transforms import training_transform
from pixelwise.machine import Room
from pixelwise.train.plan import default_workers
from pixelwise.train.stream import (
    BatchStream,
    CropSet,
    _print_unless_hung_up,
    fits_in_cache,
    make_loader,
    seed_of,
)


def take(stream, count):
    return list(itertools.islice(iter(stream), count))


def test_seeds_are_the_same_on_every_machine_and_differ_by_every_part():
    seeds = {
        seed_of(*parts) for parts in [(0, "crop", 7), (1, "crop", 7), (0, "epoch", 7), (0, "crop", 8), (0, "crop"), ()]
    }
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)


# -- the order --

sizes = st.tuples(st.integers(1, 12), st.integers(1, 9))


@settings(deadline=None, max_examples=40)
@given(size=sizes, first_step=st.integers(0, 20), seed=st.integers(0, 5))
def test_the_stream_can_be_entered_at_any_step(size, first_step, seed):
    images, batch_size = size
    whole = take(BatchStream(images, batch_size=batch_size, seed=seed), first_step + 5)
    later = take(BatchStream(images, batch_size=batch_size, seed=seed, first_step=first_step), 5)
    assert whole[first_step:] == later


@settings(deadline=None, max_examples=40)
@given(size=sizes, seed=st.integers(0, 5))
def test_every_epoch_shows_every_image_once(size, seed):
    images, batch_size = size
    rows = [row for batch in take(BatchStream(images, batch_size=batch_size, seed=seed), 3 * images) for row in batch]
    assert [position for _, position in rows] == list(range(len(rows)))
    for epoch in range(len(rows) // images):
        assert sorted(index for index, _ in rows[epoch * images : (epoch + 1) * images]) == list(range(images))


@settings(deadline=None, max_examples=40)
@given(size=sizes, world=st.integers(1, 4), first_step=st.integers(0, 5))
def test_ranks_share_the_stream_without_overlap(size, world, first_step):
    images, batch_size = size
    options = {"batch_size": batch_size, "seed": 3, "first_step": first_step}
    ranks = [take(BatchStream(images, rank=rank, world=world, **options), 4) for rank in range(world)]
    together = [row for step in zip(*ranks, strict=True) for batch in step for row in batch]
    start = first_step * world
    batches_alone = take(BatchStream(images, batch_size=batch_size, seed=3), start + 4 * world)[start:]
    alone = [row for batch in batches_alone for row in batch]
    assert together == alone


@settings(deadline=None, max_examples=40)
@given(
    images=st.integers(1, 12), crops=st.sampled_from([6, 12]), worlds=st.lists(st.sampled_from([1, 2, 3]), max_size=4)
)
def test_every_epoch_shows_every_image_once_over_any_and_changing_numbers_of_devices(images, crops, worlds):
    """A run that goes on over another number of devices with the same crops in a step: none is repeated or left out."""
    rows, first_step, worlds = [], 0, [*worlds, 2, 3]
    for world in worlds:
        options = {"batch_size": crops // world, "seed": 3, "first_step": first_step, "world": world}
        ranks = [take(BatchStream(images, rank=rank, **options), 4) for rank in range(world)]
        rows += [row for step in zip(*ranks, strict=True) for batch in step for row in batch]
        first_step += 4
    assert [position for _, position in rows] == list(range(4 * crops * len(worlds)))
    for epoch in range(len(rows) // images):
        assert sorted(index for index, _ in rows[epoch * images : (epoch + 1) * images]) == list(range(images))


def test_epochs_and_seeds_are_shuffled_differently():
    epochs = [tuple(index for index, _ in batch) for batch in take(BatchStream(30, batch_size=30, seed=0), 3)]
    assert len(set(epochs)) == 3
    assert take(BatchStream(30, batch_size=30, seed=1), 1) != take(BatchStream(30, batch_size=30, seed=0), 1)


def test_a_batch_larger_than_the_data_runs_over_several_epochs():
    (batch,) = take(BatchStream(2, batch_size=5, seed=0), 1)
    assert [position for _, position in batch] == [0, 1, 2, 3, 4]
    assert {index for index, _ in batch} == {0, 1}


# -- the crops --


@pytest.fixture(scope="module")
def crops(toy_data):
    inspection = inspect_data(open_data(toy_data))
    transform = training_transform(
        crop_px=24, scale=(0.5, 2.0), focus=0.5, flips="dihedral", fill=(0.4,) * 3, is_uint8=True
    )  # fmt: skip
    photometric = Photometric(0.3, (0.4,) * 3, (0.2,) * 3, seen_mean=(0.4,) * 3, seen_std=(0.2,) * 3, is_uint8=True)

    def make(*, seed=0, cache=True):
        return CropSet(inspection, 24, transform, photometric, seed=seed, cache=cache)

    return make


def batches(dataset, *, workers=0, first_step=0, count=3):
    stream = BatchStream(len(dataset), batch_size=4, seed=0, first_step=first_step)
    iterator = iter(make_loader(dataset, stream, workers=workers, pin_memory=False))
    return [next(iterator) for _ in range(count)]


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert len(one) == len(other) and all(map(torch.equal, one, other))


def test_batches_are_uint8_and_the_network_sees_floats_about_zero(crops):
    for stored, changes, mask in batches(crops()):
        assert stored.shape in {(4, 24, 24, 3), (4, 24, 24, 4)} and stored.dtype == torch.uint8
        assert mask.shape == (4, 24, 24) and mask.dtype == torch.uint8
        assert type(stored) is type(mask) is torch.Tensor
        image = network_input(stored, changes)
        assert image.shape == (4, 3, 24, 24) and image.dtype == torch.float32
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert image.min() > (-0.5 - 0.4) / 0.2 and image.max() < (2 - 0.4) / 0.2
        assert set(mask.unique().tolist()) <= {0, 1, 255}


def test_neither_workers_nor_cache_nor_the_first_step_change_a_batch(crops):
    whole = batches(crops())
    assert_same(batches(crops(cache=False)), whole)
    assert_same(batches(crops(), workers=2), whole)
    assert_same(batches(crops(), first_step=2, count=1), whole[2:])


def test_the_same_image_is_cut_anew_at_every_position(crops):
    dataset = crops()
    first, again, later = dataset[(0, 5)], dataset[(0, 5)], dataset[(0, 6)]
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], later[0])
    assert not torch.equal(first[0], crops(seed=1)[(0, 5)][0])


def test_drawing_a_crop_leaves_the_caller_s_random_state(crops):
    dataset = crops()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dataset[(0, 5)]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_number_of_workers_suits_the_machine(monkeypatch):
    for processors, wanted in ((2, (1, 1)), (1, (0, 1)), (64, (1, 8))):
        monkeypatch.setattr("pixelwise.data.scan.processors", lambda count=processors: count)
        assert (default_workers("cpu"), default_workers("cuda")) == wanted


def test_the_cache_takes_a_share_of_the_memory_that_is_free(monkeypatch):
    monkeypatch.setattr("pixelwise.train.stream.memory_room", lambda: Room(4_000_000, "a container"))
    assert fits_in_cache(1_599_999) and not fits_in_cache(1_600_001)
    monkeypatch.setattr("pixelwise.train.stream.memory_room", lambda: None)
    assert fits_in_cache(1_000_000_000) and not fits_in_cache(2_000_000_000)


def test_without_memory_for_the_cache_each_image_is_read_when_it_is_drawn(crops, monkeypatch):
    real = CropSet._load

    def short(self, index):
        if index == 5 and not self._samples and not getattr(self, "is_made", False):
            raise MemoryError
        return real(self, index)

    monkeypatch.setattr(CropSet, "_load", short)
    made, whole = crops(), crops(cache=False)
    made.is_made = whole.is_made = True
    assert not made._samples
    assert all(torch.equal(one, other) for one, other in zip(made[5, 3], whole[5, 3], strict=True))


def test_where_shared_memory_is_small_the_same_batches_come_without_it(crops, monkeypatch):
    """Docker's 64 MiB: torch puts every tensor of a worker there, and the process dies of SIGBUS when it is full."""
    made = []
    for room in (None, Room(1 << 30, "plenty"), Room(1000, "64 MiB of /dev/shm")):
        monkeypatch.setattr("pixelwise.train.stream.shared_memory_room", lambda room=room: room)
        loader = make_loader(crops(), BatchStream(12, batch_size=4, seed=0), workers=1, pin_memory=False)
        made.append(next(iter(loader)))
    assert all(isinstance(item, torch.Tensor) for item in (*made[0], *made[1]))
    assert all(isinstance(item, np.ndarray) for item in made[2])
    for one, other in zip(made[0], made[2], strict=True):
        assert np.array_equal(one.numpy(), other)


@pytest.mark.parametrize(("error", "is_told"), [(ConnectionResetError(104, "reset"), False), (ValueError("x"), True)])
def test_a_worker_whose_parent_hangs_up_says_nothing(error, is_told, capsys):
    _print_unless_hung_up(type(error), error, None)
    assert bool(capsys.readouterr().err) == is_told
