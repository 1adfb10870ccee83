"""The ladder decoded by Triton, in a process of its own: whether Triton interprets is decided when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "interpreted" / "ladder_triton.py"
SECONDS_MAX = 600


def test_what_is_decoded_on_a_device_is_what_the_host_decodes() -> None:
    pytest.importorskip("torch", reason="needs the torch extra")
    pytest.importorskip("triton", reason="needs the triton extra")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS_MAX, cwd=CASES.parents[2], check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
