"""Nothing is lost: killed before any single file operation, a training goes on to the same weights, scores and log.

Every third operation takes half a minute; `python tests/train/kills.py DATA SCRATCH` takes all of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_file_operation_changes_nothing(toy_data: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(toy_data), str(tmp_path), "3", "3"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["operations"] > 60 and result["kills"] == -(-result["operations"] // 3)
    assert result["unusable"] == [] and result["different"] == [], done.stdout + done.stderr[-3000:]
