"""Files appear whole, with the permissions that the user asks for, and what a kill leaves is removed."""

import os
import shlex
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from pixelwise.errors import DataError, UsageError
from pixelwise.extras import extra, requirements
from pixelwise.files import atomic_path, hidden_name, read_json, remove_leftovers, write_text


@pytest.mark.skipif(os.name != "posix", reason="needs permissions")
@pytest.mark.parametrize(("mask", "wanted"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_has_the_permissions_of_the_umask_whatever_wrote_it(tmp_path: Path, mask: int, wanted: int) -> None:
    before = os.umask(mask)
    try:
        with atomic_path(tmp_path / "weights") as part:
            part.touch(mode=0o600)  # as safetensors does
        assert stat.S_IMODE((tmp_path / "weights").stat().st_mode) == wanted
    finally:
        os.umask(before)


def left_by_a_killed_process(folder: Path) -> None:
    code = f"""
import os
from pathlib import Path
from pixelwise.files import atomic_path
with atomic_path(Path({str(folder)!r}) / "card.json") as part:
    part.write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9


def test_what_a_killed_process_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    left_by_a_killed_process(tmp_path)
    (left,) = tmp_path.iterdir()
    mine, foreign, old = (tmp_path / name for name in ("mine.txt", "foreign.txt", "old.txt"))
    folder = hidden_name(tmp_path / "a.zarr", "part")
    pid = left.name.split(".")[-3].split("-")[1]
    folder = folder.with_name(folder.name.replace(f"-{os.getpid():x}-", f"-{pid}-"))
    (folder / "inner").mkdir(parents=True)
    with atomic_path(mine) as part:
        part.write_text("being written")
        elsewhere = [
            hidden_name(path, "part").with_name(f".{path.name}.000000-1-00000000.part") for path in (foreign, old)
        ]
        for path in elsewhere:
            path.write_text("of another machine")
        os.utime(elsewhere[1], (time.time() - 90_000,) * 2)
        for name in (".hidden", ".x.part", ".b.1234.part", "c.part"):
            write_text(tmp_path / name, "the user's own")
        remove_leftovers(tmp_path, foreign=False)
        assert elsewhere[1].exists()
        remove_leftovers(tmp_path, tmp_path / "nowhere")
        assert part.exists() and elsewhere[0].exists()
        assert not left.exists() and not folder.exists() and not elsewhere[1].exists()
    kept = {".hidden", ".x.part", ".b.1234.part", "c.part", "mine.txt", elsewhere[0].name}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_json_from_outside_has_a_size_that_no_honest_file_reaches(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pixelwise.files.MAX_JSON_BYTES", 10)
    (tmp_path / "a.json").write_text('{"a": "' + "b" * 20 + '"}')
    with pytest.raises(DataError, match="it has 29 bytes; at most 10 are read"):
        read_json(tmp_path / "a.json")


EXTRAS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", [name for name in EXTRAS if name != "test"])
def test_what_is_missing_is_installed_by_a_command_that_works_without_an_index_that_knows_pixelwise(name: str) -> None:
    assert list(requirements(name)) == EXTRAS[name]
    with pytest.raises(UsageError) as error:
        extra("no_such_package", name, "X", "more")
    command = str(error.value).partition("Install it: ")[2]
    assert shlex.split(command) == ["pip", "install", *EXTRAS[name], "more"]
