import sys

import pytest
import torch

from pixelwise.ops.streaming.memory import (
    MemoryLimit,
    RowMemory,
    SpillFile,
    resident_bytes,
    return_freed_memory,
    rounded,
)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_copy_lies_apart_keeps_its_order_and_its_place_is_given_again(layout):
    memory, rows = RowMemory(), torch.randn(1, 3, 4, 5).to(memory_format=layout)
    copy = memory.copy(rows)
    assert torch.equal(copy, rows) and copy.is_contiguous(memory_format=layout)
    part, place = copy[:, 1:], copy.data_ptr()
    del copy
    other = memory.copy(torch.zeros(1, 3, 4, 5))  # a view keeps the place
    assert torch.equal(part, rows[:, 1:]) and other.data_ptr() != place
    del part
    assert memory.copy(torch.zeros(1, 3, 4, 5)).data_ptr() == place


def test_sizes_are_rounded_to_an_eighth_of_a_power_of_two():
    assert [rounded(size) for size in (0, 1, 512, 513, 5000, 8192, 8193)] == [0, 512, 512, 1024, 5120, 8192, 9216]


def test_the_file_gives_back_what_was_put_and_uses_its_places_again(tmp_path):
    with SpillFile(tmp_path) as spill_file:
        first, second = torch.arange(6.0).view(2, 3).T, torch.ones(2, 3, dtype=torch.int64)
        item, other = spill_file.put(first), spill_file.put(second)
        assert torch.equal(spill_file.take(item), first) and spill_file.size == 1024
        assert spill_file.put(torch.zeros(5)).offset == item.offset
        assert torch.equal(spill_file.take(other), second)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_limit_far_away_or_reached_is_held_without_harm():
    assert resident_bytes() > 0
    MemoryLimit(1 << 40).hold()
    MemoryLimit(0).hold()
    return_freed_memory()
