"""A few rounds of tests/chaos/kill_daemon.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "chaos" / "kill_daemon.py"


def test_what_a_killed_daemon_acknowledged_is_served_after_restart(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--rounds", "6", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    tally = json.loads(done.stdout)
    assert tally["rounds"] == 6
    assert tally["acknowledged"]
    assert tally["fetched"]
