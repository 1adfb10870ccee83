"""A few rounds of tests/chaos/kill_nvme.py, in a process of its own because it forks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "chaos" / "kill_nvme.py"


@pytest.mark.parametrize("volumes", [1, 3])
def test_nothing_acknowledged_is_lost_and_nothing_leaks(volumes: int, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--rounds", "15", "--seed", "7", "--dir", str(tmp_path)]
    command += ["--volumes", str(volumes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    tally = json.loads(done.stdout)
    assert tally["rounds"] == 15
    assert min(tally["acknowledged"], tally["evicted"], tally["checked"]) > 0, "the rounds did no work"
