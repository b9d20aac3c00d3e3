"""What is printed may have no reader, no room and no letters for it: the work is done all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs file descriptors")

PROGRAM = """
import sys
from pathlib import Path
from pixelwise import cli
from pixelwise.cli import options

@cli.app.command()
def work() -> None:
    with open("file", "w") as file:
        assert file.fileno() > 2
        options.print_plain("\\u25a0 caf\\udce9 [red]wall [/door] \\x1b[31m")
        for number in range(9_000):
            print(number, flush=True)
        print("to stderr", file=sys.stderr)
        file.write("done")

cli.main(["work"])
"""


def call(folder: Path, redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM)
    shell = f'set -o pipefail; "$0" program.py {redirection}'
    return subprocess.run(
        ["bash", "-c", shell, sys.executable], cwd=folder, text=True, capture_output=True, env=os.environ | environment
    )


@pytest.mark.parametrize(
    ("redirection", "code", "told"),
    [
        ("| head -1", 0, "to stderr\n"),
        (">&-", 0, "to stderr\n"),
        ("<&- >&- 2>&-", 0, ""),
        (
            ">/dev/full",
            2,
            "to stderr\npixelwise: not all that was to be printed could be written (No space left on device); all",
        ),
    ],
)
def test_what_cannot_be_printed_does_not_end_the_work(tmp_path: Path, redirection: str, code: int, told: str) -> None:
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    done = call(tmp_path, redirection)
    assert done.returncode == code and done.stderr.startswith(told) and bool(told) == bool(done.stderr)
    assert (tmp_path / "file").read_text() == "done"


def test_letters_that_the_output_does_not_have_are_spelt_out(tmp_path: Path) -> None:
    done = call(tmp_path, "", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.startswith("# caf\\udce9 [red]wall [/door] \\ufffd[31m\n")


def test_a_current_folder_that_was_deleted_is_told(tmp_path: Path) -> None:
    code = "import os; os.rmdir(os.getcwd()); from pixelwise.cli import main; main(['models'])"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.startswith("pixelwise: the folder in which this was started was deleted")
