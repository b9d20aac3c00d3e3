"""Nothing is lost: killed before any single file operation, a call that is made again ends as if it had not been killed.

Here a part of the operations is tried; `python tests/kills.py train DATA SCRATCH` and `python tests/kills.py predict DATA
SCRATCH` try all, with any data folder of images and masks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs fork and /proc")
@pytest.mark.parametrize(("what", "stride", "at_least"), [("train", 5, 60), ("predict", 131, 300)])
def test_a_kill_at_any_file_operation_changes_nothing(
    what: str, stride: int, at_least: int, toy_data: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), what, str(toy_data), str(tmp_path), str(stride), "3"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["operations"] > at_least and result["kills"] == -(-result["operations"] // stride)
    assert result["unusable"] == [] and result["different"] == [], done.stdout + done.stderr[-3000:]
