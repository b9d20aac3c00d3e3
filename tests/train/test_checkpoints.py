import errno
from collections import OrderedDict, namedtuple

import pytest
import torch
from safetensors.torch import save_file

from pixelwise.errors import DataError, PixelwiseError
from pixelwise.train.folder import SafeCheckpointIO, checkpoint_step, read_checkpoint

STATE = {
    "global_step": 12,
    "nothing": None,
    "rate": 0.1 + 0.2,
    "far": float("inf"),
    "text": 'ünï "quoted"',
    "flags": [True, False],
    "pair": (0.9, 0.999),
    "empty": {"list": [], "tuple": (), "dict": {}, "tensor": torch.empty(0, 3)},
    "optimizer_states": [
        {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}}, "groups": [{"params": [0, 1]}]}
    ],
    "half": torch.randn(3).bfloat16(),
    "random": torch.arange(8, dtype=torch.uint8),
    "long": torch.tensor([-(2**62)]),
    "mask": torch.tensor([True, False]),
    "turned": torch.randn(1, 4, 5, 6).to(memory_format=torch.channels_last),
    "view": torch.arange(12.0).reshape(3, 4).T,
    "tensor": {"tensor": "0", "dict": [["a", 1]]},  # looks like what the file is made of
    (1, "key"): {1: "int", "1": "str", 2: "two"} | {None: 0, 2.5: 1},
}


def same(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in theirs)
    if isinstance(theirs, list | tuple):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs and type(ours) is type(theirs)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoints" / "last.safetensors"


def write(path, state):
    SafeCheckpointIO().save_checkpoint(state, path)


def test_nested_states_come_back_as_they_were(path):
    write(path, STATE)
    assert same(read_checkpoint(path), STATE)
    assert same(SafeCheckpointIO().load_checkpoint(path), STATE)
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_subclasses_of_dict_become_dicts_and_shared_tensors_part(path):
    shared = torch.ones(3)
    write(path, {"state": OrderedDict(a=shared, b=shared, c=shared[1:])})
    state = read_checkpoint(path)["state"]
    assert type(state) is dict and list(state) == ["a", "b", "c"]
    state["a"].zero_()
    assert state["b"].sum() == 3 and state["c"].sum() == 2


@pytest.mark.parametrize(
    "value", [{1, 2}, object(), lambda: None, b"bytes", 1j, namedtuple("Point", "x")(1), torch.float32]
)
def test_what_cannot_come_back_is_not_written(path, value):
    write(path, {"global_step": 1})
    with pytest.raises(TypeError, match="a checkpoint cannot hold"):
        write(path, {"deep": [{"odd": value}]})
    assert read_checkpoint(path) == {"global_step": 1}


@pytest.mark.parametrize("when", ["while writing", "while renaming"])
def test_a_full_disk_leaves_the_last_good_checkpoint(path, monkeypatch, when):
    write(path, {"global_step": 1, "weight": torch.ones(3)})

    def full(*arguments, **_options):
        if when == "while writing":
            arguments[1].write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    target = "pixelwise.train.folder.save_file" if when == "while writing" else "pathlib.Path.replace"
    monkeypatch.setattr(target, full)
    with pytest.raises(
        PixelwiseError, match=r"last.safetensors: the checkpoint cannot be written .*No space left.*--resume"
    ):
        write(path, {"global_step": 2, "weight": torch.zeros(3)})
    monkeypatch.undo()
    assert read_checkpoint(path)["global_step"] == 1 and read_checkpoint(path)["weight"].sum() == 3
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_damaged_files_are_refused(path):
    write(path, STATE)
    whole = path.read_bytes()
    draws = torch.Generator().manual_seed(0)
    damaged = [b"", b"{}", whole[: len(whole) // 2], whole[:-1], b"\0" * 100]
    for _ in range(150):
        noisy = bytearray(whole)
        for place in torch.randint(len(whole) // 2, (3,), generator=draws).tolist():
            noisy[place] = int(torch.randint(256, (), generator=draws))
        damaged.append(bytes(noisy))
    for index, content in enumerate(damaged):
        path.write_bytes(content)
        try:
            read_checkpoint(path)  # a changed number in a tensor cannot be seen
        except DataError as error:
            assert str(error).startswith(f"{path}: is not a checkpoint that can be read")
        else:
            assert index >= 5


@pytest.mark.parametrize(
    "structure", ["", "3", "[]", '{"dict": 3}', '{"list": [{"set": []}]}', '{"dict": [[{"list": []}, 1]]}', "{}"]
)
def test_hostile_structures_are_refused(path, structure):
    path.parent.mkdir()
    save_file({"0": torch.ones(1)}, path, metadata={"checkpoint": structure})
    with pytest.raises(DataError, match="is not a checkpoint"):
        read_checkpoint(path)


def test_weights_alone_are_no_checkpoint(path):
    path.parent.mkdir()
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(DataError, match="is not a checkpoint"):
        read_checkpoint(path)
    with pytest.raises(DataError, match="is not a checkpoint"):
        read_checkpoint(path.with_name("missing.safetensors"))


def test_the_step_of_a_checkpoint(path):
    assert checkpoint_step(path) == 0
    write(path, STATE)
    assert checkpoint_step(path) == 12
    SafeCheckpointIO().remove_checkpoint(path)
    SafeCheckpointIO().remove_checkpoint(path)
    assert checkpoint_step(path) == 0
    write(path, {"other": 1})
    with pytest.raises(DataError, match="is not a checkpoint"):
        checkpoint_step(path)
